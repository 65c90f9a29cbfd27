"""Does one pretrained GPHT forecast series that it never saw, at any horizon? The calibrated case of #18's sheet.

A series is two sines of periods drawn from 8, 12, 16, 24, 32, 48, a trend of N(0, .006) a step and .1 noise. 400 series of 208
steps to learn from, 300 others to forecast from 112 steps; patches of 16, width 32, pooling 4, 2, 1, one layer a stage, 500 steps
of 64 windows. Beside it the window's mean, the last value, and a single stage with as many layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.transformers.gpht import GPHT

CONTEXT, HORIZONS, PERIODS = 112, (16, 48, 96), (8, 12, 16, 24, 32, 48)


def mixed_sines(n: int, seed: int | tuple[int, ...]) -> Float[np.ndarray, "N L"]:
    """Series as above, of a context and the longest horizon."""
    rng, t = np.random.default_rng(seed), np.arange(CONTEXT + HORIZONS[-1])
    rows = []
    for _ in range(n):
        waves = [np.sin(2 * np.pi * t / p + rng.uniform(0, 2 * np.pi)) for p in rng.choice(PERIODS, 2, replace=False)]
        rows.append(sum(waves) + rng.normal(0, 0.006) * t + 0.1 * rng.normal(size=len(t)))
    return np.array(rows)


def _panel(rows: Float[np.ndarray, "N L"]) -> Panel:
    n, length = rows.shape
    item, time = np.repeat(np.arange(n), length), np.tile(np.arange(length), n)
    df = pd.DataFrame({"item_id": item, "timestamp": time, "target": rows.ravel()})
    return panel_of(df, columns_of(df))


def _errors(point: Float[np.ndarray, "N H"], rows: Float[np.ndarray, "N L"]) -> dict[str, float]:
    truth = rows[:, CONTEXT:]
    return {f"mse{h}": float(((point - truth)[:, :h] ** 2).mean()) for h in HORIZONS}


def _learned(pools: tuple[int, ...], layers: int) -> Callable[[int, int], dict[str, float]]:
    def run(steps: int, seed: int) -> dict[str, float]:
        sizes: dict[str, Any] = {"patch": 16, "width": 32, "n_heads": 4, "hidden": 64, "pools": pools, "layers": layers}
        given: dict[str, Any] = {
            "context": CONTEXT,
            "horizon": HORIZONS[-1],
            "steps": steps,
            "rows": 64,
            "rate": 3e-3,
            "dropout": 0.0,
        }
        model = GPHT(**sizes, **given, seed=seed, levels=())
        model.fit_panel(_panel(mixed_sines(400, (seed, 0))), validation=0)
        rows = mixed_sines(300, (seed, 1))
        found = model.forecast_panel(_panel(rows[:, :CONTEXT]), HORIZONS[-1], ())
        return _errors(np.concatenate(found.point), rows)

    return run


def _simple(of: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, int], dict[str, float]]:
    return lambda _, seed: _errors(of((rows := mixed_sines(300, (seed, 1)))[:, :CONTEXT])[:, None], rows)


register_experiment(
    Experiment(
        "gpht",
        (18,),
        "2402.16516",
        "Does one pretrained GPHT forecast new series at every horizon, and does its hierarchy help?",
        datasets=lambda quick: {"mixed sines": 5 if quick else 500},
        methods={
            "mean": _simple(lambda x: x.mean(1)),
            "last": _simple(lambda x: x[:, -1]),
            "gpht": _learned((4, 2, 1), 1),
            "one stage": _learned((1,), 3),
        },
        baseline="mean",
        claims=tuple(
            Claim(
                f"rolled out to {h} steps, the squared error is at most half of the window mean's",
                lambda v, h=h: v["gpht", f"mse{h}"] / v["mean", f"mse{h}"],  # type: ignore[misc]
                at_most=0.5,
            )
            for h in HORIZONS
        ),
        minutes=3,
        lower=frozenset(f"mse{h}" for h in HORIZONS),
        room="forecast",
    )
)
