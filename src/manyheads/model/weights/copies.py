"""Copies of a model whose weights may be rewritten: everything there, adapters merged, and, if asked for, another config.

A copy's layout is the model's own, found by the names of its modules, so that a part of a larger model stays that part.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.inputs import unwrapped
from manyheads.model.layout import Absent, Layout, tiny_inputs
from manyheads.model.offloading import is_away, own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.replay.recording import first_logits, no_cache

EXACT = (torch.float32, torch.float64)
"""Types in which two ways to the same logits agree but for small change."""


def settled(model: OpenedModel) -> OpenedModel:
    """The model itself if its modules hold all of their weights; else a copy without adapters and with all weights there.

    Adapters are merged into what they adapt; weights that Accelerate had moved away are fetched.
    `UnsupportedError` for adapters that cannot be merged, or where merging changes the logits.
    """
    if not _is_wrapped(model.plain) and not _adapters(model.plain) and not is_away(model.plain):
        return model
    module = _merged(own_copy(model.plain))
    settled = OpenedModel(module, model.tokenizer, layout_in(module, model))
    if not agree(model.logits(tiny_inputs(model.plain)), tiny_logits(module)):
        raise UnsupportedError(
            f"merging the adapters of {type(model.plain).__name__} changes its logits (some may be switched off); merge "
            "them yourself, and open what that gives."
        )
    return settled


def layout_in(module: nn.Module, model: OpenedModel) -> Layout:
    """The layout of `model` in `module`, whose modules have the same names but for an adapter's wrapper."""
    names = {id(part): name for name, part in unwrapped(model.plain).named_modules()}

    def there(value: Any) -> Any:
        if isinstance(value, Absent):
            return value
        if isinstance(value, nn.Module):
            if id(value) not in names:
                raise UnsupportedError(
                    f"{type(model.plain).__name__} keeps a {type(value).__name__} outside of its own modules, which a copy "
                    "cannot follow."
                )
            return module.get_submodule(names[id(value)])
        if isinstance(value, tuple | list):
            return type(value)(map(there, value))
        if is_dataclass(value) and not isinstance(value, type):
            return replace(value, **{part.name: there(getattr(value, part.name)) for part in fields(value)})
        return value

    found: Layout = there(model.layout)
    return found


def rebuilt(module: Any, config: Any, state: Mapping[str, Tensor]) -> tuple[Any, list[str]]:
    """A module of the same class under `config` with the tensors of `state`, and the names that `state` lacks; these are zero.

    Types, places, other buffers and the generation config are those of `module`. `UnsupportedError` if the class cannot be
    made under that config, or does not take the tensors.
    """
    name = type(module).__name__
    if getattr(module, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise UnsupportedError(f"{name} is quantised, and cannot be made again with other shapes; open it unquantised.")
    place = next(iter(state.values()))
    buffers = dict(module.named_buffers())
    try:
        new = type(module)(config).eval()
        for own, parameter in new.named_parameters():
            like = state.get(own, place)
            parameter.data = parameter.data.to(like.device, like.dtype)
        for own, buffer in new.named_buffers():
            # Many are no part of a checkpoint, such as rotary frequencies, which stay float32 where weights are not.
            old = buffers.get(own, buffer)
            buffer.data = old.clone() if old.shape == buffer.shape else buffer.to(place.device, old.dtype)
        missing, unexpected = new.load_state_dict(dict(state), strict=False)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise UnsupportedError(
            f"{name} cannot be made again under a changed config: {' '.join(str(error).split())}"
        ) from error
    if unexpected:
        raise UnsupportedError(f"under the changed config {name} has no place for {', '.join(unexpected[:3])}.")
    with torch.no_grad():
        for key in missing:
            new.get_parameter(key).zero_()
    if getattr(module, "generation_config", None) is not None:
        new.generation_config = copy.deepcopy(module.generation_config)
    return new, missing


def tiny_logits(module: nn.Module) -> Tensor:
    """The logits of a tiny input, the same for a model and its copies."""
    with torch.no_grad():
        return first_logits(module(**tiny_inputs(module), **no_cache(module)))


def agree(a: Tensor, b: Tensor) -> bool:
    """Whether logits are equal up to the rounding of their type."""
    share = 1e-3 if a.dtype in EXACT else 5e-2
    a, b = a.float().cpu(), b.float().cpu()
    return a.shape == b.shape and bool((a - b).abs().max() <= share * a.abs().max() + 1e-4)


def _is_wrapped(module: Any) -> bool:
    return unwrapped(module) is not module


def _adapters(module: nn.Module) -> dict[str, nn.Module]:
    """Modules that wrap what they adapt, by name, the outermost of each."""
    found: dict[str, nn.Module] = {}
    for name, part in module.named_modules():
        if isinstance(getattr(part, "base_layer", None), nn.Module) and not any(
            name.startswith(f + ".") for f in found
        ):
            found[name] = part
    return found


def _merged(module: Any) -> Any:
    """The module with its adapters merged in place, and without their wrappers."""
    name = type(module).__name__
    try:
        if _is_wrapped(module):
            module = module.merge_and_unload()
        for place, part in _adapters(module).items():
            part.merge()  # type: ignore[operator]
            owner, _, own = place.rpartition(".")
            setattr(module.get_submodule(owner), own, part.get_base_layer())  # type: ignore[operator]
    except (AttributeError, ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())
        raise UnsupportedError(
            f"{name} has adapters that cannot be merged into its weights ({reason}); keep the edit as it is, or open the "
            "model without them."
        ) from error
    if getattr(module, "_hf_peft_config_loaded", False):
        module._hf_peft_config_loaded = False  # else saving would write the adapters alone
        module.__dict__.pop("peft_config", None)
    return module.eval()
