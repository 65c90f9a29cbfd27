"""The methods that make a model smaller. Each registers itself at the foot of its own file:

    @shrinks("snapkv", "cache", "every head keeps what the end of the prompt attends to")
    def _make(ratio: float) -> SnapKV: ...

`ratio` is the share that goes: of tokens, or of heads that stream, for a "cache"; of heads or parameters for "weights". A way of
kind "cache" makes a press, whose call on a model is a block; one of kind "weights" makes something with a `convert(model)`. The
command line looks ways up here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from manyheads.errors import InputError
from manyheads.inputs import check_number
from manyheads.registry import Registry

Kind = Literal["cache", "weights"]


@dataclass(frozen=True)
class ShrinkWay:
    """One method: its name, whether it cuts a cache or weights, what it does, and how it is made for a ratio."""

    name: str
    kind: Kind
    what: str
    make: Callable[[float], Any]

    def __call__(self, ratio: float) -> Any:
        """The method for a ratio in [0, 1)."""
        check_number(ratio, "ratio", 0.0, 1.0)
        if ratio == 1.0:
            raise InputError("ratio 1 leaves nothing; give a share below 1.")
        return self.make(ratio)


_WAYS: Registry[ShrinkWay] = Registry("shrink")
Make = Callable[[float], Any]


def shrinks(name: str, kind: Kind, what: str) -> Callable[[Make], Make]:
    """Register a function of the ratio as a method (see above)."""

    def register(make: Make) -> Make:
        _WAYS.add(name, ShrinkWay(name, kind, what, make))
        return make

    return register


def shrink_ways() -> dict[str, ShrinkWay]:
    """All methods by name."""
    return _WAYS.all()


def shrink_way(name: str) -> ShrinkWay:
    """The method called `name`. `InputError` lists the known ones."""
    return _WAYS[name]
