"""Task by example: a few pairs show what to do (plural, opposite, French, Spanish); the query follows."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Span, Split, Task, in_split, last_piece, other
from manyheads.tasks.lexicon import ANTONYMS, NOUNS

RELATIONS: dict[str, dict[str, str]] = {
    "plural": {noun: row[0] for noun, row in NOUNS.items()},
    "french": {noun: row[1] for noun, row in NOUNS.items()},
    "spanish": {noun: row[2] for noun, row in NOUNS.items()},
    "opposite": {a: b for pair in ANTONYMS for a, b in (pair, pair[::-1])},
}
FORMATS = ["Input: {x}\nOutput:{y}\n", "Q: {x} A:{y}\n", "* {x} ->{y}\n", "- {x}:{y}\n"]


@dataclass(frozen=True)
class ByExample(Task):
    """`* dog -> chien`, `* house -> maison`, `* bread ->` -> ` pain`. Held out: a fifth of the words of each relation.

    `shots` pairs come first. The foil is the word's answer in another relation (for opposites: another opposite); the
    twin shows that other relation instead (for opposites: asks for another word). Spans: `query`, `shot_answers` (the
    last shown answer), `end`.
    """

    name: ClassVar[str] = "by_example"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"relation": tuple(RELATIONS)}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "shots": (0, 30)
    }  # of the 31 words that the smallest relation shows
    shots: int = 4
    relation: str | None = None

    def draw(self, rng: random.Random, split: Split) -> Example:
        name = self.relation or rng.choice(list(RELATIONS))
        table = RELATIONS[name]
        words = _words(name)
        word = rng.choice(
            words if split == "train" else [x for x in table if in_split(f"by_example/{name}/{x}", split)]
        )
        shown = rng.sample([x for x in words if x != word], self.shots)
        form = rng.choice(FORMATS)
        prompt, query, last = _render(form, table, shown, word)
        if name == "opposite":
            asked = other(rng, [x for x in table if in_split(f"by_example/{name}/{x}", split)], word, *shown)
            foil, twin = table[asked], _render(form, table, shown, asked)[0]
        else:
            rival = RELATIONS[other(rng, [r for r in RELATIONS if r != "opposite"], name)]
            foil, twin = rival[word], _render(form, rival, shown, word)[0]
        different = foil != table[word]
        return Example(
            prompt=prompt,
            answer=" " + table[word],
            foil=" " + foil if different else None,
            corrupted=twin,
            corrupted_answer=" " + foil,
            spans={"query": query, "shot_answer": last, "end": last_piece(prompt)},
        )


def _words(relation: str) -> list[str]:
    """The words to show or to train with: held out in no relation, or a word would be seen in the others only."""
    kin = ["opposite"] if relation == "opposite" else [name for name in RELATIONS if name != "opposite"]
    return [x for x in RELATIONS[relation] if all(in_split(f"by_example/{name}/{x}", "train") for name in kin)]


def _render(form: str, table: dict[str, str], shown: list[str], word: str) -> tuple[str, Span, Span]:
    before, after = form.split("{y}")
    text, last = "", (0, 0)
    for x in shown:
        text += before.format(x=x)
        last = (len(text) + 1, len(text) + 1 + len(table[x]))
        text += " " + table[x] + after
    start = len(text) + before.index("{x}")
    return text + before.format(x=word), (start, start + len(word)), last
