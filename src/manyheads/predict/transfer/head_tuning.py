"""Head tuning (#25): how the risk of a linear head rises and falls with the width of the frozen states it reads.

Luo, Wang and Huang, arXiv:2410.00699. All of a model is frozen but a linear head on its states x_t in R^p. With n samples,

    Theta = pinv(X) Y           X [n, p], Y [n, q]: least squares, with the least norm where p > n
    excess risk    E |x Theta - E[y|z]|^2  =  bias^2 + variance                           in units of y squared

over training sets: bias^2 is the excess risk of the mean head, variance how far single heads are from it. The risk rises,
peaks at p = n, where the head just interpolates, and falls again. Where the signal in each feature is weak (about
|beta|^2 / k < noise / n) the best p below n is 0: the first descent is degenerate. Ridge erases the peak.

`small_sets` has the paper's construction, where the risk is known exactly. `width_sweep` does the same for the states of
any model (`Trunk(model).states`), on held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from jaxtyping import Float, Real

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_seed
from manyheads.predict.transfer.small_sets import Sample

Order = Literal["pca", "random", "given"]
Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]


def min_norm_head(X: Real[np.ndarray, "n p"], Y: Real[np.ndarray, "n q"]) -> Float[np.ndarray, "p q"]:
    """Theta = pinv(X) Y. Not by normal equations, which would square the condition where it is worst."""
    return np.linalg.pinv(X) @ Y


def ridge_head(
    X: Real[np.ndarray, "n p"], Y: Real[np.ndarray, "n q"], penalty: float = 1.0
) -> Float[np.ndarray, "p q"]:
    """Theta = X' (X X' + penalty n I)^-1 Y: the head that shows no peak. `penalty` in units of a feature squared."""
    return X.T @ np.linalg.solve(X @ X.T + penalty * len(X) * np.eye(len(X)), Y)


@dataclass(frozen=True)
class WidthSweep:
    """Risk by width: `table` has p, risk, stderr (over training sets), bias2 and variance. Training sets have `n` rows."""

    table: pd.DataFrame
    n: int

    def risk(self, p: int) -> float:
        """Mean risk at a width that was measured."""
        return float(self.table.set_index("p").loc[p, "risk"])

    @property
    def peak(self) -> int:
        """The width with the largest risk."""
        return int(self.table.loc[self.table["risk"].idxmax(), "p"])

    @property
    def best(self) -> int:
        """The width with the smallest risk."""
        return int(self.table.loc[self.table["risk"].idxmin(), "p"])


def risk_by_width(
    draw: Callable[[int], Sample], test: Sample, widths: Sequence[int], *, draws: int = 20, head: Fit = min_norm_head
) -> WidthSweep:
    """Fit a head on each of `draws` training sets `draw(i)` at each width, the first p columns, and measure it on `test`."""
    check_integer(draws, "draws", 1)
    (x, y), rows = test, []
    training = [draw(i) for i in range(draws)]
    for p in widths:
        check_integer(p, "a width", 0, x.shape[1])
        heads = np.stack([head(X[:, :p], Y) if p else np.zeros((0, Y.shape[1])) for X, Y in training])
        answers = x[None, :, :p] @ heads  # [draws, N, q]
        risks = _squared(answers - y).mean(1)
        bias2, variance = _squared(answers.mean(0) - y).mean(), _squared(answers - answers.mean(0)).mean()
        rows.append((p, risks.mean(), risks.std(ddof=1) / draws**0.5 if draws > 1 else np.nan, bias2, variance))
    return WidthSweep(pd.DataFrame(rows, columns=["p", "risk", "stderr", "bias2", "variance"]), len(training[0][0]))


def width_sweep(
    states: Real[np.ndarray, "N D"],
    targets: Real[np.ndarray, "N *q"],
    n: int,
    widths: Sequence[int] | None = None,
    *,
    order: Order = "random",
    draws: int = 20,
    head: Fit = min_norm_head,
    seed: int = 0,
) -> WidthSweep:
    """The same for given states: a quarter of the rows is never trained on, and risk is the mean squared error there.

    States and targets are standardised over all rows, so a head without features has about risk 1 for each target. `order`
    says which p columns a width takes: of a random rotation, the first principal components, or the first as given. E[y|x] is
    not known here, so the risk, and bias^2 with it, keep the target's own noise. `InputError` for too few rows or values that
    are not finite.
    """
    check_choice(order, "order", ("pca", "random", "given"))
    check_integer(n, "n", 1)
    x, y = _standard(states, "states"), _standard(np.asarray(targets).reshape(len(targets), -1), "targets")
    if len(x) != len(y) or n > 0.75 * len(x):
        raise InputError(
            f"{len(x)} states and {len(y)} targets are too few for n = {n}, or not as many; give 4 n / 3 of both."
        )
    rng = np.random.default_rng(check_seed(seed))
    x, shuffled = x @ _directions(x, order, rng), rng.permutation(len(x))
    held, rest = np.split(shuffled, [len(x) // 4])

    def draw(i: int) -> Sample:
        rows = np.random.default_rng((seed, i)).choice(rest, n, replace=False)
        return x[rows], y[rows]

    widths = list(range(x.shape[1] + 1)) if widths is None else widths
    return risk_by_width(draw, (x[held], y[held]), widths, draws=draws, head=head)


def _squared(values: np.ndarray) -> np.ndarray:
    return np.square(values).sum(-1)


def _standard(values: np.ndarray, name: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if not np.isfinite(values).all():
        raise InputError(f"{name} hold NaN or infinity; leave those rows out.")
    spread = values.std(0)
    if name == "targets" and not spread.all():
        raise InputError("a target is the same in every row; there is nothing to learn of it.")
    return (values - values.mean(0)) / np.where(spread > 0, spread, 1)


def _directions(x: np.ndarray, order: Order, rng: np.random.Generator) -> np.ndarray:
    if order == "pca":
        return np.linalg.svd(x, full_matrices=False)[2].T
    return np.eye(x.shape[1]) if order == "given" else np.linalg.qr(rng.standard_normal((x.shape[1], x.shape[1])))[0]
