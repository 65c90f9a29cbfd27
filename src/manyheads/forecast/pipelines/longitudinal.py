"""TADPOLE (#76): the scorer of longitudinal forecasts, such as a patient's diagnosis and measurements over years.

Marinescu et al., "The Alzheimer's Disease Prediction Of Longitudinal Evolution (TADPOLE) Challenge: Results after 1 Year
Follow-up", arXiv:2002.03419 (92 entries on 219 subjects; best mAUC .931; nobody beat guessing on ADAS-Cog13). An entry forecasts
every subject month by month: a probability of each class, and values with 50 % intervals. Each visit is compared with the
forecast nearest to it in time, the earlier of two as near; classes and values may have been measured on different days.

    mAUC     mean over pairs of classes i < j of (A_ij + A_ji) / 2; A_ij is the chance that one of i has a higher p_i than one of
             j, a tie counted half (Hand and Till, 2001)                                                              in [0, 1]
    BCA      mean over classes of (sensitivity + specificity) / 2 of the likeliest class, the first of equals         in [0, 1]
    MAE      mean |y - x|                                                                                     unit of the value
    WES      sum w |y - x| / sum w, w = 1 / width of the interval; with widths of 0 its limit, the mean over those    unit of it
    CPA      | share of y in the interval - 1/2 |                                                                   in [0, 1/2]

Where the released evaluation ignores ties and divides by a width of 0, this does not. `stderr` is that of resampled subjects,
since visits of one subject are alike. A class without a visit, or with all of them, has no sensitivity or specificity: it is left
out, and a metric that nothing is left of is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_seed

SUBJECT, DATE, LABEL = "subject", "date", "diagnosis"
Metric = Callable[[pd.DataFrame], float]


@dataclass(frozen=True)
class LongitudinalScores:
    """A row a target and metric in `table`: target, metric, value, stderr, visits, subjects. `matched` is what was compared."""

    table: pd.DataFrame
    matched: dict[str, pd.DataFrame]

    def __getitem__(self, key: tuple[str, str]) -> float:
        """The value of a target and metric."""
        row = self.table[(self.table["target"] == key[0]) & (self.table["metric"] == key[1])]
        if not len(row):
            raise InputError(f"there is no {key[1]} of {key[0]!r}; the table has them all.")
        return float(row["value"].iloc[0])


def score_longitudinal(
    forecasts: pd.DataFrame,
    truth: pd.DataFrame,
    *,
    classes: Sequence[str] = (),
    values: Sequence[str] = (),
    dates: Mapping[str, str] | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> LongitudinalScores:
    """Score one entry.

    `forecasts` has a row a subject and month: subject, date, `p_CLASS` of each class, and of each value VALUE, VALUE_low and
    VALUE_high. `truth` has a row a visit: subject, date, diagnosis, VALUE, missing where not measured. Dates are dates or
    numbers. `dates` names the column of `truth` with the day on which a target was measured, such as {"Ventricles": "scan_date"}.
    Classes are those of the columns `p_...`, values those with a `_low`, unless they are named. `InputError` names a subject that
    was not forecast, and whatever else does not fit.
    """
    check_integer(resamples, "resamples", 0), check_seed(seed)
    _needs(forecasts, "the forecasts", [SUBJECT, DATE])
    forecasts = forecasts.reset_index(drop=True)
    classes = tuple(classes) or tuple(n.removeprefix("p_") for n in map(str, forecasts.columns) if n.startswith("p_"))
    values = tuple(values) or tuple(n.removesuffix("_low") for n in map(str, forecasts.columns) if n.endswith("_low"))
    if not classes and not values:
        raise InputError("the forecasts have no column p_CLASS and no VALUE_low; there is nothing to score.")
    if len(classes) == 1:
        raise InputError(f"there is one class alone, {classes[0]!r}; give a probability of at least two.")
    if forecasts.duplicated([SUBJECT, DATE]).any():
        subject = forecasts[forecasts.duplicated([SUBJECT, DATE])][SUBJECT].iloc[0]
        raise InputError(f"the forecasts have two rows of one date of subject {subject!r}; leave one.")
    found: dict[str, tuple[pd.DataFrame, dict[str, Metric]]] = {}
    if classes:
        columns = [f"p_{name}" for name in classes]
        pairs = _matched(forecasts, truth, LABEL, columns, (dates or {}).get(LABEL, DATE))
        found[LABEL] = (_classed(pairs, classes), {"mAUC": hand_till, "BCA": balanced_accuracy})
    for name in values:
        columns = [name, f"{name}_low", f"{name}_high"]
        pairs = _matched(forecasts, truth, name, columns, (dates or {}).get(name, DATE))
        found[name] = (_valued(pairs, columns), {"MAE": _mae, "WES": _wes, "CPA": _cpa})
    rows = []
    for target, (pairs, metrics) in found.items():
        draws = _resampled(pairs, metrics, resamples, seed)
        for metric, function in metrics.items():
            n = {"visits": len(pairs), "subjects": pairs[SUBJECT].nunique()}
            rows.append({"target": target, "metric": metric, "value": function(pairs), "stderr": draws[metric], **n})
    return LongitudinalScores(pd.DataFrame(rows), {target: pairs for target, (pairs, _) in found.items()})


def hand_till(pairs: pd.DataFrame) -> float:
    """The mAUC of the columns `p0`, `p1`, ... and the class number `y`."""
    y, p = pairs["y"].to_numpy(), _probabilities(pairs)
    there = [k for k in range(p.shape[1]) if (y == k).any()]
    areas = [(_area(p[:, i], y == i, y == j) + _area(p[:, j], y == j, y == i)) / 2 for i, j in combinations(there, 2)]
    return float(np.mean(areas)) if areas else float("nan")


def balanced_accuracy(pairs: pd.DataFrame) -> float:
    """The BCA of the same columns."""
    y, p = pairs["y"].to_numpy(), _probabilities(pairs)
    said, each = p.argmax(1), []
    for k in range(p.shape[1]):
        own = y == k
        if own.any() and not own.all():
            each.append((np.mean(said[own] == k) + np.mean(said[~own] != k)) / 2)
    return float(np.mean(each)) if each else float("nan")


def _area(p: Float[np.ndarray, "N"], own: Any, other: Any) -> float:
    """The chance that one of `own` has more than one of `other`: by ranks, equal ones sharing theirs."""
    n, m = int(own.sum()), int(other.sum())
    ranks = pd.Series(np.concatenate([p[own], p[other]])).rank().to_numpy()
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def _mae(pairs: pd.DataFrame) -> float:
    return float((pairs["y"] - pairs["x"]).abs().mean())


def _wes(pairs: pd.DataFrame) -> float:
    width, off = (pairs["high"] - pairs["low"]).to_numpy(), (pairs["y"] - pairs["x"]).abs().to_numpy()
    # Relative to the least width, so that no weight overflows; where that is 0, only widths of 0 weigh.
    weight = (width == 0).astype(float) if (width == 0).any() else width.min() / width
    return float((weight * off).sum() / weight.sum())


def _cpa(pairs: pd.DataFrame) -> float:
    return float(abs(((pairs["y"] >= pairs["low"]) & (pairs["y"] <= pairs["high"])).mean() - 0.5))


def _matched(
    forecasts: pd.DataFrame, truth: pd.DataFrame, target: str, columns: Sequence[str], date: str
) -> pd.DataFrame:
    """A row a visit at which `target` was measured: subject, when, y, and the columns of the nearest forecast."""
    _needs(forecasts, "the forecasts", columns)
    _needs(truth, "the truth", [SUBJECT, date, target])
    visits = truth.loc[truth[target].notna() & truth[date].notna(), [SUBJECT, date, target]]
    if not len(visits):
        raise InputError(f"the truth has no visit with a {target!r} and a {date!r}; there is nothing to score.")
    if missing := sorted(set(visits[SUBJECT]) - set(forecasts[SUBJECT]), key=str):
        raise InputError(
            f"{len(missing)} subjects were not forecast, {missing[0]!r} first; an entry forecasts everyone."
        )
    if not np.isfinite(forecasts[list(columns)].to_numpy(dtype=np.float64, na_value=np.nan)).all():
        raise InputError(f"the forecasts of {target!r} are not all finite numbers; an entry forecasts everything.")
    # One order whatever the order of the rows was, so that not even rounding depends on it.
    visits = visits.sort_values([SUBJECT, date, target], kind="stable").reset_index(drop=True)
    months = {subject: rows.sort_values(DATE) for subject, rows in forecasts.groupby(SUBJECT, sort=False)}
    try:
        at = [_nearest(months[s], when) for s, when in zip(visits[SUBJECT], visits[date], strict=True)]
    except TypeError:
        raise InputError(
            f"the dates of the forecasts and {date!r} of the truth are of two kinds; make them one."
        ) from None
    own = forecasts.loc[at, list(columns)].reset_index(drop=True)
    return pd.concat([visits.set_axis([SUBJECT, "when", "y"], axis=1), own], axis=1)


def _nearest(rows: pd.DataFrame, when: Any) -> Any:
    return (rows[DATE] - when).abs().idxmin()


def _classed(pairs: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """Class numbers and probabilities that sum to one."""
    p = pairs[[f"p_{name}" for name in classes]].to_numpy(dtype=np.float64)
    if (p < 0).any() or (p.sum(1) <= 0).any():
        raise InputError("probabilities are negative, or all 0; give numbers from 0 on, one of them above.")
    number = {str(name): k for k, name in enumerate(classes)}
    if unknown := sorted(set(map(str, pairs["y"])) - set(number)):
        raise InputError(
            f"the truth has a {LABEL} {unknown[0]!r} without a forecast; classes are {', '.join(classes)}."
        )
    out = pairs[[SUBJECT, "when"]].assign(y=[number[str(y)] for y in pairs["y"]])
    p = p / p.sum(1, keepdims=True)
    return out.assign(**{f"p{k}": p[:, k] for k in range(len(classes))})


def _valued(pairs: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    out = pairs.rename(columns=dict(zip(columns, ("x", "low", "high"), strict=True)))
    if (out["low"] > out["high"]).any():
        subject = out[out["low"] > out["high"]][SUBJECT].iloc[0]
        raise InputError(
            f"an interval of {columns[0]!r} of subject {subject!r} ends before it begins; order the bounds."
        )
    return out


def _resampled(pairs: pd.DataFrame, metrics: Mapping[str, Metric], resamples: int, seed: int) -> dict[str, float]:
    """The standard deviation of each metric over draws of as many subjects."""
    rows: list[Int[np.ndarray, "n"]] = list(pairs.groupby(SUBJECT, sort=True).indices.values())
    if len(rows) < 2 or resamples < 2:
        return dict.fromkeys(metrics, float("nan"))
    rng, found = np.random.default_rng(seed), {name: list[float]() for name in metrics}
    for _ in range(resamples):
        drawn = pairs.iloc[np.concatenate([rows[i] for i in rng.integers(len(rows), size=len(rows))])]
        for name, function in metrics.items():
            found[name].append(function(drawn))
    return {
        name: float(np.nanstd(draws, ddof=1)) if np.isfinite(draws).any() else float("nan")
        for name, draws in found.items()
    }


def _probabilities(pairs: pd.DataFrame) -> Float[np.ndarray, "N K"]:
    found: Float[np.ndarray, "N K"] = pairs[[name for name in pairs if str(name)[0] == "p"]].to_numpy()
    return found


def _needs(frame: pd.DataFrame, what: str, columns: Sequence[str]) -> None:
    if missing := [name for name in columns if name not in frame.columns]:
        raise InputError(f"{what} have no column {missing[0]!r}, only {', '.join(map(str, frame.columns))}.")
