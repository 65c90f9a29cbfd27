"""Is a density of few frequencies (#19) worth something as a forecast of real series? Beside quantiles and free bins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from manyheads.data.series import series_frame
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.forecast.backtest import backtest
from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.core.frames import columns_of, panel_of

HORIZONS = {"co2": 26, "elnino": 12}


def _tried(**settings: Any) -> Callable[[str, int], dict[str, float]]:
    def run(name: str, seed: int) -> dict[str, float]:
        df = series_frame(name)
        panel = panel_of(df, columns_of(df))
        one = LinearForecaster(
            horizon=HORIZONS[name], context=104 if name == "co2" else 48, rate=1e-3, seed=seed, **settings
        )
        table = backtest(one, panel, windows=5).scores().set_index("method")
        return {key: float(table.loc["linear", key]) for key in ("SQL", "MASE", "coverage")}

    return run


register_experiment(
    Experiment(
        "fourier-series",
        (19,),
        "2410.22269",
        "Does a density of few frequencies forecast real series as well as quantiles?",
        datasets=lambda quick: {name: name for name in (("elnino",) if quick else HORIZONS)},
        methods={
            "quantiles": _tried(epochs=40),
            "bins": _tried(epochs=40, objective="bins"),
            "fourier": _tried(epochs=40, objective="fourier"),
        },
        baseline="quantiles",
        claims=(
            Claim(
                "its scaled quantile loss is no more than 2 % above that of a quantile head, which trains on it",
                lambda v: v["fourier", "SQL"] / v["quantiles", "SQL"],
                at_most=1.02,
            ),
            Claim(
                "it is better than bins that know nothing of their neighbours",
                lambda v: v["fourier", "SQL"] / v["bins", "SQL"],
                at_most=1.0,
            ),
        ),
        minutes=3,
        lower=frozenset({"SQL", "MASE"}),
        room="forecast",
    )
)
