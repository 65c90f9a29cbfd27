"""Successor sequences: the next day, month, number, letter, number word or ordinal."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece, other
from manyheads.tasks.lexicon import DAYS, LETTERS, MONTHS, NUMBER_WORDS, NUMBERS, ORDINALS

KINDS = {
    "day": DAYS,
    "month": MONTHS,
    "number": NUMBERS,
    "letter": LETTERS,
    "number word": NUMBER_WORDS,
    "ordinal": ORDINALS,
}
CYCLIC = {"day", "month"}
LISTS = {"spaces": " ", "commas": ", ", "arrows": " -> ", "then": " then "}
LEADS = ["", "List: ", "Note: ", "Well, "]
SENTENCES = [
    "After {last} comes",
    "The next {kind} after {last} is",
    "Q: Which {kind} follows {last}? A:",
    "First we had {last}, and then we had",
    "Today it is {last}, and next it is",
]


@dataclass(frozen=True)
class Successor(Task):
    """`Monday Tuesday Wednesday` -> ` Thursday`; also sentences such as `After 41 comes` -> ` 42`.

    Held out: triples of an opening, a phrasing and an answer, so that `... Thursday` is known, but not from `Note:` and
    commas. `kind` picks one class of items. Span: `last` (the item whose successor is asked for).
    """

    name: ClassVar[str] = "successor"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"kind": tuple(KINDS)}
    kind: str | None = None

    def draw(self, rng: random.Random, split: Split) -> Example:
        kind = self.kind or rng.choice(list(KINDS))
        while True:
            lead = rng.choice(LEADS)
            listed = rng.random() < 0.5
            form = rng.choice(list(LISTS) if listed else SENTENCES)
            shown = rng.randint(2, 5) if listed else 1
            runs = [run for run in _runs(kind, shown) if _allowed(f"{kind}/{lead}{form}", run, split)]
            if len(runs) >= 2:
                break
        run, twin = rng.sample(runs, 2)
        prompt, last = _render(kind, form, run[:-1], lead)
        foil = other(rng, KINDS[kind], run[-1], run[-2])
        return Example(
            prompt=prompt,
            answer=" " + run[-1],
            foil=" " + foil,
            corrupted=_render(kind, form, twin[:-1], lead)[0],
            corrupted_answer=" " + twin[-1],
            spans={"last": last, "end": last_piece(prompt)},
        )


def _runs(kind: str, shown: int) -> list[list[str]]:
    items = KINDS[kind]
    starts = len(items) if kind in CYCLIC else len(items) - shown
    return [[items[(start + i) % len(items)] for i in range(shown + 1)] for start in range(starts)]


def _allowed(phrasing: str, run: list[str], split: Split) -> bool:
    """In training no step of a run may be a held-out one; a test run asks for a held-out step."""
    asked = run[1:] if split == "train" else run[-1:]
    return all(in_split(f"successor/{phrasing}/{item}", split, 6) for item in asked)


def _render(kind: str, form: str, shown: list[str], lead: str) -> tuple[str, tuple[int, int]]:
    if form in LISTS:
        text = lead + LISTS[form].join(shown)
        return text + LISTS[form].rstrip(), (len(text) - len(shown[-1]), len(text))
    text, spans = fill_in(lead + form, kind=kind, last=shown[-1])
    return text, spans["last"]
