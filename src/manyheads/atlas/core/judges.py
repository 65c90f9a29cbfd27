"""Judges: what a behaviour's heads are ablated on. A judge is a clean run with one number a row, which ablations change.

A behaviour names its judge when it registers: `REPEATS`, `TEXT`, `by_task("ioi")`, or a `Judged` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.repeats import repeats
from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.metrics import log_probability
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import Recording
from manyheads.tasks import Task, encode, get_task
from manyheads.tasks.scoring import forced_answers
from manyheads.tasks.texts import passages


@dataclass(frozen=True)
class Judge:
    """A task to judge ablations by: its clean run and a metric of the last `keep` logits (None: all), one number a row."""

    metric: str
    recording: Recording
    mean_z: Tensor
    score: Callable[[Tensor], Tensor]
    keep: int | None

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.recording.batch


def repeats_judge(model: HeadModel, *, n: int = 12, length: int = 32, seed: int = 1) -> Judge:
    """Repeated random tokens: mean log-probability of the second copy's tokens, in nats a token."""
    rows, period, _ = repeats(model, n, length, seed)
    wanted = rows[:, -period + 1 :]  # what follows each token of the second copy but its last

    def score(logits: Tensor) -> Tensor:
        return log_probability(logits[:, :-1], wanted).mean(-1)

    return _judge(model, {"input_ids": rows}, "log-probability of repeated tokens (nats a token)", score, period)


def task_judge(model: HeadModel, task: Task, *, n: int, seed: int = 1) -> Judge:
    """A task: the log-probability of its answers as a whole, in nats, from where answer and foil part."""
    if model.tokenizer is None:
        raise InputError(f"the task {task.name} needs a tokenizer; open the model with tokenizer=.")
    batch = encode(task, model.tokenizer, n, seed)
    inputs, wanted = forced_answers(batch)
    length = wanted.shape[1]

    def score(logits: Tensor) -> Tensor:
        each = log_probability(logits[:, -length:], wanted.clamp(min=0))
        return (each * (wanted >= 0).to(each)).sum(-1)

    return _judge(model, inputs, f"log-probability of {task.name} answers (nats)", score, length)


def text_judge(model: HeadModel, *, n: int = 12, length: int = 64, seed: int = 1) -> Judge:
    """Prose that ships with Python: mean log-probability of its tokens, in nats a token."""
    rows = passages(model, None, n=n, length=length, seed=seed)

    def score(logits: Tensor) -> Tensor:
        return log_probability(logits[:, :-1], rows[:, 1:]).mean(-1)

    return _judge(model, {"input_ids": rows}, "log-probability of text (nats a token)", score, None)


def representation_judge(model: HeadModel, rows: Int[Tensor, "N T"]) -> Judge:
    """For models that predict no next token: cosine of a row's mean final state with what it was, 1 for the clean run."""
    clean = model.logits(rows).float().mean(1)

    def score(states: Tensor) -> Tensor:
        return torch.cosine_similarity(states.float().mean(1), clean, dim=-1)

    return _judge(model, {"input_ids": rows}, "cosine of the mean final state with the clean one", score, None)


def clean_scores(judge: Judge) -> Float[np.ndarray, "N"]:
    """The judge's metric with nothing ablated."""
    logits = judge.recording.logits
    kept = logits if judge.keep is None else logits[:, -judge.keep :]
    return judge.score(kept).double().cpu().numpy()


def _judge(
    model: HeadModel, inputs: dict[str, Any], metric: str, score: Callable[[Tensor], Tensor], keep: int | None
) -> Judge:
    recording = model.record(inputs, keep=keep)
    z = torch.stack(recording.z)
    mask = recording.inputs.get("attention_mask")
    weight = torch.ones(z.shape[1:3], device=z.device) if mask is None else mask.to(z.device)
    weight = weight.to(z.dtype)[None, :, :, None, None]
    return Judge(metric, recording, (z * weight).sum((1, 2)) / weight.sum(), score, keep)


@dataclass(frozen=True)
class Judged:
    """A judge by name: `make(model, n, seed)` builds it of `n` rows, `rows` of that many for models that predict no next token.

    `make` raises `InputError` where a tokenizer or the tokens of a task are missing. `task` is what it judges answers of, if any,
    or says what that is of a model.
    """

    name: str
    make: Callable[[HeadModel, int, int], Judge]
    rows: Callable[[HeadModel, int, int], Int[Tensor, "N T"]] | None = None
    n: int = 32
    task: Task | Callable[[HeadModel], Task] | None = None

    def __call__(self, model: HeadModel, seed: int = 1, *, n: int | None = None) -> Judge:
        """The judge for this model. `UnsupportedError` for an encoder, unless its representation of `rows` can be compared."""
        n = self.n if n is None else n
        if model.is_causal:
            return self.make(model, n, seed)
        if self.rows is None:
            raise UnsupportedError(f"the task {self.name} needs a model that predicts the next token.")
        return representation_judge(model, self.rows(model, n, seed))

    def task_of(self, model: HeadModel) -> Task | None:
        """The task whose answers it judges on this model, if any."""
        return self.task if self.task is None or isinstance(self.task, Task) else self.task(model)


def by_task(task: str | Task | Callable[[HeadModel], Task], *, name: str | None = None, n: int = 32) -> Judged:
    """The judge of a task's answers. Where the task depends on the model, `name` says what the judge is called."""
    family = get_task(task) if isinstance(task, str) else task

    def make(model: HeadModel, n: int, seed: int) -> Judge:
        return task_judge(model, family if isinstance(family, Task) else family(model), n=n, seed=seed)

    called = name or (family.name if isinstance(family, Task) else family.__name__)
    return Judged(called, make, n=n, task=family)


REPEATS = Judged(
    "repeats",
    lambda model, n, seed: repeats_judge(model, n=n, seed=seed),
    lambda model, n, seed: repeats(model, n, 32, seed)[0],
    n=12,
)
TEXT = Judged(
    "text",
    lambda model, n, seed: text_judge(model, n=n, seed=seed),
    lambda model, n, seed: passages(model, None, n=n, length=64, seed=seed),
    n=12,
)
