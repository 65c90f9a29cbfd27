"""Kinds of things and what they are kinds of: a part of WordNet 3.0 (Fellbaum, 1998), read from its own file.

The file `data.noun` comes with Debian's package wordnet-base (in /usr/share/wordnet), and with WordNet itself. Nothing is
downloaded.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from manyheads.errors import InputError

NOUNS = Path("/usr/share/wordnet/data.noun")


@dataclass(frozen=True)
class Kinds:
    """Nodes below a root, itself the first, by their first name.

    `edges` are (kind, what it is a kind of); `leaves` have no kinds below them.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    leaves: tuple[int, ...]


def word_kinds(root: str = "animal", path: Path = NOUNS) -> Kinds:
    """Everything below `root`, in the meaning that has most kinds.

    `InputError` if the file is not there, or has no such word with kinds.
    """
    if not path.is_file():
        raise InputError(f"there is no {path}; install Debian's wordnet-base, or give WordNet's data.noun.")
    names: dict[str, str] = {}
    below: dict[str, list[str]] = defaultdict(list)
    starts: list[str] = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        if not re.match(r"\d{8} ", line):
            continue
        place, _, _, count, *rest = line.partition(" | ")[0].split(" ")
        words = rest[: 2 * int(count, 16) : 2]
        names[place] = words[0].replace("_", " ")
        if root in words:
            starts.append(place)
        links = rest[2 * int(count, 16) + 1 :]
        for kind, target, part in zip(links[::4], links[1::4], links[2::4], strict=False):
            if kind == "@" and part == "n":  # what this is a kind of
                below[target].append(place)
    start = max(starts, key=lambda place: len(below[place]), default="")
    if not below.get(start):
        raise InputError(f"{path} has no noun {root!r} with kinds below it.")
    order, edges = {start: 0}, []
    queue = [start]
    for place in queue:
        for kind in below[place]:
            if kind not in order:
                order[kind] = len(order)
                queue.append(kind)
            edges.append((order[kind], order[place]))
    leaves = tuple(i for place, i in order.items() if not below.get(place))
    return Kinds(tuple(names[place] for place in order), tuple(edges), leaves)
