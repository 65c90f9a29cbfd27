"""Families of behaviours: one colour, one letter and one name each, the same on every page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from manyheads.report.figures import HUES, hue
from manyheads.report.html import Html, el

# By the `kind` of a behaviour. Their order is that of the colours and of the page.
TITLES = {
    "position": "Position",
    "rest": "Sinks and delimiters",
    "repetition": "Duplicates",
    "copying": "Copying",
    "succession": "Succession",
    "arithmetic": "Arithmetic",
    "choice": "Multiple choice",
    "facts": "Facts",
    "ioi": "Indirect objects",
    "safety": "Refusal",
    "circuit": "Other circuits",
}
_LETTERS = dict(zip(TITLES, "PSDCNAMFIRO", strict=True))


@dataclass(frozen=True)
class Family:
    """Behaviours of one kind."""

    kind: str
    title: str
    letter: str
    hue: str

    def mark(self) -> Html:
        """The family's letter on its colour, to stand before a name."""
        return el("span", self.letter, class_=f"letter {self.hue}", aria_hidden="true")


def families_of(kinds: Mapping[str, str]) -> dict[str, Family]:
    """The family of each behaviour, from the kind of each; those of one family stand next to each other."""
    known = _families(kinds.values())
    order = list(known)
    return {name: known[kind] for name, kind in sorted(kinds.items(), key=lambda item: order.index(item[1]))}


def _families(kinds: Iterable[str]) -> dict[str, Family]:
    """Families of `kinds`; one that has no place above gets a hue that none here has, and a letter that none has at all."""
    used = set(kinds)
    known = {kind: Family(kind, title, _LETTERS[kind], hue(i)) for i, (kind, title) in enumerate(TITLES.items())}
    found = {kind: family for kind, family in known.items() if kind in used}
    hues = [family.hue for kind, family in known.items() if kind not in used] or [hue(i) for i in range(HUES)]
    letters = [letter for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letter not in _LETTERS.values()]
    for i, kind in enumerate(sorted(used - set(known))):
        letter = next((letter for letter in [*kind.upper(), *letters] if letter in letters), "+")
        letters = [other for other in letters if other != letter]
        found[kind] = Family(kind, kind.replace("_", " ").capitalize(), letter, hues[i % len(hues)])
    return found
