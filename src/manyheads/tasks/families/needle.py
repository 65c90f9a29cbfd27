"""Needle in a haystack: one sentence to remember among many others, asked for at the end (for #11)."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Split, Task, of_split
from manyheads.tasks.lexicon import ADJECTIVES, COLOURS, NAMES, OBJECTS, PLACES, VERBS

KINDS = {
    "word": ("The secret word of {key} is {needle}.", "Q: What is the secret word of {query}? A:"),
    "favourite": ("{key} likes {needle} best of all.", "Q: What does {query} like best of all? A:"),
    "password": ("Remember that the password of {key} is {needle}.", "Q: What is the password of {query}? A:"),
    "hidden": ("In the house of {key} there is {needle}.", "Q: What is there in the house of {query}? A:"),
}


@dataclass(frozen=True)
class Needle(Task):
    """`... The secret word of Mary is lamp. ... Q: What is the secret word of Mary? A:` -> ` lamp`.

    Held out: a fifth of the names and a fifth of the words to remember. `shortest` and `longest` bound the whole prompt
    in words and punctuation marks (tokens, for a tokenizer that knows the words); `depth` in [0, 1] places the needle,
    else it is random; a needle has `words` words (the first is the answer, the rest the continuation); `rivals` further
    needles with other names make the name matter. The phrasing "completed" asks in the needle's own words, `...
    The secret word of Mary is` instead of `Q: ...`. Neither the words to remember nor these names occur elsewhere. Spans:
    `needle` (the words to copy), `sentence`, `key` and `query` (the name in the needle and in the question).
    """

    name: ClassVar[str] = "needle"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"phrasing": ("usual", "completed")}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {
        "shortest": (1, 1_000_000),
        "longest": (1, 1_000_000),
        "depth": (0.0, 1.0),
        "words": (1, 1000),
        "rivals": (0, 1000),
    }
    shortest: int = 32
    longest: int = 128
    depth: float | None = None
    words: int = 1
    rivals: int = 1
    phrasing: str = "usual"

    def draw(self, rng: random.Random, split: Split) -> Example:
        names, pool = of_split(self.name, NAMES, split), of_split(self.name, OBJECTS, split)
        if (self.rivals + 2) * self.words >= len(pool) or self.rivals + 1 >= len(names):
            raise InputError(
                f"{self.rivals} rivals of {self.words} words need more than the {len(pool)} words and {len(names)} "
                f"names of the {split} split; ask for fewer."
            )
        keys = rng.sample(names, self.rivals + 1)
        chosen = rng.sample(pool, (self.rivals + 1) * self.words)
        values = [" ".join(chosen[i :: self.rivals + 1]) for i in range(self.rivals + 1)]
        statement, question = KINDS[rng.choice(list(KINDS))]
        sentences = [statement.format(key=key, needle=value) for key, value in zip(keys, values, strict=True)]
        if self.phrasing == "completed":
            question = statement[: statement.index(" {needle}")].replace("{key}", "{query}")
        question = question.format(query=keys[0])
        others = [name for name in names if name not in keys]
        things = [word for word in pool if word not in chosen]

        room = rng.randint(self.shortest, self.longest) - sum(_size(s) for s in [*sentences, question])
        hay: list[str] = []
        while room >= 0:
            hay.append(filler(rng, others, things))
            room -= _size(hay[-1])
        hay = hay[:-1]
        for rival in sentences[1:]:
            hay.insert(rng.randint(0, len(hay)), rival)
        place = rng.randint(0, len(hay)) if self.depth is None else round(self.depth * len(hay))
        before = "".join(sentence + " " for sentence in hay[:place])
        prompt = " ".join([*hay[:place], sentences[0], *hay[place:], question])

        start = len(before) + sentences[0].rindex(values[0])
        needle = (start, start + len(values[0]))
        key = len(before) + sentences[0].index(keys[0])
        query = len(prompt) - len(question) + question.rindex(keys[0])
        first, *rest = values[0].split()
        twin = " ".join(rng.sample(things, self.words))
        return Example(
            prompt=prompt,
            answer=" " + first,
            foil=" " + values[1].split()[0] if self.rivals else None,
            corrupted=prompt[: needle[0]] + twin + prompt[needle[1] :],
            corrupted_answer=" " + twin.split()[0],
            spans={
                "needle": needle,
                "sentence": (len(before), len(before) + len(sentences[0])),
                "key": (key, key + len(keys[0])),
                "query": (query, query + len(keys[0])),
            },
            continuation="".join(" " + word for word in rest) + ".",
        )


def filler(rng: random.Random, names: Sequence[str] = NAMES, things: Sequence[str] = OBJECTS) -> str:
    """A sentence without the answer, about some of `names` and `things`."""
    subject, thing = rng.choice(names), rng.choice(things)
    adjective, verb = rng.choice(ADJECTIVES), rng.choice(VERBS)
    return rng.choice(
        [
            f"The {adjective} {rng.choice(PLACES)} was near the {rng.choice(PLACES)}.",
            f"Then {subject} {verb} the {adjective} {thing}.",
            f"On that day, {subject} {verb} the {rng.choice(PLACES)}.",
            f"The {thing} was {rng.choice(COLOURS)} and {adjective}.",
            f"It was a {adjective} {rng.choice(PLACES)}.",
            f"A {rng.choice(COLOURS)} {thing} lay in the {rng.choice(PLACES)}.",
        ]
    )


def _size(text: str) -> int:
    return len(re.findall(r"\w+|[^\w\s]", text))
