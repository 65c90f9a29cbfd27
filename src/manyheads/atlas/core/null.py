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
from dataclasses import dataclass, replace

import numpy as np
import torch

from manyheads.atlas.core.registry import behaviours, score_all
from manyheads.atlas.core.repeats import Reduction, repeats, score_repeats
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.model.reading.readers import Activation, Reader
from manyheads.progress import Bar, TimeIsUp

SILENT = 1e-3  # of the median head's write: a head that writes less does nothing


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


class _WriteNorms(Reader):
    """Keeps the mean length of what each head adds to the residual stream: `norms[l]` `[H]`."""

    site = "z"

    def __init__(self, model: HeadModel) -> None:
        self.model = model
        self.norms: dict[int, np.ndarray] = {}

    def read(self, call: Activation) -> None:
        W = self.model.W_O(call.layer).detach().to(call.value)
        z = call.value.float()
        squares = torch.einsum("bthd,hde,bthe->bth", z, (W @ W.mT).float(), z)
        self.norms[call.layer] = squares.clamp(min=0).sqrt().mean((0, 1)).cpu().numpy()


def write_norms(model: HeadModel, *, n: int = 4, seed: int = 0) -> HeadScores:
    """The length of each head's write `|z_h W_O[h]|` on random repeated tokens, mean over positions, in the stream's unit."""
    reader = _WriteNorms(model)
    model.look(repeats(model, n, 32, seed)[0], reader)
    values = np.full(model.shape, np.nan)
    for layer, norms in reader.norms.items():
        values[layer] = norms
    return HeadScores("write_norm", values, np.full(model.shape, np.nan), n, {"seed": seed})


def silent_heads(norms: HeadScores) -> HeadSet:
    """Heads whose write is less than `SILENT` of the median head's: wherever they look, they do nothing."""
    quiet = np.argwhere(norms.values < SILENT * np.nanmedian(norms.values))
    return HeadSet([Head(int(layer), int(index)) for layer, index in quiet], norms.shape)


def loud(scores: HeadScores, silent: HeadSet) -> HeadScores:
    """The scores without those of silent heads, which count as the lowest."""
    values = scores.values.copy()
    for head in silent:
        values[head] = min(0.0, float(np.nanmin(values)))
    return replace(scores, values=values)
