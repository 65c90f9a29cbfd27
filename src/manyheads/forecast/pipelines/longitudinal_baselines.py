"""Forecasts of a cohort for TADPOLE's scorer (#76): the last visit repeated, and a progression learned from other subjects.

A cohort has a row a visit: subject, date (months), diagnosis, and one value a column. Both methods read what came before the
forecast and say every one of the next months.

    repeated       the last value; the interval is the quartiles of changes from visit to visit; the last class has .9 of the
                   probability, the other ones share the rest
    progression    value = last + b_c + (a_c + d_c last) m, fitted by least squares over pairs of visits m months apart of other
                   subjects whose last class was c; the quartiles of its residuals, growing with sqrt(m); classes by how
                   often they followed class c, weighted by a normal kernel in (value, m)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.forecast.pipelines.longitudinal import DATE, LABEL, SUBJECT
from manyheads.inputs import check_integer, check_seed

CLASSES = ("CN", "MCI", "AD")
VALUES = ("ADAS13", "Ventricles")
_UNSURE = 0.05


def generated_cohort(n: int = 200, seed: int = 0, *, years: int = 6) -> pd.DataFrame:
    """Visits every six months (with gaps and odd days) of subjects on one hidden course of a disease.

    Stage s(t) = s_0 + r t, r log-normal over subjects; ADAS13 and ventricles are logistic curves of it with noise, and CN, MCI,
    AD are its thirds, read with an error.
    """
    check_integer(n, "n", 2), check_seed(seed)
    rng, rows = np.random.default_rng(seed), []
    for subject in range(n):
        start, rate = rng.uniform(-4, 3), rng.lognormal(-0.9, 0.7)
        own = rng.normal(0, [2.0, 0.004])
        for visit in range(2 * years + 1):
            if visit and rng.random() < 0.25:
                continue
            month = 6 * visit + (rng.uniform(-1.5, 1.5) if visit else 0.0)
            stage = start + rate * month / 12
            curve = 1 / (1 + np.exp(-stage))
            values = (np.array([5 + 40 * curve, 0.012 + 0.04 * curve]) + own) + rng.normal(0, [3.0, 0.001])
            label = CLASSES[int(np.digitize(stage + rng.normal(0, 0.3), [-1.0, 1.5]))]
            rows.append((subject, month, label, *values))
    return pd.DataFrame(rows, columns=[SUBJECT, DATE, LABEL, *VALUES])


def repeated_visit(history: pd.DataFrame, months: Sequence[float], values: Sequence[str] = VALUES) -> pd.DataFrame:
    """The last visit of each subject at each of the `months`, as `score_longitudinal` reads it."""
    last, classes = _last(history, values), _classes(history)
    out = _grid(last, months)
    for name in classes:
        out[f"p_{name}"] = np.where(out[LABEL] == name, 1 - 2 * _UNSURE, 2 * _UNSURE / max(len(classes) - 1, 1))
    for name in values:
        changes = history.sort_values([SUBJECT, DATE]).groupby(SUBJECT)[name].diff().dropna()
        low, high = np.quantile(changes, [0.25, 0.75]) if len(changes) else (0.0, 0.0)
        out[f"{name}_low"], out[f"{name}_high"] = out[name] + low, out[name] + high
    return out.drop(columns=[LABEL, "last"])


def progression(
    history: pd.DataFrame, months: Sequence[float], others: pd.DataFrame, values: Sequence[str] = VALUES
) -> pd.DataFrame:
    """The same by what followed in `others`, whose later visits are known. `InputError` if none of them has two visits."""
    steps = _pairs(others, values)
    out = _grid(_last(history, values), months)
    ahead = (out[DATE] - out["last"]).to_numpy()
    for name, p in _followed(steps, out, ahead, values[0], _classes(others)).items():
        out[f"p_{name}"] = p
    for name in values:
        x, scale = _line(steps, out, ahead, name)
        out[name] = x
        out[f"{name}_low"], out[f"{name}_high"] = x + scale[0], x + scale[1]
    return out.drop(columns=[LABEL, "last"])


def _line(
    steps: pd.DataFrame, out: pd.DataFrame, ahead: Float[np.ndarray, "N"], name: str
) -> tuple[Float[np.ndarray, "N"], Float[np.ndarray, "2 N"]]:
    x, scale = out[name].to_numpy(dtype=np.float64).copy(), np.zeros((2, len(out)))
    for label in out[LABEL].unique():
        own, at = steps[steps[LABEL] == label], (out[LABEL] == label).to_numpy()
        own = steps if len(own) < 10 else own
        level, months = own[name].to_numpy(), own["months"].to_numpy()
        middle = level.mean()
        design = lambda v, m: np.stack([np.ones_like(m), v - middle, m, m * (v - middle)], 1)  # noqa: B023, E731
        change = own[f"{name}_next"].to_numpy() - level
        weights, *_ = np.linalg.lstsq(design(level, months), change, rcond=None)
        rest = (change - design(level, months) @ weights) / np.sqrt(months)
        x[at] += design(x[at], ahead[at]) @ weights
        scale[:, at] = np.quantile(rest, [0.25, 0.75])[:, None] * np.sqrt(np.maximum(ahead[at], 1.0))
    return x, scale


def _followed(
    steps: pd.DataFrame, out: pd.DataFrame, ahead: Float[np.ndarray, "N"], name: str, classes: Sequence[str]
) -> dict[str, Float[np.ndarray, "N"]]:
    size = steps[name].std() / 3
    found = {label: np.zeros(len(out)) for label in classes}
    for i, (label, value, m) in enumerate(zip(out[LABEL], out[name], ahead, strict=True)):
        off = ((steps[name] - value) / size) ** 2 + ((steps["months"] - m) / 12) ** 2
        weight = np.exp(-0.5 * off.to_numpy()) * np.where(steps[LABEL] == label, 1.0, 1e-3)
        for one in classes:
            found[one][i] = weight[(steps["next"] == one).to_numpy()].sum() + 1e-6
    total = np.sum(list(found.values()), 0)
    return {one: p / total for one, p in found.items()}


def _pairs(cohort: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    """Every two visits of one subject: class and values at the first, months to the second, class and values then."""
    both = cohort.merge(cohort, on=SUBJECT, suffixes=("", "_next"))
    both = both[both[f"{DATE}_next"] > both[DATE]].dropna(subset=[LABEL, f"{LABEL}_next", *values])
    both = both.dropna(subset=[f"{name}_next" for name in values])
    if not len(both):
        raise InputError("no subject of the other cohort has two whole visits; there is nothing to learn from.")
    return both.assign(months=both[f"{DATE}_next"] - both[DATE], next=both[f"{LABEL}_next"])


def _last(history: pd.DataFrame, values: Sequence[str]) -> pd.DataFrame:
    """Each subject's newest observed class and values, and the date of its last visit."""
    rows = history.sort_values([SUBJECT, DATE]).groupby(SUBJECT, as_index=False)[[DATE, LABEL, *values]].last()
    return rows.rename(columns={DATE: "last"})


def _grid(last: pd.DataFrame, months: Sequence[float]) -> pd.DataFrame:
    return last.merge(pd.DataFrame({DATE: np.asarray(months, dtype=np.float64)}), "cross")


def _classes(cohort: pd.DataFrame) -> list[str]:
    return [name for name in CLASSES if (cohort[LABEL] == name).any()] or sorted(cohort[LABEL].dropna().unique())
