"""Learning the numbers of an edit while the model stays as it is: one loop for every method that does."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.edit.learn.examples import Answered, Examples
from manyheads.errors import InputError
from manyheads.model import hooks
from manyheads.model.editing.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.progress import Bar
from manyheads.training import TrainSettings, epoch_rows, fit

LogP = Callable[[nn.Module, Answered], Tensor]
LEARNING = TrainSettings(
    epochs=5, rows=8, warmup=1, decay=0.0, betas=(0.9, 0.999), weight_decay=0.0, precision="fp32", patience=3
)


class LearnedEdit(nn.Module):
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

    def forward(self, input_ids: Tensor, attention_mask: Tensor, is_answer: Tensor) -> Float[Tensor, "B"]:
        """Each answer's log-probability under the edit, in nats."""
        given = Answered(input_ids, attention_mask, is_answer.bool())
        plain = self.model.plain
        with self.model.editing(self.edit(prompt_length(given))):
            return given.log_p(first_logits(plain(**given.inputs(self.model), **no_cache(plain))))


def prompt_length(examples: Answered) -> int:
    """How many columns come before the answers. `InputError` if that differs between rows."""
    first = examples.is_answer.to(torch.uint8).argmax(1)
    if (first != first[0]).any():
        raise InputError("answers begin in different columns; left-pad prompts with answers of one length.")
    return int(first[0])


def learn(
    learned: LearnedEdit,
    examples: Examples,
    settings: TrainSettings,
    *,
    dev: Examples | None = None,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> list[float]:
    """Train `learned` in place by the loss of `examples`; the losses on `dev` (empty without).

    The trunk's weights are untouched. With a `folder` the run's state is kept there, and the same call goes on where it stopped.
    """
    with frozen_trunk(learned.model):
        losses = train_module(
            learned, examples, settings, _log_p, penalty=learned.penalty, dev=dev, folder=folder, bar=bar
        )
    learned.to("cpu")
    return losses


def train_module(
    module: nn.Module,
    examples: Examples,
    settings: TrainSettings,
    log_p: LogP,
    *,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    dev: Examples | None = None,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> list[float]:
    """Train the parameters of `module` that ask for gradients, by the loss of `examples` under its `log_p`, plus `penalty`.

    Ends in the best state on `dev` (judged every epoch, unless `settings` say otherwise), and returns the losses there (empty
    without). With a `folder` an interrupted call goes on.
    """
    if not len(examples):
        raise InputError("there are no examples to learn from.")
    if dev is not None and not len(dev):
        raise InputError("there are no held-out examples; give some, or leave dev= out.")
    settings = settings.for_examples(len(examples))

    def loss(trained: nn.Module, rows: Tensor) -> Tensor:
        some = examples.rows(rows.cpu())
        return some.loss(partial(log_p, trained)).mean() + penalty()

    done = fit(
        module,
        lambda number: epoch_rows(len(examples), settings.rows, number, first=settings.seed),
        settings,
        folder,
        loss=loss,
        judge=None if dev is None else lambda: mean_loss(module, dev, log_p),
        bar=bar,
    )
    return list(done.judged.values())


@torch.no_grad()
def mean_loss(module: nn.Module, examples: Examples, log_p: LogP, *, rows: int = 64) -> float:
    """Mean loss of `examples`, in nats."""
    parts = [examples.rows(slice(i, i + rows)).loss(partial(log_p, module)) for i in range(0, len(examples), rows)]
    return float(torch.cat(parts).mean())


def held_out_loss(learned: LearnedEdit, examples: Examples, *, rows: int = 64) -> float:
    """Mean loss of `examples` under the edit as learned, in nats: of answers, their negative log-likelihood."""
    return mean_loss(learned, examples, _log_p, rows=rows)


def _log_p(learned: nn.Module, given: Answered) -> Float[Tensor, "B"]:
    log_p: Tensor = learned(given.input_ids, given.attention_mask, given.is_answer)
    return log_p


@torch.no_grad()
def answer_accuracy(model: HeadModel, examples: Answered, edits: list[Edit] | None = None, *, rows: int = 64) -> float:
    """Share of answers that greedy decoding gives, under `edits`."""
    right = []
    with model.editing(*(edits or [])):
        for i in range(0, len(examples), rows):
            part = examples.rows(slice(i, i + rows))
            right.append(part.right(model.logits(part.inputs(model))))
    return float(torch.cat(right).float().mean())


@contextlib.contextmanager
def frozen_trunk(model: HeadModel) -> Iterator[None]:
    """While this lasts, the trunk's weights ask for no gradient, and dropout is off."""
    training = model.plain.training
    model.plain.eval()
    try:
        with hooks.frozen(model.plain):
            yield
    finally:
        model.plain.train(training)
