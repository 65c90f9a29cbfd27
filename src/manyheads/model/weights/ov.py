"""What heads do by their weights alone, measured through the model's own modules.

A sequence of one token attends to itself with weight one, so z is its value vector. Feeding a residual stream to every layer
as a one-token sequence therefore gives each head's OV circuit, in any architecture: input norms, biases, fused and grouped
weights are included, wherever they are kept.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import UnsupportedError
from manyheads.model.editing.edits import Ablate
from manyheads.model.hooks import entering
from manyheads.model.linear import output_rows
from manyheads.model.norms import FoldedNorm
from manyheads.model.opened import OpenedModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Keep, ReadAttention


def ov_z(model: OpenedModel, resid: Float[Tensor, "N D"]) -> Float[Tensor, "L N H Dh"]:
    """Z of one-token sequences whose residual stream at every layer is `resid`; attention sinks taken out."""
    model.require_alike("an OV circuit")
    if not model.reads_tokens:
        raise UnsupportedError(
            f"{type(model.plain).__name__} reads no tokens, and OV circuits are of one-token sequences."
        )
    ids = torch.zeros(len(resid), 1, dtype=torch.long, device=model.device)
    keep, sinks = Keep("z"), dict[int, Tensor]()

    def note(call: AttentionCall) -> None:
        sinks[call.layer] = call.pattern.transpose(1, 2)

    readers = [keep, ReadAttention(note)] if hasattr(model.layout.blocks[0].core, "sinks") else [keep]
    with _everywhere(model, resid):
        model.look(ids, *readers)
    z = [keep.values[layer] / sinks[layer] if sinks else keep.values[layer] for layer in range(model.n_layers)]
    return torch.stack([one[:, 0].to(resid.device) for one in z])


def ov(model: OpenedModel, resid: Float[Tensor, "N D"]) -> Float[Tensor, "L N H D"]:
    """Head writes of one-token sequences whose residual stream at every layer is `resid`: `z W_O`."""
    z = ov_z(model, resid)
    return torch.stack(
        [torch.einsum("nhd,hde->nhe", z[layer], model.W_O(layer).to(z)) for layer in range(model.n_layers)]
    )


def effective_embedding(model: OpenedModel, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
    """`E0[t] = MLP_0(norm(W_E[t]))` of each token: the first MLP's write with the first attention ablated (arXiv:2312.09230)."""
    keep = Keep("mlp_write", layers=[0])
    layer0 = [head for head in model.heads if head.layer == 0]
    with model.editing(Ablate(layer0, "zero")):
        model.look(ids[:, None], keep)
    return keep.values[0][:, 0]


def embedding(model: OpenedModel, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
    """The residual stream entering layer 0 for one-token sequences: token embedding, scaled and normed as the model does."""
    keep = Keep("resid", layers=[0])
    model.look(ids[:, None], keep)
    return keep.values[0][:, 0]


def readout(model: OpenedModel, ids: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
    """The directions in the final residual stream that raise each token's logit: the unembedding times the final norm's gain
    and centring (not its scale)."""
    head = model.layout.unembedding
    if head is None:
        raise UnsupportedError(f"{type(model.plain).__name__} has no unembedding to read logits with.")
    rows = output_rows(head, ids).detach()
    if model.layout.final_norm is None:
        return rows
    return FoldedNorm.of(model.layout.final_norm, model.layout.hidden_size).pull(rows).to(rows)


@contextlib.contextmanager
def _everywhere(model: OpenedModel, resid: Tensor) -> Any:
    """Make `resid` the residual stream that enters every layer."""
    hidden = resid[:, None]

    with contextlib.ExitStack() as stack:
        for block in model.layout.blocks:
            stack.enter_context(entering(block.module, hidden.to))
        yield
