"""Induction heads: which heads attend to what followed the current token last time (Olsson et al., arXiv:2209.11895).

    score[l, h] = mean_{t in second copy} pattern[l, h, t, t - P + 1]        in [0, 1], dimensionless, on random repeated tokens

This is the prefix-matching half of the paper's definition; that the head also copies is `copying`'s and the causal check's part.
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
        name="induction",
        title="Induction",
        what="Attends to the token that followed the current one last time, and predicts it again: [A] [B] ... [A] -> [B].",
        formula="mean over the second copy of pattern[t, t-P+1] on random repeated tokens",
        unit="attention",
        paper="arXiv:2209.11895",
        threshold=0.4,
        kind="copying",
    ),
    offset=lambda period: period - 1,
    by_content=True,
)


def induction(model: HeadModel, *, n: int = 32, length: int = 64, seed: int = 0) -> HeadScores:
    """Score every head by its attention to the token after the previous occurrence (formula above), over `n` rows."""
    return score_repeats(model, [DIAGONAL], n=n, length=length, seed=seed)[0]


register(DIAGONAL.about, score=DIAGONAL, judge=REPEATS)
