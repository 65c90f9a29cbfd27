"""Duplicate-token heads: which heads attend to an earlier occurrence of the current token (Wang et al., arXiv:2211.00593).

score[l, h] = mean_{t in second copy} pattern[l, h, t, t - P]        in [0, 1], dimensionless, on random repeated tokens
"""

from __future__ import annotations

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import REPEATS
from manyheads.atlas.core.registry import register
from manyheads.atlas.core.repeats import Diagonal, score_repeats
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel

DIAGONAL = Diagonal(
    About(
        name="duplicate_token",
        title="Duplicate token",
        what="Attends to the place where the current token stood before, and so tells later heads that it is a repetition.",
        formula="mean over the second copy of pattern[t, t-P] on random repeated tokens",
        unit="attention",
        paper="arXiv:2211.00593",
        threshold=0.4,
        kind="repetition",
    ),
    offset=lambda period: period,
    by_content=True,
)


def duplicate_token(model: HeadModel, *, n: int = 32, length: int = 64, seed: int = 0) -> HeadScores:
    """Score every head by its attention to the same token's first occurrence (formula above), over `n` rows."""
    return score_repeats(model, [DIAGONAL], n=n, length=length, seed=seed)[0]


register(DIAGONAL.about, score=DIAGONAL, judge=REPEATS)
