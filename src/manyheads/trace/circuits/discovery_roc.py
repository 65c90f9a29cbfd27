"""Scores against a known circuit: ROC, precision and recall of head scores.

The area under the ROC is `evaluation.metrics.auc`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float

from manyheads.errors import InputError
from manyheads.evaluation.metrics import auc
from manyheads.heads import HeadLike, HeadScores, HeadSet


@dataclass(frozen=True)
class Roc:
    """`table` has one row a threshold, from the highest score down: `threshold`, `found`, `tpr` (recall), `fpr`, `precision`."""

    table: pd.DataFrame
    auc: float

    @property
    def average_precision(self) -> float:
        """Precision averaged over the steps of recall."""
        steps = np.diff(self.table["tpr"].to_numpy(), prepend=0.0)
        return float((steps * self.table["precision"]).sum())

    def at(self, n: int) -> tuple[float, float]:
        """Precision and recall of the `n` heads that score highest (more where scores are equal)."""
        row = self.table[self.table["found"] >= n].iloc[0]
        return float(row["precision"]), float(row["tpr"])


def roc(scores: HeadScores | Float[np.ndarray, "L H"], known: HeadSet | Iterable[HeadLike]) -> Roc:
    """ROC of `scores` (higher: more likely in the circuit) for the `known` heads.

    `InputError` if known heads are out of range, or are no heads or all heads.
    """
    values = np.asarray(scores.values if isinstance(scores, HeadScores) else scores, dtype=np.float64)
    inside = np.zeros(values.shape, dtype=bool)
    for head in HeadSet(known, (values.shape[0], values.shape[1])):
        inside[head] = True
    if inside.all() or not inside.any():
        raise InputError(f"{int(inside.sum())} of {inside.size} heads are known; a ROC needs some, and some others.")
    return Roc(_table(values.ravel(), inside.ravel()), auc(values, inside))


def _table(values: Float[np.ndarray, "N"], inside: Bool[np.ndarray, "N"]) -> pd.DataFrame:
    order = np.argsort(-values, kind="stable")
    ends = np.flatnonzero(np.diff(values[order], append=-np.inf))
    found, hits = ends + 1, inside[order].cumsum()[ends]
    return pd.DataFrame(
        {
            "threshold": values[order][ends],
            "found": found,
            "tpr": hits / inside.sum(),
            "fpr": (found - hits) / (~inside).sum(),
            "precision": hits / found,
        }
    )
