"""A forecast as the page draws it: what came, what was forecast in the windows of the backtest, and what is forecast now."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd

from manyheads.errors import InputError
from manyheads.explorer.overview import numbers
from manyheads.forecast.running import BACKTEST, FORECAST

MOST = 200  # series
_QUANTILE = re.compile(r"(?:.*-q-(\d+(?:\.\d+)?)|(0?\.\d+))$")


def forecast_numbers(folder: Path) -> dict[str, Any]:
    """The two tables of a folder that `manyheads forecast --out` wrote. `InputError` for anything else."""
    try:
        ahead, past = (pd.read_parquet(folder / name) for name in (FORECAST, BACKTEST))
        series = _series(ahead, past)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise InputError(
            f"{folder} holds no forecast that can be shown ({' '.join(str(error).split())[:120]})."
        ) from None
    errors = past.assign(miss=(past["y"] - past["point"]).abs()).groupby(["method", "step"])["miss"].mean().unstack()
    return {
        "series": series,
        "methods": sorted(
            past["method"].unique(), key=lambda name: name not in ahead.columns
        ),  # that of the forecast first
        "steps": [int(step) for step in errors.columns],
        "errors": {str(method): numbers(row.to_numpy()) for method, row in errors.iterrows()},
    }


def _series(ahead: pd.DataFrame, past: pd.DataFrame) -> list[dict[str, Any]]:
    item, time = ahead.columns[:2]
    levels = _levels(ahead)
    low, high = _ends(ahead)
    points = [name for name in ahead.select_dtypes("number").columns if name not in levels]
    targets = "target_name" if "target_name" in ahead else None
    found = []
    groups = ahead.groupby([item, targets] if targets else [item], sort=False)
    for key, rows in list(groups)[:MOST]:
        mine = past[past["item"].astype(str) == str(key[0])]
        mine = mine[mine["target_name"] == key[1]] if targets else mine
        seen = mine.drop_duplicates("time").sort_values("time")
        each = mine.groupby(["method", "window"])
        windows = [{"method": method, **_fan(one, "time", "point", *_ends(one))} for (method, _), one in each]
        found.append(
            {
                "name": " ".join(map(str, key)),
                "time": _seconds(seen["time"]),
                "y": numbers(seen["y"].to_numpy()),
                "windows": windows,
                "ahead": _fan(rows, time, points[0], low, high),
                "levels": [levels[low], levels[high]],
            }
        )
    return found


def _level(name: str) -> float | None:
    """The quantile level that a column's name says, in either convention; None for other columns."""
    found = _QUANTILE.match(str(name))
    if found is None:
        return None
    return float(found[1]) / 100 if found[1] else float(found[2])


def _levels(rows: pd.DataFrame) -> dict[str, float]:
    found = {name: _level(str(name)) for name in rows.columns}
    return {name: level for name, level in found.items() if level is not None}


def _ends(rows: pd.DataFrame) -> tuple[str, str]:
    """The columns of the lowest and of the highest quantile."""
    levels = _levels(rows)
    return min(levels, key=levels.__getitem__), max(levels, key=levels.__getitem__)


def _fan(rows: pd.DataFrame, time: str, point: str, low: str, high: str) -> dict[str, Any]:
    parts = {"point": point, "low": low, "high": high}
    return {"time": _seconds(rows[time]), **{name: numbers(rows[column].to_numpy()) for name, column in parts.items()}}


def _seconds(times: pd.Series) -> list[float]:
    """Seconds since 1970, or the numbers themselves where time is counted."""
    if pd.api.types.is_numeric_dtype(times):
        return [float(time) for time in times]
    at = pd.to_datetime(times, utc=True)
    return [float(stamp.timestamp()) for stamp in at]
