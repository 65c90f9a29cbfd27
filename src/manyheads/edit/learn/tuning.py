"""Learning the numbers of an edit while the model stays as it is: one loop for every method that does."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn

from manyheads.edit.learn.examples import Answered, Examples
from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.model import hooks
from manyheads.model.edit.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.training import Progress, TrainSettings, WarmupStableDecay, fit
from manyheads.training.checkpoint import states
from manyheads.training.loop import Batch

LogP = Callable[[nn.Module, Answered], Tensor]


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
    examples: Examples,
    how: Learning,
    *,
    dev: Examples | None = None,
    folder: Path | None = None,
) -> list[float]:
    """Train `learned` in place by the loss of `examples`; the losses on `dev` (empty without).

    The trunk's weights are untouched. With a `folder` the run's state is kept there, and the same call goes on where it stopped.
    """
    with frozen(learned.model):
        losses = train(learned, examples, how, _log_p, penalty=learned.penalty, dev=dev, folder=folder)
    learned.to("cpu")
    return losses


def train(
    module: nn.Module,
    examples: Examples,
    how: Learning,
    log_p: LogP,
    *,
    penalty: Callable[[], Tensor | float] = lambda: 0.0,
    dev: Examples | None = None,
    folder: Path | None = None,
    weight_decay: float = 0.0,
) -> list[float]:
    """Train the parameters of `module` that ask for gradients, by the loss of `examples` under its `log_p`, plus `penalty`.

    Ends in the best state on `dev`, and returns the losses there (empty without). With a `folder` an interrupted call goes on.
    """
    if not len(examples):
        raise InputError("there are no examples to learn from.")
    if dev is not None and not len(dev):
        raise InputError("there are no held-out examples; give some, or leave dev= out.")
    each = max(1, len(examples) // how.rows)
    every = how.every or each

    def batch_at(number: int) -> Batch:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(how.seed + number // each))
        rows = order[number % each * how.rows :][: how.rows]
        return {"input_ids": examples.input_ids[rows], "rows": rows}

    def loss(trained: nn.Module, batch: Batch) -> Tensor:
        some = examples.rows(batch["rows"].cpu())
        return some.loss(partial(log_p, trained)).mean() + penalty()

    settings = TrainSettings(
        steps=how.epochs * each if how.steps is None else how.steps,
        schedule=WarmupStableDecay(peak=how.rate, warmup=1, decay=0.0),
        weight_decay=weight_decay,
        betas=(0.9, 0.999),
        precision="fp32",
        seed=how.seed,
    )
    with contextlib.ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory())) if folder is None else folder
        if dev is None:
            fit(module, batch_at, where, settings, loss=loss)
            return []
        looks = _Looks(module, lambda: mean_loss(module, dev, log_p), where, how.patience)
        looks.catch_up(every)

        def after_step(progress: Progress) -> bool:
            return progress.step % every != 0 or looks.look(progress.step)

        if not looks.over:
            fit(module, batch_at, where, settings, loss=loss, after_step=after_step)
        return looks.restore()


class _Looks:
    """Losses on held-out examples and the best state so far, kept beside a run's states: a run that goes on knows them."""

    def __init__(self, module: nn.Module, measure: Callable[[], float], folder: Path, patience: int) -> None:
        self.module, self.measure, self.folder, self.patience = module, measure, folder, patience
        self.file = folder / "looks.safetensors"
        saved = load_file(self.file) if self.file.is_file() else {}
        self.best = {name.removeprefix("best."): value for name, value in saved.items() if name.startswith("best.")}
        self.losses: dict[int, float] = {}
        if saved:
            self.losses = dict(zip(saved["steps"].tolist(), saved["losses"].tolist(), strict=True))

    @property
    def over(self) -> bool:
        """Whether patience has run out."""
        losses = list(self.losses.values())
        return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= self.patience

    def look(self, step: int) -> bool:
        """Measure; false if patience has run out."""
        mode = self.module.training
        self.module.eval()
        loss = self.measure()
        self.module.train(mode)
        if loss <= min(self.losses.values(), default=loss):
            self.best = {name: p.detach().cpu().clone().contiguous() for name, p in self._learning()}
        self.losses[step] = loss
        tensors = {"steps": torch.tensor([*self.losses]), "losses": torch.tensor([*self.losses.values()]).double()}
        kept = tensors | {f"best.{name}": value for name, value in self.best.items()}
        write_atomically(self.file, lambda path: save_file(kept, path), force=True)
        return not self.over

    def catch_up(self, every: int) -> None:
        """Forget looks that the newest state has not come to, and take one that an interruption left out."""
        newest = states(self.folder)[-1:]
        step = int(newest[0].name.removeprefix("step-")) if newest else 0
        self.losses = {at: loss for at, loss in self.losses.items() if at <= step}
        if step and step % every == 0 and step not in self.losses:
            load_model(self.module, str(newest[0] / "model.safetensors"))
            self.look(step)

    def restore(self) -> list[float]:
        """Put the best state into the module; the losses, in order."""
        with torch.no_grad():
            for name, parameter in self._learning():
                if name in self.best:
                    parameter.copy_(self.best[name])
        return list(self.losses.values())

    def _learning(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]


@torch.no_grad()
def mean_loss(module: nn.Module, examples: Examples, log_p: LogP, *, rows: int = 64) -> float:
    """Mean loss of `examples`, in nats."""
    parts = [examples.rows(slice(i, i + rows)).loss(partial(log_p, module)) for i in range(0, len(examples), rows)]
    return float(torch.cat(parts).mean())


def held_out_loss(learned: Learned, examples: Examples, *, rows: int = 64) -> float:
    """Mean loss of `examples` under the edit as learned, in nats: of answers, their negative log-likelihood."""
    return mean_loss(learned, examples, _log_p, rows=rows)


def _log_p(learned: nn.Module, given: Answered) -> Float[Tensor, "B"]:
    log_p: Tensor = learned(given.input_ids, given.attention_mask, given.said)
    return log_p


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
    training = model.plain.training
    model.plain.eval()
    try:
        with hooks.frozen(model.plain):
            yield
    finally:
        model.plain.train(training)
