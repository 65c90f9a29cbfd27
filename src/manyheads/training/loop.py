"""`fit`: the training loop for every trunk and head here."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.progress import Bar
from manyheads.training.batches import Batch, on_device, tokens_of
from manyheads.training.best import BestState
from manyheads.training.checkpoint import load_state, save_state, states
from manyheads.training.settings import TrainSettings


@dataclass
class Progress:
    """How far a run is: optimiser steps, tokens seen (where batches have `input_ids`), minutes of training (over all resumes).

    `loss` is the running mean over about 50 steps, `last` the newest step's. `judged` are the judge's losses by step.
    """

    step: int = 0
    tokens: int = 0
    minutes: float = 0.0
    loss: float = float("nan")
    last: float = float("nan")
    judged: dict[int, float] = field(default_factory=dict)
    finished: bool = False


Hook = Callable[[Progress, torch.optim.Optimizer], object]


def next_token_loss(model: nn.Module, batch: Batch) -> Float[Tensor, ""]:
    """Cross-entropy of `input_ids[:, 1:]` in nats, targets weighted by `weights[:, 1:]` where the batch has them."""
    ids: Int[Tensor, "B T"] = batch["input_ids"]
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    if "weights" not in batch:
        return losses.mean()
    weights = batch["weights"][:, 1:].flatten().float()
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


def fit(
    objective: nn.Module,
    batches: Callable[[int], Any],
    settings: TrainSettings,
    folder: str | Path | None = None,
    *,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    judge: Callable[[], float] | None = None,
    after_backward: Hook | None = None,
    after_step: Hook | None = None,
    device: torch.device | str | None = None,
    resume: bool = True,
    bar: Bar = Bar(),
) -> Progress:
    """Train the parameters of `objective` that ask for gradients, in place, and return the progress made.

    `objective(batch)` is the loss, a scalar; or give `loss(objective, batch)`. A batch is a tensor, or a mapping, tuple or
    dataclass of them. `batches(i)` must be a pure function of the batch number: that makes a resumed run equal an uninterrupted
    one (under a step budget; under a clock the learning rate follows the clock).

    With a `folder` the whole state goes there every `settings.save_minutes`, at the end, and on Ctrl-C or SIGTERM once the step
    is done; the same call then goes on. Without one nothing is written.

    `judge()` is a loss of the state, for example on held-out data, taken in evaluation mode: the run ends in the state where it
    was lowest (`TrainSettings.every`, `patience`). `after_backward(progress, optimizer)` may change gradients and learning rates
    before they are clipped and used; `after_step` may change parameters and moments, and ends the run by returning False.

    Everything runs on `device` (default: Accelerate's, over all its processes). Torch's random state afterwards is what it was
    before. `bar` counts steps, with the loss as note.
    """
    if settings.steps is None and settings.minutes is None:
        raise InputError("the run has no end; give TrainSettings steps or minutes.")
    folder = None if folder is None else Path(folder)
    saved = [] if folder is None else states(folder)
    if saved and not resume:
        raise InputError(f"{folder} holds a run already ({saved[-1].name}); resume it or give another folder.")
    # Autocast is ours (`gradients`), since bf16 needs no loss scaler.
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), device_placement=False)
    place = torch.device(accelerator.device if device is None else device)
    call = loss or (lambda module, batch: module(batch))
    with _random_state(place), _stop_requests() as stop, torch.enable_grad():
        torch.manual_seed(settings.seed)
        run = _Run(objective.to(place).train(), settings, accelerator, place, folder)
        if saved:
            run.load(saved[-1])
            bar(run.progress.step)
        if device is None:  # with a device given, every process does the whole run by itself
            run.share()
        call = torch.compile(call, dynamic=False) if settings.compile else call
        before, last_saved = run.progress.minutes - time.monotonic() / 60, time.monotonic()
        while run.goes_on:
            run.gradients(call, batches)
            if after_backward is not None:
                after_backward(run.progress, run.optimizer)
            run.update()
            run.progress.minutes = before + time.monotonic() / 60
            ended = after_step is not None and after_step(run.progress, run.optimizer) is False
            if settings.every is not None and run.progress.step % settings.every == 0:
                run.look(judge)
            bar(1, note=f"loss {run.progress.loss:.3f}")
            if stop.is_set():
                run.save()
                raise KeyboardInterrupt
            if ended:
                break
            if time.monotonic() - last_saved > 60 * settings.save_minutes:
                run.save()
                last_saved = time.monotonic()
        else:
            run.look(judge)
        run.progress.finished = True
        run.save()
        run.best.restore()
    return run.progress


class _Run:
    """An objective, its optimiser, its progress and its best state, on one device or shared by several processes."""

    def __init__(
        self,
        objective: nn.Module,
        settings: TrainSettings,
        accelerator: Accelerator,
        place: torch.device,
        folder: Path | None,
    ) -> None:
        self.objective, self.settings, self.accelerator = objective, settings, accelerator
        self.place, self.folder = place, folder
        self.optimizer = _optimizer(objective, settings)
        self.wrapped, self.stepper, self.processes, self.index = objective, self.optimizer, 1, 0
        self.progress = Progress()
        self.best = BestState(objective, self.progress.judged, {})

    def load(self, path: Path) -> None:
        kept, state = load_state(path, self.objective, self.optimizer)
        judged = {int(step): value for step, value in kept["judged"].items()}
        self.progress = Progress(**kept | {"judged": judged, "finished": False})
        self.best = BestState(self.objective, judged, state)

    def share(self) -> None:
        """Over all of Accelerate's processes: each takes every n-th batch."""
        self.wrapped, self.stepper = self.accelerator.prepare(self.objective, self.optimizer)
        self.processes, self.index = self.accelerator.num_processes, self.accelerator.process_index

    @property
    def spent(self) -> float:
        return self.settings.spent(self.progress.step, self.progress.minutes)

    @property
    def goes_on(self) -> bool:
        return self.spent < 1.0 and not self.best.out_of_patience(self.settings.patience)

    def gradients(self, loss: Callable[[nn.Module, Any], Tensor], batches: Callable[[int], Any]) -> None:
        """The loss of the next batch, and its gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate_at(self.progress.step, self.spent)
        batch = on_device(batches(self.progress.step * self.processes + self.index), self.place)
        with torch.autocast(self.place.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            value = loss(self.wrapped, batch)
        self.accelerator.backward(value)
        self.progress.tokens += tokens_of(batch) * self.processes
        self.progress.last = value.item()

    def update(self) -> None:
        """One step of the optimiser."""
        if self.settings.clip is not None:
            self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.settings.clip)
        self.stepper.step()
        self.stepper.zero_grad()
        progress = self.progress
        progress.step += 1
        progress.loss = progress.last if progress.step == 1 else 0.98 * progress.loss + 0.02 * progress.last

    def look(self, judge: Callable[[], float] | None) -> None:
        if judge is not None and self.progress.step not in self.best.losses:
            self.best.look(self.progress.step, _judged(self.objective, judge))

    def save(self) -> None:
        if self.folder is not None and self.accelerator.is_main_process:
            state, at = self.best.state, self.progress
            save_state(self.folder, at.step, self.objective, self.optimizer, vars(at), state)


def _judged(module: nn.Module, judge: Callable[[], float]) -> float:
    mode = module.training
    module.eval()
    try:
        with torch.no_grad():
            return judge()
    finally:
        module.train(mode)


def _optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise InputError(f"no parameter of {type(model).__name__} asks for gradients; set requires_grad on some.")
    if settings.optimizer == "adam":
        return torch.optim.Adam(trained, lr=0.0, betas=settings.betas)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(trained, lr=0.0)
    decay = [p for p in trained if p.ndim >= 2 or settings.decayed == "all"]
    keep = [p for p in trained if p.ndim < 2 and settings.decayed != "all"]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


@contextlib.contextmanager
def _random_state(place: torch.device) -> Iterator[None]:
    """Training seeds torch; afterwards the caller's random state is as it was."""
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: FrameType | None) -> None:
        stop.set()

    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
