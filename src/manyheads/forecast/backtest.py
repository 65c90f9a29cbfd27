"""Backtests: forecasts from several cuts in the past, beside the truth and seasonal naive.

The last window ends where the series do, and each begins `step` before the next. A forecaster is trained on what comes before the
first cut alone, then forecasts from every cut with the history up to it; with `refit` it is trained anew at each.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from manyheads.errors import InputError
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.heads import LEVELS
from manyheads.forecast.core.metrics import levels_of, scores, seasonal_error
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.inputs import check_integer
from manyheads.progress import Bar
from manyheads.report import Reported

NAIVE = "seasonal_naive"


@dataclass(frozen=True)
class Backtest(Reported):
    """A row a method, series, target, window and step in `table`:

    method, item, target_name, window, step (from 1 on), time, y, error (the history's seasonal error), point, and a column a
    quantile level. `seconds` of training and forecasting by method, `parameters` by method; `panel` and `season` as they were.
    """

    table: pd.DataFrame
    seconds: dict[str, float]
    parameters: dict[str, int]
    panel: Panel
    horizon: int
    season: int

    def scores(self) -> pd.DataFrame:
        """A row a method, the best first: MASE, SQL, WAPE, WQL, MSE, MAE, coverage (`metrics`), seconds, parameters."""
        found = scores(self.table, by=["method"]).set_index("method")
        found["seconds"] = pd.Series(self.seconds)
        found["parameters"] = pd.Series(self.parameters).astype("Int64")
        by = next((name for name in ("SQL", "MASE") if name in found and found[name].notna().any()), "MAE")
        return found.sort_values(by, kind="stable").reset_index()

    def by_step(self) -> pd.DataFrame:
        """The same for each method and step ahead."""
        return scores(self.table, by=["method", "step"])

    def by_item(self) -> pd.DataFrame:
        """The same for each method and series."""
        return scores(self.table, by=["method", "item"])

    def worse_than_naive(self, margin: float = 0.05) -> pd.DataFrame:
        """The methods, and series, whose MASE is more than `margin` above seasonal naive's: method, item, MASE, naive."""
        found = self.by_item()
        naive = found[found["method"] == NAIVE].set_index("item")["MASE"]
        found = found.assign(naive=found["item"].map(naive))
        worse = found[(found["method"] != NAIVE) & (found["MASE"] > (1 + margin) * found["naive"])]
        return worse[["method", "item", "MASE", "naive"]].reset_index(drop=True)

    @property
    def levels(self) -> tuple[float, ...]:
        """The quantile levels."""
        return levels_of(self.table)


def backtest(
    forecasters: Forecaster | dict[str, Forecaster],
    panel: Panel,
    *,
    horizon: int | None = None,
    windows: int = 5,
    step: int | None = None,
    season: int | None = None,
    quantile_levels: Sequence[float] = LEVELS,
    refit: bool = False,
    bar: Bar = Bar(),
) -> Backtest:
    """Forecasts of each method from the same cuts, and seasonal naive's. What was learned before is not used.

    Series too short for the first cut join at later ones. `InputError` where no series is long enough.
    """
    given = {forecasters.METHOD: forecasters} if isinstance(forecasters, Forecaster) else dict(forecasters)
    first = next(iter(given.values()))
    horizon = check_integer(first.horizon if horizon is None else horizon, "horizon", 1)
    step = check_integer(horizon if step is None else step, "step", 1)
    check_integer(windows, "windows", 1)
    cuts = [horizon + (windows - 1 - w) * step for w in range(windows)]  # steps before the end
    longest = max(map(len, panel.series))
    if longest < cuts[0] + 2:
        raise InputError(
            f"{windows} windows of {horizon} steps need {cuts[0] + 2} steps, and the longest series has {longest}; ask for fewer."
        )
    season = panel.season if season is None else check_integer(season, "season", 1)
    methods: dict[str, Forecaster] = {NAIVE: SeasonalNaive(horizon=horizon, season=season), **given}
    done = bar.step("backtest", len(methods) * windows)
    parts, seconds, sizes = [], dict[str, float](), dict[str, int]()
    for name, one in methods.items():
        started, fitted = time.perf_counter(), one.fresh()
        for w, cut in enumerate(cuts):
            before = panel.longer_than(cut + 1).without_last(cut, horizon)
            if w == 0 or refit:
                fitted = one.fresh()
                fitted.fit_panel(before, bar=bar)
            found = fitted.forecast_panel(before, horizon, quantile_levels)
            parts.append(_rows(name, w, cut, panel, before, found, season))
            done(1, note=name)
        seconds[name] = time.perf_counter() - started
        sizes[name] = sum(t.numel() for t in fitted._tensors().values())
    return Backtest(pd.concat(parts, ignore_index=True), seconds, sizes, panel, horizon, season)


def _rows(
    method: str, window: int, cut: int, panel: Panel, before: Panel, found: Forecasts, season: int
) -> pd.DataFrame:
    whole = {one.name: one for one in panel.series}
    errors = seasonal_error(before, season)
    rows = []
    for i, one in enumerate(before.series):
        full, n, h = whole[one.name], len(one), found.horizon
        for v, target in enumerate(panel.columns.targets):
            row = {"item": one.name, "target_name": target, "step": np.arange(1, h + 1), "time": full.times[n : n + h]}
            row |= {"y": full.values[v, n : n + h], "error": errors[i, v], "point": found.point[i][v]}
            row |= {f"{t:g}": found.quantiles[i][v, :, q] for q, t in enumerate(found.levels)}
            rows.append(pd.DataFrame(row))
    return pd.concat(rows, ignore_index=True).assign(method=method, window=window)
