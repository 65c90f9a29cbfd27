"""The catalogue: 125 published systems that work on attention heads, what each is for, and how far ours is (not all are built).

`methods()` lists them, `search("reward model")` finds them, `method(11)` names one. `catalogue.json` is the list.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.resources import files
from math import log
from typing import Any, Literal, get_args

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


def methods() -> list[Method]:
    """Every method, by number."""
    return list(_catalogue())


def method(number: int) -> Method:
    """The method with this number. `InputError` if there is none."""
    for found in _catalogue():
        if found.number == number:
            return found
    raise InputError(f"there is no method {number!r}; the catalogue numbers its methods 1 to {len(_catalogue())}.")


# How much a word says about a method, by where it stands.
_WEIGHTS = {"name": 4.0, "room": 3.0, "title": 2.0, "what": 2.0}
_PREFIX = 0.5
_IGNORED = frozenset(
    "a an and are as at by do does for from how i in is it me my need of on or that the to want what which with".split()
)


def search(query: str) -> list[Method]:
    """The methods that `query` describes, best first; every method, by number, if it holds no word to look for.

    A word counts in any case and ending (head, heads; prune, pruning), and as the beginning of a longer word at half
    weight. Each adds

        idf(word) * weight of the best field it stands in        with idf = log(1 + methods / methods that hold it)

    and a method must hold at least half as much of the query, measured in idf, as the method that holds most: where
    "retrieval heads" finds a retrieval head, any other head is no answer. A number (`11`, `#11`) or an arXiv number
    names its method.
    """
    exact = query.strip().lower().removeprefix("#").removeprefix("arxiv:")
    named = [m for m in _catalogue() if exact in (str(m.number), m.arxiv)]
    if named:
        return named
    wanted = {_stem(word) for word in _words(query) if word not in _IGNORED}
    if not wanted:
        return methods()
    hits = {word: {m.number: hit for m in _catalogue() if (hit := _hit(word, m)) > 0} for word in sorted(wanted)}
    idf = {word: log(1 + len(_catalogue()) / len(hit)) for word, hit in hits.items() if hit}

    held = {m.number: sum(idf[word] for word in idf if m.number in hits[word]) for m in _catalogue()}
    found = [m for m in _catalogue() if held[m.number] >= max(held.values()) / 2 > 0]
    return sorted(found, key=lambda m: (-sum(idf[word] * hits[word].get(m.number, 0.0) for word in idf), m.number))


def _hit(word: str, m: Method) -> float:
    best = 0.0
    for name, weight in _WEIGHTS.items():
        for other in map(_stem, _words(getattr(m, name))):
            if other == word:
                best = max(best, weight)
            elif len(word) >= 3 and other.startswith(word):
                best = max(best, weight * _PREFIX)
    return best


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _stem(word: str) -> str:
    """The word without its English ending: heads, pruning, prune -> head, prun, prun. At least four letters stay."""
    if len(word) > 4 and word.endswith("ies"):
        word = word[:-3] + "y"
    elif len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    for ending in ("ing", "ed", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 4:
            return word.removesuffix(ending)
    return word
