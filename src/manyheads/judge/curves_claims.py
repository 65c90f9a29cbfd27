"""How well trends tell what more data brings (#28): on a curve that is known, and on real ones made here.

**Known.** 97 - 60 x^-.35 every 5,000 to 800,000, noise of .05: the score at 800,000 from prefixes of 95,000, 200,000 and
400,000. The bounds of the issue: a median error over 40 draws of .10, .035 and .015 points, a fifth of what carrying the last
value forward errs.

**Real.** Accuracy on 500 held-out digits of scikit-learn, of a linear model, neighbours and a forest trained on 60, 120, ...
1,260 of the others (mean of five draws of rows a size): the accuracy at 1,260 from the sizes up to 600.

**Prediction:** a trend is nearer than the last value, than a power law without an asymptote below 100, and about as near as a
Bayesian average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

import numpy as np

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.judge.curves import LearningCurve, bayesian_curve, power_law

FULL = 800_000.0
PREFIXES = {"from 95,000": 19, "from 200,000": 40, "from 400,000": 80}
DRAWS = 40


def known_curve(seed: int) -> LearningCurve:
    """The sheet's curve with noise of .05 points."""
    sizes = np.arange(5000, FULL + 1, 5000)
    return LearningCurve(sizes, 97 - 60 * sizes**-0.35 + np.random.default_rng(seed).normal(0, 0.05, len(sizes)))


@cache
def digits_curve(kind: str, seed: int) -> LearningCurve:
    """Accuracy in per cent of a model of digits at growing numbers of rows."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    x, y = load_digits(return_X_y=True)
    x = x / 16
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(y))
    held, rest = order[:500], order[500:]
    make: dict[str, Callable[[], object]] = {
        "linear": lambda: LogisticRegression(max_iter=2000),
        "neighbours": lambda: KNeighborsClassifier(1),
        "forest": lambda: RandomForestClassifier(50, random_state=seed, n_jobs=1),
    }
    sizes = np.arange(60, 1261, 60)
    scores = []
    for size in sizes:
        each = []
        for _ in range(5):
            rows = draw.permutation(rest)[:size]
            each.append(100 * make[kind]().fit(x[rows], y[rows]).score(x[held], y[held]))  # type: ignore[attr-defined]
        scores.append(float(np.mean(each)))
    return LearningCurve(sizes.astype(float), np.array(scores))


def _told(way: str, curve: LearningCurve, size: float) -> float:
    if way == "last value":
        return float(curve.scores[-1])
    if way == "power law":
        return float(power_law(curve).at(size))
    if way == "Bayesian":
        return bayesian_curve(curve, size).mean
    whole = LearningCurve(curve.sizes, curve.scores, curve.most, 1.0 if way == "anchored trend" else 0.0)
    return float(min(whole.trend.at(size), curve.most))


def _run(way: str, data: str, seed: int) -> Mapping[str, float]:
    if data == "known":
        true = 97 - 60 * FULL**-0.35
        curves = [known_curve(1000 * seed + i) for i in range(DRAWS)]
        return {
            name: float(np.median([abs(_told(way, curve.prefix(n), FULL) - true) for curve in curves]))
            for name, n in PREFIXES.items()
            if way != "anchored trend" or n < 40  # every prefix is fitted anew, which takes its time
        }
    curve = digits_curve(data, seed)
    true = float(curve.scores[-3:].mean())
    return {"error": abs(_told(way, curve.prefix(10), float(curve.sizes[-2])) - true)}


def _known(name: str, most: float) -> tuple[Claim, Claim]:
    def share(v: Mapping[tuple[str, str], float]) -> float:
        return v["trend", name] / v["last value", name]

    return (
        Claim(f"{name}: median error", lambda v: v["trend", name], at_most=most, on="known"),
        Claim(f"{name}: over that of the last value", share, at_most=0.2, on="known"),
    )


_REAL = ("linear", "neighbours", "forest")
register_experiment(
    Experiment(
        "learning-curve",
        (28,),
        "2402.02515",
        "Does the trend of a learning curve tell what more data would bring?",
        datasets=lambda quick: {name: name for name in ("known", *(() if quick else _REAL))},
        methods={
            name: partial(_run, name) for name in ("last value", "trend", "anchored trend", "power law", "Bayesian")
        },
        baseline="last value",
        claims=(
            *_known("from 95,000", 0.10),
            *_known("from 200,000", 0.035),
            *_known("from 400,000", 0.015),
            *(
                Claim(
                    f"digits, {kind}: the trend errs less than the last value",
                    lambda v: v["trend", "error"] - v["last value", "error"],
                    at_most=0.0,
                    on=kind,
                )
                for kind in _REAL
            ),
        ),
        minutes=4.0,
        lower=frozenset({"error", *PREFIXES}),
        room="judge",
    )
)
