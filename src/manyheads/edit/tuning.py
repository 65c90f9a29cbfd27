"""Learning the numbers of an edit while the model stays as it is: one loop for every method that does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.edit.examples import Answered
from manyheads.errors import InputError
from manyheads.model.editing import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay import first_logits, no_cache
from manyheads.training import Progress, TrainSettings, WarmupStableDecay, fit
from manyheads.training.loop import Batch


class Learned(nn.Module):
    """What is learned of an edit of `model`. Subclasses hold parameters and say which edit they make, and what they cost."""

    def __init__(self, model: HeadModel) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: the trunk is no part of what is learned

    @property
    def model(self) -> HeadModel:
        """The model that is edited."""
        return self._model[0]

    def edit(self, length: int) -> Edit:
        """The edit, for prompts of `length` columns; gradients reach the parameters through it."""
        raise TypeError(f"{type(self).__name__} does not say which edit it makes; fill in its edit method.")

    def penalty(self) -> Tensor | float:
        """What is added to the loss."""
        return 0.0

    def forward(self, input_ids: Tensor, attention_mask: Tensor, said: Tensor) -> Float[Tensor, "B"]:
        """Each answer's log-probability under the edit, in nats."""
        given = Answered(input_ids, attention_mask, said.bool())
        plain = self.model.plain
        with self.model.editing(self.edit(prompt_length(given))):
            return given.log_p(first_logits(plain(**given.inputs(self.model), **no_cache(plain))))


@dataclass(frozen=True)
class Learning:
    """How an edit's numbers are learned: `epochs` over the examples, or `steps`, of `rows` each, by AdamW at `rate`, no decay.

    With held-out examples the best state counts of those looked at, one every `every` steps (default: every epoch), and
    `patience` looks without a better one end the run.
    """

    rate: float
    epochs: int = 5
    steps: int | None = None
    rows: int = 8
    every: int | None = None
    patience: int = 3
    seed: int = 0


def prompt_length(examples: Answered) -> int:
    """How many columns come before the answers. `InputError` if that differs between rows."""
    first = examples.said.to(torch.uint8).argmax(1)
    if (first != first[0]).any():
        raise InputError("answers begin in different columns; left-pad prompts with answers of one length.")
    return int(first[0])


def learn(
    learned: Learned,
    examples: Answered,
    how: Learning,
    *,
    dev: Answered | None = None,
    folder: Path | None = None,
) -> list[float]:
    """Train `learned` in place on the answers of `examples`; the losses on `dev` (empty without).

    The trunk's weights are untouched. With a `folder` the run's state is kept there, and the same call goes on where it stopped.
    """
    if not len(examples):
        raise InputError("there are no examples to learn from.")
    each = max(1, len(examples) // how.rows)

    def batch_at(number: int) -> Batch:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(how.seed + number // each))
        some = examples.rows(order[number % each * how.rows :][: how.rows])
        return {"input_ids": some.input_ids, "attention_mask": some.attention_mask, "said": some.said}

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        return -module(**batch).mean() + learned.penalty()

    losses: list[float] = []
    best: dict[str, Tensor] = deepcopy(learned.state_dict())

    def after_step(progress: Progress) -> bool:
        if dev is None or progress.step % (how.every or each):
            return True
        losses.append(held_out_loss(learned, dev))
        if losses[-1] <= min(losses):
            best.update(deepcopy(learned.state_dict()))
        return len(losses) - 1 - losses.index(min(losses)) < how.patience

    settings = TrainSettings(
        steps=how.epochs * each if how.steps is None else how.steps,
        schedule=WarmupStableDecay(peak=how.rate, warmup=1, decay=0.0),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        precision="fp32",
        seed=how.seed,
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(frozen(learned.model))
        where = Path(stack.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder
        fit(learned, batch_at, where, settings, loss=loss, after_step=after_step)
    learned.to("cpu")
    if dev is not None and losses:
        learned.load_state_dict(best)
    return losses


@torch.no_grad()
def held_out_loss(learned: Learned, examples: Answered, *, rows: int = 64) -> float:
    """Mean negative log-likelihood of the answers, in nats."""
    parts = [examples.rows(slice(i, i + rows)) for i in range(0, len(examples), rows)]
    values = [learned(part.input_ids, part.attention_mask, part.said) for part in parts]
    return -float(torch.cat(values).mean())


@torch.no_grad()
def accuracy(model: HeadModel, examples: Answered, edits: list[Edit] | None = None, *, rows: int = 64) -> float:
    """Share of answers that greedy decoding gives, under `edits`."""
    right = []
    with model.editing(*(edits or [])):
        for i in range(0, len(examples), rows):
            part = examples.rows(slice(i, i + rows))
            right.append(part.right(model.logits(part.inputs(model))))
    return float(torch.cat(right).float().mean())


@contextlib.contextmanager
def frozen(model: HeadModel) -> Iterator[None]:
    """While this lasts, the trunk's weights ask for no gradient, and dropout is off."""
    wanted = [p for p in model.plain.parameters() if p.requires_grad]
    training = model.plain.training
    for parameter in wanted:
        parameter.requires_grad_(False)
    model.plain.eval()
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.plain.train(training)
