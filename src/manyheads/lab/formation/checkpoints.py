"""Heads along a training that is over: the same scores on its checkpoints, one after another.

The scores are those of `watching_heads`, and `more`; the loss (nats) and the accuracy are of the next token on passages of text.
One checkpoint is in memory at a time. Checkpoints that share no size of layers and heads are refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.lab.formation.watching_heads import HeadHistory, Look, judged_rows, said_twice, scores_of
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks.texts import passages
from manyheads.training import generator_of

ROWS, LENGTH, PASSAGES = 32, 128, 16


def steps_of(names: Sequence[str]) -> list[int]:
    """The number that each name ends with, such as 1000 of "run/checkpoint-1000" or "name@step1000".

    `InputError` for a name without a number, and for two with the same one.
    """
    found = [re.findall(r"\d+", name.rstrip("/").replace("\\", "/").rpartition("/")[2]) for name in names]
    for name, numbers in zip(names, found, strict=True):
        if not numbers:
            raise InputError(f"{name} has no number in its name that says when it was; name it such as step-100.")
    steps = [int(numbers[-1]) for numbers in found]
    if len(set(steps)) < len(steps):
        raise InputError(f"two checkpoints are of step {max(steps, key=steps.count)}; give each once.")
    return steps


def checkpoints_history(
    names: Sequence[str],
    opening: Callable[[str], HeadModel],
    *,
    steps: Sequence[int] | None = None,
    texts: Sequence[str] | None = None,
    period: int = 16,
    more: Look | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadHistory:
    """What `opening` opens of each of `names`, in the order of `steps` (default: the numbers in the names)."""
    if len(names) < 2:
        raise InputError("a history needs two checkpoints or more.")
    steps = steps_of(names) if steps is None else list(steps)
    if len(steps) != len(names) or len(set(steps)) < len(steps):
        raise InputError(f"there are {len(names)} checkpoints and {len(set(steps))} different steps; give one each.")
    check_integer(period, "period", 2)
    losses: list[float] = []
    rights: list[float] = []
    found: list[dict[str, np.ndarray]] = []
    told = bar.step("checkpoints", len(names))
    for name in (names[i] for i in np.argsort(steps)):
        model = opening(name)
        if not model.is_causal:
            raise InputError(f"{name} does not predict the next token; the history is of decoders.")
        longest = getattr(model.config, "max_position_embeddings", None) or LENGTH
        text = passages(model, texts, n=PASSAGES, length=min(LENGTH, longest), seed=seed)
        rows = said_twice(ROWS, period, model.vocab_size, generator_of(seed, 10**6 - 3))
        with torch.no_grad():
            loss, right = judged_rows(model.plain, {"input_ids": text.to(model.device)})
        scores = scores_of(model, rows, more)
        shape = scores[next(iter(scores))].shape
        if found and shape != found[0][next(iter(scores))].shape:
            raise InputError(f"{name} has {shape[0]} layers of {shape[1]} heads, and those before it have not.")
        losses.append(loss)
        rights.append(right)
        found.append(scores)
        told(1)
    scores = {name: np.stack([one[name] for one in found]) for name in found[0]}
    return HeadHistory(np.sort(steps), np.array(losses), np.array(rights), scores)
