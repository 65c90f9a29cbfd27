"""What scores look like where there is nothing to find: thresholds that hold by more than custom.

Two nulls. The *untrained twin* has the model's architecture and fresh random weights. *Unrepeated tokens* are rows of
repeated tokens whose second copy is replaced by other tokens, for behaviours that need the repetition. With the scores of all N
null heads,

    threshold = max(the behaviour's own, just above the highest null score)
    false positives = null heads at the behaviour's own threshold, of N;  at most 1 - .05^(1/N) of heads at 95 % if there are none

A head above the highest null score does more of it than chance; one above the threshold does it as its work. Both are counted.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from manyheads.atlas.core.registry import behaviours, score_all
from manyheads.atlas.core.repeats import Reduction, score_repeats
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar, TimeIsUp


@dataclass(frozen=True)
class NullScores:
    """The scores of one behaviour where there is nothing to find: the highest, how many heads, how many at its own threshold."""

    highest: float
    heads: int
    reached: int

    @classmethod
    def of(cls, several: Collection[HeadScores], threshold: float) -> NullScores:
        """Of the scores of all nulls."""
        values = np.concatenate([scores.values.ravel() for scores in several])
        values = values[~np.isnan(values)]
        return cls(float(values.max(initial=-math.inf)), len(values), int((values >= threshold).sum()))

    def threshold(self, own: float) -> float:
        """The behaviour's own threshold, or one just above the highest null score."""
        return max(own, math.nextafter(self.highest, math.inf))


def untrained_twin(model: HeadModel, seed: int = 0) -> HeadModel:
    """A model of the same architecture with fresh random weights.

    `UnsupportedError` where its class cannot be made from a config alone.
    """
    first = next(model.plain.parameters())
    devices = [first.device] if first.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        try:
            twin = type(model.plain)(copy.deepcopy(model.plain.config))  # type: ignore[operator, arg-type]
        except Exception as error:
            raise UnsupportedError(
                f"{type(model.plain).__name__} cannot be made anew from its config ({error})."
            ) from error
    return open_model(twin.to(device=first.device, dtype=first.dtype).eval(), tokenizer=model.tokenizer)


def null_scores(
    model: HeadModel, names: Collection[str], *, n: int = 4, seed: int = 0, bar: Bar = Bar()
) -> dict[str, NullScores]:
    """The null of each of these behaviours that has one: of the twin on `n` examples, and of the model on unrepeated tokens.

    A `Deadline` for a bar leaves out those that it does not reach.
    """
    every = behaviours()
    found: dict[str, list[HeadScores]] = {name: [] for name in names}
    try:
        twin = untrained_twin(model, seed)
    except (InputError, UnsupportedError):
        twin = None
    if twin is not None:

        def keep(scores: Mapping[str, HeadScores]) -> None:
            for name, one in scores.items():
                # Scores of no example (the twin answers nothing) are 0 by rule, and no chance at all.
                if one.n or getattr(every[name].score, "by_weights", False):
                    found[name].append(one)

        with contextlib.suppress(TimeIsUp):  # what is done by then counts
            score_all(twin, names, n=n, seed=seed, bar=bar, keep=keep)
    by_content = [every[name].score for name in names if isinstance(every[name].score, Reduction)]
    by_content = [reduction for reduction in by_content if reduction.by_content]
    if by_content:
        for one in score_repeats(model, by_content, n=n, length=64, seed=seed, copied=False):
            found[one.name].append(one)
    return {name: NullScores.of(several, every[name].about.threshold) for name, several in found.items() if several}
