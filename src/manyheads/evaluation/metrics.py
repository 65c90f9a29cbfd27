"""Metrics that several rooms share: how two rankings, two sets, scores and labels agree; how likely an answer is.

Higher is better or more alike:

    AUC                 P(score of a positive > score of a negative) + P(equal) / 2        in [0, 1]; 0.5: chance
    rank correlation    Spearman's: Pearson's correlation of ranks, equal values sharing theirs        in [-1, 1]
    Jaccard             |A and B| / |A or B|                                               in [0, 1]
    log-probability     log softmax(logits)[token]                                         nats, at most 0
"""

from __future__ import annotations

from collections.abc import Hashable
from collections.abc import Set as AbstractSet

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Real, Shaped
from torch import Tensor

from manyheads.errors import InputError


def auc(scores: Real[np.ndarray, "..."], positive: Bool[np.ndarray, "..."]) -> float:
    """How well `scores` set the positives above the others (formula above); NaN if there are only positives, or none.

    `InputError` if the shapes differ.
    """
    scores, positive = np.asarray(scores), np.asarray(positive, dtype=bool)
    _same_shape(scores, positive)
    yes, no = scores[positive], np.sort(scores[~positive])
    if not len(yes) or not len(no):
        return float("nan")
    below, not_above = np.searchsorted(no, yes, "left"), np.searchsorted(no, yes, "right")
    return float((below + not_above).mean() / (2 * len(no)))


def rank_correlation(a: Shaped[np.ndarray, "..."], b: Shaped[np.ndarray, "..."]) -> float:
    """Spearman's correlation of two arrays of one shape; NaN where all values of one are equal. Pairs with a NaN do not count.

    `InputError` if the shapes differ.
    """
    a, b = np.asarray(a), np.asarray(b)
    _same_shape(a, b)
    return float(pd.DataFrame({"a": a.ravel(), "b": b.ravel()}).corr("spearman").iloc[0, 1])


def jaccard(a: AbstractSet[Hashable], b: AbstractSet[Hashable]) -> float:
    """How much two sets share (formula above); 1 for two empty ones, which are equal."""
    union = len(a | b)
    return len(a & b) / union if union else 1.0


def log_probability(logits: Float[Tensor, "... V"], tokens: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The log-probability of one token a place, in single precision, where the logits are."""
    return logits.float().log_softmax(-1).gather(-1, tokens.to(logits.device)[..., None])[..., 0]


def _same_shape(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        raise InputError(
            f"values of shapes {list(a.shape)} and {list(b.shape)} cannot be compared; give as many of both."
        )
