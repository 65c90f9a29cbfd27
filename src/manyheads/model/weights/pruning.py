"""Removing heads from a model for good: rows of q, k and v, columns of the output projection, and the config's counts.

Layers may lose different numbers of heads. Where all keep as many, and the architecture's own config can say so, the result is a
plain checkpoint; else it is one of the conversion `uneven`, which opens wherever manyheads is imported.

A KV head goes when all its query heads have gone. Query heads that are left must share KV heads evenly: with s of them for each,
a KV head with m query heads left becomes ceil(m / s) equal ones, and the last of these is filled up with query heads that write
nothing. Each layer takes the s with the fewest weights whose KV heads are no more than before, so that a cache never grows.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.heads import HeadSet
from manyheads.inputs import clause
from manyheads.model.editing.edits import Scale
from manyheads.model.layout import tiny_inputs
from manyheads.model.offloading import own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights import uneven
from manyheads.model.weights.baking import Parts, check_plain
from manyheads.model.weights.converted import with_conversion
from manyheads.model.weights.copies import EXACT, agree, layout_in, rebuilt, settled
from manyheads.model.weights.slices import HeadMap, head_map

_INSTEAD = "Mask them with Scale(heads, 0.0), or bake that."


def pruned(model: OpenedModel, heads: HeadSet) -> Parts:
    """Remove `heads` from a copy of the model; the others are numbered anew, in their order.

    What is left must run, have the logits of masking, and open again. `UnsupportedError` names the rule that is broken, or says
    that nothing would become smaller; masking and baking remain.
    """
    plans = _plans(model, heads)
    name = type(model.plain).__name__
    base = settled(model)
    maps = head_map(base)
    check_plain(name, [part.module for one in maps.values() for part in one.parts])
    if len({plan.counts for plan in plans}) > 1:
        return _unevenly(base, heads, maps, plans)
    try:
        return _alike(base, heads, maps, plans)
    except UnsupportedError as error:  # the config cannot say it; ours may
        try:
            return _unevenly(base, heads, maps, plans)
        except UnsupportedError:
            raise error from None


# Which heads of a layer stay


@dataclass(frozen=True)
class LayerPlan:
    """A layer's new heads: from which query head, and which KV head, each is made. Those in `idle` write nothing."""

    queries: tuple[int, ...]
    groups: tuple[int, ...]
    idle: tuple[int, ...] = ()

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.queries), len(self.groups)


def _plans(model: OpenedModel, heads: HeadSet) -> list[LayerPlan]:
    model.require_alike("pruning", even=True)
    group = model.n_heads // model.n_kv_heads
    removed = heads.by_layer()
    plans = []
    for layer in range(model.n_layers):
        gone = set(removed.get(layer, []))
        members = [[h for h in range(g * group, (g + 1) * group) if h not in gone] for g in range(model.n_kv_heads)]
        plans.append(_plan(members))
    whole = model.n_heads, model.n_kv_heads
    if all(plan.counts == (0, 0) for plan in plans):
        raise UnsupportedError("this set leaves no head at all; keep at least one.")
    if len(heads) and all(plan.counts == whole for plan in plans):
        layer, left = next((at, _members(model, removed[at])) for at in range(model.n_layers) if at in removed)
        raise UnsupportedError(
            f"nothing would become smaller: {left} are left in layer {layer}, and to share KV heads evenly without more "
            f"of them, as many query heads would have to stay. Prune whole groups, or as many of each group. {_INSTEAD}"
        )
    return plans


def _plan(members: Sequence[Sequence[int]]) -> LayerPlan:
    """The cheapest way for the query heads that are left on each KV head."""
    left = {g: stay for g, stay in enumerate(members) if stay}
    most = len(members)

    def kv_heads(size: int) -> int:
        return sum(-(-len(stay) // size) for stay in left.values())

    sizes = [size for size in range(1, max(map(len, left.values()), default=0) + 1) if kv_heads(size) <= most]
    if not sizes:
        return LayerPlan((), ())
    size = min(sizes, key=lambda s: (kv_heads(s) * (s + 1), kv_heads(s)))  # q and o of s heads, k and v of one
    queries: list[int] = []
    groups: list[int] = []
    idle: list[int] = []
    for g, stay in left.items():
        for start in range(0, len(stay), size):
            some = list(stay[start : start + size])
            idle += range(len(queries) + len(some), len(queries) + size)
            queries += some + some[-1:] * (size - len(some))
            groups.append(g)
    return LayerPlan(tuple(queries), tuple(groups), tuple(idle))


def _members(model: OpenedModel, gone: Sequence[int]) -> str:
    group = model.n_heads // model.n_kv_heads
    left = [group - sum(h // group == g for h in gone) for g in range(model.n_kv_heads)]
    return " and ".join(f"{n} on KV head {g}" for g, n in enumerate(left))


# A plain config: as many in each layer


def _alike(base: OpenedModel, heads: HeadSet, maps: Mapping[int, HeadMap], plans: Sequence[LayerPlan]) -> Parts:
    name = type(base.plain).__name__
    config = copy.deepcopy(base.plain.config)
    if not hasattr(config, "head_dim"):
        raise _no_head_dim(name)
    n_heads, n_kv_heads = plans[0].counts
    before = {"num_attention_heads": base.n_heads, "num_key_value_heads": base.n_kv_heads}
    for (key, old), value in zip(before.items(), (n_heads, n_kv_heads), strict=True):
        if getattr(config, key, None) == old:
            setattr(config, key, value)
    config.head_dim = base.head_dim
    _check_config(config, name, base)
    shapes = _shapes(type(base.plain), config)
    module, missing = rebuilt(base.plain, config, _cut(base, shapes, maps, plans))
    if missing:
        raise UnsupportedError(f"with fewer heads {name} has weights that it had not before: {', '.join(missing[:3])}.")
    _check_pruned(base, heads, module, name)
    layout = replace(layout_in(module, base), n_heads=n_heads, n_kv_heads=n_kv_heads)
    return module, base.tokenizer, layout


def _no_head_dim(name: str) -> UnsupportedError:
    return UnsupportedError(
        f"the config of {name} has no head_dim of its own (it is hidden_size / heads), so it cannot state that heads "
        f"are missing. {_INSTEAD}"
    )


def _check_config(config: Any, name: str, model: OpenedModel) -> None:
    """A config that is saved is checked, and checked again when it is loaded; some allow only divisors of the width."""
    try:
        again = type(config).from_dict(config.to_dict())
        for one in (config, again):
            if hasattr(one, "validate"):
                one.validate()
    except Exception as error:  # Transformers raises several kinds here, none of a common class
        reason = " ".join(str(error).split())
        width = model.layout.hidden_size
        group = model.n_heads // model.n_kv_heads
        fine = [n for n in range(group, model.n_heads, group) if width % n == 0]
        raise UnsupportedError(
            f"a {name} with {config.num_attention_heads} heads a layer could not be saved and opened again: {reason} Numbers "
            f"that divide its width are {', '.join(map(str, fine)) or 'none'}. {_INSTEAD}"
        ) from error


def _shapes(kind: Any, config: Any) -> dict[str, torch.Size]:
    try:
        with torch.device("meta"):
            return {key: tensor.shape for key, tensor in kind(config).state_dict().items()}
    except Exception as error:  # whatever a modelling file raises for counts it did not expect
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{kind.__name__} cannot be made with fewer heads: {reason}. {_INSTEAD}") from error


# A config of its own for each layer


def _unevenly(base: OpenedModel, heads: HeadSet, maps: Mapping[int, HeadMap], plans: Sequence[LayerPlan]) -> Parts:
    name = type(base.plain).__name__
    whole = base.n_heads, base.n_kv_heads
    counts = {
        str(layer): {
            "num_attention_heads": plan.counts[0],
            "num_key_value_heads": plan.counts[1],
            "head_dim": base.head_dim,
        }
        for layer, plan in enumerate(plans)
        if plan.counts != whole
    }
    settings = {**uneven.paths(base), "per_layer_config": counts}
    try:
        weights = _cut(base, uneven.shapes(base, settings), maps, plans)
        module, _, layout = with_conversion(base, uneven.NAME, settings, weights)
    except UnsupportedError as error:
        if not hasattr(base.plain.config, "head_dim"):
            raise _no_head_dim(name) from error
        raise UnsupportedError(
            f"{name} cannot have other numbers of heads in some layers: {clause(error)}. {_INSTEAD}"
        ) from error
    _check_pruned(base, heads, module, name)
    return module, base.tokenizer, layout


def _cut(
    model: OpenedModel, wanted: Mapping[str, torch.Size], maps: Mapping[int, HeadMap], plans: Sequence[LayerPlan]
) -> dict[str, Tensor]:
    """The model's weights as `wanted` has them, of the heads in the plans."""
    taken = {
        id(parameter): (dim, index, idle)
        for layer, one in maps.items()
        if plans[layer] != LayerPlan(tuple(range(model.n_heads)), tuple(range(model.n_kv_heads)))
        for parameter, dim, index, idle in _taken(one, plans[layer])
    }
    parameters = dict(model.plain.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = {key: t for key, t in model.plain.state_dict().items() if key in wanted}
    for key, tensor in list(state.items()):
        if id(parameters.get(key)) in taken:
            dim, index, idle = taken[id(parameters[key])]
            state[key] = tensor.index_select(dim, index.to(tensor.device)).index_fill(dim, idle.to(tensor.device), 0)
        if state[key].shape != wanted[key]:
            raise UnsupportedError(
                f"with fewer heads {type(model.plain).__name__} makes {key} {list(wanted[key])}, not what is left of them. "
                + _INSTEAD
            )
    return state | uneven.left_over(model, wanted)


def _taken(one: HeadMap, plan: LayerPlan) -> Iterator[tuple[nn.Parameter, int, Int[Tensor, "F"], Int[Tensor, "N"]]]:
    """Each parameter with numbers of heads: the dimension, the features of the new heads along it, and which of these idle."""
    members = (plan.queries, plan.groups, plan.groups, plan.queries)
    found: dict[nn.Module, tuple[int, list[Tensor]]] = {}
    for part, some in zip(one.parts, members, strict=True):
        found.setdefault(part.holder, (part.dim, []))[1].append(part.index[list(some)].flatten())
    none = torch.zeros(0, dtype=torch.long)
    for holder, (dim, parts) in found.items():
        if len(parts) > 1 and len(set(plan.groups)) < len(plan.groups):
            raise UnsupportedError(
                f"this set would need more than one copy of a KV head, which {type(holder).__name__} keeps in one matrix with "
                f"others; prune whole groups, or as many of each group. {_INSTEAD}"
            )
        index = torch.cat(parts) if len(parts) == 1 else torch.cat(parts).sort().values  # as they lie in the one matrix
        idle = one.output.index[list(plan.idle)].flatten() if holder is one.output.holder else none
        yield holder.get_parameter("weight"), dim, index, idle
        if isinstance(getattr(holder, "bias", None), nn.Parameter) and holder is not one.output.holder:
            yield holder.get_parameter("bias"), 0, index, none
    for vector in one.vectors:
        some = plan.queries if vector.of_query else plan.groups
        yield vector.module.get_parameter(vector.name), 0, vector.index[list(some)].flatten(), none


def _check_pruned(model: OpenedModel, heads: HeadSet, module: nn.Module, name: str) -> None:
    """Against masking, in float32: in half precision rounding would hide what heads do to each other."""
    inputs = tiny_inputs(model.plain)
    exact = next(module.parameters()).dtype in EXACT
    whole = model if exact else OpenedModel(*_in_float32(model))
    with whole.editing(Scale(heads, 0.0)):
        masked = whole.logits(inputs)
    del whole
    cut = module if exact else own_copy(module).float()
    try:
        with torch.no_grad():
            found = first_logits(cut(**inputs, **no_cache(cut)))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(f"{name} does not run with fewer heads: {reason}. {_INSTEAD}") from error
    if not agree(masked, found):
        raise UnsupportedError(
            f"{name} computes across heads (for example a norm over all of them), so removing heads changes the others. "
            + _INSTEAD
        )


def _in_float32(model: OpenedModel) -> Parts:
    module = own_copy(model.plain).float()
    return module, model.tokenizer, layout_in(module, model)
