"""MLP units in the weights: which rows of which maps make a unit, which column it writes through, and removing some for good.

    y = W_down a        a_i = act(W_gate x)_i (W_up x)_i,  or act(W_up x)_i        i = 1 .. I units

Without unit i, row i of W_gate and W_up and column i of W_down go. Where every layer keeps as many, the config's
`intermediate_size` says so; else the checkpoint is one of the conversion `uneven`.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.hooks import entering
from manyheads.model.layout import Block, find_layout, tiny_inputs
from manyheads.model.linear import features_of, output_dim
from manyheads.model.opened import OpenedModel
from manyheads.model.weights import uneven
from manyheads.model.weights.baking import Parts, check_plain
from manyheads.model.weights.converted import with_conversion
from manyheads.model.weights.copies import agree, rebuilt, settled, tiny_logits


@dataclass(frozen=True)
class GatedMlp:
    """A layer's MLP: the maps that make its units (gate and up, or up alone), and the one that reads them."""

    up: tuple[nn.Module, ...]
    down: nn.Module
    units: int

    @property
    def parameters_each(self) -> int:
        """How many parameters go with a unit."""
        biases = sum(getattr(module, "bias", None) is not None for module in self.up)
        width = features_of(self.down)
        assert width is not None
        return (len(self.up) + 1) * width[1] + biases

    def weights(self) -> list[tuple[nn.Parameter, int]]:
        """Its parameters with numbers for each unit, and along which dimension."""
        found = [(module.get_parameter("weight"), output_dim(module)) for module in self.up]
        found.append((self.down.get_parameter("weight"), 1 - output_dim(self.down)))
        biases = [getattr(module, "bias", None) for module in self.up]
        return found + [(bias, 0) for bias in biases if isinstance(bias, nn.Parameter)]


def mlp_of(model: OpenedModel, layer: int) -> GatedMlp:
    """The MLP of a layer, found by the shapes of its linear maps. `UnsupportedError` for mixtures of experts and fused maps."""
    width = model.layout.hidden_size
    counts = [(module, features_of(module)) for module in _linear_outside_attention(model.layout.blocks[layer])]
    up = [(module, n[1]) for module, n in counts if n is not None and n[0] == width != n[1]]
    down = [(module, n[0]) for module, n in counts if n is not None and n[1] == width != n[0]]
    if len(down) != 1 or len(up) not in (1, 2) or any(made != down[0][1] for _, made in up):
        seen = ", ".join(f"{n[0]} to {n[1]}" for _, n in counts if n is not None) or "none"
        raise UnsupportedError(
            f"cannot tell the units of {type(model.plain).__name__}'s MLP apart in layer {layer}: expected one or two linear "
            f"maps from {width} features to as many units, and one back, and found maps of {seen}."
        )
    check_plain(type(model.plain).__name__, [module for module, _ in (*up, *down)])
    return GatedMlp(tuple(module for module, _ in up), down[0][0], down[0][1])


def with_units(model: OpenedModel, kept: Sequence[Int[Tensor, "N"]]) -> Parts:
    """A copy of the model whose MLPs keep only these units in each layer, in ascending order.

    `InputError` for units that are not there, or a layer that keeps none. `UnsupportedError` for an MLP that is not of the form
    above, a config without `intermediate_size`, and if the logits are not those of the model with the other units zeroed.
    """
    base = settled(model)
    mlps = [mlp_of(base, layer) for layer in range(base.n_layers)]
    name = type(base.plain).__name__
    for layer, (mlp, units) in enumerate(zip(mlps, kept, strict=True)):
        if not len(units) or int(units.min()) < 0 or int(units.max()) >= mlp.units:
            raise InputError(f"layer {layer} has units 0 to {mlp.units - 1}; keep at least one, and none but these.")
    if getattr(base.plain.config, "intermediate_size", None) != mlps[0].units:
        raise UnsupportedError(
            f"the config of {name} does not state the {mlps[0].units} units of its MLPs as intermediate_size."
        )
    state = _cut(base, mlps, kept)
    sizes = {len(units) for units in kept}
    try:
        parts = _alike(base, sizes.pop(), state) if len(sizes) == 1 else _unevenly(base, mlps, kept, state)
    except (RuntimeError, ValueError) as error:
        raise UnsupportedError(f"{name} cannot be made with other MLPs: {' '.join(str(error).split())}") from error
    if not agree(_zeroed_logits(base, mlps, kept), tiny_logits(parts[0])):
        raise UnsupportedError(
            f"the MLPs of {name} do more with their units than their maps say; zero units by hooks instead."
        )
    return parts


def _linear_outside_attention(block: Block) -> list[nn.Module]:
    inside = set(block.attention.modules())
    found: list[nn.Module] = []
    for module in block.module.modules():
        if module not in inside and features_of(module) is not None:
            found.append(module)
            inside |= set(module.modules())  # an adapter's own parts are no maps of the MLP
    return found


def _cut(model: OpenedModel, mlps: Sequence[GatedMlp], kept: Sequence[Tensor]) -> dict[str, Tensor]:
    where = {
        id(parameter): (dim, units) for mlp, units in zip(mlps, kept, strict=True) for parameter, dim in mlp.weights()
    }
    state: dict[str, Tensor] = model.plain.state_dict()
    for key, parameter in model.plain.named_parameters(remove_duplicate=False):
        if id(parameter) in where:
            dim, units = where[id(parameter)]
            state[key] = state[key].index_select(dim, units.to(parameter.device).sort().values)
    return state


def _alike(base: OpenedModel, units: int, state: Mapping[str, Tensor]) -> Parts:
    config = copy.deepcopy(base.plain.config)
    config.intermediate_size = units
    module, _ = rebuilt(base.plain, config, state)
    return module, base.tokenizer, find_layout(module)


def _unevenly(
    base: OpenedModel, mlps: Sequence[GatedMlp], kept: Sequence[Tensor], state: Mapping[str, Tensor]
) -> Parts:
    counts = {
        str(layer): {"intermediate_size": len(units)}
        for layer, (mlp, units) in enumerate(zip(mlps, kept, strict=True))
        if len(units) != mlp.units
    }
    settings: dict[str, Any] = {"mlp": _path(base, mlps), "per_layer_config": counts}
    return with_conversion(base, uneven.NAME, settings, state)


def _path(model: OpenedModel, mlps: Sequence[GatedMlp]) -> str:
    """Where each layer's MLP is, with `{}` for the layer: the module that holds all its maps."""
    names = {id(part): name for name, part in model.plain.named_modules()}
    found = set()
    for block, mlp in zip(model.layout.blocks, mlps, strict=True):
        whole = names[id(block.module)]
        owners = {names[id(module)].rpartition(".")[0] for module in (*mlp.up, mlp.down)}
        stem = whole.rpartition(".")[0]
        found |= {f"{stem}.{{}}{owner.removeprefix(whole)}" for owner in owners}
    if len(found) > 1 or found == {f"{stem}.{{}}"}:
        raise UnsupportedError(
            f"{type(model.plain).__name__} keeps no MLP in a module of its own that can be made anew."
        )
    return found.pop()


def _zeroed_logits(model: OpenedModel, mlps: Sequence[GatedMlp], kept: Sequence[Tensor]) -> Tensor:
    with contextlib.ExitStack() as stack:
        for mlp, units in zip(mlps, kept, strict=True):
            stack.enter_context(entering(mlp.down, partial(_only, units)))
        return model.logits(tiny_inputs(model.plain))


def _only(units: Int[Tensor, "N"], hidden: Tensor) -> Tensor:
    mask = torch.zeros(hidden.shape[-1], dtype=hidden.dtype, device=hidden.device)
    return hidden * mask.index_fill(0, units.to(hidden.device), 1)
