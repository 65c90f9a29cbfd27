"""Training chosen heads and nothing else ("precise" fine-tuning, #14): their slices of W_Q, W_K, W_V and W_O.

Zhang et al., arXiv:2409.01659. Of layer l's projections only the features of its h chosen heads (of H) are trained,

    grad = (H / h) * dL/dW  on the slices,    nothing elsewhere        (same unit as the gradient)

The slices become small parameters of their own and the weights a constant around them, so an optimiser holds no state for
anything else and weight decay cannot reach it: whatever is not tuned stays bit-identical under any optimiser and any loop,
`fit` included. Biases, norms, MLPs and embeddings are frozen. When the block ends the slices are folded back and the
module is the ordinary one it was, with the same parameter objects.

The factor H / h is our reading of the paper. An optimiser that normalises gradients (Adam) cancels it but for its epsilon, and
so does clipping: it matters under SGD, or beside parameters that are trained whole. Under grouped-query attention a tuned head
shares its keys and values with its group, whose other heads then change too (`sharing` names them).

`manyheads.model.weights.slices` finds which features are a head's, and proves it on a forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen
from manyheads.model.linear import is_plain
from manyheads.model.weights.slices import head_map


@dataclass(frozen=True)
class HeadSlice:
    """The features `index` of one projection's weight, along `dim`, that belong to chosen heads. `ratio` is H / h."""

    layer: int
    module: nn.Module
    dim: int
    index: Int[Tensor, "F"]
    ratio: float

    @property
    def weight(self) -> Float[Tensor, "A B"]:
        return self.module.weight  # type: ignore[return-value]


class _Around(nn.Module):
    """Parametrises a weight as a constant with the trained `part` in it."""

    def __init__(self, piece: HeadSlice) -> None:
        super().__init__()
        self.dim, self.ratio = piece.dim, piece.ratio
        self.register_buffer("index", piece.index, persistent=False)
        self.part = nn.Parameter(piece.weight.detach().index_select(piece.dim, piece.index))
        self.part.register_hook(lambda grad: grad * self.ratio)

    def forward(self, weight: Float[Tensor, "A B"]) -> Float[Tensor, "A B"]:
        index: Tensor = self.index  # type: ignore[assignment]
        return weight.index_copy(self.dim, index, self.part)


@contextlib.contextmanager
def only_heads(model: HeadModel, heads: Iterable[HeadLike], *, scaled: bool = True) -> Iterator[list[nn.Parameter]]:
    """While this lasts, `model.plain` trains the slices of `heads` alone; yields them as parameters for an optimiser.

    Gradients are times H / h, unless not `scaled`.
    Other parameters may be thawed inside the block (the paper also tunes whole MLPs). Afterwards every `requires_grad` is as
    before. `InputError` without heads or for one out of range; `UnsupportedError` where q, k and v cannot be separated.
    """
    pieces = head_slices(model, heads)
    arounds: list[_Around] = []
    try:
        for piece in pieces:
            arounds.append(_Around(piece if scaled else replace(piece, ratio=1.0)))
            parametrize.register_parametrization(piece.module, "weight", arounds[-1])
        parts = [around.part for around in arounds]
        with frozen(model.plain, but=parts):
            yield parts
    finally:
        for piece, around in zip(pieces, arounds, strict=False):
            _fold(piece, around)


def _fold(piece: HeadSlice, around: _Around) -> None:
    original: Tensor = piece.module.parametrizations["weight"].original  # type: ignore[union-attr, index, assignment]
    with torch.no_grad():
        original.index_copy_(piece.dim, piece.index.to(original.device), around.part)
    parametrize.remove_parametrizations(piece.module, "weight", leave_parametrized=False)


def sharing(model: HeadModel, heads: Iterable[HeadLike]) -> HeadSet:
    """The heads that are not chosen, but read keys and values that are: the rest of the chosen heads' KV groups."""
    chosen = model.head_set(heads)
    group = model.n_heads // model.n_kv_heads
    touched = {
        Head(h.layer, i) for h in chosen for i in range(h.index // group * group, (h.index // group + 1) * group)
    }
    return model.head_set(touched) - chosen


def head_slices(model: HeadModel, heads: Iterable[HeadLike]) -> list[HeadSlice]:
    """Where the chosen heads' parts of W_Q, W_K, W_V and W_O are: three or four slices a layer, two where q, k, v are fused.

    `InputError` without heads or for one out of range; `UnsupportedError` where q, k and v cannot be separated, or where the
    weights are not in floating point. Under an adapter they are those of what it adapts.
    """
    chosen = model.head_set(heads)
    if not chosen:
        raise InputError("no heads given; name at least one head to train.")
    by_layer = chosen.by_layer()
    pieces = []
    for layer, one in head_map(model, set(by_layer)).items():
        ratio = model.n_heads / len(by_layer[layer])
        for module, dim, index in one.weights(by_layer[layer]):
            if not is_plain(module):
                raise UnsupportedError(
                    f"layer {layer} of {type(model.plain).__name__} keeps its heads in {type(module).__name__} modules, whose "
                    "weights are not in floating point, so that slices of them cannot be trained; open it in floating point."
                )
            pieces.append(HeadSlice(layer, module, dim, index.to(module.weight.device), ratio))  # type: ignore[union-attr, arg-type]
    return pieces
