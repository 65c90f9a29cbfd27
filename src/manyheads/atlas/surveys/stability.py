"""Stability: do fresh inputs rank the heads the same way?

The scores are taken again on inputs of other seeds. Between every two seeds,

    rank = Spearman's correlation of the scores of all heads       in [-1, 1]
    top = |A and B| / |A or B| of the heads a causal check would ablate       in [0, 1]

and both are averaged over the pairs. Equal scores agree with 1. A correlation is undefined where all heads of one of two
different draws score the same; such pairs do not count. Scores read off the weights agree perfectly unless they sample the
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import combinations
from types import MappingProxyType

import numpy as np

from manyheads.atlas.core.registry import behaviours, score_all, top_heads
from manyheads.atlas.core.result import Agreement
from manyheads.evaluation.metrics import jaccard, rank_correlation
from manyheads.heads import HeadScores, mean_stderr
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Task


def stability(
    model: HeadModel,
    scores: Mapping[str, HeadScores],
    seeds: int,
    *,
    n: int | Mapping[str, int],
    seed: int = 0,
    tasks: Mapping[str, Task] = MappingProxyType({}),
    bar: Bar = Bar(),
) -> dict[str, Agreement]:
    """Agreement of each behaviour's `scores`, which are those of `seed`, with `seeds - 1` further draws; none if `seeds` is 1."""
    draws = {name: [one] for name, one in scores.items()}
    for more in range(1, seeds):
        again, _ = score_all(model, scores.keys(), n=n, seed=seed + 1000 * more, tasks=tasks, bar=bar)
        for name, one in again.items():
            draws[name].append(one)
    return {name: agreement(name, several) for name, several in draws.items() if len(several) > 1}


def rank_agreement(draws: Collection[HeadScores]) -> float:
    """Spearman's correlation of the scores of all heads, mean over pairs of draws (see above); NaN where no pair has one."""
    pairs = combinations((scores.values for scores in draws), 2)
    each = [1.0 if np.array_equal(a, b, equal_nan=True) else rank_correlation(a, b) for a, b in pairs]
    return float(mean_stderr(np.array(each))[0])


def agreement(behaviour: str, draws: Collection[HeadScores]) -> Agreement:
    """Agreement of two or more draws of one behaviour's scores."""
    tops = [top_heads(scores, behaviours()[behaviour].about.threshold) for scores in draws]
    overlaps = [jaccard(a, b) for a, b in combinations(tops, 2)]
    return Agreement(rank_agreement(draws), float(np.mean(overlaps)), len(draws))
