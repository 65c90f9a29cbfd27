"""W_Q, W_K and W_V by heads, of any architecture, measured through its own modules.

    q_h = x W_Q[h] + b,    k_h = x W_K[h] + b,    v_h = x W_V[h] + b        x what the attention reads, `[D]`

At position 0 a rotary embedding turns nothing. So a basis, fed to every attention module as one-token sequences, comes out as
these matrices (less what a zero gives), however an architecture keeps them: apart, fused, transposed or shared by groups. The
map of heads to weights (`slices`) is proved by the same pass over other rows.

Norms are no linear maps; what is linear of them is folded in:

    input norm (with `fold`)    the basis enters the layer instead: W' = C diag(gain) W, up to one factor a layer; C is the
                                centring of a LayerNorm, the identity for an RMSNorm
    norms of q and k            by their gains (and centring); their denominators, which depend on the token, are left out

Scores of weights by these matrices should hence not depend on their scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.readers import Keep
from manyheads.model.weights.slices import any_inputs, feeding


@dataclass(frozen=True)
class HeadWeights:
    """One layer's weights, for each query head (under grouped-query attention a group's heads repeat one key and value).

    `W_Q`, `W_K`, `W_V` are `[H, D, Dh]`, `W_O` is `[H, Dh, D]`.
    """

    W_Q: Float[Tensor, "H D Dh"]
    W_K: Float[Tensor, "H D Dh"]
    W_V: Float[Tensor, "H D Dh"]
    W_O: Float[Tensor, "H Dh D"]


def head_weights(model: HeadModel, *, fold: bool = True) -> list[HeadWeights]:
    """Every layer's weights; with `fold` the input norm, and a norm or scale between W_O and the stream, are multiplied in.

    Costs one pass over `hidden_size + 1` one-token sequences.
    """
    model.require_alike("a matrix of each head")
    width, n_heads = model.layout.hidden_size, model.n_heads
    basis = torch.cat([torch.eye(width) * width**0.5, torch.zeros(1, width)])[:, None].to(model.device)
    q, k, v = Keep("q"), Keep("k"), Keep("v")
    with feeding(model, basis, behind_norm=not fold):
        model.look(any_inputs(model, width + 1), q, k, v)
    return [
        HeadWeights(
            _linear(q.values[layer][:, 0], n_heads) / width**0.5,
            _linear(k.values[layer][:, 0], n_heads) / width**0.5,
            _linear(v.values[layer][:, 0], n_heads) / width**0.5,
            _written(model, layer, fold),
        )
        for layer in range(model.n_layers)
    ]


def _linear(part: Float[Tensor, "N G Dh"], n_heads: int) -> Float[Tensor, "H D Dh"]:
    matrix = (part[:-1] - part[-1]).transpose(0, 1)
    return matrix.repeat_interleave(n_heads // matrix.shape[0], 0)


def _written(model: HeadModel, layer: int, fold: bool) -> Float[Tensor, "H Dh D"]:
    block, W_O = model.layout.blocks[layer], model.W_O(layer).detach()
    if not fold or block.attention_write is block.projection:
        return W_O
    try:
        return FoldedNorm.of(block.attention_write, model.layout.hidden_size).direction(W_O).to(W_O)
    except UnsupportedError:
        with torch.no_grad():
            gain: Tensor = block.attention_write(torch.ones_like(W_O[:1, 0]))
        return W_O * gain
