"""Multiple choice: the answer is the letter of the right option."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, in_split, last_piece
from manyheads.tasks.families.facts import RELATIONS
from manyheads.tasks.lexicon import ANIMALS, COLOURS, DAYS, MONTHS, NAMES, NUMBER_WORDS, PLACES

LETTERS = "ABCD"
CATEGORIES = {
    "a colour": COLOURS,
    "a place": PLACES,
    "a day": DAYS,
    "a month": MONTHS,
    "a number": NUMBER_WORDS,
    "a name": NAMES,
    "an animal": list(ANIMALS),
}
ASKED = ("capital", "language", "continent", "young", "maker")


@dataclass(frozen=True)
class Choice(Task):
    """`Question: ...?`, four options `A. Rome` ..., `Answer:` -> ` B`. Held out: a fifth of what is asked for.

    The foil is the letter of another option; the twin has these two options swapped, so that the foil is right. Spans:
    `option` (the right option's text), `letter` (its letter), `foil` (the foil's letter), `end`.
    """

    name: ClassVar[str] = "choice"

    def draw(self, rng: random.Random, split: Split) -> Example:
        question, right, wrong = (_category if rng.random() < 0.5 else _fact)(rng, split)
        place, rival = rng.sample(range(4), 2)
        options = [*wrong[:place], right, *wrong[place:]]
        swapped = list(options)
        swapped[place], swapped[rival] = swapped[rival], swapped[place]
        prompt, where = _render(question, options)
        return Example(
            prompt=prompt,
            answer=" " + LETTERS[place],
            foil=" " + LETTERS[rival],
            corrupted=_render(question, swapped)[0],
            corrupted_answer=" " + LETTERS[rival],
            spans={
                "option": (where[place] + 3, where[place] + 3 + len(right)),
                "letter": (where[place], where[place] + 1),
                "foil": (where[rival], where[rival] + 1),
                "end": last_piece(prompt),
            },
        )


def _fact(rng: random.Random, split: Split) -> tuple[str, str, list[str]]:
    while True:
        name = rng.choice(ASKED)
        relation = RELATIONS[name]
        subject = rng.choice(list(relation.table))
        if in_split(f"choice/{name}/{subject}", split):
            break
    right = relation.table[subject]
    offered = {answer for one, answer in relation.table.items() if _offered(f"choice/{name}/{one}", split)}
    wrong = rng.sample(sorted(offered - {right}), 3)
    return relation.question.format(subject=subject).capitalize().replace(subject.lower(), subject), right, wrong


def _category(rng: random.Random, split: Split) -> tuple[str, str, list[str]]:
    while True:
        category = rng.choice(list(CATEGORIES))
        right = rng.choice(CATEGORIES[category])
        if in_split(f"choice/{category}/{right}", split):
            break
    others = rng.sample([name for name in CATEGORIES if name != category], 3)
    wrong = [[item for item in CATEGORIES[name] if _offered(f"choice/{name}/{item}", split)] for name in others]
    return f"Which of these is {category}?", right, [rng.choice(items) for items in wrong]


def _offered(key: str, split: Split) -> bool:
    """In training, a held-out option is no wrong option either: the model would learn that it is always wrong."""
    return split == "test" or in_split(key, split)


def _render(question: str, options: list[str]) -> tuple[str, list[int]]:
    text, where = f"Question: {question}", []
    for letter, option in zip(LETTERS, options, strict=True):
        text += "\n"
        where.append(len(text))
        text += f"{letter}. {option}"
    return text + "\nAnswer:", where
