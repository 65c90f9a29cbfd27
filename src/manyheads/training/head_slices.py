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

Where q, k and v are is told by their width. Fused projections come as q|k|v or head by head; which it is, is proved on a
forward pass: a constant added to a KV head's value features must arrive in the z of just its query heads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.layout import Layout
from manyheads.model.opening import tiny_inputs
from manyheads.model.replay.recording import no_cache


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
        """The whole weight."""
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
def only_heads(model: HeadModel, heads: Iterable[HeadLike]) -> Iterator[list[nn.Parameter]]:
    """While this lasts, `model.plain` trains the slices of `heads` alone; yields them as parameters for an optimiser.

    Other parameters may be thawed inside the block (the paper also tunes whole MLPs). Afterwards every `requires_grad` is as
    before. `InputError` without heads or for one out of range; `UnsupportedError` where q, k and v cannot be told apart.
    """
    pieces = head_slices(model, heads)
    were = [(p, p.requires_grad) for p in model.plain.parameters()]
    arounds: list[_Around] = []
    try:
        for piece in pieces:
            arounds.append(_Around(piece))
            parametrize.register_parametrization(piece.module, "weight", arounds[-1])
        for parameter, _ in were:
            parameter.requires_grad_(False)
        yield [around.part for around in arounds]
    finally:
        for piece, around in zip(pieces, arounds, strict=False):
            _fold(piece, around)
        for parameter, before in were:
            parameter.requires_grad_(before)


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
    """Where the chosen heads' parts of W_Q, W_K, W_V and W_O are: three or four slices a layer, two where q, k, v are fused."""
    chosen = model.head_set(heads)
    if not chosen:
        raise InputError("no heads given; name at least one head to train.")
    pieces = []
    for layer, members in chosen.by_layer().items():
        ratio = model.n_heads / len(members)
        projection = model.layout.blocks[layer].projection
        groups = sorted({h * model.n_kv_heads // model.n_heads for h in members})
        for module in _inputs(model, layer):
            index = _features(model, layer, module, members, groups)
            pieces.append(HeadSlice(layer, module, _features_dim(module), index, ratio))
        index = _blocks(members, model.head_dim).to(projection.weight.device)  # type: ignore[arg-type, union-attr]
        pieces.append(HeadSlice(layer, projection, 1 - _features_dim(projection), index, ratio))
    return pieces


def _inputs(model: HeadModel, layer: int) -> list[nn.Module]:
    """The modules that make q, k and v: three, or one if they are fused."""
    block = model.layout.blocks[layer]
    found = {
        name: module
        for name, module in block.attention.named_modules()
        if module is not block.projection
        and isinstance(getattr(module, "weight", None), Tensor)
        and module.weight.ndim == 2  # type: ignore[union-attr]
    }
    q, kv = model.n_heads * model.head_dim, model.n_kv_heads * model.head_dim
    widths = sorted(_width(module) for module in found.values())
    floating = all(module.weight.is_floating_point() for module in found.values())  # type: ignore[union-attr, operator]
    if widths not in (sorted([q, kv, kv]), [q + 2 * kv]) or not floating:
        raise UnsupportedError(
            f"cannot tell the heads of {type(model.plain).__name__} apart in its weights: expected projections of {q}, {kv} "
            f"and {kv} features (or one of {q + 2 * kv}), in floating point, and found {', '.join(found) or 'none'} with "
            f"{widths}."
        )
    return list(found.values())


def _features(model: HeadModel, layer: int, module: nn.Module, heads: list[int], groups: list[int]) -> Int[Tensor, "F"]:
    """The output features of `module` that belong to `heads` and to the KV heads `groups`."""
    width, n_heads, n_groups = _width(module), model.n_heads, model.n_kv_heads
    device = module.weight.device  # type: ignore[union-attr]
    if width == n_heads * model.head_dim:
        blocks = heads
    elif width == n_groups * model.head_dim:
        blocks = groups
    else:
        q, k, v = _fused(model, layer, module)
        blocks = sorted([q[h] for h in heads] + [k[g] for g in groups] + [v[g] for g in groups])
    return _blocks(blocks, model.head_dim).to(device)  # type: ignore[arg-type]


def _fused(model: HeadModel, layer: int, module: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Which blocks of `head_dim` features are q of each head, and k and v of each KV head: the order that a pass proves."""
    n_heads, n_groups = model.n_heads, model.n_kv_heads
    size = n_heads // n_groups
    stacked = (
        list(range(n_heads)),
        [n_heads + g for g in range(n_groups)],
        [n_heads + n_groups + g for g in range(n_groups)],
    )
    by_group = (
        [h // size * (size + 2) + h % size for h in range(n_heads)],
        [g * (size + 2) + size for g in range(n_groups)],
        [g * (size + 2) + size + 1 for g in range(n_groups)],
    )
    for order in (stacked, by_group):
        if all(_is_value(model, layer, module, order[2][g], g) for g in {0, n_groups - 1}):
            return order
    raise UnsupportedError(
        f"{type(model.plain).__name__} fuses q, k and v neither as q|k|v nor head by head; its heads' slices are not known."
    )


def _is_value(model: HeadModel, layer: int, module: nn.Module, block: int, group: int) -> bool:
    """Whether 1 added to these features arrives in the z of the group's heads, evenly, and in no other."""
    features = slice(block * model.head_dim, (block + 1) * model.head_dim)

    def shift(_: nn.Module, __: object, out: Tensor) -> Tensor:
        out = out.clone()
        out[..., features] += 1.0
        return out

    layout = model.layout
    plain = _z(model, layout, layer)
    handle = module.register_forward_hook(shift)
    try:
        change = (_z(model, layout, layer) - plain).unflatten(-1, (model.n_heads, model.head_dim)).flatten(0, -3)
    finally:
        handle.remove()
    own = torch.arange(model.n_heads, device=change.device) * model.n_kv_heads // model.n_heads == group
    return bool((change[:, own] - 1).abs().max() < 0.05) and (
        bool(own.all()) or bool(change[:, ~own].abs().max() < 0.05)
    )


def _z(model: HeadModel, layout: Layout, layer: int) -> Float[Tensor, "... F"]:
    seen: list[Tensor] = []
    handle = layout.blocks[layer].projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].float()))
    try:
        with torch.no_grad():
            model.plain(**tiny_inputs(model.plain), **no_cache(model.plain))
    finally:
        handle.remove()
    return seen[0]


def _features_dim(module: nn.Module) -> int:
    """The dimension of the weight that counts output features (`nn.Linear` and GPT-2's `Conv1D` store it each their way)."""
    return 0 if isinstance(module, nn.Linear) else 1


def _width(module: nn.Module) -> int:
    return int(module.weight.shape[_features_dim(module)])  # type: ignore[union-attr, index, arg-type]


def _blocks(blocks: list[int], width: int) -> Int[Tensor, "F"]:
    return (torch.tensor(blocks)[:, None] * width + torch.arange(width)).flatten()
