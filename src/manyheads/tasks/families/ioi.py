"""Indirect-object identification: of two names, the one that did not act receives the thing."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from manyheads.tasks.base import Example, Split, Task, fill_in, last_piece, of_split, word_at
from manyheads.tasks.lexicon import NAMES, OBJECTS, PLACES

TEMPLATES = [
    "When {A} and {B} went to the {place}, {S2} gave a {thing} to",
    "Then, {A} and {B} had a long talk at the {place}. Afterwards {S2} gave a {thing} to",
    "After {A} and {B} went to the {place}, {S2} handed a {thing} to",
    "While {A} and {B} were working at the {place}, {S2} showed a {thing} to",
    "Yesterday {A} and {B} met at the {place}. There {S2} offered a {thing} to",
    "Friends {A} and {B} found a {thing} at the {place}. Later {S2} gave it to",
    "Once {A} and {B} got a {thing} at the {place}, and {S2} decided to give it to",
    "The {place} was full when {A} and {B} arrived, so {S2} passed the {thing} to",
    "In the morning {A} and {B} visited the {place}, where {S2} sold a {thing} to",
]


@dataclass(frozen=True)
class IOI(Task):
    """`When Mary and John went to the store, John gave a cup to` -> ` Mary`. Held out: a fifth of the names.

    `order` picks ABBA (the receiver is named first), BABA or both. `corruption` makes the twin: "swap" lets the
    receiver act (the answer becomes the other name), "abc" names three new people (no answer). Spans: `IO`, `S1`,
    `S1+1`, `S2`, `end`.
    """

    name: ClassVar[str] = "ioi"
    choices: ClassVar[Mapping[str, Collection[str]]] = {
        "order": ("both", "ABBA", "BABA"),
        "corruption": ("swap", "abc"),
    }
    order: Literal["both", "ABBA", "BABA"] = "both"
    corruption: Literal["swap", "abc"] = "swap"

    def draw(self, rng: random.Random, split: Split) -> Example:
        receiver, actor, *strangers = rng.sample(of_split(self.name, NAMES, split), 5)
        template, place, thing = rng.choice(TEMPLATES), rng.choice(PLACES), rng.choice(OBJECTS)
        abba = self.order == "ABBA" or (self.order == "both" and rng.random() < 0.5)
        first, second = (receiver, actor) if abba else (actor, receiver)
        prompt, spans = fill_in(template, A=first, B=second, S2=actor, place=place, thing=thing)
        io, s1 = (spans["A"], spans["B"]) if abba else (spans["B"], spans["A"])
        twin = (first, second, receiver) if self.corruption == "swap" else tuple(strangers)
        return Example(
            prompt=prompt,
            answer=" " + receiver,
            foil=" " + actor,
            corrupted=fill_in(template, A=twin[0], B=twin[1], S2=twin[2], place=place, thing=thing)[0],
            corrupted_answer=" " + actor if self.corruption == "swap" else None,
            spans={"IO": io, "S1": s1, "S1+1": word_at(prompt, s1[1]), "S2": spans["S2"], "end": last_piece(prompt)},
            continuation=".",
        )
