"""First-token heads, attention sinks: which heads attend to the first token, whatever it is.

Xiao et al., arXiv:2309.17453; Gu et al., arXiv:2410.10781, whose measure with its threshold 0.3 this is, on random tokens:

    score[l, h] = mean_{t > 1} pattern[l, h, t, 0]        in [0, 1], dimensionless

Such a head may still do something: many act only where they find what they look for, which random tokens lack.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import TEXT
from manyheads.atlas.core.registry import register
from manyheads.atlas.core.repeats import Copies, Reduction, score_repeats
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel


class FirstColumn(Reduction):
    """Keeps `[B, H]`: the mean of the pattern's first column."""

    about = About(
        name="first_token",
        title="First token (sink)",
        what="Attends to the first token of the text where it finds nothing else.",
        formula="mean over queries of pattern[t, 0] on random tokens",
        unit="attention",
        paper="arXiv:2410.10781",
        threshold=0.3,
        kind="rest",
        trait=True,
    )

    def reduce(self, pattern: Float[Tensor, "B H T T"], copies: Copies) -> Float[Tensor, "B H"]:
        """The first column, without the queries that have little else to attend to."""
        return pattern[:, :, 2:, 0].float().mean(-1)


REDUCTION = FirstColumn()


def first_token(model: HeadModel, *, n: int = 32, length: int = 64, seed: int = 0) -> HeadScores:
    """Score every head by its attention to the first token (formula above), over `n` rows."""
    return score_repeats(model, [REDUCTION], n=n, length=length, seed=seed)[0]


register(REDUCTION.about, score=REDUCTION, judge=TEXT)
