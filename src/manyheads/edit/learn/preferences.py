"""Preferring one answer to another: the loss by which an edit learns from pairs (DPO), in the loop of all edits.

Rafailov et al., arXiv:2305.18290 (NeurIPS 2023); LoFiT (#30, arXiv:2406.01563) learns TruthfulQA by it. With c the chosen
answer to a prompt, r the rejected one and p0 the model before the edit,

    margin = beta [(log p(c) - log p0(c)) - (log p(r) - log p0(r))]            loss = -log sigmoid(margin)        in nats

so an edit that does nothing has a loss of ln 2. The difference alone is learned: both answers may become unlikely, so look at
accuracy beside it. log p0 is taken once, before. The paper's beta is 0.5; chosen is the best answer, rejected the first wrong
one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.edit.learn.examples import Answered
from manyheads.errors import InputError
from manyheads.model.editing.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example

BETA = 0.5


@dataclass(frozen=True)
class Preferences:
    """Prompts with a `chosen` and a `rejected` answer. `reference` holds log p0 of both, in nats."""

    chosen: Answered
    rejected: Answered
    reference: Float[Tensor, "N 2"]
    beta: float = BETA

    @classmethod
    def of(cls, model: HeadModel, chosen: Answered, rejected: Answered, *, beta: float = BETA) -> Preferences:
        """From the two answers to the same prompts; `model` as it is now is the reference.

        `InputError` if they differ in shape, or for a beta that is not positive.
        """
        if chosen.input_ids.shape != rejected.input_ids.shape:
            raise InputError(
                f"chosen answers are {list(chosen.input_ids.shape)} with their prompts, rejected ones "
                f"{list(rejected.input_ids.shape)}; give both for the same prompts (Preferences.of_examples pads them)."
            )
        if not beta > 0:
            raise InputError(f"beta is {beta:g}; give a positive number.")
        return cls(chosen, rejected, torch.stack([log_p(model, side) for side in (chosen, rejected)], 1), beta)

    @classmethod
    def of_examples(cls, model: HeadModel, examples: Sequence[Example], *, beta: float = BETA) -> Preferences:
        """From examples: the answer is chosen, the foil rejected. `InputError` where there is no foil."""
        foils = [example.foil for example in examples if example.foil is not None]
        if len(foils) < len(examples):
            raise InputError("not every example has a foil; preferences need a wrong answer for each prompt.")
        both = Answered.of_texts(model, [e.prompt for e in examples] * 2, [*(e.answer for e in examples), *foils])
        n = len(examples)
        return cls.of(model, both.rows(slice(0, n)), both.rows(slice(n, 2 * n)), beta=beta)

    @property
    def input_ids(self) -> Int[Tensor, "N {2*self.chosen.input_ids.shape[1]}"]:
        """Both sides, next to each other."""
        return torch.cat([self.chosen.input_ids, self.rejected.input_ids], 1)

    def __len__(self) -> int:
        return len(self.chosen)

    def rows(self, index: Int[Tensor, "n"] | slice) -> Preferences:
        """Some of the rows."""
        return Preferences(self.chosen.rows(index), self.rejected.rows(index), self.reference[index], self.beta)

    def margins(self, log_p: Callable[[Answered], Float[Tensor, "M"]]) -> Float[Tensor, "N"]:
        """How much more the chosen answer is preferred than by the reference, times beta (formula above)."""
        pairs = (getattr(self.chosen, name) for name in ("input_ids", "attention_mask", "is_answer"))
        others = (getattr(self.rejected, name) for name in ("input_ids", "attention_mask", "is_answer"))
        both = log_p(Answered(*(torch.cat(pair) for pair in zip(pairs, others, strict=True)))).unflatten(0, (2, -1))
        moved = both - self.reference.T.to(both)
        return self.beta * (moved[0] - moved[1])

    def loss(self, log_p: Callable[[Answered], Float[Tensor, "M"]]) -> Float[Tensor, "N"]:
        """-log sigmoid of the margins, in nats."""
        return -F.logsigmoid(self.margins(log_p))


@torch.no_grad()
def log_p(model: HeadModel, answers: Answered, edits: Sequence[Edit] = (), *, rows: int = 64) -> Float[Tensor, "N"]:
    """Each answer's log-probability under `edits`, in nats."""
    found = []
    with model.editing(*edits):
        for start in range(0, len(answers), rows):
            some = answers.rows(slice(start, start + rows))
            found.append(some.log_p(model.logits(some.inputs(model))).cpu())
    return torch.cat(found)


def preferred(model: HeadModel, pairs: Preferences, edits: Sequence[Edit] = ()) -> float:
    """Share of prompts whose chosen answer is likelier than the rejected one, under `edits`."""
    return float((log_p(model, pairs.chosen, edits) > log_p(model, pairs.rejected, edits)).float().mean())
