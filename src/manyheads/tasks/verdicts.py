"""What a model can do of a task family, before heads are looked for: does it answer, does it prefer the answer, or neither?

Over `n` rows, with the whole answer a and the whole foil f (see `scoring`),

    answered  = share of rows whose accepted answer greedy decoding writes whole                         in [0, 1]
    preferred = share of rows with log p(a) > log p(f), ties counted half                                in [0, 1], 0.5 by chance
    p_value   = P(Binomial(m, 1/2) >= k),  k of the m rows that are no ties preferred                    one-sided

A family is *answered* where at least half of its rows are and the answer is also preferred to the foil above chance (a model
that always says one of two answers is right on half of the rows), *preferred* where only the latter holds, and *at chance*,
or blind, otherwise. No head of a blind family can be found or checked: there is nothing to lose. Where no row has a foil, the
share answered decides alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb, nan, sqrt
from typing import Literal

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks.base import Split, Task
from manyheads.tasks.encoding import TaskBatch, try_encode
from manyheads.tasks.scoring import whole_answers

Verdict = Literal["answered", "preferred", "at chance"]
ANSWERED, ALPHA = 0.5, 0.05
TIE = 1e-6  # nats: less is the order of summing


@dataclass(frozen=True)
class TaskVerdict:
    """What a model does with family `name` (formulas above), on `n` rows.

    `stderr` is that of `preferred`; both and `p_value` are NaN where no row has a foil. `dropped` counts, by reason, the
    examples that the tokenizer could not encode; with `n` 0 it could encode none, and the family is at chance.
    """

    name: str
    n: int
    answered: float
    preferred: float
    stderr: float
    p_value: float
    verdict: Verdict
    dropped: dict[str, int]

    @property
    def blind(self) -> bool:
        """Whether the model does this no better than chance: a check on it would mean nothing."""
        return self.verdict == "at chance"

    def __str__(self) -> str:
        return f"{self.name}: {self.summary}"

    @property
    def summary(self) -> str:
        """The verdict with its figures."""
        if not self.n:
            return "at chance (no example can be encoded)"
        return (
            f"{self.verdict} (answered {self.answered:.0%}, preferred {self.preferred:.0%} "
            f"± {self.stderr:.0%} of {self.n}, p {self.p_value:.2g})"
        )


def task_verdict(
    model: HeadModel, task: Task | TaskBatch, *, n: int = 32, seed: int = 0, split: Split = "test"
) -> TaskVerdict:
    """The verdict on `task` (formulas above), from `n` of its examples. `InputError` without a tokenizer.

    A tokenizer that can encode none of them is a verdict too: at chance, with the reasons in `dropped`.
    """
    if isinstance(task, TaskBatch):
        return _verdict(model, "given", task)
    if model.tokenizer is None:
        raise InputError(
            f"the task {task.name} needs a tokenizer; open the model with tokenizer=, or give a TaskBatch."
        )
    batch, dropped = try_encode(task, model.tokenizer, n, seed, split)
    if batch is None:
        return TaskVerdict(task.name, 0, 0.0, nan, nan, nan, "at chance", dropped)
    return _verdict(model, task.name, batch)


def _verdict(model: HeadModel, name: str, batch: TaskBatch) -> TaskVerdict:
    scores = whole_answers(model, batch)
    answered = float(scores.right.double().mean())
    difference = (scores.answer - scores.foil)[scores.foil.isfinite()]
    won, tied, m = difference > TIE, difference.abs() <= TIE, len(difference)
    wins = won.double() + 0.5 * tied
    preferred = float(wins.mean()) if m else nan
    p_value = _p_value(int(won.sum()), int((~tied).sum())) if m else nan
    above = p_value < ALPHA if m else answered >= ANSWERED
    verdict: Verdict = "at chance" if not above else "answered" if answered >= ANSWERED else "preferred"
    stderr = float(wins.std() / sqrt(m)) if m > 1 else nan
    return TaskVerdict(name, len(batch), answered, preferred, stderr, p_value, verdict, batch.dropped)


def _p_value(wins: int, n: int) -> float:
    """P(Binomial(n, 1/2) >= wins); 1 where every row is a tie."""
    return sum(comb(n, k) for k in range(wins, n + 1)) / 2**n
