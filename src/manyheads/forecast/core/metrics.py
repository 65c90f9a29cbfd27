"""How good forecasts are, as fev measures it (arXiv:2509.26468), so that figures can be laid beside published ones.

With the truth y, the point x, the quantile q_t of level t, and the seasonal error of the history before the cut,

    e = mean |y_s - y_(s-m)|                       m: the season; only where both are observed

    MASE       mean |y - x| / e                    1: as far off as repeating the last season was in the past
    SQL        mean 2 max(t (y - q_t), (t - 1)(y - q_t)) / e,         the mean over levels too
    WAPE       mean |y - x| / mean |y|             WQL: the same of the quantile loss
    MSE, MAE   in the unit of the data (squared)
    coverage   share of y between the lowest and the highest quantile; `nominal` is what that should be

each over series and steps of a window and target, then the mean over targets, then over windows. Series whose seasonal error is 0
or not known are left out of MASE and SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.forecast.core.panel import Panel

KEYS = ["window", "target_name"]


def seasonal_error(panel: Panel, season: int) -> Float[np.ndarray, "N V"]:
    """The e of the formula above for each series and target; NaN where no two observed steps are a season apart."""
    out = np.full((len(panel), panel.n_targets), np.nan)
    for i, one in enumerate(panel.series):
        if len(one) > season:
            off = np.abs(one.values[:, season:] - one.values[:, :-season])
            seen = np.isfinite(off)
            total = np.where(seen, off, 0.0).sum(1)
            out[i] = np.where(seen.any(1), total / np.maximum(seen.sum(1), 1), np.nan)
    return out


def levels_of(table: pd.DataFrame) -> tuple[float, ...]:
    """The quantile levels among the columns of a table of forecasts."""
    return tuple(float(name) for name in table.columns if _is_level(name))


def scores(table: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """The metrics above as columns: one row, or one a value of `by`.

    `table` has a row a series, target, window and step: window, target_name, y, point, error (e), and a column a quantile level.
    """
    levels = levels_of(table)
    known = table[np.isfinite(table["y"])]
    off = (known["y"] - known["point"]).abs()
    e = known["error"].where(known["error"] > 0)
    parts = {"MSE": (known["y"] - known["point"]) ** 2, "MAE": off, "MASE": off / e, "size": known["y"].abs()}
    if levels:
        losses = [_pinball(known["y"], known[f"{t:g}"], t) for t in levels]
        parts["QL"] = sum(losses[1:], losses[0]) / len(levels)
        parts["SQL"] = parts["QL"] / e
        inside = (known["y"] >= known[f"{levels[0]:g}"]) & (known["y"] <= known[f"{levels[-1]:g}"])
        parts["coverage"] = inside.astype(float)
    rows = known[list(dict.fromkeys([*by, *KEYS]))].assign(**parts)
    means = rows.groupby(list(dict.fromkeys([*by, *KEYS])), sort=False, observed=True).mean()
    means["WAPE"] = means["MAE"] / means["size"]
    if levels:
        means["WQL"] = means["QL"] / means["size"]
    wanted = ["MASE", "SQL", "WAPE", "WQL", "MSE", "MAE", "coverage"] if levels else ["MASE", "WAPE", "MSE", "MAE"]
    level: Callable[[list[str]], list[str]] = lambda names: list(dict.fromkeys(names))  # noqa: E731
    each = means[wanted].groupby(level=level([*by, "window"]), sort=False).mean()
    if not by:
        return each.mean().to_frame().T
    return each.groupby(level=list(by), sort=False).mean().reset_index()


def _pinball(y: pd.Series, quantile: pd.Series, level: float) -> pd.Series:
    off = y - quantile
    return 2 * np.maximum(level * off, (level - 1) * off)


def _is_level(name: object) -> bool:
    try:
        return 0 < float(str(name)) < 1
    except ValueError:
        return False
