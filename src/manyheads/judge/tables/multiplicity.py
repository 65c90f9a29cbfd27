"""Predictive multiplicity (#112): how far models that fit as well as the best disagree on each example.

Watson-Daniels, Parkes and Ustun, arXiv:2206.01131. With the mean logistic loss L(w) (+ |w|^2 / C, the intercept free), w0 its
minimum, p_i(w) = sigmoid(w . x_i), and the models that are nearly as good, S = { w : L(w) <= L(w0) + epsilon },

    viable range   V_i = [ min over S of p_i, max over S of p_i ]
    ambiguity      A(delta) = share of examples with  max over S |p_i(w) - p_i(w0)| >= delta      each by a model of its own
    discrepancy    D(delta) = max over S of the share of examples with |p_i(w) - p_i(w0)| >= delta      one model for all; D <= A

epsilon is absolute, on the training loss, in nats. The range is exact: the largest w . x_i within S is reached at a minimum of
L(w) - t w . x_i, with t such that the slack is used up (S is convex); t is found by safeguarded steps, each minimum by Newton.
The paper instead solves for 21 fixed probabilities an example, which gives the same to within its grid. Discrepancy is searched
among the models that end the ranges, which gives a lower bound; `exact` bounds it from above by mixed-integer programs with
cutting planes for the loss. For classifiers that are not linear there is `pool_multiplicity`, over models that were trained.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_number
from manyheads.progress import Bar

try:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.special import expit, logit
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils import validation as checks
    from sklearn.utils.multiclass import check_classification_targets, unique_labels
except ImportError:
    raise InputError("judging predictors needs scikit-learn; install it: pip install 'manyheads[judge]'.") from None

PASSES = 60  # of the search for t
NEWTON = 50
TIGHT = 1e-9  # of the slack that may be left unused, relative


class MultiplicityClassifier(ClassifierMixin, BaseEstimator):
    """Logistic regression that knows its rivals: all linear models whose training loss is at most `epsilon` higher.

    After `fit`: `coef_` `[D]`, `intercept_`, `loss_` (of w0, nats a row). A column is scaled to a standard deviation of 1
    first, as is usual before a ridge; with C as large as it is here that changes nothing that can be measured.
    """

    def __init__(self, epsilon: float = 0.01, *, C: float = 1e6) -> None:
        self.epsilon, self.C = epsilon, C

    def fit(self, X: Any, y: Any) -> Self:
        """Fit w0 to rows `X` `[N, D]` and two classes. Warns where a line tells them apart: w0 is as large as C allows then."""
        check_number(self.epsilon, "epsilon", 0.0, 10.0)
        check_number(self.C, "C", 1e-6, 1e12)
        X, y = checks.validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_ = unique_labels(y)
        if len(self.classes_) != 2:
            raise ValueError(f"Only binary classification is supported. The target has {len(self.classes_)} classes.")
        self._centre, scale = X.mean(0), X.std(0)
        self._scale = np.where(scale > 0, scale, 1.0)
        signs = np.where(y == self.classes_[1], 1.0, -1.0)
        ridge = np.r_[np.full(X.shape[1], 1.0 / self.C), 0.0]
        self._problem = _Logistic(self._rows(X), signs, ridge)
        start = np.zeros((1, X.shape[1] + 1))
        (self._w0,) = self._problem.minimum(np.zeros_like(start), start)
        self.loss_ = float(self._problem.loss(self._w0[None])[0])
        if (signs * (self._problem.rows @ self._w0) > 0).all():
            warnings.warn(
                "a line tells the two classes apart, so that only C keeps the best model finite; ranges depend on it.",
                stacklevel=2,
            )
        self.coef_ = self._w0[:-1] / self._scale
        self.intercept_ = float(self._w0[-1] - self.coef_ @ self._centre)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def predict_proba(self, X: Any) -> Float[np.ndarray, "N 2"]:
        """Probabilities of w0."""
        p = expit(self._given(X) @ self._w0)
        return np.stack([1 - p, p], 1)

    def predict(self, X: Any) -> Any:
        """The likelier class."""
        second = self.predict_proba(X)[:, 1] > 0.5
        return self.classes_[second.astype(int)]

    def viable_range(self, X: Any, *, bar: Bar = Bar()) -> Float[np.ndarray, "N 2"]:
        """The least and the largest probability of the second class that a rival gives to each row."""
        rows = self._given(X)
        low, high = (self._problem.extreme(self._w0, rows, sign, self.epsilon, bar) for sign in (-1.0, 1.0))
        return np.stack([expit((rows * low).sum(1)), expit((rows * high).sum(1))], 1)

    def ambiguity(self, X: Any, delta: float = 0.1) -> float:
        """A(delta), in [0, 1]."""
        p, ends = self.predict_proba(X)[:, 1], self.viable_range(X)
        return float((_moved(p, ends) >= check_number(delta, "delta", 0.0, 1.0)).mean())

    def discrepancy(self, X: Any, delta: float = 0.1, *, exact: bool = False, seconds: float = 60.0) -> Discrepancy:
        """D(delta): the best of the models that end the ranges, and with `exact` an upper bound by mixed-integer programs.

        These meet for some tens of rows; with more, `seconds` end them and the bounds stay apart.
        """
        check_number(delta, "delta", 0.0, 1.0)
        rows = self._given(X)
        p = expit(rows @ self._w0)
        rivals = np.concatenate([self._problem.extreme(self._w0, rows, s, self.epsilon, Bar()) for s in (-1.0, 1.0)])
        shares = (np.abs(expit(rows @ rivals.T) - p[:, None]) >= delta).mean(0)
        ambiguity = self.ambiguity(X, delta)
        best = rivals[int(shares.argmax())]
        found = Discrepancy(float(shares.max()), ambiguity, self._weights(best))
        if not exact or found.value >= ambiguity:
            return found
        return _by_programs(self._problem, self._w0, rows, delta, self.epsilon, found, best, seconds, self._weights)

    def _rows(self, X: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N D1"]:
        return np.column_stack([(X - self._centre) / self._scale, np.ones(len(X))])

    def _given(self, X: Any) -> Float[np.ndarray, "N D1"]:
        checks.check_is_fitted(self)
        return self._rows(checks.validate_data(self, X, dtype=np.float64, reset=False))

    def _weights(self, w: Float[np.ndarray, "D1"]) -> Float[np.ndarray, "D1"]:
        """In the units of the columns, the intercept last."""
        coef = w[:-1] / self._scale
        return np.r_[coef, w[-1] - coef @ self._centre]


@dataclass(frozen=True)
class Discrepancy:
    """A lower bound `value`, reached by the rival `weights` (intercept last), and an upper bound `at_most`."""

    value: float
    at_most: float
    weights: Float[np.ndarray, "D1"]


@dataclass(frozen=True)
class PoolMultiplicity:
    """Of trained models: the rivals, each row's range over them, ambiguity and discrepancy; lower bounds of the true ones."""

    rivals: Bool[np.ndarray, "M"]
    ranges: Float[np.ndarray, "N 2"]
    ambiguity: float
    discrepancy: float


def pool_multiplicity(
    models: Sequence[Any],
    X: Any,
    y: Any,
    *,
    epsilon: float = 0.01,
    delta: float = 0.1,
    on: Any = None,
    bar: Bar = Bar(),
) -> PoolMultiplicity:
    """Multiplicity among fitted classifiers with `predict_proba` of two classes; the first is the one that is used.

    Losses are taken on `X`, `y`, ranges on `on` (None: `X`). Retraining finds only some rivals, so the true range is wider.
    """
    check_number(epsilon, "epsilon", 0.0, 10.0)
    check_number(delta, "delta", 0.0, 1.0)
    if len(models) < 2:
        raise InputError("multiplicity is among several models; give two at least.")
    positive = np.asarray(y) == models[0].classes_[1]
    step = bar.step("models", len(models))
    losses, p = [], []
    for model in models:
        if len(model.classes_) != 2 or list(model.classes_) != list(models[0].classes_):
            raise InputError("the models must know the same two classes, in the same order.")
        here = np.clip(model.predict_proba(X)[:, 1], 1e-12, 1 - 1e-12)
        losses.append(-np.where(positive, np.log(here), np.log1p(-here)).mean())
        p.append(here if on is None else model.predict_proba(on)[:, 1])
        step(1)
    rivals = np.array(losses) <= losses[0] + epsilon
    moved = np.abs(np.stack(p) - p[0])[rivals] >= delta
    ranges = np.stack(p)[rivals]
    return PoolMultiplicity(
        rivals, np.stack([ranges.min(0), ranges.max(0)], 1), float(moved.any(0).mean()), float(moved.mean(1).max())
    )


def _moved(p: Float[np.ndarray, "N"], ends: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N"]:
    return np.maximum(p - ends[:, 0], ends[:, 1] - p)


@dataclass(frozen=True)
class _Logistic:
    """The mean logistic loss of rows with signs, plus `sum(ridge * w^2)`."""

    rows: Float[np.ndarray, "N D"]
    signs: Float[np.ndarray, "N"]
    ridge: Float[np.ndarray, "D"]

    def loss(self, w: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B"]:
        margins = self.signs * (w @ self.rows.T)
        return np.logaddexp(0, -margins).mean(1) + (self.ridge * w**2).sum(1)

    def gradient(self, w: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
        pull = -self.signs * expit(-self.signs * (w @ self.rows.T))
        return pull @ self.rows / len(self.rows) + 2 * self.ridge * w

    def hessian(self, w: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D D"]:
        p = expit(w @ self.rows.T)
        return np.einsum(
            "bn,nd,ne->bde", p * (1 - p) / len(self.rows), self.rows, self.rows, optimize=True
        ) + 2 * np.diag(self.ridge)

    def minimum(self, pulls: Float[np.ndarray, "B D"], start: Float[np.ndarray, "B D"]) -> Float[np.ndarray, "B D"]:
        """Argmin L(w) - pulls . w, each by damped Newton steps from `start`."""
        w = start.copy()
        value = self.loss(w) - (pulls * w).sum(1)
        for _ in range(NEWTON):
            slope = self.gradient(w) - pulls
            going = np.abs(slope).max(1) > 1e-10
            if not going.any():
                break
            hessian = self.hessian(w[going]) + 1e-14 * np.eye(w.shape[1])
            step = np.linalg.solve(hessian, slope[going][..., None])[..., 0]
            size = np.ones(len(step))
            here, now = w[going], value[going]
            for _ in range(30):
                tried = here - size[:, None] * step
                new = self.loss(tried) - (pulls[going] * tried).sum(1)
                worse = new > now + 1e-15
                if not worse.any():
                    break
                size[worse] /= 2
            w[going], value[going] = here - size[:, None] * step, np.minimum(new, now)
        return w

    def extreme(
        self, w0: Float[np.ndarray, "D"], rows: Float[np.ndarray, "N D"], sign: float, epsilon: float, bar: Bar
    ) -> Float[np.ndarray, "N D"]:
        """For each row the model of S with the largest `sign * w . row`."""
        step = bar.step("rows", len(rows))
        at_once = max(1, 2_000_000 // (len(self.rows) * self.rows.shape[1]))
        found = []
        for some in np.array_split(rows, max(1, -(-len(rows) // at_once))):
            found.append(self._extreme(w0, sign * some, epsilon))
            step(len(some))
        return np.concatenate(found)

    def _extreme(self, w0: Float[np.ndarray, "D"], rows: Float[np.ndarray, "N D"], epsilon: float) -> np.ndarray:
        start = np.repeat(w0[None], len(rows), 0)
        if epsilon == 0:
            return start
        best = float(self.loss(w0[None])[0])
        # Near w0 the slack is t^2 x' H^-1 x / 2, which is a first guess of t.
        width = np.einsum("nd,dn->n", rows, np.linalg.solve(self.hessian(w0[None])[0], rows.T))
        t = np.sqrt(2 * epsilon / np.maximum(width, 1e-300))
        low, high = np.zeros(len(rows)), np.full(len(rows), np.inf)
        w, inside = start, start.copy()
        for _ in range(PASSES):
            w = self.minimum(t[:, None] * rows, w)
            slack = self.loss(w) - best
            over = slack > epsilon
            inside[~over] = w[~over]
            low, high = np.where(over, low, t), np.where(over, t, high)
            if (np.abs(slack - epsilon) <= TIGHT * epsilon + 1e-13).all():
                break
            guess = t * np.sqrt(epsilon / np.maximum(slack, 1e-300))
            middle = np.where(np.isfinite(high), (low + high) / 2, 2 * t)
            t = np.where((guess > low) & (guess < high), guess, middle)
        return inside


def _by_programs(
    problem: _Logistic,
    w0: Float[np.ndarray, "D"],
    rows: Float[np.ndarray, "N D"],
    delta: float,
    epsilon: float,
    found: Discrepancy,
    reached: Float[np.ndarray, "D"],
    seconds: float,
    units: Any,
) -> Discrepancy:
    """Maximise how many rows move by `delta`, the loss entering by its tangents, until a model found is within the true loss.

    After `seconds` the bounds are as near as they came.
    """
    n, d = rows.shape
    p = expit(rows @ w0)
    ends = np.stack([(rows * problem.extreme(w0, rows, s, epsilon, Bar())).sum(1) for s in (-1.0, 1.0)], 1)
    down, up = (p - delta > 0), (p + delta < 1)
    with np.errstate(divide="ignore"):
        below, above = logit(np.clip(p - delta, 1e-300, 1)), logit(np.clip(p + delta, 0, 1 - 1e-16))
    down, up = down & (ends[:, 0] <= below), up & (ends[:, 1] >= above)
    # w.x <= below where z = 1, w.x >= above where v = 1; the exact ranges of w.x are the tightest big-M there is.
    slack_low, slack_high = np.where(down, ends[:, 1] - below, 0.0), np.where(up, above - ends[:, 0], 0.0)
    links = [
        LinearConstraint(
            np.hstack([rows, np.diag(slack_low), np.zeros((n, n))]), -np.inf, np.where(down, ends[:, 1], np.inf)
        ),
        LinearConstraint(
            np.hstack([rows, np.zeros((n, n)), -np.diag(slack_high)]), np.where(up, ends[:, 0], -np.inf), np.inf
        ),
    ]
    box = np.abs(np.linalg.pinv(rows)) @ np.abs(ends).max(1) + np.abs(w0) + 1.0
    limits = Bounds(np.r_[-box, np.zeros(2 * n)], np.r_[box, down.astype(float), up.astype(float)])
    whole: Int[np.ndarray, "V"] = np.r_[np.zeros(d), np.ones(2 * n)].astype(int)
    best, allowed = float(problem.loss(w0[None])[0]), float(problem.loss(w0[None])[0]) + epsilon
    tangents, value, at_most, weights = [w0, reached], found.value, found.at_most, found.weights
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0:
        w = np.array(tangents)
        slope, level = problem.gradient(w), problem.loss(w)
        cuts = LinearConstraint(
            np.hstack([slope, np.zeros((len(w), 2 * n))]), -np.inf, allowed - level + (slope * w).sum(1)
        )
        solved = milp(
            -np.r_[np.zeros(d), np.ones(2 * n)],
            constraints=[*links, cuts],
            bounds=limits,
            integrality=whole,
            options={"time_limit": left, "mip_rel_gap": 0.0},
        )
        if solved.mip_dual_bound is not None:
            at_most = min(at_most, np.floor(-solved.mip_dual_bound + 1e-6) / n)
        if solved.x is None:
            break
        proposal = solved.x[:d]
        # The program's model may be over the true loss; on the way to w0 it comes within.
        near, far = 0.0, 1.0
        for _ in range(50):
            middle = (near + far) / 2
            inside = problem.loss((w0 + middle * (proposal - w0))[None])[0] <= best + epsilon
            near, far = (middle, far) if inside else (near, middle)
        inner = w0 + (1.0 if problem.loss(proposal[None])[0] <= allowed else near) * (proposal - w0)
        share = float((np.abs(expit(rows @ inner) - p) >= delta - 1e-6).mean())  # the programs are that exact
        if share > value:
            value, weights = share, units(inner)
        if value >= at_most - 1e-9 or problem.loss(proposal[None])[0] <= allowed + 1e-7:
            break
        tangents += [proposal, inner]
    return Discrepancy(value, max(at_most, value), weights)
