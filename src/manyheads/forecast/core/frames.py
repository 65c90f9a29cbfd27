"""From a long frame to a panel, and from forecasts back to a frame, in the convention that the user has.

    unique_id, ds, y                  Nixtla's     ->  unique_id, ds, [target_name,] MODEL, MODEL-q-10, MODEL-q-50, ...
    item_id, timestamp, target        Chronos's    ->  item_id, timestamp, target_name, predictions, "0.1", "0.5", ...

Any names may be given instead. Rows may come in any order. Times that are missing on the grid become missing values; times off
the grid, and two rows of one time, are refused by the name of the series.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.data.tables import read_table
from manyheads.errors import InputError
from manyheads.forecast.core.panel import Forecasts, FrameColumns, Frequency, Panel, Series
from manyheads.inputs import clause

NIXTLA = ("unique_id", "ds", "y")
CHRONOS = ("item_id", "timestamp", "target")
ONE = "series"  # the name of a series where no column names it
_SPARSE = 100  # grid steps a row: a grid that is emptier than this is no grid


def read_frame(path: str | Path) -> pd.DataFrame:
    """A long frame from a CSV or Parquet file. `InputError` for anything else."""
    return read_table(path, "one row a series and time")


def columns_of(
    df: pd.DataFrame,
    *,
    item: str | None = None,
    time: str | None = None,
    target: str | Sequence[str] | None = None,
    known: Sequence[str] = (),
    past: Sequence[str] | None = None,
    static: Sequence[str] = (),
) -> FrameColumns:
    """What each column is: as named, else by the two conventions. Other columns of numbers are past-only covariates.

    `InputError` says which column is missing, or is none of numbers.
    """
    if not isinstance(df, pd.DataFrame):
        raise InputError(f"expected a long data frame, one row a series and time; got {type(df).__name__}.")
    style = "nixtla" if time == "ds" or (time is None and "ds" in df.columns) else "chronos"
    names = NIXTLA if style == "nixtla" else CHRONOS
    item = item or (names[0] if names[0] in df.columns else None)
    time = time or next((name for name in (names[1], "date") if name in df.columns), names[1])
    targets = (target,) if isinstance(target, str) else tuple(target or (names[2],))
    taken = [name for name in (item, time, *targets, *known, *(past or ()), *static) if name is not None]
    if missing := [name for name in taken if name not in df.columns]:
        raise InputError(
            f"the frame has no column {missing[0]!r}, only {', '.join(map(str, df.columns))}; name the columns: item, time, "
            "target."
        )
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise InputError(f"column {twice[0]!r} is named twice; a column is one thing.")
    if past is None:
        past = [name for name in df.columns if name not in taken and pd.api.types.is_numeric_dtype(df[name])]
    columns = FrameColumns(item, time, targets, tuple(known), tuple(past), tuple(static), style)
    for name in (*columns.targets, *columns.covariates, *columns.static):
        if not pd.api.types.is_numeric_dtype(df[name]):
            raise InputError(f"column {name!r} holds {df[name].dtype}, and numbers are needed; convert or drop it.")
        if np.isinf(df[name].to_numpy(dtype=np.float64, na_value=np.nan)).any():
            raise InputError(f"column {name!r} holds infinity; make such values missing.")
    return columns


def panel_of(df: pd.DataFrame, columns: FrameColumns, freq: str | Frequency | None = None) -> Panel:
    """The series of a frame. `InputError` names the series that has no value, two rows of one time, or times off the grid."""
    if not len(df):
        raise InputError("the frame has no rows; give at least one series.")
    df = df.reset_index(drop=True)
    times = _times(df[columns.time], columns.time)
    items = pd.Series(ONE, index=df.index) if columns.item is None else df[columns.item]
    if items.isna().any():
        raise InputError(f"column {columns.item!r} has a row without a name; give every row its series.")
    table = df[[*columns.targets, *columns.covariates, *columns.static]].astype(np.float64)
    groups = {
        name: (index := times.loc[rows].sort_values().index, pd.Index(times.loc[index]))
        for name, rows in items.groupby(items, sort=False).groups.items()
    }
    for name, (_, when) in groups.items():
        if when.has_duplicates:
            raise InputError(f"series {name!r} has two rows at {when[when.duplicated()][0]}; leave one.")
    grid = _frequency([when for _, when in groups.values()], freq)
    series = tuple(_series(name, table.loc[index], when, columns, grid) for name, (index, when) in groups.items())
    return Panel(series, columns, grid)


def with_future(panel: Panel, future: pd.DataFrame | None, horizon: int) -> Panel:
    """The panel with covariates known ahead, of a frame that has each series' next `horizon` times.

    `InputError` names the series whose times or columns do not match.
    """
    columns = panel.columns
    if not columns.known:
        return panel
    if future is None:
        raise InputError(f"{', '.join(columns.known)} were said to be known ahead; give future_df with them.")
    wanted = [name for name in (columns.item, columns.time, *columns.known) if name is not None]
    if missing := [name for name in wanted if name not in future.columns]:
        raise InputError(f"future_df has no column {missing[0]!r}, only {', '.join(map(str, future.columns))}.")
    future = future.reset_index(drop=True)
    times = _times(future[columns.time], columns.time)
    by = (
        {ONE: future.index}
        if columns.item is None
        else future.groupby(columns.item, sort=False).groups  # the rows of each series
    )
    series = []
    for one in panel.series:
        ahead = panel.future_times(one, horizon)
        rows = by.get(one.name)
        if rows is None:
            raise InputError(f"future_df has no rows of series {one.name!r}.")
        found = future.loc[rows, list(columns.known)].astype(np.float64).set_axis(pd.Index(times.loc[rows]))
        if found.index.has_duplicates or not ahead.isin(found.index).all():
            raise InputError(
                f"future_df lacks a time of series {one.name!r}, or has it twice: it needs {horizon}, {ahead[0]} to {ahead[-1]}."
            )
        values = found.loc[ahead].to_numpy().T
        series.append(
            Series(one.name, one.times, one.values, one.past, np.hstack([one.known[:, : len(one)], values]), one.static)
        )
    return Panel(tuple(series), columns, panel.freq)


def frame_of(panel: Panel, forecasts: Forecasts, model: str) -> pd.DataFrame:
    """Forecasts as a long frame in the convention of the panel's own."""
    columns, parts = panel.columns, []
    point, level = _names(columns, model)
    for i, one in enumerate(panel.series):
        times = panel.future_times(one, forecasts.horizon)
        for v, target in enumerate(columns.targets):
            part = pd.DataFrame({columns.time: times})
            if columns.item is not None:
                part.insert(0, columns.item, one.name)
            if columns.style == "chronos" or len(columns.targets) > 1:
                part["target_name"] = target
            part[point] = forecasts.point[i][v]
            for q, tau in enumerate(forecasts.levels):
                part[level(tau)] = forecasts.quantiles[i][v, :, q]
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _names(columns: FrameColumns, model: str) -> tuple[str, Any]:
    if columns.style == "chronos":
        return "predictions", lambda tau: f"{tau:g}"
    return model, lambda tau: f"{model}-q-{100 * tau:g}"


def _times(column: pd.Series, name: str) -> pd.Series:
    if pd.api.types.is_datetime64_any_dtype(column) or pd.api.types.is_integer_dtype(column):
        times = column
    else:
        try:
            try:
                times = pd.to_datetime(column)
            except ValueError:
                times = pd.to_datetime(column, format="ISO8601")  # dates with and without hours
        except (ValueError, TypeError, OverflowError) as error:
            raise InputError(f"column {name!r} is no time ({clause(error)}); give dates or whole numbers.") from None
    if times.isna().any():
        raise InputError(f"column {name!r} has a row without a time; leave such rows out.")
    return times


def _frequency(times: Sequence[pd.Index], freq: str | Frequency | None) -> Frequency:
    """The given frequency, else that of the longest series: its commonest step, or the calendar's where that fits."""
    if isinstance(freq, str):
        try:
            return pd.tseries.frequencies.to_offset(freq)
        except ValueError:
            raise InputError(f"freq is {freq!r}; give one of pandas, such as 'h', 'D', 'W', 'MS' or '15min'.") from None
    if freq is not None:
        return freq
    longest = max(times, key=len)
    if len(longest) < 2:
        raise InputError("a series of one value does not tell its step; give freq, for example freq='D'.")
    steps = longest[1:] - longest[:-1]
    step = pd.Series(steps).mode()[0]
    if not isinstance(longest, pd.DatetimeIndex):
        return int(step)
    return _calendar(longest, step)


def _calendar(times: pd.DatetimeIndex, step: pd.Timedelta) -> Frequency:
    days = step / pd.Timedelta(days=1)
    offsets = pd.offsets
    for low, high, months in ((28, 31, 1), (89, 92, 3), (365, 366, 12)):
        if low <= days <= high:
            if (times.day == 1).all():
                return {1: offsets.MonthBegin(), 3: offsets.QuarterBegin(startingMonth=times[0].month)}.get(
                    months, offsets.YearBegin(month=times[0].month)
                )
            if times.is_month_end.all():
                return {1: offsets.MonthEnd(), 3: offsets.QuarterEnd(startingMonth=times[0].month)}.get(
                    months, offsets.YearEnd(month=times[0].month)
                )
            if (times.day == times[0].day).all() and times[0].day <= 28:
                return offsets.DateOffset(months=months)
    if days == 7 and (times.day_of_week == times[0].day_of_week).all():
        return offsets.Week(weekday=times[0].weekday())
    if days == 1:
        weekdays = len(times) > 10 and not (times.day_of_week > 4).any()
        return offsets.BusinessDay() if weekdays else offsets.Day()
    return pd.tseries.frequencies.to_offset(step)


def _grid(name: Any, times: pd.Index, freq: Frequency) -> pd.Index:
    """The regular times from the first to the last. `InputError` names the series whose times are not among them."""
    first, last = times[0], times[-1]
    if isinstance(freq, int):
        n = (last - first) // freq + 1 if freq > 0 else 0
        sparse, make = n > _SPARSE * (len(times) + 100), lambda: pd.RangeIndex(first, last + 1, max(freq, 1))
    else:
        span = (first + freq) - first  # from below it; one step is enough to tell an empty grid
        sparse = span <= pd.Timedelta(0) or (last - first) / span > _SPARSE * (len(times) + 100)
        make = lambda: pd.date_range(first, last, freq=freq)  # noqa: E731
    grid = pd.Index([]) if sparse else make()
    if sparse or not times.isin(grid).all():
        off = "too few values for it" if sparse else f"times that are not on it, {times[~times.isin(grid)][0]} first"
        step = freq if isinstance(freq, int) else freq.freqstr
        raise InputError(
            f"series {name!r} is not on a grid of step {step}: it has {off}; resample it to regular times, or give freq."
        )
    return grid


def _series(name: Any, rows: pd.DataFrame, times: pd.Index, columns: FrameColumns, freq: Frequency) -> Series:
    grid = _grid(name, times, freq)
    table = rows.set_axis(times).reindex(grid)

    def part(names: Sequence[str]) -> Float[np.ndarray, "C L"]:
        return table[list(names)].to_numpy().T

    values = part(columns.targets)
    for target, row in zip(columns.targets, values, strict=True):
        if np.isnan(row).all():
            which = "" if len(columns.targets) == 1 else f" of {target!r}"
            raise InputError(f"series {name!r} has no value{which}, only missing ones; leave it out.")
    static = rows[list(columns.static)].mean().to_numpy() if columns.static else np.zeros(0)
    return Series(name, grid, values, part(columns.past), part(columns.known), static)
