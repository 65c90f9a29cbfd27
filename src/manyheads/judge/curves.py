"""What would more data bring, and when may one stop? (#28): trends of a learning curve.

Vilares Ferro, Darriba and Ribadas, arXiv:2402.02515. A score A of models that were trained on x rows is taken to follow

    A(x) = c - a x^-b                  a, b > 0;  c is what endless data would bring

The trend of a prefix of the curve is its least-squares fit: for a given b a line in x^-b, and b by a grid, then by golden
section. The list of trends of growing prefixes is the trace. It is believed from its *level* on: the first prefix from which on
all trends are admissible, c <= `most` (100 for per cent). Where trends swing, an *anchor* counts the previous c as one more
observation at x = infinity. Training may stop where c moves by less than tau from one trend to the next; that distance is the
error band.

It holds for curves that rise ever more slowly. One that jumps (a phase change) breaks it, and nothing before the jump can tell.

Ours beside it: `power_law` with c = `most` fixed, and `bayesian_curve`, which averages over c and b on a grid (flat priors, the
scale of the noise integrated out) and so gives an interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.inputs import check_number

try:
    from scipy.optimize import minimize_scalar
except ImportError:
    raise InputError(
        "judging predictors needs scikit-learn and SciPy; install them: pip install 'manyheads[judge]'."
    ) from None

LEAST = 3  # observations of a trend
POWERS = np.geomspace(0.005, 4.0, 120)


@dataclass(frozen=True)
class Trend:
    """c - a x^-b, fitted to the first `n` observations; `stderr` is that of the residuals."""

    c: float
    a: float
    b: float
    n: int
    stderr: float

    def at(self, x: Float[np.ndarray, "..."] | float) -> Float[np.ndarray, "..."] | float:
        """The score at x rows."""
        return self.c - self.a * np.asarray(x, dtype=float) ** -self.b


@dataclass(frozen=True)
class LearningCurve:
    """Scores at growing numbers of rows. `most` is the best score there can be; `anchor` weighs the last asymptote.

    For a loss give minus the loss, and 0 as `most`. `InputError` for fewer than three sizes, sizes that do not grow, or scores
    above `most`.
    """

    sizes: Float[np.ndarray, "N"]
    scores: Float[np.ndarray, "N"]
    most: float = 100.0
    anchor: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.anchor, "anchor", 0.0, 1e6)
        if len(self.sizes) < LEAST or len(self.sizes) != len(self.scores):
            raise InputError(
                f"a learning curve has {LEAST} sizes at least, and a score for each; there are {len(self.sizes)}."
            )
        if not (np.isfinite(self.sizes).all() and np.isfinite(self.scores).all()):
            raise InputError("sizes and scores are numbers; some are missing or infinite.")
        if (np.diff(self.sizes) <= 0).any() or self.sizes[0] <= 0:
            raise InputError("the sizes must be above 0 and grow; sort the rows, and average scores of one size.")
        if self.scores.max() > self.most:
            raise InputError(
                f"a score of {self.scores.max():g} is above the best there can be, {self.most:g}; give `most`."
            )

    @cached_property
    def trace(self) -> tuple[Trend, ...]:
        """The trends of the first 3, 4, ..., N observations."""
        found: list[Trend] = []
        for n in range(LEAST, len(self.sizes) + 1):
            before = found[-1].c if found and self.anchor else None
            found.append(_fitted(self.sizes[:n], self.scores[:n], before, self.anchor, self.most))
        return tuple(found)

    @cached_property
    def trend(self) -> Trend:
        """The trend of all observations; without an anchor it needs no other."""
        return self.trace[-1] if self.anchor else _fitted(self.sizes, self.scores, None, 0.0, self.most)

    @property
    def level(self) -> int | None:
        """How many observations there are at the prediction level; None where even the last trend is not admissible."""
        admissible = [trend.c <= self.most + 1e-9 for trend in self.trace]
        if not admissible[-1]:
            return None
        last = max((i for i, good in enumerate(admissible) if not good), default=-1)
        return self.trace[last + 1].n

    @property
    def proximity(self) -> float:
        """How far c moved with the last observation, in the units of the score; infinite where there is one trend only."""
        return abs(self.trace[-1].c - self.trace[-2].c) if len(self.trace) > 1 else float("inf")

    def stops(self, tau: float) -> int | None:
        """After how many observations training could have stopped: at the level or later, c within tau of the last. Or None."""
        check_number(tau, "tau", 0.0, above=True)
        if self.level is None:
            return None
        for before, trend in zip(self.trace, self.trace[1:], strict=False):
            if before.n >= self.level and abs(trend.c - before.c) < tau:
                return trend.n
        return None

    def prefix(self, n: int) -> LearningCurve:
        """The curve as it was after n observations."""
        return LearningCurve(self.sizes[:n], self.scores[:n], self.most, self.anchor)

    def predict(self, size: float) -> float:
        """The score at `size` rows by the last trend. `InputError` where that is not admissible, with too few observations."""
        if self.trend.c > self.most + 1e-9:
            raise InputError(
                f"the trend goes to {self.trend.c:.2f}, above the best there can be; train on more sizes, or set an anchor."
            )
        return float(self.trend.at(check_number(size, "size", 0.0, above=True)))


def power_law(curve: LearningCurve) -> Trend:
    """The fit with c = `most`: error falls as a power of the rows, to none."""
    return min((_line(b, curve.sizes, curve.scores, curve.most) for b in POWERS), key=lambda trend: trend.stderr)


@dataclass(frozen=True)
class BayesianCurve:
    """What the score at a size is: mean, and the ends of the central 90 %."""

    mean: float
    low: float
    high: float


def bayesian_curve(curve: LearningCurve, size: float) -> BayesianCurve:
    """Average of all curves with b in [.005, 4] (flat in log b) and c between the last score and `most` (flat), a fitted to each.

    Each weighs (sum of squares)^-(n - 1)/2: the likelihood with the scale of the noise integrated out. Needs four observations.
    """
    n = len(curve.sizes)
    if n < LEAST + 1:
        raise InputError(f"an interval needs {LEAST + 1} observations; there are {n}.")
    floor = curve.scores[-1] - 3 * (np.std(np.diff(curve.scores)) + 1e-12)
    c = np.linspace(floor, curve.most, 400)
    falls = curve.sizes[None] ** -POWERS[:, None]  # [B, N]
    gap = c[:, None] - curve.scores[None]  # [C, N]
    both, own = gap @ falls.T, (falls**2).sum(1)  # [C, B] and [B]
    a = np.maximum(both / own, 0.0)
    squares = np.maximum((gap**2).sum(1)[:, None] - 2 * a * both + a**2 * own, 1e-9)
    weights = np.exp(-(n - 1) / 2 * (np.log(squares) - np.log(squares.min())))
    values = c[:, None] - a * float(size) ** -POWERS
    order = np.argsort(values, axis=None)
    share = np.cumsum(weights.ravel()[order]) / weights.sum()
    sorted_values = values.ravel()[order]
    low, high = (float(sorted_values[min(np.searchsorted(share, q), len(share) - 1)]) for q in (0.05, 0.95))
    return BayesianCurve(float((weights * values).sum() / weights.sum()), low, high)


def _line(
    b: float,
    x: Float[np.ndarray, "N"],
    y: Float[np.ndarray, "N"],
    c: float | None,
    anchor: float | None = None,
    weight: float = 0.0,
) -> Trend:
    """The best c (or the given one) and a >= 0 for one b."""
    falls, scores = x**-b, y
    weights = np.ones(len(x))
    if anchor is not None and weight > 0:
        falls, scores, weights = np.r_[falls, 0.0], np.r_[scores, anchor], np.r_[weights, weight]
    if c is None:
        mean_f, mean_s = np.average(falls, weights=weights), np.average(scores, weights=weights)
        spread = (weights * (falls - mean_f) ** 2).sum()
        slope = (weights * (falls - mean_f) * (scores - mean_s)).sum() / spread if spread > 0 else 0.0
        a = max(-slope, 0.0)
        c = float(mean_s + a * mean_f)
    else:
        a = max(float((falls * (c - scores)).sum() / (falls**2).sum()), 0.0)
    squares = (weights * (scores - c + a * falls) ** 2).sum()
    return Trend(float(c), float(a), float(b), len(x), float(np.sqrt(squares / len(x))))


def _nearest_power(x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"], anchor: float | None, weight: float) -> int:
    """Which of POWERS leaves the least squares: all lines at once."""
    falls, scores, weights = x[None] ** -POWERS[:, None], y, np.ones(len(x))
    if anchor is not None and weight > 0:
        falls = np.column_stack([falls, np.zeros(len(POWERS))])
        scores, weights = np.r_[scores, anchor], np.r_[weights, weight]
    w = weights / weights.sum()
    f, s = falls - (falls @ w)[:, None], scores - scores @ w
    slope = (f * s) @ w / np.maximum((f**2) @ w, 1e-300)
    a = np.maximum(-slope, 0.0)
    return int((((s + a[:, None] * f) ** 2) @ w).argmin())


def _fitted(
    x: Float[np.ndarray, "N"], y: Float[np.ndarray, "N"], anchor: float | None, weight: float, most: float
) -> Trend:
    anchor = None if anchor is None else min(anchor, most)

    def off(power: float) -> float:
        return _line(float(np.exp(power)), x, y, None, anchor, weight).stderr

    best = _nearest_power(x, y, anchor, weight)
    ends = np.log(POWERS[max(best - 1, 0)]), np.log(POWERS[min(best + 1, len(POWERS) - 1)])
    found = minimize_scalar(off, bounds=ends, method="bounded", options={"xatol": 1e-10})
    return _line(float(np.exp(found.x)), x, y, None, anchor, weight)
