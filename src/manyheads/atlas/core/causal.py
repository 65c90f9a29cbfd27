"""The causal check: does ablating a behaviour's heads hurt its task more than ablating random heads of the same layers?

For heads S and R random sets with as many heads in each layer as S (see `HeadSet.matched_random`), ablated by zero, by their mean
over the task or by uniform attention,

    effect(S) = mean over examples of metric(clean) - metric(S ablated)

in the metric's unit, with p as in `evaluation/controls.py`. Random sets are disjoint from S as long as its layers have enough
different ones; after that they may share heads with S, as in any permutation test, which makes them harder to beat. Where a layer
has few different sets of the size at all, p cannot fall below what they allow. Sets, not single heads: in a redundant model
ablating one of several heads changes nothing, and a head that scores low can be needed by all that score high (see the trap of
#11).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.repeats import repeats
from manyheads.atlas.core.result import CausalCheck
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets
from manyheads.evaluation.metrics import log_probability
from manyheads.heads import Array, HeadScores, HeadSet
from manyheads.model.edit.edits import Ablate, Edit, Mode
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import Recording
from manyheads.progress import SILENT, Bar
from manyheads.tasks import Task, encode
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
    """A task of one-token answers: their log-probability, in nats."""
    if model.tokenizer is None:
        raise InputError(f"the task {task.name} needs a tokenizer; open the model with tokenizer=.")
    batch = encode(task, model.tokenizer, n, seed)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}

    def score(logits: Tensor) -> Tensor:
        return log_probability(logits[:, -1], batch.answer_ids)

    return _judge(model, inputs, f"log-probability of {task.name} answers (nats)", score, 1)


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


def ablation_effects(
    model: HeadModel,
    name: str,
    judge: Judge,
    mode: Mode = "mean",
    *,
    seed: int = 0,
    bar: Bar = SILENT,
) -> HeadScores:
    """What ablating each head alone costs the judge, `clean - ablated` in its metric's unit. Redundant heads cost nothing."""
    edits: list[Edit] = [Ablate([head], mode, judge.mean_z if mode == "mean" else None) for head in model.heads]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep, bar=bar)
    effects = (clean_scores(judge)[None] - values).T.reshape(judge.n, *model.shape)
    return HeadScores.from_examples(f"effect on {name}", effects, {"metric": judge.metric, "mode": mode, "seed": seed})


def causal_check(
    model: HeadModel,
    behaviour: str,
    heads: HeadSet,
    judge: Judge,
    mode: Mode = "zero",
    *,
    n_random: int = 20,
    seed: int = 0,
) -> CausalCheck:
    """Ablate `heads` and `n_random` >= 20 random sets matched by layer, and compare (formula above).

    Sets drawn twice count once, and the set itself not at all: `random_effects` are those of different sets.
    """
    if n_random < 20:
        raise InputError(f"a causal check needs at least 20 random sets, not {n_random}.")
    if not heads:
        raise InputError("a causal check needs at least one head.")
    sets = [heads, *matched_sets(heads, n_random, seed, shape=model.shape)]
    edits: list[Edit] = [Ablate(s, mode, judge.mean_z if mode == "mean" else None) for s in sets]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep)  # [1 + R, n]
    return CausalCheck.of(behaviour, mode, heads, judge.metric, clean_scores(judge), values)


def clean_scores(judge: Judge) -> Float[Array, "N"]:
    """The judge's metric with nothing ablated."""
    logits = judge.recording.logits
    return judge.score(logits if judge.keep is None else logits[:, -judge.keep :]).double().cpu().numpy()


def _judge(
    model: HeadModel, inputs: dict[str, Any], metric: str, score: Callable[[Tensor], Tensor], keep: int | None
) -> Judge:
    recording = model.record(inputs)
    z = torch.stack(recording.z)
    mask = recording.inputs.get("attention_mask")
    weight = torch.ones(z.shape[1:3], device=z.device) if mask is None else mask.to(z.device)
    weight = weight.to(z.dtype)[None, :, :, None, None]
    return Judge(metric, recording, (z * weight).sum((1, 2)) / weight.sum(), score, keep)
