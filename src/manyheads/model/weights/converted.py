"""Conversions: a model whose layers were rebuilt is an ordinary folder, a config and safetensors, that opens again.

A conversion is a name and a function that changes a module in place, by settings which are plain JSON:

    @conversion("moh")
    def install(module: PreTrainedModel, settings: Mapping[str, Any]) -> None: ...

It makes structure only. It runs on the whole model when it is converted, and again before weights are loaded when it is
reopened, then on the meta device, perhaps for the trunk alone (`submodule` finds a part in either). New parameters begin where
the model computes what it did before. What it needs besides lies in parameters or persistent buffers, which are saved: buffers
that are not persistent are empty after loading.

The config says what was done, in order: `"manyheads": [{"conversion": "moh", "settings": {...}}]`. Its `model_type` is the
architecture's behind `manyheads_`, and its classes are the architecture's own, subclassed. Once manyheads is imported,
`AutoModelForCausalLM.from_pretrained(folder)` opens it, as `open_model(folder)` does.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel, conversion_mapping
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from manyheads.errors import InputError, ManyheadsError, UnsupportedError
from manyheads.inputs import clause
from manyheads.model.layout import Layout, find_layout
from manyheads.model.offloading import own_copy
from manyheads.model.opened import OpenedModel
from manyheads.model.weights.copies import settled
from manyheads.model.weights.registering import PREFIX

Install = Callable[[PreTrainedModel, Mapping[str, Any]], None]
Opened = TypeVar("Opened", bound=OpenedModel)

_PACKAGE = Path(__file__).parents[2]
_ROOMS = ("shrink", "model/weights")  # where conversions lie: in the file that has their name
_INSTALLS: dict[str, Install] = {}
_BUILDING: ContextVar[bool] = ContextVar("_BUILDING", default=False)


def conversion(name: str) -> Callable[[Install], Install]:
    """Register a conversion. One of ours stands in the file of its name, so that a config leads to it."""

    def note(install: Install) -> Install:
        _INSTALLS[name] = install
        return install

    return note


def converted(model: Opened, name: str, settings: Mapping[str, Any]) -> Opened:
    """A copy of `model` with the conversion `name` installed: its config says so, and saved it opens again.

    Weights that the conversion leaves alone are kept, and what it makes has their type and place. `InputError` for a conversion
    that is not known, or settings that are no JSON; `UnsupportedError` for a model whose code is no part of Transformers, whose
    weights cannot be copied, or that could not be made again from its config.
    """
    return type(model)(*with_conversion(model, name, settings))


def with_conversion(
    model: OpenedModel, name: str, settings: Mapping[str, Any], weights: Mapping[str, torch.Tensor] | None = None
) -> tuple[Any, Any, Layout]:
    """`converted`, as module, tokenizer and layout; `weights` are all tensors of the new module, where they are known already."""
    settings = _plain(name, settings)
    install = _install_of(name)
    base = settled(model)
    _check_kind(base.plain)
    module = base.plain if base is not model else own_copy(model.plain)
    before = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    place = next(module.parameters())
    install(module, settings)
    for part in module.modules():
        _settle(part, before, place)
    config = module.config
    config.manyheads = [*conversions_of(config), {"conversion": name, "settings": settings}]
    # The class is changed and not the object, which the model's parts hold too. A config that was read has its type in itself.
    config.__class__ = _config_class(config.model_type.removeprefix(PREFIX))
    config.__dict__.pop("model_type", None)
    kind: Any = type(module)
    module.__class__ = converted_class(kind)
    _check_again(module)
    if weights is not None:
        module.load_state_dict(dict(weights))
    return module.eval(), model.tokenizer, find_layout(module)


def conversions_of(config: Any) -> list[dict[str, Any]]:
    """What was done to the model of this config, in order. `InputError` for a record that is damaged."""
    steps = getattr(config, "manyheads", [])
    steps = [steps] if isinstance(steps, dict) else steps
    if not isinstance(steps, list) or not all(
        isinstance(step, dict) and isinstance(step.get("conversion"), str) and isinstance(step.get("settings"), dict)
        for step in steps
    ):
        raise InputError(
            f'manyheads in the config is {str(steps)[:60]}; a list of {{"conversion": name, "settings": {{...}}}} was expected.'
        )
    return steps


def submodule(module: nn.Module, path: str) -> Any:
    """The part at `path` in the whole model, also where `module` is its trunk alone. `InputError` if there is none."""
    prefix = getattr(module, "base_model_prefix", "")
    inner = path.removeprefix(f"{prefix}.") if prefix and not hasattr(module, prefix) else path
    try:
        return module.get_submodule(inner)
    except AttributeError:
        raise InputError(f"{type(module).__name__} has no {path}, which its conversion rebuilds.") from None


# Classes, made when they are asked for


def register_type(model_type: str) -> Any:
    """The config class of a converted type, registered with Transformers together with its model classes."""
    config_class = _config_class(model_type.removeprefix(PREFIX))
    AutoConfig.register(model_type, config_class, exist_ok=True)
    base = config_class.__mro__[1]
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
        kind = None if mapping is None else mapping.get(base, None)
        if isinstance(kind, type) and getattr(kind, "config_class", None) is base:
            auto.register(config_class, converted_class(kind), exist_ok=True)
    return config_class


@cache
def converted_class(kind: Any) -> Any:
    """The architecture's class `kind`, subclassed: it installs what its config says."""
    if issubclass(kind, _Converted):
        return kind
    name = f"Manyheads{kind.__name__}"
    config_class = _config_class(kind.config_class.model_type)
    made = type(name, (_Converted, kind), {"config_class": config_class, "__module__": kind.__module__})
    _same_files(kind.__name__, name)
    return made


@cache
def _config_class(model_type: str) -> Any:
    base = CONFIG_MAPPING[model_type]
    name, new_type = f"Manyheads{base.__name__}", PREFIX + model_type
    _same_files(model_type, new_type)
    return type(name, (base,), {"model_type": new_type, "__post_init__": _checked(base), "__module__": __name__})


def _checked(base: Any) -> Callable[..., None]:
    def __post_init__(self: Any, **kwargs: Any) -> None:
        base.__post_init__(self, **kwargs)
        for step in conversions_of(self):
            _install_of(step["conversion"])

    return __post_init__


def _same_files(known: str, new: str) -> None:
    """Some types are saved under other names or shapes than they have in memory; converted ones are saved alike."""
    mapping = conversion_mapping.get_checkpoint_conversion_mapping(known)
    if mapping is not None:
        conversion_mapping.register_checkpoint_conversion_mapping(new, mapping, overwrite=True)


class _Converted:
    """What a converted class does besides its architecture's: it installs its conversions when it is made."""

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        with _building() as outermost:
            super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        for step in conversions_of(config) if outermost else ():
            _installed(self, step["conversion"], step["settings"])


@contextlib.contextmanager
def _building() -> Iterator[bool]:
    """Whether this is the whole model: a trunk that is made inside of it has the same config, and is not converted twice."""
    outermost = not _BUILDING.get()
    token = _BUILDING.set(True)
    try:
        yield outermost
    finally:
        _BUILDING.reset(token)


def _installed(module: Any, name: str, settings: Mapping[str, Any]) -> None:
    try:
        _install_of(name)(module, settings)
    except ManyheadsError:
        raise
    except Exception as error:  # settings from a stranger's file fail in any way
        raise InputError(
            f"the settings of the conversion {name!r} do not fit {type(module).__name__} ({clause(error)}); give the config that "
            "belongs to these weights."
        ) from error


def _install_of(name: str) -> Install:
    if name not in _INSTALLS and re.fullmatch(r"[a-z][a-z0-9_]*", name):
        # By name alone, so that opening one converted model imports one conversion; and a room below need not know those above.
        for room in _ROOMS:
            for file in _PACKAGE.joinpath(room).rglob(f"{name}.py"):
                import_module(".".join(("manyheads", *file.relative_to(_PACKAGE).with_suffix("").parts)))
    if name not in _INSTALLS:
        raise InputError(
            f"manyheads knows no conversion {name[:60]!r}; a later version may, or the program that registers it."
        )
    return _INSTALLS[name]


# Converting


def _plain(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    try:
        plain = json.loads(json.dumps(dict(settings), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise InputError(f"the settings of the conversion {name!r} are no JSON ({clause(error)}).") from None
    return dict(plain)


def _check_kind(module: Any) -> None:
    model_type = module.config.model_type.removeprefix(PREFIX)
    known = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None  # noqa: SIM401 - its get is empty
    if not isinstance(module, PreTrainedModel) or known is None or not isinstance(module.config, known):
        raise UnsupportedError(
            f"{type(module).__name__} is no model that Transformers opens by its type ({model_type!r}), so that a converted one "
            "could not be opened again."
        )
    if getattr(module, "hf_quantizer", None) is not None:
        raise UnsupportedError(f"{type(module).__name__} is quantised, and cannot be converted; open it unquantised.")


def _settle(part: nn.Module, before: set[int], place: torch.Tensor) -> None:
    """Give what was made now the type and the place of the model's weights."""
    for parameter in part.parameters(recurse=False):
        if id(parameter) not in before:
            parameter.data = parameter.data.to(place.device, place.dtype)
    for name, buffer in part.named_buffers(recurse=False):
        if id(buffer) not in before:
            part._buffers[name] = buffer.to(place.device)  # frequencies stay float32 where weights are not


def _check_again(module: Any) -> None:
    """`UnsupportedError` unless the config makes the same tensors again."""
    with torch.device("meta"):
        again = type(module)(type(module.config).from_dict(module.config.to_dict()))
    made, wanted = ({key: t.shape for key, t in m.state_dict().items()} for m in (again, module))
    if made != wanted:
        odd = sorted(key for key in made.keys() | wanted.keys() if made.get(key) != wanted.get(key))
        raise UnsupportedError(f"{type(module).__name__} could not be opened again: its config makes another {odd[0]}.")
