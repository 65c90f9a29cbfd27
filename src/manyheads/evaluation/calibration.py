"""Calibration: do probabilities mean what they say? ECE, MCE, and the one temperature that repairs most of it.

Rows are put into bins of equal width by the probability p of their largest class. With n_b rows in bin b of n, of which a share
acc(b) is right, and their mean probability conf(b) (Guo et al., arXiv:1706.04599),

    ECE   sum_b n_b / n |acc(b) - conf(b)|                                               in [0, 1]
    MCE   max_b |acc(b) - conf(b)| over bins with rows                                   in [0, 1]
    temperature scaling   softmax(logits / T), T > 0 least negative log-likelihood       T is dimensionless

T must be fitted on rows that the model was not trained on, nor is judged on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Real

from manyheads.errors import InputError
from manyheads.inputs import check_integer

BINS = 15
COLDEST, HOTTEST = 1e-3, 1e3


@dataclass(frozen=True)
class Calibration:
    """ECE, MCE, the share of rows that are right, and nats a row (NLL)."""

    ece: float
    mce: float
    accuracy: float
    nll: float


def calibration(
    logits: Real[np.ndarray, "N C"], labels: Int[np.ndarray, "N"], *, temperature: float = 1.0, bins: int = BINS
) -> Calibration:
    """How well softmax(logits / temperature) is calibrated. `InputError` for no rows, or labels that are no class."""
    check_integer(bins, "bins", 1)
    logits, labels = _checked(logits, labels)
    log_p = _log_softmax(logits / temperature)
    confidence, right = np.exp(log_p.max(1)), log_p.argmax(1) == labels
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    gap = np.bincount(index, right - confidence, minlength=bins)  # n_b (acc - conf)
    rows = np.bincount(index, minlength=bins)
    ece, mce = np.abs(gap).sum() / len(labels), np.max(np.abs(gap[rows > 0]) / rows[rows > 0])
    nll = -log_p[np.arange(len(labels)), labels].mean()
    return Calibration(float(ece), float(mce), float(right.mean()), float(nll))


def fit_temperature(logits: Real[np.ndarray, "N C"], labels: Int[np.ndarray, "N"]) -> float:
    """The T in [1e-3, 1e3] with the least negative log-likelihood.

    It is convex in s = 1 / T with derivative mean(E_p[logit] - logit of the label), so halving finds the only root. At a bound
    there is none: rows that are all right want T = 0, rows that are worse than chance T = infinity.
    """
    logits, labels = _checked(logits, labels)
    own = logits[np.arange(len(labels)), labels].mean()
    low, high = 1 / HOTTEST, 1 / COLDEST
    while high / low > 1 + 1e-9:
        middle = (low * high) ** 0.5
        p = np.exp(_log_softmax(logits * middle))
        low, high = (low, middle) if (p * logits).sum(1).mean() > own else (middle, high)
    return float(1 / (low * high) ** 0.5)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    scaled = logits - logits.max(1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


def _checked(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise InputError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} do not fit; give [N, C] and [N], N >= 1."
        )
    if not np.isfinite(logits).all():
        raise InputError("logits hold NaN or infinity; no probability can be read from them.")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise InputError(
            f"labels go from {labels.min()} to {labels.max()}; there are classes 0 to {logits.shape[1] - 1}."
        )
    return logits, labels
