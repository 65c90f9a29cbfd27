"""The rows of the catalogue: one published system each, as `catalogue.json` has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from typing import Any, Literal, get_args

from manyheads.catalogue.commands import COMMANDS
from manyheads.errors import InputError

Room = Literal[
    "atlas",
    "trace",
    "edit",
    "shrink",
    "draft",
    "predict",
    "forecast",
    "lab",
    "vision",
    "audio",
    "control",
    "judge",
    "brain",
]
State = Literal["ready", "partial", "absent"]
ROOMS: tuple[str, ...] = get_args(Room)
# What each room is for. The search by meaning reads it too: a row is too short to say it again.
ROOM_ABOUT: dict[str, str] = {
    "atlas": "find out what each attention head does",
    "trace": "explain one answer, find circuits and features",
    "edit": "change what a model does by its heads",
    "shrink": "smaller models and caches: less memory, less time",
    "draft": "generate text faster; other output heads",
    "predict": "heads for classes, numbers and rewards on a trained model",
    "forecast": "forecast and classify time series",
    "lab": "small experiments: how training makes heads, laws of language models",
    "vision": "images, faces and poses",
    "audio": "sound, speech and music",
    "control": "robots and agents that act",
    "judge": "compare and evaluate predictions",
    "brain": "models of the brain",
}
STATES: tuple[str, ...] = get_args(State)


@dataclass(frozen=True)
class Method:
    """One system of the catalogue.

    `entry` is the dotted path of the function, class or `Class.method` to call, `docs` its page and `tests` the pytest
    nodes that show its claim by calling the entry, both relative to the root of the repository. While `state` is "absent",
    the first two are None and there are no tests. "partial" means that the entry point works but that a part of the paper
    is missing, or that a part of the claim is not shown; `reason` says which in one sentence. Other rows have no reason.
    """

    number: int
    name: str
    room: Room
    title: str
    what: str
    arxiv: str
    venue: str | None
    state: State
    entry: str | None
    docs: str | None
    tests: tuple[str, ...]
    reason: str | None

    @property
    def asked(self) -> str:
        """What somebody would ask who needs it, in plain words; the search reads it."""
        return _asked()[str(self.number)]

    @property
    def command(self) -> str | None:
        """What to type to try it: a command line, or for what has none, the import in Python. None if it is absent."""
        if self.entry is None:
            return None
        parts = self.entry.split(".")
        cut = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)
        return COMMANDS.get(self.number) or f"from {'.'.join(parts[:cut])} import {parts[cut]}"

    @property
    def year(self) -> int:
        """The year of the paper's first version, which its arXiv number tells."""
        return 2000 + int(self.arxiv[:2])

    @property
    def paper(self) -> str:
        """The paper in one line: title, arXiv number, venue."""
        return ", ".join(part for part in (self.title, f"arXiv:{self.arxiv}", self.venue) if part)

    def load(self) -> Callable[..., Any]:
        """The entry point itself. `InputError` if the method is absent."""
        if self.entry is None:
            raise InputError(
                f"method #{self.number} ({self.name}) has no entry point yet; "
                "`manyheads methods --state ready` lists those that have one."
            )
        parts = self.entry.split(".")
        cut = next((i for i, part in enumerate(parts) if part[:1].isupper()), len(parts) - 1)  # modules are lower case
        found: Any = import_module(".".join(parts[:cut]))
        for name in parts[cut:]:
            found = getattr(found, name)
        entry: Callable[..., Any] = found
        return entry


@cache
def _catalogue() -> tuple[Method, ...]:
    rows = json.loads(files("manyheads").joinpath("catalogue.json").read_text(encoding="utf-8"))
    return tuple(Method(**row | {"tests": tuple(row["tests"])}) for row in rows)


@cache
def _asked() -> dict[str, str]:
    asked: dict[str, str] = json.loads(files("manyheads.catalogue").joinpath("asked.json").read_text(encoding="utf-8"))
    return asked


def methods() -> list[Method]:
    """Every method, by number."""
    return list(_catalogue())


def method(number: int) -> Method:
    """The method with this number. `InputError` if there is none."""
    for found in _catalogue():
        if found.number == number:
            return found
    raise InputError(f"there is no method {number!r}; the catalogue numbers its methods 1 to {len(_catalogue())}.")
