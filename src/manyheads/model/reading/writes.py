"""What a layer reads, split by who wrote it: the residual stream as the sum of what components have added to it.

    x_l = embedding + sum over layers i < l of ( sum_h z_ih W_O[i, h] + MLP_i ) + biases

The embedding is the stream entering layer 0. A norm between the output projection and the stream (Gemma 2) or after each
addition (BERT) is linear once its denominator is known: parts pass through it with the denominator of the whole, and its bias
goes to `biases`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.heads import Head
from manyheads.model.headmodel import HeadModel
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.readers import Activation, Reader, Site


@dataclass(frozen=True)
class StreamParts:
    """The stream entering a layer at P positions of one row, by component. `values.sum(0)` is the stream `[P, D]`.

    `names` are `embedding`, the heads (`L0H3`) and MLPs (`M0`) of the layers below, in the order of the pass, and `biases`.
    """

    names: tuple[str, ...]
    values: Float[Tensor, "C P D"]


def stream_parts(model: HeadModel, inputs: Any, layer: int, positions: Sequence[int]) -> StreamParts:
    """Split the stream that enters `layer` at `positions` of the only row of `inputs` (formula above), in float64.

    `UnsupportedError` where a layer adds more than its heads and its MLP write, or layers differ in their heads.
    """
    model.require_alike("splitting the residual stream")
    sites: tuple[Site, ...] = ("z", "resid", "attention_write", "mlp_write")
    at = {site: _AtPositions(site, positions, layer + (site == "resid")) for site in sites}
    model.look(inputs, *at.values())
    stream, attention, mlp = (at[site].values for site in ("resid", "attention_write", "mlp_write"))
    names, parts = ["embedding"], stream[0][None]
    biases = torch.zeros_like(parts)
    for below in range(layer):
        heads = _written(model, below, at["z"].values[below])
        biases = biases + (attention[below] - heads.sum(0))
        parts = torch.cat([parts, heads])
        names += [str(Head(below, h)) for h in range(model.n_heads)]
        norms = model.layout.blocks[below].post_norms
        middle = stream[below] + attention[below]
        if norms is not None:
            parts, biases, middle = _normalised(norms[0], parts, biases, middle)
        parts, middle = torch.cat([parts, mlp[below][None]]), middle + mlp[below]
        names.append(f"M{below}")
        if norms is not None:
            parts, biases, middle = _normalised(norms[1], parts, biases, middle)
    found = StreamParts((*names, "biases"), torch.cat([parts, biases]))
    _check(model, found, stream[layer])
    return found


def _written(model: HeadModel, layer: int, z: Float[Tensor, "P H Dh"]) -> Float[Tensor, "H P D"]:
    """What each head adds to the stream, through whatever stands between the output projection and the stream."""
    block = model.layout.blocks[layer]
    heads = torch.einsum("phd,hde->hpe", z, model.W_O(layer).detach().to(z))
    if block.attention_write is not block.projection:
        bias = model.bias_O(layer)
        projected = heads.sum(0) if bias is None else heads.sum(0) + bias.detach().to(z)
        heads = _through(block.attention_write, heads, projected)
    return heads * model.layout.residual_scale


def _through(module: nn.Module, parts: Float[Tensor, "C P D"], whole: Float[Tensor, "P D"]) -> Float[Tensor, "C P D"]:
    """Parts after a norm, without its bias, or after a scale of each feature."""
    try:
        norm = FoldedNorm.of(module, whole.shape[-1])
    except UnsupportedError:
        ones = torch.ones(1, whole.shape[-1], device=whole.device)
        with torch.no_grad():
            gain, twice = module(ones), module(2 * ones)
        if not torch.allclose(2 * gain, twice):
            raise
        return parts * gain.to(parts)
    return (norm.direction(parts) / norm.sigma(whole)).to(parts)


def _normalised(norm: nn.Module, parts: Tensor, biases: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Parts, biases and the whole after the norm that follows an addition."""
    folded = FoldedNorm.of(norm, whole.shape[-1])
    sigma = folded.sigma(whole)
    parts, biases = folded.direction(parts) / sigma, folded.direction(biases) / sigma + folded.bias
    return parts, biases, folded.apply(whole)


def _check(model: HeadModel, found: StreamParts, stream: Float[Tensor, "P D"]) -> None:
    exact = {torch.float32: 1e-4, torch.float64: 1e-8}.get(next(model.plain.parameters()).dtype, 0.05)
    error = (found.values.sum(0) - stream).abs().max()
    if error > exact * found.values.abs().max():
        raise UnsupportedError(
            f"layers of {type(model.plain).__name__} add more to the residual stream than their heads and MLPs write, so it "
            "cannot be split by who wrote it."
        )


class _AtPositions(Reader):
    """Keeps some positions of the only row, in float64: `values[layer]` `[P, ...]`."""

    def __init__(self, site: Site, positions: Sequence[int], n_layers: int) -> None:
        self.site = site  # type: ignore[misc]
        self.positions, self.layers = list(positions), range(n_layers)
        self.values: dict[int, Tensor] = {}

    def read(self, call: Activation) -> None:
        """Keep the rows asked for; a copy, since a layer may add to the tensor in place."""
        self.values[call.layer] = call.value.detach()[0, self.positions].double()
