"""Does attention across variables find the covariate that leads the target by a week (#85)?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.explaining import explain_forecast
from manyheads.forecast.sensors.mhac import Mhac

HORIZON, WINDOWS, LEADER = 7, 10, "c1"


def leading_covariate(seed: int, n: int = 1000, covariates: int = 4) -> Panel:
    """A daily target: 1.5 times what `c1` was seven days before, a weekly cycle, and noise of .1; other covariates are alike."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=(covariates, n))
    for t in range(1, n):
        c[:, t] += 0.3 * c[:, t - 1]
    y = rng.normal(size=7)[np.arange(n) % 7] + 0.1 * rng.normal(size=n)
    y[7:] += 1.5 * c[1, :-7]
    frame = {"timestamp": pd.date_range("2020-01-01", periods=n), "target": y}
    df = pd.DataFrame(frame | {f"c{i}": row for i, row in enumerate(c)})
    return panel_of(df, columns_of(df))


def without_covariates(panel: Panel) -> Panel:
    """The targets alone."""
    series = tuple(replace(one, past=one.past[:0], known=one.known[:0]) for one in panel.series)
    return replace(panel, series=series, columns=replace(panel.columns, past=(), known=()))


def held_out_error(forecaster: Forecaster, panel: Panel, windows: int = WINDOWS) -> float:
    """The mean absolute error over the last windows, of a method that learned before the first of them."""
    forecaster.fit_panel(panel.without_last(windows * HORIZON))
    errors = []
    for w in range(windows, 0, -1):
        before = panel.without_last(w * HORIZON)
        n = len(before.series[0])
        found = forecaster.forecast_panel(before, HORIZON, ()).point[0][0]
        errors.append(np.abs(found - panel.series[0].values[0, n : n + HORIZON]).mean())
    return float(np.mean(errors))


@torch.no_grad()
def attention_received(forecaster: Mhac, panel: Panel, steps: int = 200) -> dict[str, float]:
    """How much the target attends to each variable, the mean over heads and the last windows."""
    windows = forecaster._windows(panel)
    batch = windows.batch(np.array([(0, cut) for cut in range(windows.lengths[0] - steps, windows.lengths[0])]))
    trunk: Any = forecaster.backbone
    x, attention = trunk.embedded(batch["past_values"], batch["past_observed_mask"]), trunk.layers[0].attention
    q, k = (part(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2) for part in (attention.q, attention.k))
    pattern = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, :, 0].mean((0, 1))
    return dict(zip(panel.columns.targets + panel.columns.past, pattern.tolist(), strict=True))


def _rank(sizes: dict[str, float]) -> float:
    """The place of the leading covariate among all variables, from 1 on."""
    return 1.0 + sum(size > sizes[LEADER] for size in sizes.values())


def _naive(n: int, seed: int) -> dict[str, float]:
    return {"mae": held_out_error(SeasonalNaive(horizon=HORIZON), leading_covariate(seed, n))}


def _learned(mixes: bool, covariates: bool) -> Callable[[int, int], dict[str, float]]:
    def run(n: int, seed: int) -> dict[str, float]:
        panel = leading_covariate(seed, n)
        panel = panel if covariates else without_covariates(panel)
        one = Mhac(horizon=HORIZON, objective="point", epochs=15, mixes=mixes, seed=seed)
        found = {"mae": held_out_error(one, panel)}
        if covariates:
            table = explain_forecast(one, panel, windows=WINDOWS, n_random=1).table
            table = table[table["kind"] == "covariate"]
            found["rank by effect"] = _rank(dict(zip(table["part"], table["effect"], strict=True)))
        if covariates and mixes:
            found["rank by attention"] = _rank(attention_received(one, panel))
        return found

    return run


register_experiment(
    Experiment(
        "mhac",
        (85,),
        "2112.00328",
        "Does attention across variables find the covariate that leads the target by a week?",
        datasets=lambda quick: {"a covariate a week ahead": 300 if quick else 1000},
        methods={
            "mhac": _learned(True, True),
            "no attention": _learned(False, True),
            "target alone, no attention": _learned(False, False),
            "seasonal naive": _naive,
        },
        baseline="target alone, no attention",
        claims=(
            Claim(
                "its error is at most .5 of seasonal naive's",
                lambda v: v["mhac", "mae"] / v["seasonal naive", "mae"],
                at_most=0.5,
            ),
            Claim(
                "it is at most .8 of that of the target alone, without attention",
                lambda v: v["mhac", "mae"] / v["target alone, no attention", "mae"],
                at_most=0.8,
            ),
            Claim(
                "the covariate is among the two that move the forecast most",
                lambda v: v["mhac", "rank by effect"],
                at_most=2,
            ),
            Claim(
                "it is among the two variables that the target attends to most",
                lambda v: v["mhac", "rank by attention"],
                at_most=2,
            ),
            Claim(
                "attention is worth a tenth: the same network without it, which reads all variables, is worse by that",
                lambda v: v["mhac", "mae"] / v["no attention", "mae"],
                at_most=0.9,
            ),
        ),
        minutes=1,
        lower=frozenset({"mae", "rank by effect", "rank by attention"}),
        room="forecast",
    )
)
