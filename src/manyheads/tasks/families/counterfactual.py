"""Counterfactual context: the prompt contradicts a known fact; which source does the model follow? (#8, #82)"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece
from manyheads.tasks.families.facts import RELATIONS

# relation -> statement, question
STATEMENTS = {
    "capital": ("the capital of {subject} is {context}", "what is the capital of {query}?"),
    "language": ("the language of {subject} is {context}", "what is the language of {query}?"),
    "continent": ("the continent of {subject} is {context}", "what is the continent of {query}?"),
    "currency": ("the currency of {subject} is the {context}", "what is the currency of {query}?"),
}
# the side that is right -> ways to say so
FORMS = {
    "context": (
        "In this story, {statement}. Q: In this story, {question} A:",
        "According to the text, {statement}. Q: According to the text, {question} A:",
    ),
    "memory": (
        "Somebody said that {statement}. Q: In truth, {question} A:",
        "In this story, {statement}. Q: Actually, {question} A:",
    ),
    "bare": ("{Statement}. Q: {Question} A:",),
}
# the same, to be completed in the statement's own words
COMPLETED = {
    "context": (
        "In this story, {statement}. In this story, {again}",
        "According to the text, {statement}. According to the text, {again}",
    ),
    "memory": ("Somebody said that {statement}. In truth, {again}", "In this story, {statement}. Actually, {again}"),
    "bare": ("{Statement}. {Again}",),
}


@dataclass(frozen=True)
class Counterfactual(Task):
    """`In this story, the capital of France is Rome. Q: In this story, what is the capital of France? A:` -> ` Rome`.

    `form` sets whose answer is right: "context" (` Rome`), "memory" (`Q: In truth, ...` -> ` Paris`), "marked" (either,
    as the prompt states) or "bare" (the prompt does not state which: the answer is the context's, the foil the memorised one).
    Held out: a fifth of the pairs (subject, contradicting answer). The foil is always the other source's answer; the
    twin of a context prompt states a third answer, that of a memory prompt asks about another subject. Spans:
    `context`, `subject`, `query` (the subject in the question), `end`. The phrasing "completed" asks in the statement's own
    words: `In this story, the capital of France is Rome. In this story, the capital of France is`.
    """

    name: ClassVar[str] = "counterfactual"
    choices: ClassVar[Mapping[str, Collection[str]]] = {
        "form": ("marked", "context", "memory", "bare"),
        "relation": tuple(STATEMENTS),
        "phrasing": ("usual", "completed"),
    }
    form: Literal["marked", "context", "memory", "bare"] = "marked"
    relation: str | None = None
    phrasing: str = "usual"

    def draw(self, rng: random.Random, split: Split) -> Example:
        relation = self.relation or rng.choice(list(STATEMENTS))
        form = rng.choice(["context", "memory"]) if self.form == "marked" else self.form
        table = RELATIONS[relation].table
        answers = sorted(set(table.values()))
        while True:
            subject, stated = rng.choice(list(table)), rng.choice(answers)
            if stated != table[subject] and in_split(f"counterfactual/{relation}/{subject}/{stated}", split):
                break
        third = rng.choice([one for one in answers if one not in (stated, table[subject])])
        rival = rng.choice([one for one in table if table[one] not in (stated, table[subject])])
        template = _template(
            rng.choice((FORMS if self.phrasing == "usual" else COMPLETED)[form]), *STATEMENTS[relation]
        )
        prompt, spans = fill_in(template, subject=subject, query=subject, context=stated)
        if form == "memory":
            right, wrong, twin_answer = table[subject], stated, table[rival]
            twin = fill_in(template, subject=rival, query=rival, context=stated)[0]
        else:
            right, wrong, twin_answer = stated, table[subject], third
            twin = fill_in(template, subject=subject, query=subject, context=third)[0]
        return Example(
            prompt=prompt,
            answer=" " + right,
            foil=" " + wrong,
            corrupted=twin,
            corrupted_answer=" " + twin_answer,
            spans={name: spans[name] for name in ("context", "subject", "query")} | {"end": last_piece(prompt)},
            continuation=".",
        )


def _template(form: str, statement: str, question: str) -> str:
    again = statement[: statement.index(" {context}")].replace("{subject}", "{query}")
    parts = {"statement": statement, "question": question, "again": again}
    capital = {f"{{{name.capitalize()}}}": text[0].upper() + text[1:] for name, text in parts.items()}
    for name, text in {**{f"{{{name}}}": text for name, text in parts.items()}, **capital}.items():
        form = form.replace(name, text)
    return form
