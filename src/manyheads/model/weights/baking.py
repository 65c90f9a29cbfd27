"""From edits to weights: baking into the output projection, and removing heads physically."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Edit, Scale, compose_affine
from manyheads.model.layout import Layout, find_layout, tiny_inputs
from manyheads.model.linear import base_of, is_plain, projection_matrix
from manyheads.model.opened import OpenedModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights.slices import HeadMap, head_map

Parts = tuple[nn.Module, Any, Layout]


def baked(model: OpenedModel, edits: Sequence[Edit]) -> Parts:
    """Fold edits of the form `z -> scale z + shift` into the output projections of a copy of the model:

    W_O[h] <- scale_h W_O[h],    b_O <- b_O + sum_h shift_h W_O[h]
    """
    _check_plain(type(model.plain).__name__, [block.projection for block in model.layout.blocks])
    layers = range(model.n_layers)
    affine = [compose_affine(edits, layer, model.n_heads, model.head_dim) for layer in layers]
    shifts = [_shift(model, layer, affine[layer][1]) for layer in layers]
    needs_bias = [layer for layer in layers if shifts[layer].abs().max() > 0 and model.bias_O(layer) is None]
    module = _with_bias(model.plain) if needs_bias else copy.deepcopy(model.plain)
    layout = find_layout(module)
    with torch.no_grad():
        for layer, block in enumerate(layout.blocks):
            scale = affine[layer][0]
            weight = projection_matrix(block.projection)
            weight.mul_(scale.repeat_interleave(model.head_dim)[:, None].to(weight))
            if shifts[layer].abs().max() > 0:
                block.projection.bias.add_(shifts[layer].to(weight))  # type: ignore[operator, union-attr]
    return module, model.tokenizer, layout


def _shift(model: OpenedModel, layer: int, shift: Float[Tensor, "H Dh"]) -> Float[Tensor, "D"]:
    weight = model.W_O(layer).detach().to("cpu", torch.float32)
    return torch.einsum("hd,hde->e", shift, weight)


def _with_bias(module: nn.Module) -> nn.Module:
    """A copy whose output projections have a bias, if the config allows one; the other biases that come with it are zero."""
    config = copy.deepcopy(module.config)
    name = type(module).__name__
    if not hasattr(config, "attention_bias"):
        raise UnsupportedError(
            f"this edit adds a constant to z, which needs a bias in the output projection, and the config of {name} "
            "cannot have one. Scaling and zero ablation can be baked; constants stay an edit."
        )
    config.attention_bias = True
    new = type(module)(config).to(next(module.parameters()).dtype).eval()
    missing, unexpected = new.load_state_dict(module.state_dict(), strict=False)
    if unexpected or any(not key.endswith("bias") for key in missing):
        raise UnsupportedError(f"the config of {name} has attention_bias, but setting it changes more than biases.")
    with torch.no_grad():
        for key in missing:
            new.get_parameter(key).zero_()
    if any(getattr(block.projection, "bias", None) is None for block in find_layout(new).blocks):
        raise UnsupportedError(
            f"attention_bias gives {name} no bias in its output projection, so constants stay an edit."
        )
    return new


def pruned(model: OpenedModel, heads: HeadSet) -> Parts:
    """Remove `heads` from a copy of the model: rows of q, k and v, columns of the output projection, and the config's counts.

    A config states one number of heads for all layers, so as many must go from each; under grouped-query attention a KV head
    goes only with its whole group. `UnsupportedError` names the rule that is broken; masking and baking remain.
    """
    kept_heads, kept_groups = _kept(model, heads)
    config = copy.deepcopy(model.config)
    before = {"num_attention_heads": model.n_heads, "num_key_value_heads": model.n_kv_heads}
    after = {"num_attention_heads": len(kept_heads[0]), "num_key_value_heads": len(kept_groups[0])}
    name = type(model.plain).__name__
    if not hasattr(config, "head_dim"):
        raise UnsupportedError(
            f"the config of {name} has no head_dim of its own (it is hidden_size / heads), so it cannot state that heads "
            "are missing. Mask them with Scale(heads, 0.0), or bake that."
        )
    maps = head_map(model)
    _check_plain(name, [part.module for one in maps.values() for part in one.parts])
    for key, value in after.items():
        if getattr(config, key, None) == before[key]:
            setattr(config, key, value)
    config.head_dim = model.head_dim
    module = type(model.plain)(config).to(next(model.plain.parameters()).dtype).eval()
    module.load_state_dict(_cut(model, module.state_dict(), maps, kept_heads))
    if getattr(model.plain, "generation_config", None) is not None:
        module.generation_config = copy.deepcopy(model.plain.generation_config)
    layout = find_layout(module)
    _check_pruned(model, heads, module, name)
    return module, model.tokenizer, layout


def _kept(model: OpenedModel, heads: HeadSet) -> tuple[list[list[int]], list[list[int]]]:
    group = model.n_heads // model.n_kv_heads
    removed = heads.by_layer()
    kept_heads, kept_groups = [], []
    for layer in range(model.n_layers):
        gone = set(removed.get(layer, []))
        groups = [set(range(g * group, (g + 1) * group)) for g in range(model.n_kv_heads)]
        torn = next((g for g in groups if g & gone and not g <= gone), None)
        if torn is not None and group > 1:
            here = ", ".join(f"L{layer}H{h}" for h in sorted(torn))
            raise UnsupportedError(
                f"{here} share one KV head, which goes only with all of them; prune the whole group, or mask single heads."
            )
        kept_heads.append([h for h in range(model.n_heads) if h not in gone])
        kept_groups.append([g for g, members in enumerate(groups) if not members <= gone])
    counts = {len(kept) for kept in kept_heads}
    if len(counts) > 1:
        raise UnsupportedError(
            f"a config has one number of heads for all layers, but this set leaves between {min(counts)} and {max(counts)} "
            "heads a layer; prune as many in each layer, or mask them with Scale(heads, 0.0) and bake that."
        )
    if counts == {0}:
        raise UnsupportedError("this set leaves no head at all; keep at least one in each layer.")
    return kept_heads, kept_groups


def _cut(
    model: OpenedModel, wanted: Mapping[str, Tensor], maps: Mapping[int, HeadMap], kept: Sequence[list[int]]
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
        if key in wanted and tensor.shape != wanted[key].shape:
            if id(parameters.get(key)) not in where:
                raise UnsupportedError(f"do not know which part of {key} belongs to which head ({list(tensor.shape)}).")
            dim, index = where[id(parameters[key])]
            state[key] = tensor.index_select(dim, index.to(tensor.device))
    return state


def _check_plain(name: str, modules: Sequence[nn.Module]) -> None:
    """Weights can only be rewritten where they are all there is."""
    other = next((module for module in modules if not is_plain(module)), None)
    if other is not None:
        weight = getattr(base_of(other), "weight", None)
        held = f"weights in {weight.dtype}" if base_of(other) is other and isinstance(weight, Tensor) else "an adapter"
        raise UnsupportedError(
            f"{name} keeps heads in {type(other).__name__} modules, with {held}, which cannot be rewritten head by head; merge "
            "adapters or open the model in floating point, or keep the edit as it is."
        )


def _check_pruned(model: OpenedModel, heads: HeadSet, module: nn.Module, name: str) -> None:
    inputs = tiny_inputs(model.plain)
    with model.editing(Scale(heads, 0.0)):
        masked = model.logits(inputs).float()
    with torch.no_grad():
        cut = first_logits(module(**inputs, **no_cache(module))).float()
    if (cut - masked).abs().max() > 1e-3 * masked.abs().max() + 1e-4:
        raise UnsupportedError(
            f"{name} computes across heads (for example a norm over all of them), so removing heads changes the others. "
            "Mask them with Scale(heads, 0.0), or bake that."
        )


def save_pretrained(model: OpenedModel, folder: Path, *, force: bool = False) -> Path:
    """Write module and tokenizer as Transformers does, all or nothing."""

    def write(into: Path) -> None:
        model.plain.save_pretrained(into)  # type: ignore[operator]
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(into)

    return write_folder_atomically(folder, write, force=force)
