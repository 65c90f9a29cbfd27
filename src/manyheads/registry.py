"""Methods of a room that register themselves, each in its own file, and are looked up by name.

WAYS: Registry[ShrinkWay] = Registry("shrink")

WAYS.add("snapkv", ShrinkWay(...))     # in the method's file, by a decorator of the room
WAYS["snapkv"]                         # imports all files of the room first
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pkgutil import walk_packages
from typing import Generic, TypeVar

from manyheads.errors import InputError

Way = TypeVar("Way")


class Registry(Generic[Way]):
    """What the files of `manyheads.<room>` registered, by name."""

    def __init__(self, room: str) -> None:
        self.room = f"manyheads.{room}"
        self._found: dict[str, Way] = {}

    def add(self, name: str, way: Way) -> None:
        """Register `way` as `name`."""
        self._found[name] = way

    def all(self) -> dict[str, Way]:
        """Everything registered, in the order of names."""
        _import_all(self.room)
        return dict(sorted(self._found.items()))

    def __getitem__(self, name: str) -> Way:
        """The method called `name`. `InputError` lists the known ones."""
        found = self.all()
        if name not in found:
            raise InputError(f"there is no method {name!r}; choose from {', '.join(found)}.")
        return found[name]


@cache
def _import_all(room: str) -> None:
    spec = find_spec(room)
    for module in walk_packages(spec.submodule_search_locations if spec else None, f"{room}."):
        import_module(module.name)
