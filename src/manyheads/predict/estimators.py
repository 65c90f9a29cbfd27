"""Heads as scikit-learn estimators: `fit`, `predict`, `predict_proba`, `score`, on tables, on texts, on anything a trunk reads.

    HeadClassifier().fit(X, y)                                       # a table: a small network with a linear head
    HeadClassifier(trunk=mh.open_model("smollm2"), pool="last").fit(texts, y)      # a head on frozen states
    HeadRegressor(levels=(0.1, 0.5, 0.9)).fit(X, y).predict_quantiles(X)           # a second head on the same trunk

A table's columns are scaled to a mean of 0 and a standard deviation of 1, and so is the target of a regressor; both compute in
double precision, so that a row's prediction does not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.learning import Attached, LinearHead, LinearSettings, MultiHead, Pool, ScalarHead, Trunk, features
from manyheads.learning.binned import QuantileHead, QuantileSettings
from manyheads.learning.trunk import Layer
from manyheads.model.headmodel import HeadModel
from manyheads.predict.trunks import mlp
from manyheads.training import ADAM, row_batches

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.utils import validation as checks
    from sklearn.utils.multiclass import check_classification_targets
except ImportError:
    raise InputError("estimators need scikit-learn; install it: pip install 'manyheads[predict]'.") from None


class _HeadEstimator(BaseEstimator):
    """What both share: the trunk, how it is read, and how long its heads train."""

    def __init__(
        self,
        trunk: Trunk | HeadModel | nn.Module | None = None,
        *,
        hidden: Sequence[int] = (64,),
        layer: Layer = -1,
        pool: Pool = "mean",
        epochs: int = 60,
        rows: int = 32,
        rate: float = 3e-3,
        random_state: int = 0,
    ) -> None:
        self.trunk, self.hidden, self.layer, self.pool = trunk, hidden, layer, pool
        self.epochs, self.rows, self.rate, self.random_state = epochs, rows, rate, random_state

    def _states(self, X: Any, *, fitting: bool) -> Tensor:
        """A table's scaled columns, or the states of a frozen trunk, in double precision."""
        if self.trunk is None:
            X = checks.validate_data(self, X, dtype=np.float64, reset=fitting)
        else:
            inputs = X if isinstance(X, Tensor) else [str(text) for text in X]
            X = features(self.trunk, inputs, self.layer, self.pool).double().numpy()
            checks.validate_data(self, X, reset=fitting)
        if fitting:
            self.mean_, self.scale_ = X.mean(0), np.where(X.std(0) > 0, X.std(0), 1.0)
        scaled: Tensor = torch.tensor((X - self.mean_) / self.scale_)
        return scaled

    def _fitted(self, states: Tensor, heads: Mapping[str, Any], targets: Mapping[str, Tensor]) -> None:
        seed = self.random_state if isinstance(self.random_state, int | np.integer) else 0
        widths = (states.shape[1], *(self.hidden if self.trunk is None else ()))
        small = mlp(widths[0], *widths[1:], seed=int(seed)) if len(widths) > 1 else nn.Identity()
        self.heads_ = MultiHead(
            Trunk(small, frozen=False), {name: make(widths[-1], int(seed)) for name, make in heads.items()}
        )
        self.heads_.double()
        steps = self.epochs * max(1, len(states) // self.rows)
        settings = replace(ADAM, steps=steps, rate=self.rate, decay=0.5, seed=int(seed))
        data = {"input": states, **targets}
        self.heads_.fit(row_batches(data, self.rows, int(seed)), settings, log_every=steps + 1)

    @torch.no_grad()
    def _output(self, X: Any, name: str) -> Tensor:
        checks.check_is_fitted(self)
        out: Tensor = self.heads_({"input": self._states(X, fitting=False)})[name]
        return out


class HeadClassifier(ClassifierMixin, _HeadEstimator):
    """A linear head over classes. `classes_` are the classes, `heads_` the trained `MultiHead`."""

    def fit(self, X: Any, y: Any) -> HeadClassifier:
        """Learn from rows (or texts) and their classes."""
        if y is None:
            raise InputError("fit requires y to be passed, but the target y is None.")
        states = self._states(X, fitting=True)
        y = checks.column_or_1d(y, warn=True)
        checks.check_consistent_length(states, y)
        check_classification_targets(y)
        self.classes_, numbers = np.unique(y, return_inverse=True)
        classes = len(self.classes_)
        if classes < 2:
            raise InputError(f"y has one class, {self.classes_[0]!r}; a classifier needs at least two.")
        head = {"y": lambda width, seed: LinearHead(LinearSettings(width, classes, seed))}
        self._fitted(states, head, {"y": torch.tensor(numbers)})
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """The probability of each class, in the order of `classes_`."""
        return self._output(X, "y").softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        best = self._output(X, "y").argmax(-1).numpy()
        return self.classes_[best]


class HeadRegressor(RegressorMixin, _HeadEstimator):
    """A head for a number, and with `levels` a second one for its quantiles on the same trunk."""

    def __init__(
        self,
        trunk: Trunk | HeadModel | nn.Module | None = None,
        *,
        levels: Sequence[float] | None = None,
        hidden: Sequence[int] = (64,),
        layer: Layer = -1,
        pool: Pool = "mean",
        epochs: int = 60,
        rows: int = 32,
        rate: float = 3e-3,
        random_state: int = 0,
    ) -> None:
        super().__init__(
            trunk, hidden=hidden, layer=layer, pool=pool, epochs=epochs, rows=rows, rate=rate, random_state=random_state
        )
        self.levels = levels

    def fit(self, X: Any, y: Any) -> HeadRegressor:
        """Learn from rows (or texts) and their numbers."""
        if y is None:
            raise InputError("fit requires y to be passed, but the target y is None.")
        states = self._states(X, fitting=True)
        y = checks.column_or_1d(checks.check_array(y, ensure_2d=False, dtype=np.float64), warn=True)
        checks.check_consistent_length(states, y)
        self.y_mean_, self.y_scale_ = float(y.mean()), float(y.std()) or 1.0
        target = torch.tensor((y - self.y_mean_) / self.y_scale_)
        heads: dict[str, Any] = {"y": lambda width, seed: ScalarHead(LinearSettings(width, 1, seed))}
        if self.levels is not None:
            levels = tuple(self.levels)
            heads["quantiles"] = lambda width, seed: Attached(QuantileHead(QuantileSettings(width, levels, seed)), "y")
        self._fitted(states, heads, {"y": target})
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The mean of each row."""
        return self._output(X, "y")[:, 0].numpy() * self.y_scale_ + self.y_mean_

    def predict_quantiles(self, X: Any) -> np.ndarray:
        """[rows, levels], rising along each row. `InputError` without `levels`."""
        if self.levels is None:
            raise InputError(
                "no quantiles were learned; give levels, for example levels=(0.1, 0.5, 0.9), and fit again."
            )
        return self._output(X, "quantiles").numpy() * self.y_scale_ + self.y_mean_
