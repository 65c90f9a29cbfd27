"""Environments by name: those of gymnasium, and the four rooms of our own, which need nothing installed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from manyheads.control.grid_rooms import four_rooms
from manyheads.errors import InputError


def open_environment(name: str, module: str | None = None) -> Any:
    """The environment called `name`; `module` is imported first, so that it can register its own.

    `InputError` where gymnasium or the module is missing, or gymnasium knows no such environment.
    """
    if name == "four-rooms":
        return four_rooms()
    try:
        gymnasium = import_module("gymnasium")
    except ImportError:
        raise InputError("environments need gymnasium; install it with pip install 'manyheads[control]'.") from None
    if module is not None:
        if not all(part.isidentifier() for part in module.split(".")):
            raise InputError(f"{module!r} is no name of a module; give one such as minigrid.")
        try:
            found = import_module(module)
        except ImportError as error:
            raise InputError(f"the module {module!r} cannot be imported ({error}); install it.") from None
        if hasattr(gymnasium, "register_envs"):
            gymnasium.register_envs(found)
    try:
        return gymnasium.make(name)
    except gymnasium.error.Error as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"gymnasium has no {name!r} ({reason}); give --module if a package registers it.") from None
    except (ImportError, ModuleNotFoundError) as error:
        raise InputError(f"{name!r} needs a module that is missing ({error}); install it.") from None
