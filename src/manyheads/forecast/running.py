"""One run over a frame, as the command line makes it: a backtest, then a forecast by a method fitted on everything."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.forecast.backtest import Backtest, backtest
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import frame_of, with_future
from manyheads.forecast.core.heads import LEVELS
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.progress import Bar
from manyheads.report import Reported

FORECAST, BACKTEST, PAGE, MODEL = "forecast.parquet", "backtest.parquet", "report.html", "forecaster"


@dataclass(frozen=True)
class ForecastRun(Reported):
    """The forecasts of the best of the methods on the backtest (`chosen`), and the backtest of all."""

    panel: Panel
    forecasts: Forecasts
    backtest: Backtest
    chosen: Forecaster

    def to_frame(self) -> pd.DataFrame:
        """The forecast in the convention of the input."""
        return frame_of(self.panel, self.forecasts, self.chosen.METHOD)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write forecast.parquet, backtest.parquet, report.html and the forecaster into a new folder."""

        def write(into: Path) -> None:
            self.to_frame().to_parquet(into / FORECAST, index=False)
            table = self.backtest.table
            table.assign(item=table["item"].astype(str)).to_parquet(into / BACKTEST, index=False)
            self.report(into / PAGE)
            self.chosen.save(into / MODEL)

        return write_folder_atomically(folder, write, force=force)


def windows_for(panel: Panel, horizon: int, wanted: int = 5) -> int:
    """How many backtest windows the longest series allows, at most `wanted`, keeping half of it to learn from.

    `InputError` where it is too short for one.
    """
    longest = max(map(len, panel.series))
    fit = min(wanted, longest // 2 // horizon)
    if fit < 1 and longest < horizon + 4:
        raise InputError(
            f"the longest series has {longest} steps, too few to look back at a horizon of {horizon}; ask for less."
        )
    return max(1, fit)


def run_forecast(
    panel: Panel,
    methods: Mapping[str, Forecaster],
    *,
    horizon: int,
    future: pd.DataFrame | None = None,
    windows: int | None = None,
    season: int | None = None,
    quantile_levels: Sequence[float] = LEVELS,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> ForecastRun:
    """Backtest the methods, fit the best one by SQL on all of the panel, and forecast.

    With a `folder` an interrupted training of that one goes on there. `InputError` before work begins.
    """
    if not methods:
        raise InputError("no method was given; name at least one.")
    ahead = with_future(panel, future, horizon)
    looked = backtest(
        dict(methods),
        panel,
        horizon=horizon,
        windows=windows or windows_for(panel, horizon),
        season=season,
        quantile_levels=quantile_levels,
        bar=bar,
    )
    order = [name for name in looked.scores()["method"] if name in methods]
    chosen = methods[order[0]].fresh().fit_panel(panel, folder=folder, bar=bar)
    return ForecastRun(panel, chosen.forecast_panel(ahead, horizon, quantile_levels), looked, chosen)
