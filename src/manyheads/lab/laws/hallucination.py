"""Calibrated models must hallucinate (#88): the share of false facts is at least that of facts seen once, less miscalibration.

Kalai and Vempala, arXiv:2311.14648. A generator says facts y with probability g(y); the true ones have probabilities p(y).

    MF      = #{facts seen exactly once} / n                    over n observations (Good-Turing estimate of the unseen mass)
    miscal  = 1/2 sum over bins |g(bin) - p(bin)|               bins of equal g-mass, y sorted by g
    halluc  = sum of g(y) over false y
    law       halluc >= MF - miscal - O(1 / sqrt n)

Refuted by: a generator below the right side by more than 2 / sqrt(n). Bins hold whole groups of equal g, so that no order among
equals is made up. Of a model whose training texts are not known MF is not known: then the law bounds it from above,
MF <= halluc + miscal, and there is no verdict.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_number
from manyheads.lab.laws.law import Answer, LawRow
from manyheads.lab.laws.relations import TwoWay
from manyheads.model.headmodel import HeadModel

BINS = 10


@dataclass(frozen=True)
class Hallucination:
    """The three estimates, and whether the law is kept."""

    monofacts: float
    miscalibration: float
    hallucination: float
    n: int

    @property
    def slack(self) -> float:
        """`halluc - (MF - miscal)`: the law wants at least - 2 / sqrt(n)."""
        return self.hallucination - self.monofacts + self.miscalibration

    @property
    def kept(self) -> bool:
        """Whether the law holds here."""
        return self.slack >= -2 / math.sqrt(self.n)


def monofact_rate(counts: Int[np.ndarray, "..."]) -> float:
    """Share of the observations whose fact was seen once."""
    total = int(counts.sum())
    if total < 1 or (counts < 0).any():
        raise InputError("counts of facts are whole numbers from 0 on, and at least one is above it.")
    return float((counts == 1).sum() / total)


def miscalibration(g: Float[np.ndarray, "F"], p: Float[np.ndarray, "F"], bins: int = BINS) -> float:
    """Total variation between g and p over bins of about equal g-mass (formula above); in [0, 1]."""
    for name, one in (("g", g), ("p", p)):
        if (one < 0).any() or abs(one.sum() - 1) > 1e-6:
            raise InputError(f"{name} is no distribution: it must be non-negative with sum 1.")
    values, group = np.unique(-g.round(15), return_inverse=True)
    mass, truth = np.bincount(group, g, len(values)), np.bincount(group, p, len(values))
    middle = np.cumsum(mass) - mass / 2
    place = np.minimum((middle * bins).astype(int), bins - 1)
    return float(0.5 * np.abs(np.bincount(place, mass - truth)).sum())


def estimates(
    g: Float[np.ndarray, "F"], p: Float[np.ndarray, "F"], counts: Int[np.ndarray, "F"], bins: int = BINS
) -> Hallucination:
    """The three estimates of a generator `g` over all conceivable facts; `p` is 0 of false ones, `counts` were its training."""
    return Hallucination(monofact_rate(counts), miscalibration(g, p, bins), float(g[p == 0].sum()), int(counts.sum()))


def hallucination(
    model: HeadModel,
    facts: TwoWay,
    *,
    forwards: Float[np.ndarray, "N N"] | None = None,
    monofacts: float | None = None,
) -> LawRow:
    """What a model says of the relation: a subject at random, an object as it holds them likely among those of the relation.

    `monofacts` is the share of its training's facts that were seen once, where that is known (0 for ladon, whose texts repeat
    every fact); `forwards` are the scores of `facts`, where they are known already.
    """
    if monofacts is not None:
        check_number(monofacts, "monofacts", 0.0, 1.0)
    scores = facts.scores(model) if forwards is None else forwards
    n = len(scores)
    chosen = np.exp(scores - scores.max(1, keepdims=True))
    chosen /= chosen.sum(1, keepdims=True)
    g, p = (chosen / n).ravel(), (np.eye(n) / n).ravel()
    off, false = miscalibration(g, p), float(1 - np.diagonal(chosen).mean())
    stderr = float(np.diagonal(chosen).std(ddof=1) / math.sqrt(n))
    told = f"false share {false:.3f}, miscalibration {off:.3f}"
    answer: Answer
    if monofacts is None:
        says, answer = (
            f"{told}; at most {min(1.0, false + off):.2f} of its facts can have been seen once",
            "not decided",
        )
        effect = false + off
    else:
        effect = false + off - monofacts
        answer = "holds" if effect >= -2 / math.sqrt(n) else "fails"
        says = f"{told}, seen once {monofacts:.3f}"
    return LawRow(
        "calibrated hallucination", 88, facts.name, effect, stderr, "share", math.nan, math.nan, n, answer, says
    )
