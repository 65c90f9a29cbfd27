"""Removing heads from a model for good: rows of q, k and v, columns of the output projection, and the config's counts."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Scale
from manyheads.model.layout import tiny_inputs
from manyheads.model.offloading import own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights.baking import Parts, check_plain
from manyheads.model.weights.copies import EXACT, agree, layout_in, rebuilt, settled
from manyheads.model.weights.slices import HeadMap, head_map

_INSTEAD = "Mask them with Scale(heads, 0.0), or bake that."


def pruned(model: OpenedModel, heads: HeadSet) -> Parts:
    """Remove `heads` from a copy of the model.

    A config states one number of heads for all layers, so as many must go from each; under grouped-query attention whole groups
    go, or as many query heads of each group. What is left must run, have the logits of masking, and be a config that
    Transformers loads again. `UnsupportedError` names the rule that is broken; masking and baking remain.
    """
    kept_heads, kept_groups = _kept(model, heads)
    name = type(model.plain).__name__
    base = settled(model)
    config = copy.deepcopy(base.plain.config)
    before = {"num_attention_heads": model.n_heads, "num_key_value_heads": model.n_kv_heads}
    after = {"num_attention_heads": len(kept_heads[0]), "num_key_value_heads": len(kept_groups[0])}
    if not hasattr(config, "head_dim"):
        raise UnsupportedError(
            f"the config of {name} has no head_dim of its own (it is hidden_size / heads), so it cannot state that heads "
            f"are missing. {_INSTEAD}"
        )
    for key, value in after.items():
        if getattr(config, key, None) == before[key]:
            setattr(config, key, value)
    config.head_dim = model.head_dim
    _check_config(config, name, model)
    maps = head_map(base)
    check_plain(name, [part.module for one in maps.values() for part in one.parts])
    shapes = _shapes(type(base.plain), config)
    module, missing = rebuilt(base.plain, config, _cut(base, shapes, maps, kept_heads))
    if missing:
        raise UnsupportedError(f"with fewer heads {name} has weights that it had not before: {', '.join(missing[:3])}.")
    _check_pruned(base, heads, module, name)
    layout = replace(layout_in(module, base), n_heads=len(kept_heads[0]), n_kv_heads=len(kept_groups[0]))
    return module, model.tokenizer, layout


def _kept(model: OpenedModel, heads: HeadSet) -> tuple[list[list[int]], list[list[int]]]:
    """The query heads and the KV heads that stay in each layer.

    A config states one number of each, so every layer must keep as many KV heads, and every KV head as many query heads.
    """
    group = model.n_heads // model.n_kv_heads
    removed = heads.by_layer()
    kept_heads, kept_groups = [], []
    sizes: dict[int, str] = {}
    for layer in range(model.n_layers):
        gone = set(removed.get(layer, []))
        kept_heads.append([h for h in range(model.n_heads) if h not in gone])
        members = [[h for h in range(g * group, (g + 1) * group) if h not in gone] for g in range(model.n_kv_heads)]
        kept_groups.append([g for g, stay in enumerate(members) if stay])
        sizes |= {len(stay): f"{len(stay)} on KV head {g} of layer {layer}" for g, stay in enumerate(members) if stay}
    counts = {len(kept) for kept in kept_heads}
    if counts == {0}:
        raise UnsupportedError("this set leaves no head at all; keep at least one in each layer.")
    if len(counts) > 1:
        raise UnsupportedError(
            f"a config has one number of heads for all layers, but this set leaves between {min(counts)} and {max(counts)} "
            "heads a layer; prune as many in each layer, or mask them with Scale(heads, 0.0) and bake that."
        )
    if len(sizes) > 1:
        raise UnsupportedError(
            f"a config has one number of query heads for each KV head, but this set leaves {' and '.join(sizes.values())}; prune "
            "whole groups, or as many of each group, or mask single heads."
        )
    return kept_heads, kept_groups


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


def _cut(
    model: OpenedModel, wanted: Mapping[str, torch.Size], maps: Mapping[int, HeadMap], kept: Sequence[list[int]]
) -> dict[str, Tensor]:
    """The model's weights, those that are smaller in `wanted` with the kept heads' part of them alone."""
    where = {
        id(parameter): (dim, index)
        for layer, one in maps.items()
        for parameter, dim, index in one.parameters(kept[layer])
    }
    parameters = dict(model.plain.named_parameters(remove_duplicate=False))
    state: dict[str, Tensor] = model.plain.state_dict()
    for key, tensor in list(state.items()):
        if key in wanted and tensor.shape != wanted[key]:
            if id(parameters.get(key)) not in where:
                raise UnsupportedError(f"do not know which part of {key} belongs to which head ({list(tensor.shape)}).")
            dim, index = where[id(parameters[key])]
            state[key] = tensor.index_select(dim, index.to(tensor.device))
    return state


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
