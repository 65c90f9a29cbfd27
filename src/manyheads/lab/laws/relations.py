"""Facts as a model tells them: how likely each object of a relation is after each subject, forwards and backwards.

    S[i, j] = log p(object_j | prompt of subject_i)                                      nats, whole answers
    gain[i] = S[i, i] - mean_j S[i, j] - mean_i S[i, j=i] + mean S                       0 if subjects say nothing of objects

The second mean takes out how likely an object is after any subject: a frequent name gains nothing by being frequent.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.inputs import clause
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, encode, whole_answers
from manyheads.tasks.lexicon import ANIMALS, COUNTRIES


@dataclass(frozen=True)
class TwoWay:
    """Pairs (a, b) and how to ask for b by a (`forward`, with {a}) and for a by b (`backward`, with {b}).

    `InputError` for fewer than 4 pairs, a name that stands twice, or a phrasing without its one blank.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    forward: str
    backward: str

    def __post_init__(self) -> None:
        for phrasing, blank in ((self.forward, "a"), (self.backward, "b")):
            if re.findall(r"{(.*?)}", phrasing) != [blank]:
                raise InputError(f"the phrasing {phrasing!r} needs {{{blank}}} once, and no other blank.")
        for side in zip(*self.pairs, strict=True):
            if len(set(side)) < len(side):
                raise InputError(f"{self.name}: a name stands twice on one side; the law is about one-to-one facts.")
        if len(self.pairs) < 4:
            raise InputError(f"{self.name} has {len(self.pairs)} pairs; give at least 4.")

    @classmethod
    def read(cls, path: str | Path, forward: str, backward: str) -> TwoWay:
        """Pairs from a CSV file with the columns a and b."""
        try:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read as CSV: {clause(error)}.") from None
        if not {"a", "b"} <= set(frame):
            raise InputError(f"{path} has the columns {', '.join(map(str, frame))}; it needs a and b.")
        pairs = zip(frame["a"].str.strip(), frame["b"].str.strip(), strict=True)
        return cls(Path(path).stem, tuple(pairs), forward, backward)

    def scores(self, model: HeadModel, *, backward: bool = False) -> Float[np.ndarray, "N N"]:
        """S of the formula above. `InputError` if the tokenizer cannot write a name as tokens of its own."""
        phrasing = self.backward if backward else self.forward
        prompts = [phrasing.format(a=a, b=b) for a, b in self.pairs]
        answers = [" " + (a if backward else b) for a, b in self.pairs]
        return answer_scores(model, prompts, answers)


def answer_scores(model: HeadModel, prompts: list[str], answers: list[str]) -> Float[np.ndarray, "N M"]:
    """Log-probability (nats) of every answer after every prompt, all of its tokens."""
    if model.tokenizer is None:
        raise InputError("facts are text; open the model with its tokenizer.")
    examples = [Example(prompt, answer) for prompt in prompts for answer in answers]
    batch = encode(examples, model.tokenizer, len(examples))
    if len(batch) < len(examples):
        raise InputError(
            f"this tokenizer joins an answer to its prompt ({', '.join(batch.dropped)}); put it otherwise."
        )
    return whole_answers(model, batch).answer.numpy().reshape(len(prompts), len(answers))


def gains(scores: Float[np.ndarray, "N N"]) -> Float[np.ndarray, "N N"]:
    """Scores without what rows and columns have in common; the diagonal is the gain of the right pairs (formula above)."""
    rows, columns = scores.mean(1, keepdims=True), scores.mean(0, keepdims=True)
    return scores - rows - columns + scores.mean()


BUNDLED = (
    TwoWay(
        "capitals",
        tuple((country, row[0]) for country, row in list(COUNTRIES.items())[:24]),
        "The capital of {a} is",
        "{b} is the capital of",
    ),
    TwoWay(
        "young animals",
        tuple((animal, row[0]) for animal, row in ANIMALS.items()),
        "The young of a {a} is a",
        "A {b} is the young of a",
    ),
)
