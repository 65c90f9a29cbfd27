"""`fit`: the training loop for every trunk and head here."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.training.checkpoint import load_state, save_state, states
from manyheads.training.schedule import WarmupStableDecay

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class TrainSettings:
    """How long and how fast. The run ends at `steps` or after `minutes` (summed over resumes), whichever comes first.

    `clip` bounds the gradient norm; `compile` compiles the loss (worth it from a few minutes of training on).
    """

    steps: int | None = None
    minutes: float | None = None
    schedule: WarmupStableDecay = field(default_factory=WarmupStableDecay)
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    compile: bool = False
    save_minutes: float = 3.0
    seed: int = 0

    def spent(self, step: int, minutes: float) -> float:
        """Share of the budget used, in [0, 1]."""
        shares = [step / self.steps if self.steps else 0.0, minutes / self.minutes if self.minutes else 0.0]
        return min(1.0, max(shares))


@dataclass
class Progress:
    """Where a run stands: optimiser steps, tokens seen, minutes of training (over all resumes), the running loss."""

    step: int = 0
    tokens: int = 0
    minutes: float = 0.0
    loss: float = float("nan")
    finished: bool = False


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
    model: nn.Module,
    batch_at: Callable[[int], Batch],
    folder: Path,
    settings: TrainSettings,
    *,
    loss: Callable[[nn.Module, Batch], Tensor] = next_token_loss,
    after_step: Callable[[Progress], object] | None = None,
    resume: bool = True,
) -> Progress:
    """Train `model` in place and return the progress made.

    `batch_at(i)` must be a pure function of the batch number: that makes a resumed run equal an uninterrupted one
    (under a step budget; under a clock the learning rate follows the clock). The whole state goes to `folder` every
    `settings.save_minutes`, at the end, and on Ctrl-C or SIGTERM once the step is done; the same call then goes on.
    A run also ends where `after_step` returns False.
    """
    if settings.steps is None and settings.minutes is None:
        raise InputError("The run has no end; give TrainSettings steps or minutes.")
    saved = states(folder)
    if saved and not resume:
        raise InputError(f"{folder} holds a run already ({saved[-1].name}); resume it or give another folder.")
    accelerator = Accelerator(
        mixed_precision="no", cpu=not torch.cuda.is_available()
    )  # bf16 needs autocast, but no scaler
    amp = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=settings.precision == "bf16")
    torch.manual_seed(settings.seed)
    model.to(accelerator.device).train()
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=0.0, betas=settings.betas, fused=True)
    progress = Progress(**load_state(saved[-1], model, optimizer)) if saved else Progress()
    progress.finished = False
    wrapped, stepper = accelerator.prepare(model, optimizer)
    if settings.compile:
        loss = torch.compile(loss, dynamic=False)
    before, started = progress.minutes, time.monotonic()
    last_saved = started

    def save() -> None:
        if accelerator.is_main_process:
            save_state(folder, progress.step, model, optimizer, asdict(progress))

    columns = (
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, disable=not accelerator.is_main_process) as bar, _stop_requests() as stop:
        line = bar.add_task("", total=settings.steps, completed=progress.step)
        while (spent := settings.spent(progress.step, progress.minutes)) < 1.0:
            rate = settings.schedule(progress.step, spent)
            for group in optimizer.param_groups:
                group["lr"] = rate
            number = progress.step * accelerator.num_processes + accelerator.process_index
            batch = {name: value.to(accelerator.device) for name, value in batch_at(number).items()}
            with amp:
                value = loss(wrapped, batch)
            accelerator.backward(value)
            accelerator.clip_grad_norm_(wrapped.parameters(), settings.clip)
            stepper.step()
            stepper.zero_grad()
            progress.step += 1
            progress.tokens += batch["input_ids"].numel() * accelerator.num_processes
            progress.minutes = before + (time.monotonic() - started) / 60
            progress.loss = value.item() if progress.step == 1 else 0.98 * progress.loss + 0.02 * value.item()
            bar.update(line, completed=progress.step, description=f"loss {progress.loss:.3f} lr {rate:.1e}")
            if stop.is_set():
                save()
                raise KeyboardInterrupt
            if time.monotonic() - last_saved > 60 * settings.save_minutes:
                save()
                last_saved = time.monotonic()
            if after_step is not None and after_step(progress) is False:
                break
    progress.finished = True
    save()
    return progress


@contextmanager
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


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; gains and biases do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
