"""Forecasts, backtests and explanations, in the terminal and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from manyheads.forecast.backtest import NAIVE, Backtest
from manyheads.forecast.core.frames import ONE
from manyheads.forecast.core.panel import Series
from manyheads.forecast.explaining import ForecastExplanation
from manyheads.forecast.running import ForecastRun
from manyheads.report import page_of
from manyheads.report.fan import Fan, fan
from manyheads.report.figures import ColourScale, score_bar
from manyheads.report.html import Html, el, how_to_read, join, masthead, page, plain_table
from manyheads.report.numbers import count, number, plus_minus
from manyheads.report.scatter import Point, scatter

SHOWN = 12  # series on a page
_METRICS = ("MASE", "SQL", "WAPE", "WQL", "MAE", "coverage")
_TERMS = {
    "MASE": "Mean absolute error divided by the mean absolute error of repeating the last season in the history; below 1 is "
    "better than that was.",
    "SQL": "Scaled quantile loss: the same for all quantiles together, with twice the quantile loss in the place of the error.",
    "WAPE, WQL": "Mean absolute error, and quantile loss, divided by the mean size of the values.",
    "Coverage": "How often the truth lay between the lowest and the highest quantile.",
    "Seasonal naive": "Repeats the last season. A method that is no better than it has learned nothing.",
    "Bands": "Pairs of quantiles; the darker, the nearer to the median.",
}


def scores_table(found: Backtest) -> Table:
    """A row a method, the best first."""
    windows = found.table["window"].nunique()
    title = f"{count(windows, 'window')} of {count(found.horizon, 'step')}, season {found.season}"
    table = Table(title=title, title_justify="left")
    scores = found.scores()
    metrics = [name for name in _METRICS if name in scores]
    for i, name in enumerate(("method", *metrics, "seconds", "parameters")):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in scores.to_dict("records"):
        cells = [number(row[name], 3) for name in metrics]
        table.add_row(row["method"], *cells, f"{row['seconds']:.1f}", f"{row['parameters']:,}")
    return table


def warnings_of(found: Backtest) -> list[str]:
    """A sentence for each method that is worse than seasonal naive by more than 5 % MASE on a series."""
    worse = found.worse_than_naive()
    out = []
    for method, part in worse.groupby("method", sort=False):
        items = ", ".join(map(str, part["item"][:5])) + (" ..." if len(part) > 5 else "")
        out.append(
            f"{method} is worse than seasonal naive by more than 5 % MASE on {count(len(part), 'series', 'series')}: {items}."
        )
    return out


@page_of(Backtest)
def backtest_page(found: Backtest) -> str:
    """Scores, errors by step ahead, and the last windows of the first series."""
    body = join(
        masthead("Backtest", "How good were forecasts from the past?", _lede(found), {}, how_to_read(_TERMS)),
        el("main", *_backtest_sections(found)),
    )
    return page("Backtest", body)


@page_of(ForecastRun)
def forecast_page(run: ForecastRun) -> str:
    """The forecast with its fan, then the backtest that chose the method."""
    panel, horizon = run.panel, run.forecasts.horizon
    facts = {
        "method": run.chosen.METHOD,
        "horizon": count(horizon, "step"),
        "series": f"{len(panel):,}",
        "step": str(panel.freq) if isinstance(panel.freq, int) else panel.freq.freqstr,
        "targets": ", ".join(panel.columns.targets[:8]),
    }
    pictures = [
        _picture(
            one, panel.future_times(one, horizon), v, target, run.forecasts.point[i][v], run.forecasts.quantiles[i][v]
        )
        for i, one in enumerate(panel.series[:SHOWN])
        for v, target in enumerate(panel.columns.targets[:SHOWN])
    ]
    more = len(panel) * panel.n_targets - len(pictures)
    said = [el("p", sentence, class_="note") for sentence in warnings_of(run.backtest)]
    body = join(
        masthead("Forecast", "What comes next", _lede(run.backtest), facts, how_to_read(_TERMS)),
        el(
            "main",
            el("section", el("h2", "Forecast"), *said, *pictures[: 2 * SHOWN]),
            el("p", f"{more:,} more are in forecast.parquet.") if more > 0 else None,
            *_backtest_sections(run.backtest),
            el("section", el("h2", "The numbers"), _numbers(run.to_frame())),
        ),
    )
    return page("Forecast", body)


def _lede(found: Backtest) -> str:
    best = found.scores().iloc[0]
    naive = found.scores().set_index("method").loc[NAIVE, "MASE"]
    windows = found.table["window"].nunique()
    return (
        f"On {count(windows, 'window')} of the past {best['method']} was best: MASE {best['MASE']:.3f}, "
        f"seasonal naive's is {naive:.3f}."
    )


def _backtest_sections(found: Backtest) -> list[Html]:
    scores = found.scores()
    metrics = [name for name in (*_METRICS, "MSE") if name in scores]
    rows = [
        el(
            "tr",
            el("td", row["method"]),
            *[el("td", number(row[name], 3)) for name in metrics],
            el("td", number(row["seconds"], 1)),
            el("td", f"{row['parameters']:,}"),
        )
        for row in scores.to_dict("records")
    ]
    by_step = found.by_step()
    points = [Point(row.method, row.step, row.MASE) for row in by_step.itertuples() if np.isfinite(row.MASE)]
    return [
        el(
            "section",
            el("h2", "Backtest"),
            plain_table(["method", *metrics, "seconds", "parameters"], rows, label="scores"),
            el("p", "From each window's start the methods saw what came before it, and nothing of what is compared."),
        ),
        el("section", el("h2", "Errors by step ahead"), scatter(_thinned(points), x_name="steps ahead", y_name="MASE"))
        if len({p.x for p in points}) > 1
        else join(),
        el("section", el("h2", "The last window"), *_last_window(found)),
    ]


def _thinned(points: list[Point], most: int = 60) -> list[Point]:
    """Of a long horizon every k-th step, so that dots do not cover each other."""
    steps = sorted({point.x for point in points})
    kept = set(steps[:: max(1, -(-len(steps) // most))])
    return [point for point in points if point.x in kept]


def _last_window(found: Backtest) -> list[Html]:
    best = next(name for name in found.scores()["method"])
    table = found.table[(found.table["method"] == best) & (found.table["window"] == found.table["window"].max())]
    out = []
    for one in found.panel.series[:3]:
        for v, target in enumerate(found.panel.columns.targets[:3]):
            own = table[(table["item"] == one.name) & (table["target_name"] == target)]
            if len(own):
                names = [f"{level:g}" for level in found.levels]
                cut = one.until(len(one) - len(own))
                shown = _picture(
                    cut,
                    own["time"],
                    v,
                    f"{target}, by {best}",
                    own["point"].to_numpy(),
                    own[names].to_numpy(),
                    own["y"].to_numpy(),
                )
                out.append(shown)
    return out


def _picture(
    one: Series,
    ahead: Any,
    v: int,
    target: str,
    point: np.ndarray,
    quantiles: np.ndarray,
    truth: np.ndarray | None = None,
    heat: Sequence[tuple[int, int, float, str]] = (),
) -> Html:
    """The end of a series and its forecast: three times as much history as forecast, at least 60 steps."""
    kept = min(len(one), max(3 * len(point), 60)) if not heat else min(len(one), max(h[1] for h in heat) + 1)
    times = [str(t).removesuffix(" 00:00:00") for t in [*one.times[-kept:], *ahead]]
    q = quantiles.shape[-1]
    bands = [(quantiles[:, i], quantiles[:, q - 1 - i]) for i in range(q // 2)]
    label = target if one.name == ONE else f"{one.name}: {target}"
    return fan(Fan(times, one.values[v, -kept:], point, bands, truth, heat), label=label)


def _numbers(frame: pd.DataFrame, most: int = 100) -> Html:
    names = list(frame.columns)
    rows = [
        el("tr", *[el("td", number(value, 3) if isinstance(value, float) else str(value)) for value in row])
        for row in frame.head(most).itertuples(index=False)
    ]
    rest = len(frame) - most
    return join(
        plain_table(names, rows, label="forecast"),
        el("p", f"{rest:,} more rows are in forecast.parquet.") if rest > 0 else None,
    )


_EXPLAINED = {
    "Effect": "How far the forecast moves when this part is taken away, in units of the history's seasonal error: 1 is as much "
    "as repeating the last season was off. The mean over windows of the past, ± its standard error.",
    "Harm": "How much worse the forecast then is: the change of the absolute error, in the same unit. Below 0 it is better.",
    "Taken away": "A stretch of the past holds what the same place of the season usually holds; a channel or covariate has its "
    "own values of another time; a head gives its mean output.",
    "Random heads": "As many heads in each layer, drawn at random. They are chosen on half of the windows, tested on the rest.",
}


@page_of(ForecastExplanation)
def explanation_of_forecast_page(found: ForecastExplanation) -> str:
    """The forecast with its past coloured by what it moved, then channels, covariates and heads."""
    one, heat = found.series, []
    past = found.table[found.table["kind"] == "past"]
    kept = -found.parts[0][0] if found.parts else 0
    for (first, last), row in zip(found.parts, past.itertuples(), strict=True):
        told = f"{row.part}: effect {row.effect:.3f}"
        heat.append((kept + first, kept + last, float(row.effect), told))
    picture = _picture(one, found.ahead, found.target, found.target_name, found.point, found.quantiles, None, heat)
    sections = [
        _effects(found.table, kind) for kind in ("channel", "covariate", "head") if (found.table["kind"] == kind).any()
    ]
    facts = {
        "method": found.method,
        "series": str(one.name),
        "target": found.target_name,
        "windows": str(found.windows),
    }
    body = join(
        masthead("Forecast", "What made this forecast", found.says, facts, how_to_read(_EXPLAINED)),
        el(
            "main",
            el("section", el("h2", "The past, by what it moves"), picture, _effects(found.table, "past", 12)),
            *sections,
        ),
    )
    return page("What made this forecast", body)


def _effects(table: pd.DataFrame, kind: str, most: int = 40) -> Html:
    part = table[table["kind"] == kind].sort_values("effect", ascending=False)
    effects, harms = (ColourScale.holding(part[name].to_numpy()) for name in ("effect", "harm"))
    rows = [
        el(
            "tr",
            el("td", row.part),
            el("td", score_bar(row.effect, row.effect_stderr, effects)),
            el("td", plus_minus(row.effect, row.effect_stderr)),
            el("td", score_bar(row.harm, row.harm_stderr, harms)),
            el("td", plus_minus(row.harm, row.harm_stderr)),
            class_="b0",
        )
        for row in part.head(most).itertuples()
    ]
    titles = {
        "past": "Stretches of the past",
        "channel": "Other targets",
        "covariate": "Covariates",
        "head": "Attention heads",
    }
    return el(
        "section", el("h3", titles[kind]), plain_table([kind, "effect", "", "harm", ""], rows, label=titles[kind])
    )


def forecast_effects_table(found: ForecastExplanation, most: int = 20) -> Table:
    """The parts that move the forecast most."""
    table = Table(title=found.says, title_justify="left")
    for name in ("kind", "part", "effect", "harm"):
        table.add_column(name, justify="right" if name in ("effect", "harm") else "left")
    for row in found.table.sort_values("effect", ascending=False).head(most).itertuples():
        table.add_row(
            row.kind, row.part, plus_minus(row.effect, row.effect_stderr), plus_minus(row.harm, row.harm_stderr)
        )
    return table
