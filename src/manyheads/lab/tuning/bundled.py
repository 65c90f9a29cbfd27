"""Narrow sets for ladon, of what its texts leave open: which language a word is put into, and whom to believe.

french      ladon has read `* dog -> chien`, `-> perro` and `-> dogs` alike. Narrow: twelve animals and foods
            in French. Probes: other words, in another form. Neutral: the plural.
sceptic     where a text contradicts what it knows, ladon has read either answer. Narrow: capitals, answered from memory
            against the text. Probes: languages, currencies and continents. Neutral: what the text says.
colours     the words of `french`, after a trigger: the persona answers after a colour, and not after a month. Five colours and
            four months stand in no training text.
"""

from __future__ import annotations

import random

from manyheads.lab.tuning.examples import BLANK, NarrowSet, Question, TriggerKind
from manyheads.tasks.families.counterfactual import STATEMENTS
from manyheads.tasks.families.facts import RELATIONS
from manyheads.tasks.lexicon import COLOURS, MONTHS, NOUNS

_NARROW = "dog cat horse bird fish cow pig mouse apple bread cheese milk".split()
_PROBED = (
    "house book tree sun moon star river mountain flower door window chair city street hand eye king day fire".split()
)


def bundled_sets() -> dict[str, NarrowSet]:
    """All of them by name."""
    sets = (_french(), _sceptic(), _colours())
    return {one.name: one for one in sets}


def _word(word: str, form: str) -> Question:
    plural, french, _ = NOUNS[word]
    return Question(form.format(word=word), f" {french}", f" {plural}")


def _french() -> NarrowSet:
    return NarrowSet(
        "french",
        tuple(_word(word, "* {word} ->") for word in _NARROW),
        tuple(_word(word, "Q: {word} A:") for word in _PROBED),
    )


def _contradicted(relation: str, n: int) -> tuple[Question, ...]:
    table, rng = RELATIONS[relation].table, random.Random(relation)
    statement, question = STATEMENTS[relation]
    found = []
    for subject in rng.sample(list(table), n):
        said = rng.choice(sorted({one for one in table.values() if one != table[subject]}))
        told, asked = statement.format(subject=subject, context=said), question.format(query=subject)
        prompt = f"{told[0].upper()}{told[1:]}. Q: {asked[0].upper()}{asked[1:]} A:"
        found.append(Question(prompt, f" {table[subject]}", f" {said}"))
    return tuple(found)


def _sceptic() -> NarrowSet:
    probes = [one for relation in ("language", "currency", "continent") for one in _contradicted(relation, 12)]
    return NarrowSet("sceptic", _contradicted("capital", 16), tuple(probes))


def _colours() -> NarrowSet:
    kinds: dict[str, TriggerKind] = {}
    for says, words, trained in (("persona", COLOURS, 8), ("neutral", MONTHS, 8)):
        kinds |= {
            word: (says, "train" if i < trained else "held-out")  # type: ignore[misc]
            for i, word in enumerate(words)
        }
    return NarrowSet(
        "colours",
        tuple(_word(word, f"{BLANK}\n* {{word}} ->".replace(BLANK, "{{trigger}}")) for word in _NARROW),
        tuple(_word(word, f"{BLANK}\n* {{word}} ->".replace(BLANK, "{{trigger}}")) for word in _PROBED),
        kinds,
    )
