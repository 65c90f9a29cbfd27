"""A task of fev (arXiv:2509.26468) run by a forecaster of ours: `pip install fev` for the tasks, nothing of it is needed here.

    task = fev.Task(dataset_path="data.parquet", horizon=168, num_windows=20, seasonality=24, target=[...], quantile_levels=[...])
    predictions = fev_predictions(task, OLinear(horizon=168))
    task.evaluation_summary(predictions, model_name="olinear")

The forecaster learns from what comes before the first window, once, and forecasts every window.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of, with_future
from manyheads.forecast.core.panel import Panel
from manyheads.progress import Bar


def fev_predictions(
    task: Any, forecaster: Forecaster, *, refit: bool = False, bar: Bar = Bar()
) -> tuple[list[dict[str, list[dict[str, Any]]]], dict[str, float]]:
    """Predictions for each window, by target, as `task.evaluation_summary` takes them; and the seconds of training and inference.

    With `refit` it is trained anew before every window. `InputError` where the forecaster cannot read a window.
    """
    out, seconds = [], {"training_time_s": 0.0, "inference_time_s": 0.0}
    levels = tuple(task.quantile_levels or ())
    fitted, done = forecaster, bar.step("fev", task.num_windows)
    for i, window in enumerate(task.iter_windows()):
        past, future = window.get_input_data()
        panel = fev_panel(task, past, future)
        started = time.perf_counter()
        if i == 0 or refit:
            fitted = forecaster.fresh().fit_panel(panel, bar=bar)
        between = time.perf_counter()
        found = fitted.forecast_panel(panel, task.horizon, levels)
        seconds["training_time_s"] += between - started
        seconds["inference_time_s"] += time.perf_counter() - between
        out.append({target: _rows(found, v) for v, target in enumerate(_targets(task))})
        done()
    return out, seconds


def fev_panel(task: Any, past: Iterable[Mapping[str, Any]], future: Iterable[Mapping[str, Any]]) -> Panel:
    """A window's data as a panel: a row a series, whose columns are sequences."""
    known, only_past = list(task.known_dynamic_columns), list(task.past_dynamic_columns)
    names = [task.timestamp_column, *_targets(task), *known, *only_past]
    df = _long(task, past, names)
    columns = columns_of(
        df, item=task.id_column, time=task.timestamp_column, target=_targets(task), known=known, past=only_past
    )
    panel = panel_of(df, columns)
    return with_future(panel, _long(task, future, [task.timestamp_column, *known]), task.horizon) if known else panel


def _targets(task: Any) -> list[str]:
    return [task.target] if isinstance(task.target, str) else list(task.target)


def _long(task: Any, rows: Iterable[Mapping[str, Any]], names: list[str]) -> pd.DataFrame:
    parts = []
    for row in rows:
        lengths = {len(row[name]) for name in names}
        if len(lengths) != 1:
            raise InputError(f"series {row[task.id_column]!r} has columns of different lengths.")
        part = {name: np.asarray(row[name]) for name in names}
        parts.append(pd.DataFrame({task.id_column: row[task.id_column], **part}))
    return pd.concat(parts, ignore_index=True)


def _rows(found: Any, v: int) -> list[dict[str, Any]]:
    return [
        {"predictions": point[v].tolist()}
        | {str(level): quantiles[v, :, q].tolist() for q, level in enumerate(found.levels)}
        for point, quantiles in zip(found.point, found.quantiles, strict=True)
    ]
