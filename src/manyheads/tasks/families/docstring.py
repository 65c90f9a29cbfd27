"""Docstring: after two documented arguments comes the third of the signature."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, last_piece, of_split
from manyheads.tasks.lexicon import ADJECTIVES, OBJECTS, VERBS, WORDS

TEMPLATE = '''def {function}(self, {A_def}, {B_def}, {C_def}, {D_def}):
    """{text}

    :param {A_doc}: {a}
    :param {B_doc}: {b}
    :param'''


@dataclass(frozen=True)
class Docstring(Task):
    """`def f(self, cup, pen, mug, lamp)` with `:param cup: ...`, `:param pen: ...`, `:param` -> ` mug`.

    Held out: a fifth of the argument names. The foil is the last argument; the twin's signature names another word in
    place of the answer. Spans: `A_def` `B_def` `C_def` `D_def` `A_doc` `B_doc` `end`, where `C_def` is the answer.
    """

    name: ClassVar[str] = "docstring"

    def draw(self, rng: random.Random, split: Split) -> Example:
        *names, swapped = rng.sample(of_split(self.name, WORDS, split), 5)
        a, b, c, d = names
        parts = {
            "function": rng.choice(VERBS),
            "A_def": a,
            "B_def": b,
            "D_def": d,
            "A_doc": a,
            "B_doc": b,
            "text": f"{rng.choice(ADJECTIVES)} {rng.choice(ADJECTIVES)}",
            "a": f"the {rng.choice(ADJECTIVES)} {rng.choice(of_split(self.name, OBJECTS, split))}",
            "b": f"the {rng.choice(ADJECTIVES)} {rng.choice(of_split(self.name, OBJECTS, split))}",
        }
        prompt, spans = fill_in(TEMPLATE, C_def=c, **parts)
        kept = ("A_def", "B_def", "C_def", "D_def", "A_doc", "B_doc")
        return Example(
            prompt=prompt,
            answer=" " + c,
            foil=" " + d,
            corrupted=fill_in(TEMPLATE, C_def=swapped, **parts)[0],
            corrupted_answer=" " + swapped,
            spans={name: spans[name] for name in kept} | {"end": last_piece(prompt)},
            continuation=": a value",
        )
