"""Ridge regression in closed form, in double precision, with a penalty chosen by cross-validation on the rows it is given.

With X [n, D] and Y [n, M] less their column means, and a penalty lam in the unit of X squared, rows counted,

    primal    W = (X^T X + lam I)^-1 X^T Y               D unknowns
    dual      W = X^T (X X^T + lam I)^-1 Y               n unknowns, for n < D
    b         mean(Y) - mean(X) W                        the intercept is not penalised
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number

PENALTIES = tuple(float(10**power) for power in np.linspace(-2, 4, 13))
Form = Literal["primal", "dual"]


def ridge(
    x: Float[Tensor, "n D"], y: Float[Tensor, "n M"], penalty: float, form: Form | None = None
) -> tuple[Float[Tensor, "D M"], Float[Tensor, "M"]]:
    """W and b of the formulas above, of double precision; without a `form` the one with fewer unknowns."""
    check_number(penalty, "penalty", 0.0, above=True)
    x, y, mean_x, mean_y = _centred(x, y)
    if (form or ("dual" if x.shape[0] < x.shape[1] else "primal")) == "dual":
        weight = x.T @ torch.linalg.solve(_penalised(x @ x.T, penalty), y)
    else:
        weight = torch.linalg.solve(_penalised(x.T @ x, penalty), x.T @ y)
    return weight, mean_y - mean_x @ weight


def best_penalty(
    x: Float[Tensor, "n D"],
    y: Float[Tensor, "n M"],
    penalties: Sequence[float] = PENALTIES,
    *,
    folds: int = 5,
    seed: int = 0,
) -> float:
    """The penalty with the smallest squared error on rows left out, each target in units of its own variance.

    One decomposition a fold serves all penalties. `InputError` for fewer rows than folds.
    """
    check_integer(folds, "folds", 2)
    if len(x) < folds:
        raise InputError(f"{len(x)} rows are too few for {folds} folds; give more rows or fewer folds.")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    scale = y.double().var(0).clamp_min(1e-30)
    errors = torch.zeros(len(penalties), dtype=torch.float64)
    for fold in range(folds):
        out = order[fold::folds]
        kept = order[~torch.isin(order, out)]
        found = _along_penalties(x[kept], y[kept], x[out], penalties)
        errors += torch.stack([((guess - y[out].double()).square() / scale).sum() for guess in found])
    return float(penalties[int(errors.argmin())])


def _along_penalties(x: Tensor, y: Tensor, new: Tensor, penalties: Sequence[float]) -> list[Tensor]:
    """Predictions for new rows under each penalty, by the eigenvectors of the smaller Gram matrix."""
    x, y, mean_x, mean_y = _centred(x, y)
    away = new.double() - mean_x
    dual = x.shape[0] < x.shape[1]
    values, vectors = torch.linalg.eigh(x @ x.T if dual else x.T @ x)
    left = (away @ x.T if dual else away) @ vectors
    right = vectors.T @ (y if dual else x.T @ y)
    return [mean_y + left @ (right / (values.clamp_min(0) + penalty)[:, None]) for penalty in penalties]


def _centred(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if len(x) != len(y) or not len(x):
        raise InputError(f"there are {len(x)} rows and {len(y)} targets; give as many of both, at least one.")
    x, y = x.double(), y.double()
    if not bool(x.isfinite().all()) or not bool(y.isfinite().all()):
        raise InputError("states or targets hold NaN or infinity; leave such rows out.")
    mean_x, mean_y = x.mean(0), y.mean(0)
    return x - mean_x, y - mean_y, mean_x, mean_y


def _penalised(gram: Tensor, penalty: float) -> Tensor:
    gram.diagonal().add_(penalty)
    return gram
