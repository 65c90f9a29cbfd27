"""EACS (#123): which covariates to use where: a set for each environment, chosen by what its unlabelled inputs look like.

Zuo and Wang, arXiv:2601.02322. Where a cause of y is not observed, a child of y may stand in for it, until a shift breaks that.
The shift leaves marks in the inputs alone:

    f_S      least squares of y on the covariates S, with intercept, on all training environments together
    phi_e    mark of an environment, from its unlabelled rows: standard deviations (ddof 1) and pairwise correlations
    j*_e     argmin_S of the mean squared error of f_S in e
    selector multinomial logistic regression  phi -> j*

At test the selector sees the mark of a batch, and f of the set it names predicts. Ours: marks are standardised before they are
compared; means can be marks too; and a batch whose mark lies twice as far from all training marks as these lie from each other is
answered by the set that is best over all of them, and `uncertain` says so: a shift of an unseen kind would be guessed at random.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Shaped

from manyheads.errors import InputError

try:
    from sklearn.base import BaseEstimator, RegressorMixin
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import validation as checks
except ImportError:
    raise InputError("judging predictors needs scikit-learn; install it: pip install 'manyheads[judge]'.") from None

MOST_SETS = 64
LEAST_ROWS = 30  # of a batch: correlations of fewer mislead


def environment_mark(x: Float[np.ndarray, "N D"], *, means: bool = False) -> Float[np.ndarray, "F"]:
    """Phi of an environment: standard deviations, correlations (0 where undefined), and means if asked for. Rows only, no y."""
    spread = x.std(0, ddof=1) if len(x) > 1 else np.zeros(x.shape[1])
    centred = x - x.mean(0)
    scale = np.outer(spread, spread) * max(len(x) - 1, 1)
    together = np.divide(centred.T @ centred, scale, out=np.zeros_like(scale), where=scale > 0)
    pairs = together[np.triu_indices(x.shape[1], 1)]
    return np.concatenate([spread, pairs, x.mean(0)] if means else [spread, pairs])


class CovariateSelector(RegressorMixin, BaseEstimator):
    """Chooses a set of covariates for each batch by its unlabelled inputs (formulas above).

    `subsets` are the candidate sets of column numbers. None: every set, with those in `always` in each; of more than 6 columns
    none, each alone, all but each, and all; of more than 31 none and all. `means` adds means to the
    marks. After `fit`: `subsets_`, `best_` (the best set of each environment), `marks_`, `overall_` (the best set on average).
    """

    def __init__(
        self,
        subsets: Sequence[Sequence[int]] | None = None,
        *,
        always: Sequence[int] = (),
        means: bool = False,
        abstain: bool = True,
    ) -> None:
        self.subsets, self.always, self.means, self.abstain = subsets, always, means, abstain

    def fit(self, X: Any, y: Any, environments: Any = None) -> Self:
        """Learn from rows `X` `[N, D]` with `y` `[N]` and the environment of each row. Without environments all rows are one."""
        X, y = checks.validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        where = np.zeros(len(X), dtype=int) if environments is None else np.asarray(environments)
        if where.shape != y.shape:
            raise InputError(f"there are {len(X)} rows and {where.size} environments; give one a row.")
        self.subsets_ = self._candidates(X.shape[1])
        self.models_ = [_Line.of(X[:, list(chosen)], y) for chosen in self.subsets_]
        errors = np.stack([(y - self._by(j, X)) ** 2 for j in range(len(self.subsets_))])
        each = [where == name for name in np.unique(where)]
        self.errors_ = np.stack([errors[:, rows].mean(1) for rows in each])
        self.best_ = self.errors_.argmin(1)
        self.overall_ = int(self.errors_.mean(0).argmin())
        self.marks_ = np.stack([environment_mark(X[rows], means=self.means) for rows in each])
        self.scaler_ = StandardScaler().fit(self.marks_)
        known = np.unique(self.best_)
        scaled = self.scaler_.transform(self.marks_)
        self.selector_ = LogisticRegression(max_iter=2000).fit(scaled, self.best_) if len(known) > 1 else None
        apart = np.linalg.norm(scaled[:, None] - scaled, axis=-1) + np.where(np.eye(len(scaled)) > 0, np.inf, 0.0)
        self.farthest_ = float(apart.min(1).max()) if len(scaled) > 1 else np.inf
        return self

    def choose(self, X: Any) -> tuple[int, ...]:
        """The covariates for a batch of unlabelled rows of one environment."""
        return self.subsets_[self._chosen(self._batch(X))]

    def uncertain(self, X: Any) -> bool:
        """Whether the batch is too small, or unlike all environments seen, and so is answered by the best set on average."""
        X = self._batch(X)
        return self.abstain and (len(X) < LEAST_ROWS or self._apart(X) > 2 * self.farthest_)

    def predict(self, X: Any) -> Float[np.ndarray, "N"]:
        """Predict rows of one environment together: what is chosen depends on all of them."""
        X = self._batch(X)
        return self._by(self._chosen(X), X)

    def _batch(self, X: Any) -> Float[np.ndarray, "N D"]:
        checks.check_is_fitted(self)
        return checks.validate_data(self, X, dtype=np.float64, reset=False)

    def _mark(self, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "1 F"]:
        return self.scaler_.transform(environment_mark(X, means=self.means)[None])

    def _apart(self, X: Float[np.ndarray, "N D"]) -> float:
        return float(np.linalg.norm(self.scaler_.transform(self.marks_) - self._mark(X), axis=1).min())

    def _chosen(self, X: Float[np.ndarray, "N D"]) -> int:
        if self.selector_ is None:
            return int(self.best_[0])
        return self.overall_ if self.uncertain(X) else int(self.selector_.predict(self._mark(X))[0])

    def _by(self, j: int, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N"]:
        return self.models_[j].predict(X[:, list(self.subsets_[j])])

    def _candidates(self, width: int) -> list[tuple[int, ...]]:
        if self.subsets is not None:
            found = [tuple(sorted(set(map(int, chosen)))) for chosen in self.subsets]
        else:
            rest = [i for i in range(width) if i not in set(self.always)]
            sizes: Sequence[int] = (
                range(len(rest) + 1) if 2 ** len(rest) <= MOST_SETS else (0, 1, len(rest) - 1, len(rest))
            )
            if 2 * len(rest) + 2 > MOST_SETS:
                sizes = (0, len(rest))
            some = chain.from_iterable(combinations(rest, k) for k in sizes)
            found = [tuple(sorted({*self.always, *chosen})) for chosen in some]
        wrong = [i for chosen in found for i in chosen if not 0 <= i < width]
        if wrong or not found or len(found) > MOST_SETS:
            raise InputError(
                f"the candidate sets name columns 0 to {width - 1}, at least one and at most {MOST_SETS} sets."
            )
        return list(dict.fromkeys(found))


class _Line:
    """Least squares with intercept, also on no column at all."""

    def __init__(self, line: LinearRegression | None, mean: float) -> None:
        self.line, self.mean = line, mean

    @classmethod
    def of(cls, x: Float[np.ndarray, "N S"], y: Shaped[np.ndarray, "N"]) -> _Line:
        return cls(LinearRegression().fit(x, y) if x.shape[1] else None, float(y.mean()))

    def predict(self, x: Float[np.ndarray, "N S"]) -> Float[np.ndarray, "N"]:
        return np.full(len(x), self.mean) if self.line is None else self.line.predict(x)
