"""The pipeline of TimeSeriesScientist (#49) beside each model of its library, on constructed and on real series.

    python benchmarks/forecast/pipelines.py --out pipelines      # or: manyheads bench pipelines --out pipelines

Constructed: 4 series a seed with trend and season, clean and damaged (5 % missing, 2 % outliers). Real: statsmodels' CO2,
sunspots, Nile, El Nino, US unemployment, inflation, GDP and Danish money. Every method is fitted anew at each of `--windows`
cuts; the statistical ones get the season that the curator finds before the first cut. The figures are MASE. A finished series is
kept in `--out` and not done again.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from manyheads.files import write_atomically
from manyheads.forecast.backtest import backtest
from manyheads.forecast.choosing import forecaster_named
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.metrics import seasonal_error
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.pipelines.scientist import COMBINATIONS, Scientist
from manyheads.forecast.pipelines.scientist_curate import curated
from manyheads.progress import progressing

NAIVE = "naive"  # not the one that a backtest adds, whose season is the frequency's
HORIZON = {"MS": 12, "D": 14, "QS": 8, "YS": 10}
STATISTICS, LEARNED = ("seasonal_naive", "theta", "ets", "arima"), ("linear",)


def constructed(seed: int, damaged: bool) -> dict[str, Panel]:
    """Four series: monthly and daily, straight, damped, no and wandering trends, one growing season, related noise."""
    rng, out = np.random.default_rng(seed), dict[str, Panel]()
    for i in range(4):
        freq, season, n = (("MS", 12, 240), ("D", 7, 300))[i % 2]
        t = np.arange(n)
        trend = (0.05 * t, 8 * (1 - np.exp(-t / 80)), 0 * t, np.cumsum(rng.normal(0, 0.15, n)))[i]
        wave = sum(rng.normal() * np.sin(2 * np.pi * k * t / season + rng.uniform(0, 7)) for k in (1, 2, 3))
        grows = 1 + 0.003 * t * (i == 0)
        noise = np.zeros(n)
        for s in range(1, n):
            noise[s] = 0.5 * noise[s - 1] + rng.normal(0, 0.4)
        y = 20 + trend + 2 * grows * wave + noise
        if damaged:
            y[rng.choice(n - 1, n // 50, replace=False)] += rng.choice([-1, 1]) * 15
            y[rng.choice(np.arange(1, n - 1), n // 20, replace=False)] = np.nan
        out[f"{'damaged' if damaged else 'clean'} {seed}.{i}"] = panel_from(y, "2000-01-01", freq)
    return out


def real() -> dict[str, Panel]:
    """Series of statsmodels."""
    import statsmodels.api as sm

    def data(name: str) -> Any:
        return getattr(sm.datasets, name).load_pandas().data

    quarterly = data("macrodata")
    series = {
        "co2": (data("co2").co2.resample("MS").mean(), "1958-03-01", "MS"),
        "sunspots": (data("sunspots").SUNACTIVITY, "1700-01-01", "YS"),
        "nile": (data("nile").volume, "1871-01-01", "YS"),
        "elnino": (data("elnino").drop(columns="YEAR").to_numpy().ravel(), "1950-01-01", "MS"),
        "unemployment": (quarterly.unemp, "1959-01-01", "QS"),
        "inflation": (quarterly.infl, "1959-01-01", "QS"),
        "gdp": (quarterly.realgdp, "1959-01-01", "QS"),
        "danish money": (data("danish_data").lrm, "1974-01-01", "QS"),
    }
    return {name: panel_from(np.asarray(y, dtype=float), start, freq) for name, (y, start, freq) in series.items()}


def panel_from(y: np.ndarray, start: str, freq: str) -> Panel:
    """A panel of one series."""
    df = pd.DataFrame({"timestamp": pd.date_range(start, periods=len(y), freq=freq), "target": y})
    return panel_of(df, columns_of(df), freq)


def measured(panel: Panel, freq: str, windows: int) -> dict[str, float]:
    """MASE by method, and the mean seconds of fitting the pipeline once."""
    horizon = HORIZON[freq]
    before = panel.without_last(windows * horizon)
    season = curated(before.series[0].values[0], panel.season)[2].season
    methods: dict[str, Forecaster] = {
        name: forecaster_named(name, panel, horizon, season=season) for name in (*STATISTICS, *LEARNED)
    }
    methods[NAIVE] = methods.pop("seasonal_naive")
    found = backtest(methods, panel, horizon=horizon, windows=windows, season=season, refit=True)
    rows = found.scores().set_index("method")["MASE"]
    return {name: float(rows[name]) for name in methods} | pipeline(panel, horizon, windows, season)


def pipeline(panel: Panel, horizon: int, windows: int, season: int) -> dict[str, float]:
    """The same of the pipeline: fitted once at a cut, combined in every way."""
    y, errors, seconds = panel.series[0].values[0], dict[str, list[float]](), []
    for w in range(windows):
        cut = len(y) - (windows - w) * horizon
        before, started = panel.without_last(len(y) - cut), time.perf_counter()
        one = Scientist(horizon=horizon)
        one.fit_panel(before)
        seconds.append(time.perf_counter() - started)
        assert one.report_ is not None
        report, e = one.report_, seasonal_error(before, season)[0, 0]
        for how in ("auto", *COMBINATIONS):
            if how != "auto":
                one.report_ = replace(report, plans=tuple(replace(plan, combine=how) for plan in report.plans))
            off = np.abs(one.forecast_panel(before, horizon, ()).point[0][0] - y[cut : cut + horizon])
            errors.setdefault(f"scientist {how}", []).append(float(np.nanmean(off)) / e)
    return {name: float(np.mean(rows)) for name, rows in errors.items()} | {"seconds": float(np.mean(seconds))}


def main(
    out: Annotated[Path, typer.Option(help="Where finished series are kept.")] = Path("pipelines"),
    seeds: Annotated[str, typer.Option(help="Seeds of the constructed series.")] = "0,1,2",
    windows: Annotated[int, typer.Option(help="Windows of the backtest.")] = 2,
) -> None:
    """Run the series that were not run yet, and print the tables."""
    torch.set_num_threads(1)
    drawn = [int(seed) for seed in seeds.split(",")]
    suites = {
        "clean": {k: v for seed in drawn for k, v in constructed(seed, False).items()},
        "damaged": {k: v for seed in drawn for k, v in constructed(seed, True).items()},
        "real": real(),
    }
    record = out / "scientist.json"
    kept: dict[str, dict[str, float]] = json.loads(record.read_text("utf-8")) if record.exists() else {}
    with progressing() as bar:
        done = bar.step("series", sum(map(len, suites.values())))
        for suite in suites.values():
            for name, panel in suite.items():
                if name not in kept:
                    kept[name] = measured(panel, panel.freq.freqstr.split("-")[0], windows)  # type: ignore[union-attr]
                    out.mkdir(parents=True, exist_ok=True)
                    text = json.dumps(kept, indent=1)
                    write_atomically(record, lambda file, text=text: file.write_text(text, "utf-8"), force=True)
                done(1, note=name)
    for title, suite in suites.items():
        shown(title, pd.DataFrame({name: kept[name] for name in suite}).T)


def shown(title: str, table: pd.DataFrame) -> None:
    """Mean MASE of each method over a suite, and beside the best single model of all and of each series."""
    single = [NAIVE, *[name for name in table if name in (*STATISTICS, *LEARNED)]]
    best, oracle = table[single].mean().min(), table[single].min(axis=1)
    out = Table(
        "method", "MASE", "/ best single", "/ best of each series", "seconds", title=f"{title}: {len(table)} series"
    )
    for name in table.mean().sort_values().index:
        if name != "seconds":
            mean = table[name].mean()
            cells = (f"{mean:.3f}", f"{mean / best:.3f}", f"{mean / oracle.mean():.3f}")
            out.add_row(name, *cells, f"{table['seconds'].mean():.1f}" if name == "scientist auto" else "")
    Console(width=110).print(out)
    if title == "real":
        rows = Table("series", "scientist", "best single", "which", title="real, series by series")
        for name, row in table.iterrows():
            best_name = row[single].astype(float).idxmin()
            rows.add_row(str(name), f"{row['scientist auto']:.3f}", f"{row[best_name]:.3f}", best_name)
        Console(width=110).print(rows)


if __name__ == "__main__":
    typer.run(main)
