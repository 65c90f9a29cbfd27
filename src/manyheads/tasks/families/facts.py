"""World facts with one-word answers: capitals, languages, continents, currencies, animals, makers."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece
from manyheads.tasks.lexicon import ANIMALS, COUNTRIES, MAKERS


@dataclass(frozen=True)
class Relation:
    """One relation: `table[subject]` is its object, with the question for it and its phrasings."""

    table: dict[str, str]
    question: str
    templates: tuple[str, ...]


def _column(table: dict[str, tuple[str, ...]], i: int) -> dict[str, str]:
    return {subject: row[i] for subject, row in table.items()}


RELATIONS = {
    "capital": Relation(
        _column(COUNTRIES, 0),
        "what is the capital of {subject}?",
        (
            "The capital of {subject} is",
            "The capital city of {subject} is called",
            "In {subject}, the capital is",
            "{subject} has its capital in",
        ),
    ),
    "language": Relation(
        _column(COUNTRIES, 1),
        "which language is spoken in {subject}?",
        (
            "The language of {subject} is",
            "People in {subject} speak",
            "In {subject}, the language is",
            "{subject} is a country where they speak",
        ),
    ),
    "continent": Relation(
        _column(COUNTRIES, 2),
        "which continent is {subject} in?",
        (
            "The continent of {subject} is",
            "{subject} is a country in",
            "{subject} lies in",
            "On the map, {subject} is part of",
        ),
    ),
    "currency": Relation(
        _column(COUNTRIES, 3),
        "what is the currency of {subject}?",
        (
            "The currency of {subject} is the",
            "People in {subject} pay with the",
            "The money of {subject} is the",
            "In {subject}, the currency is the",
        ),
    ),
    "young": Relation(
        _column(ANIMALS, 0),
        "what is the young of a {subject} called?",
        (
            "The young of a {subject} is a",
            "A young {subject} is called a",
            "The child of a {subject} is a",
            "A baby {subject} is a",
        ),
    ),
    "sound": Relation(
        _column(ANIMALS, 1),
        "what does a {subject} do?",
        ("The {subject}", "Every {subject}", "You can hear how the {subject}", "At night a {subject}"),
    ),
    "maker": Relation(
        dict(MAKERS),
        "which country does {subject} come from?",
        (
            "The company {subject} comes from",
            "{subject} is a company from",
            "The home of {subject} is",
            "{subject} was founded in",
        ),
    ),
}


@dataclass(frozen=True)
class Facts(Task):
    """`The capital of France is` -> ` Paris`. Held out: a quarter of the pairs (phrasing, subject).

    So every fact is in the training texts, but not in this phrasing. `relation` picks one. The foil is another subject's
    answer, the twin asks about that subject. Spans: `subject`, `end`.
    """

    name: ClassVar[str] = "facts"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"relation": tuple(RELATIONS)}
    relation: str | None = None

    def draw(self, rng: random.Random, split: Split) -> Example:
        relation = RELATIONS[self.relation or rng.choice(list(RELATIONS))]
        table = relation.table
        templates = [*relation.templates, f"Q: {relation.question.capitalize()} A:"]
        while True:
            template, subject = rng.choice(templates), rng.choice(list(table))
            if in_split(f"facts/{template}/{subject}", split, 4):
                break
        rival = rng.choice([one for one in table if table[one] != table[subject]])
        prompt, spans = fill_in(template, subject=subject)
        return Example(
            prompt=prompt,
            answer=" " + table[subject],
            foil=" " + table[rival],
            corrupted=fill_in(template, subject=rival)[0],
            corrupted_answer=" " + table[rival],
            spans={"subject": spans["subject"], "end": last_piece(prompt)},
            continuation=".",
        )
