"""Positional heads: which heads attend to a fixed distance, whatever token is there (Voita et al., arXiv:1905.09418).

On random tokens that have not occurred before, the offset profile of a head and its score are

    profile[l, h, o] = mean_t pattern[l, h, t, t - o],   o = -8 .. 8        (o > 0 looks back, 0 at itself, o < 0 ahead)
    score[l, h] = max_o profile[l, h, o]        in [0, 1], dimensionless

The paper counts how often the largest weight lies at one relative position; we take the weight itself, so that a head which is
positional half of the time scores half. `previous_token` is the profile at o = 1; the tokens there repeat, here they do not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import REPEATS
from manyheads.atlas.core.registry import register
from manyheads.atlas.core.repeats import Copies, Reduction, score_repeats
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel

REACH = 8
OFFSETS = range(-REACH, REACH + 1)


class OffsetProfile(Reduction):
    """Keeps `[B, H, 2 REACH + 1]`: the weight at each distance, over queries of the first copy that have keys at all of them."""

    about = About(
        name="positional",
        title="Positional",
        what="Attends to a fixed distance (this token, the one before, three back), whatever stands there.",
        formula="largest mean of pattern[t, t-o] over offsets o, on random tokens that have not occurred before",
        unit="attention",
        paper="arXiv:1905.09418",
        threshold=0.4,
        kind="position",
    )

    def reduce(self, pattern: Float[Tensor, "B H T T"], copies: Copies) -> Float[Tensor, "B H O"]:
        first, last = copies.start + REACH, copies.start + copies.period - REACH
        queries = torch.arange(min(first, last - 1), max(last, first))
        return torch.stack([pattern[:, :, queries, queries - o].float().mean(-1) for o in OFFSETS], -1)

    def score(self, kept: Float[np.ndarray, "N L H O"]) -> tuple[Float[np.ndarray, "N L H"], dict[str, Any]]:
        """The profile at each head's best offset; `meta["offsets"]` has the offsets, `meta["profile"]` all of the profile."""
        profile = kept.mean(0)
        best = profile.argmax(-1)
        values = np.take_along_axis(kept, best[None, ..., None], -1)[..., 0]
        return values, {"offsets": (best - REACH).tolist(), "profile": profile.round(4).tolist()}


REDUCTION = OffsetProfile()


def positional(model: HeadModel, *, n: int = 32, length: int = 64, seed: int = 0) -> HeadScores:
    """Score every head by its attention to its favourite distance (formula above), over `n` rows; `length` is at least 24."""
    return score_repeats(model, [REDUCTION], n=n, length=length, seed=seed)[0]


register(REDUCTION.about, score=REDUCTION, judge=REPEATS)
