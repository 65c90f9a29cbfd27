"""Coloured objects: several things, each of a colour; which colour has this one?"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, last_piece, of_split
from manyheads.tasks.lexicon import COLOURS, OBJECTS

TEMPLATES = [
    "Q: On the table, there is a {c0} {o0}, a {c1} {o1}, and a {c2} {o2}. What colour is the {query}? A:",
    "I have a {c0} {o0}, a {c1} {o1} and a {c2} {o2}. The colour of the {query} is",
    "In the room are a {c0} {o0}, a {c1} {o1} and a {c2} {o2}. Q: What colour is the {query}? A:",
    "There is a {c0} {o0}. There is a {c1} {o1}. There is a {c2} {o2}. So the {query} is",
]
COMPLETED = [
    "The {o0} is {c0}. The {o1} is {c1}. The {o2} is {c2}. The {query} is",
    "My {o0} is {c0}, my {o1} is {c1} and my {o2} is {c2}. My {query} is",
    "Colours: {o0} {c0}, {o1} {c1}, {o2} {c2}, {query}",
]


@dataclass(frozen=True)
class ColouredObjects(Task):
    """`... a red cup, a blue pen, and a green mug. What colour is the pen? A:` -> ` blue`.

    Held out: a fifth of the things. The foil is the colour of another thing; the twin asks for that thing. Spans:
    `colour` and `object` (where the answer stands), `query` (the thing asked for), `foil` (the foil's colour), `end`. The
    phrasing "completed" says the colours as it asks for one: `The cup is red. The pen is blue. ... The pen is`.
    """

    name: ClassVar[str] = "coloured_objects"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"phrasing": ("usual", "completed")}
    phrasing: str = "usual"

    def draw(self, rng: random.Random, split: Split) -> Example:
        things = rng.sample(of_split(self.name, OBJECTS, split), 3)
        colours = rng.sample(COLOURS, 3)
        asked, rival = rng.sample(range(3), 2)
        template = rng.choice(TEMPLATES if self.phrasing == "usual" else COMPLETED)
        parts = {f"o{i}": thing for i, thing in enumerate(things)} | {f"c{i}": c for i, c in enumerate(colours)}
        prompt, spans = fill_in(template, query=things[asked], **parts)
        return Example(
            prompt=prompt,
            answer=" " + colours[asked],
            foil=" " + colours[rival],
            corrupted=fill_in(template, query=things[rival], **parts)[0],
            corrupted_answer=" " + colours[rival],
            spans={
                "colour": spans[f"c{asked}"],
                "object": spans[f"o{asked}"],
                "query": spans["query"],
                "foil": spans[f"c{rival}"],
                "end": last_piece(prompt),
            },
            continuation=".",
        )
