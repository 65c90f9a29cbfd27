"""A market as a classifier (#36): scikit-learn models bet on rows they were not trained on, and budgets say who is believed.

`MarketClassifier` takes any classifiers. A specialist is one whose `predict_proba` gives a row of zeros, or NaN, where it has
nothing to say; `Specialist` makes one of a classifier and a rule. `ForestMarket` lets every leaf of a fitted forest be a
participant: with equal budgets its prices are the forest's own probabilities.

Bets on training rows come from folds that did not train the model: one that bets on rows it knows looks richer than it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import numpy as np
from jaxtyping import Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.judge.market import Betting, bets_on, market_price, settle_bets

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, clone
    from sklearn.model_selection import StratifiedKFold
    from sklearn.utils import validation as checks
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
except ImportError:
    raise InputError("judging predictors needs scikit-learn; install it: pip install 'manyheads[judge]'.") from None


class Specialist(ClassifierMixin, BaseEstimator):
    """A classifier that learns and speaks only where `where(X)` is true, and is silent elsewhere."""

    def __init__(self, estimator: Any, where: Callable[[Any], Any]) -> None:
        self.estimator, self.where = estimator, where

    def fit(self, X: Any, y: Any) -> Self:
        """Fit on the rows that are its own. Without two classes among them it is silent everywhere."""
        self.classes_ = unique_labels(y)
        own = np.asarray(self.where(X), dtype=bool)
        known = unique_labels(np.asarray(y)[own]) if own.any() else []
        self.estimator_ = clone(self.estimator).fit(np.asarray(X)[own], np.asarray(y)[own]) if len(known) > 1 else None
        return self

    def predict_proba(self, X: Any) -> Float[np.ndarray, "N K"]:
        """Probabilities, or zeros where it is silent."""
        own = np.asarray(self.where(X), dtype=bool)
        found = np.zeros((len(own), len(self.classes_)))
        if self.estimator_ is not None and own.any():
            found[own] = _aligned(self.estimator_, np.asarray(X)[own], self.classes_)
        return found

    def predict(self, X: Any) -> Any:
        """The likeliest class, the first one where it is silent."""
        return self.classes_[self.predict_proba(X).argmax(1)]


class MarketClassifier(ClassifierMixin, BaseEstimator):
    """A market of classifiers (formulas in `judge.market`).

    `estimators` are fitted here; None: a linear model, naive Bayes, neighbours and a forest. `passes` batch steps of size `eta`
    move the budgets, on bets from `folds` folds. `settle` moves them by more rows, one by one, without training anybody anew.
    After `fit`: `budgets_` (they sum to 1), `estimators_`, `prior_`, and `log_likelihood_`, the mean log price of the true class
    before each pass.
    """

    def __init__(
        self,
        estimators: Sequence[Any] | None = None,
        *,
        betting: Betting = "constant",
        passes: int = 50,
        eta: float = 1.0,
        folds: int = 5,
        random_state: int | None = 0,
    ) -> None:
        self.estimators, self.betting, self.passes = estimators, betting, passes
        self.eta, self.folds, self.random_state = eta, folds, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the participants, let them bet on rows of other folds, and settle."""
        check_integer(self.passes, "passes", 0, 100_000)
        check_integer(self.folds, "folds", 2, 100)
        X, y = checks.validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("the target has one class; there is nothing to bet on.")
        counts = np.bincount(labels)
        self.prior_ = counts / counts.sum()
        folds = min(self.folds, int(counts.min()))
        participants = _usual(self.random_state) if self.estimators is None else list(self.estimators)
        if not participants:
            raise InputError("a market needs participants; give estimators.")
        beliefs = np.zeros((len(participants), len(X), len(self.classes_)))
        if folds >= 2:
            cut = StratifiedKFold(folds, shuffle=True, random_state=self.random_state)
            for train, test in cut.split(X, labels):
                for m, one in enumerate(participants):
                    beliefs[m, test] = _aligned(clone(one).fit(X[train], y[train]), X[test], self.classes_)
        self.estimators_ = [clone(one).fit(X, y) for one in participants]
        self.budgets_ = np.full(len(participants), 1 / len(participants))
        self.log_likelihood_ = []
        for _ in range(self.passes if folds >= 2 else 0):
            price = bets_on(self.budgets_, beliefs, labels, self.betting).price
            self.log_likelihood_.append(float(np.log(np.maximum(price, 1e-300)).mean()))
            self.budgets_ = settle_bets(self.budgets_, beliefs, labels, self.betting, eta=self.eta)
        return self

    def settle(self, X: Any, y: Any, *, eta: float = 0.05) -> Self:
        """Settle more rows, one after the other, with steps of `eta`. The participants stay as they are."""
        check_number(eta, "eta", 0.0, 1.0, above=True)
        beliefs = self.beliefs(X)
        unknown = set(np.unique(y)) - set(self.classes_)
        if unknown:
            raise InputError(f"the market has no class {sorted(map(str, unknown))[0]!r}.")
        labels = np.searchsorted(self.classes_, y)
        for n in range(beliefs.shape[1]):
            row = slice(n, n + 1)
            self.budgets_ = settle_bets(self.budgets_, beliefs[:, row], labels[row], self.betting, eta=eta)
        return self

    def beliefs(self, X: Any) -> Float[np.ndarray, "M N K"]:
        """What each participant believes of each row."""
        checks.check_is_fitted(self)
        X = checks.validate_data(self, X, dtype=np.float64, reset=False)
        return np.stack([_aligned(one, X, self.classes_) for one in self.estimators_])

    def predict_proba(self, X: Any) -> Float[np.ndarray, "N K"]:
        """Prices; the share of classes in training where nobody bets."""
        beliefs = self.beliefs(X)
        return market_price(self.budgets_, beliefs, self.betting, prior=self.prior_)

    def predict(self, X: Any) -> Any:
        """The class with the highest price."""
        prices = self.predict_proba(X)
        return self.classes_[prices.argmax(1)]


class ForestMarket:
    """The leaves of a fitted forest as participants, with equal budgets at first. Settle it on held-out rows."""

    def __init__(self, forest: Any, betting: Betting = "constant") -> None:
        checks.check_is_fitted(forest)
        self.forest, self.betting, self.classes_ = forest, betting, forest.classes_
        counts = [tree.tree_.node_count for tree in forest.estimators_]
        self.first = np.r_[0, np.cumsum(counts)[:-1]]
        values = np.concatenate([tree.tree_.value[:, 0] for tree in forest.estimators_])
        self.leaf_beliefs = values / values.sum(1, keepdims=True)
        self.budgets_ = np.full(len(values), 1 / len(values))

    def predict_proba(self, X: Any) -> Float[np.ndarray, "N K"]:
        """Prices by the leaves that a row falls into."""
        who = self._leaves(X)
        return market_price(self.budgets_[who], self.leaf_beliefs[who], self.betting)

    def predict(self, X: Any) -> Any:
        """The class with the highest price."""
        return self.classes_[self.predict_proba(X).argmax(1)]

    def settle(self, X: Any, y: Any, *, eta: float = 1.0, passes: int = 1) -> Self:
        """Move budgets by the bets on held-out rows: a leaf's gain is the mean over all rows, 0 where it does not take part."""
        check_number(eta, "eta", 0.0, 1.0, above=True)
        check_integer(passes, "passes", 1, 100_000)
        who, labels = self._leaves(X), np.searchsorted(self.classes_, y)
        if not np.isin(y, self.classes_).all():
            raise InputError("there are rows of a class that the forest does not know.")
        for _ in range(passes):
            gains = bets_on(self.budgets_[who], self.leaf_beliefs[who], labels, self.betting).gains
            total = np.bincount(who.ravel(), gains.ravel(), minlength=len(self.budgets_))
            self.budgets_ = self.budgets_ * (1 + eta * total / who.shape[1])
        return self

    def _leaves(self, X: Any) -> Int[np.ndarray, "M N"]:
        return self.forest.apply(X).T + self.first[:, None]


def _aligned(model: Any, X: Any, classes: np.ndarray) -> Float[np.ndarray, "N K"]:
    """Probabilities in the order of `classes`, 0 for those a model does not know, and all 0 where it is silent (NaN)."""
    own = np.nan_to_num(np.asarray(model.predict_proba(X), dtype=np.float64))
    found = np.zeros((len(own), len(classes)))
    found[:, np.searchsorted(classes, model.classes_)] = own
    return np.clip(found, 0, 1)


def _usual(seed: int | None) -> list[Any]:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return [
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)),
        GaussianNB(),
        make_pipeline(StandardScaler(), KNeighborsClassifier(15)),
        RandomForestClassifier(100, min_samples_leaf=2, random_state=seed, n_jobs=1),
    ]
