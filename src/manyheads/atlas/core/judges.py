"""Judges: what a behaviour's heads are ablated on. A judge is a clean run with one number a row, which ablations change.

A behaviour names its judge when it registers: `REPEATS`, `TEXT`, `by_task("ioi")`, or a `Judged` of its own.

A recorded run takes `2 L B T D` numbers, half a gigabyte for 32 prompts of 117 tokens in 30 layers of width 576. So a judge makes
its run when it is first used, and `release` frees it: a survey holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, eq=False)
class Judge:
    """A task to judge ablations by: inputs and a metric of the last `keep` logits (None: all), one number a row.

    `reference` is what mean ablation puts in the place of z; None is the mean over all tokens.
    """

    metric: str
    model: HeadModel
    inputs: Mapping[str, Any]
    score: Callable[[Tensor], Tensor]
    keep: int | None
    reference: Float[Tensor, "L H Dh"] | None = None

    @property
    def n(self) -> int:
        """Number of examples."""
        return len(self.inputs["input_ids"])

    @cached_property
    def recording(self) -> Recording:
        """The clean run: made when it is first asked for, and anew after `release`."""
        return self.model.record(self.inputs, keep=self.keep, mlps=False)

    @cached_property
    def mean_z(self) -> Float[Tensor, "L H Dh"]:
        """Mean of every head's z over the tokens of the clean run, or `reference`."""
        if self.reference is not None:
            return self.reference
        mask = self.recording.inputs.get("attention_mask")
        return torch.stack([_mean_over_tokens(z, mask) for z in self.recording.z])

    @cached_property
    def clean(self) -> Float[np.ndarray, "N"]:
        """The metric with nothing ablated."""
        logits = self.recording.logits
        kept = logits if self.keep is None else logits[:, -self.keep :]
        return self.score(kept).double().cpu().numpy()

    def release(self) -> None:
        """Free the clean run; what was read off it stays."""
        vars(self).pop("recording", None)


def repeats_judge(model: HeadModel, *, n: int = 12, length: int = 32, seed: int = 1) -> Judge:
    """Repeated random tokens: mean log-probability of the second copy's tokens, in nats a token."""
    rows, period, _ = repeats(model, n, length, seed)
    wanted = rows[:, -period + 1 :]  # what follows each token of the second copy but its last

    def score(logits: Tensor) -> Tensor:
        return log_probability(logits[:, :-1], wanted).mean(-1)

    return Judge("log-probability of repeated tokens (nats a token)", model, {"input_ids": rows}, score, period)


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

    return Judge(f"log-probability of {task.name} answers (nats)", model, inputs, score, length)


def text_judge(model: HeadModel, *, n: int = 12, length: int = 64, seed: int = 1) -> Judge:
    """Prose that ships with Python: mean log-probability of its tokens, in nats a token."""
    rows = passages(model, None, n=n, length=length, seed=seed)

    def score(logits: Tensor) -> Tensor:
        return log_probability(logits[:, :-1], rows[:, 1:]).mean(-1)

    return Judge("log-probability of text (nats a token)", model, {"input_ids": rows}, score, None)


def representation_judge(model: HeadModel, rows: Int[Tensor, "N T"]) -> Judge:
    """For models that predict no next token: cosine of a row's mean final state with what it was, 1 for the clean run."""
    clean = model.logits(rows).float().mean(1)

    def score(states: Tensor) -> Tensor:
        return torch.cosine_similarity(states.float().mean(1), clean, dim=-1)

    return Judge("cosine of the mean final state with the clean one", model, {"input_ids": rows}, score, None)


def _mean_over_tokens(z: Float[Tensor, "B T H Dh"], mask: Int[Tensor, "B T"] | None) -> Float[Tensor, "H Dh"]:
    if mask is None:
        return z.mean((0, 1))
    weight = mask.to(z)[:, :, None, None]
    return (z * weight).sum((0, 1)) / weight.sum()


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
