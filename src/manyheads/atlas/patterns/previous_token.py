"""Previous-token heads: which heads attend to the token just before (Elhage et al. 2021; Olsson et al., arXiv:2209.11895).

score[l, h] = mean_t pattern[l, h, t, t - 1]        in [0, 1], dimensionless, on random repeated tokens
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
        name="previous_token",
        title="Previous token",
        what="Attends to the token just before, which later heads need to know what followed what.",
        formula="mean over t of pattern[t, t-1] on random repeated tokens",
        unit="attention",
        paper="arXiv:2209.11895",
        threshold=0.4,
        kind="position",
    ),
    offset=lambda period: 1,
    by_content=False,
)


def previous_token(model: HeadModel, *, n: int = 32, length: int = 64, seed: int = 0) -> HeadScores:
    """Score every head by its attention to the previous token (formula above), over `n` rows of two copies of `length` tokens."""
    return score_repeats(model, [DIAGONAL], n=n, length=length, seed=seed)[0]


register(DIAGONAL.about, score=DIAGONAL, judge=REPEATS)
