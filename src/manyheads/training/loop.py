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
from manyheads.progress import SILENT, Bar
from manyheads.training.batches import Batch, on_device, tokens_of
from manyheads.training.best import Best
from manyheads.training.checkpoint import load_state, save_state, states
from manyheads.training.settings import TrainSettings


@dataclass
class Progress:
    """Where a run stands: optimiser steps, tokens seen (where batches have `input_ids`), minutes of training (over all resumes).

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
    bar: Bar = SILENT,
) -> Progress:
    """Train the parameters of `objective` that ask for gradients, in place, and return the progress made.

    `objective(batch)` is the loss, a scalar; or give `loss(objective, batch)`. A batch is a tensor, or a mapping, tuple or
    dataclass of them. `batches(i)` must be a pure function of the batch number: that makes a resumed run equal an uninterrupted
    one (under a step budget; under a clock the learning rate follows the clock).

    With a `folder` the whole state goes there every `settings.save_minutes`, at the end, and on Ctrl-C or SIGTERM once the step
    is done; the same call then goes on. Without one nothing is written.

    `judge()` is a loss of the state, on held-out data say, taken in evaluation mode: the run ends in the state where it was
    lowest (`TrainSettings.every`, `patience`). `after_backward(progress, optimizer)` may change gradients and learning rates
    before they are clipped and used; `after_step` may change parameters and moments, and ends the run by returning False.

    Everything runs on `device` (default: Accelerate's, over all its processes). Torch's random state afterwards is what it was
    before. `bar` counts steps, with the loss as note.
    """
    if settings.steps is None and settings.minutes is None:
        raise InputError("The run has no end; give TrainSettings steps or minutes.")
    folder = None if folder is None else Path(folder)
    saved = [] if folder is None else states(folder)
    if saved and not resume:
        raise InputError(f"{folder} holds a run already ({saved[-1].name}); resume it or give another folder.")
    # bf16 needs autocast, but no scaler
    accelerator = Accelerator(mixed_precision="no", cpu=not torch.cuda.is_available(), device_placement=False)
    place = torch.device(accelerator.device if device is None else device)
    with _random_state(place), _stop_requests() as stop, torch.enable_grad():
        torch.manual_seed(settings.seed)
        objective.to(place).train()
        optimizer = _optimizer(objective, settings)
        wrapped, stepper, processes, index = objective, optimizer, 1, 0
        progress, best = Progress(), Best(objective, {}, {})
        if saved:
            progress, best.state = _loaded(saved[-1], objective, optimizer)
            bar(progress.step)
        best.losses, progress.finished = progress.judged, False
        if device is None:  # on a device of one's own, every process does the whole
            wrapped, stepper = accelerator.prepare(objective, optimizer)
            processes, index = accelerator.num_processes, accelerator.process_index
        call = loss or (lambda module, batch: module(batch))
        if settings.compile:
            call = torch.compile(call, dynamic=False)
        amp = torch.autocast(place.type, torch.bfloat16, enabled=settings.precision == "bf16")
        before, started = progress.minutes, time.monotonic()
        last_saved = started

        def save() -> None:
            if folder is not None and accelerator.is_main_process:
                save_state(folder, progress.step, objective, optimizer, vars(progress), best.state)

        def look() -> None:
            if judge is not None and progress.step not in best.losses:
                best.look(progress.step, _judged(objective, judge))

        while settings.spent(progress.step, progress.minutes) < 1.0 and not best.out_of_patience(settings.patience):
            rate = settings.rate_at(progress.step, settings.spent(progress.step, progress.minutes))
            for group in optimizer.param_groups:
                group["lr"] = rate
            batch = on_device(batches(progress.step * processes + index), place)
            with amp:
                value = call(wrapped, batch)
            accelerator.backward(value)
            if after_backward is not None:
                after_backward(progress, optimizer)
            if settings.clip is not None:
                accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
            stepper.step()
            stepper.zero_grad()
            progress.step += 1
            progress.tokens += tokens_of(batch) * processes
            progress.minutes = before + (time.monotonic() - started) / 60
            progress.last = value.item()
            progress.loss = progress.last if progress.step == 1 else 0.98 * progress.loss + 0.02 * progress.last
            go_on = after_step is None or after_step(progress, optimizer) is not False
            if settings.every is not None and progress.step % settings.every == 0:
                look()
            bar(1, note=f"loss {progress.loss:.3f}")
            if stop.is_set():
                save()
                raise KeyboardInterrupt
            if not go_on:
                break
            if time.monotonic() - last_saved > 60 * settings.save_minutes:
                save()
                last_saved = time.monotonic()
        else:
            look()
        progress.finished = True
        save()
        best.restore()
    return progress


def _loaded(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Progress, dict[str, Tensor]]:
    kept, best = load_state(path, model, optimizer)
    kept["judged"] = {int(step): value for step, value in kept["judged"].items()}
    return Progress(**kept), best


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
        raise InputError(f"nothing of {type(model).__name__} asks for gradients; there is nothing to train.")
    if settings.optimizer == "adam":
        return torch.optim.Adam(trained, lr=0.0, betas=settings.betas)
    decay = [p for p in trained if p.ndim >= 2 or settings.decayed == "all"]
    keep = [p for p in trained if p.ndim < 2 and settings.decayed != "all"]
    groups = [{"params": decay, "weight_decay": settings.weight_decay}, {"params": keep, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings.betas, fused=True)


@contextlib.contextmanager
def _random_state(place: torch.device) -> Iterator[None]:
    """Training seeds torch; whoever called goes on as if it had not."""
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
