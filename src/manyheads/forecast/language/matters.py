"""Does the language model matter? AutoTimes, SMETimes and Time-LLM beside their untrained twins, no model at all, and a line.

    sines      four series of three sines (periods 12, 24, 84, drawn phases) + .2 noise, 700 hours; segments of a day, as in #94's
               sheet, and without stamps, as there
    co2        monthly means at Mauna Loa, 1958 to 2001 (statsmodels); segments of a year, with stamps

The look-back is seven segments. Squared errors are in the scale of the training part, over the next one, two and four segments
(`mse1`, `mse2`, `mse4`), from eight cuts half a segment apart; nothing after the first cut was learned from. One model of each
method serves all horizons; the line and Time-LLM say four segments at once. Every body has the same steps, windows and rate; the
line has five times the steps. Time-LLM has half the steps and half the windows a step, since its prompts make each cost more.

`mse2 told` and so on are what SMETimes gets where prompts know the true future (`SMETimes.replayed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.forecast.language.autotimes import AutoTimes
from manyheads.forecast.language.frozen import BODIES
from manyheads.forecast.language.smetimes import SMETimes
from manyheads.forecast.language.time_llm import TimeLLM

SEGMENTS, AHEAD, CUTS = 7, (1, 2, 4), 8
Make = Callable[["Series7", int], Forecaster]


@dataclass(frozen=True)
class Series7:
    """A panel, steps of a segment, steps of training, and whether AutoTimes reads stamps."""

    panel: Panel
    patch: int
    steps: int
    stamps: bool = True

    @property
    def horizon(self) -> int:
        """The longest horizon."""
        return AHEAD[-1] * self.patch


def sines(n: int = 4, length: int = 700, seed: int = 0) -> Panel:
    """Series of three sines with drawn phases, as above."""
    rng = np.random.default_rng(seed)
    t, parts = np.arange(length), []
    for i in range(n):
        y = sum(np.sin(2 * np.pi * t / period + rng.uniform(0, 2 * np.pi)) for period in (12, 24, 84))
        parts.append(_frame(f"s{i}", y + 0.2 * rng.normal(size=length), "2024-01-01", "h"))
    df = pd.concat(parts, ignore_index=True)
    return panel_of(df, columns_of(df))


def co2() -> Panel:
    """Monthly means of CO2 at Mauna Loa."""
    import statsmodels.api as sm

    values = sm.datasets.co2.load_pandas().data["co2"].resample("MS").mean()
    df = _frame("co2", values.to_numpy(), str(values.index[0].date()), "MS")
    return panel_of(df, columns_of(df))


def _frame(name: str, values: Any, start: str, freq: str) -> pd.DataFrame:
    times = pd.date_range(start, periods=len(values), freq=freq)
    return pd.DataFrame({"item_id": name, "timestamp": times, "target": values})


def errors(forecast: Callable[[Panel], Forecasts], data: Series7) -> dict[str, float]:
    """`mse1`, `mse2`, `mse4` of what `forecast` says of a panel that ends with what is forecast."""
    held = data.horizon + (CUTS - 1) * data.patch // 2
    off = []
    scale = [np.nanstd(one.values[:, :-held]) for one in data.panel.series]
    for cut in range(CUTS):
        known = data.panel.without_last(cut * data.patch // 2) if cut else data.panel
        found = forecast(known)
        truth = [one.values[:, -data.horizon :] for one in known.series]
        off.append([(x - y) / s for x, y, s in zip(found.point, truth, scale, strict=True)])
    squares = np.square(np.array(off))
    return {f"mse{k}": float(np.nanmean(squares[..., : k * data.patch])) for k in AHEAD}


def trial(make: Make) -> Callable[[Series7, int], dict[str, float]]:
    """One method of the experiment: trained before the first cut, then tried."""

    def run(data: Series7, seed: int) -> dict[str, float]:
        held = data.horizon + (CUTS - 1) * data.patch // 2
        made = make(data, seed)
        made.fit_panel(data.panel.without_last(held), validation=0)
        found = errors(lambda known: made.forecast_panel(known.without_last(data.horizon), data.horizon, ()), data)
        if isinstance(made, SMETimes) and made.reads_series:
            told = errors(lambda known: made.replayed(known, data.horizon, leaky=True), data)
            found |= {f"{name} told": value for name, value in told.items()}
        return found

    return run


def autotimes(body: str, model: str = "ladon") -> Make:
    """AutoTimes with a body."""
    return lambda data, seed: AutoTimes(**_settings(data, seed, body), model=model, stamps=data.stamps)


def smetimes(body: str, model: str = "ladon") -> Make:
    """SMETimes with a body."""
    return lambda data, seed: SMETimes(**_settings(data, seed, body), model=model)


def time_llm(body: str, model: str = "ladon") -> Make:
    """Time-LLM with a body."""
    return lambda data, seed: TimeLLM(
        **_settings(data, seed, body) | {"rows": 8, "steps": max(1, data.steps // 2), "patch": 16, "rate": 3e-3},
        patch_stride=8,
        model=model,
    )


def line(data: Series7, seed: int) -> Forecaster:
    """A linear layer from the look-back to four segments."""
    settings = _settings(data, seed, "")
    return LinearForecaster(
        **{k: v for k, v in settings.items() if k not in ("body", "patch")} | {"steps": 5 * data.steps, "rate": 3e-3}
    )


def _settings(data: Series7, seed: int, body: str) -> dict[str, Any]:
    own = {"horizon": data.horizon, "context": SEGMENTS * data.patch, "patch": data.patch, "body": body, "seed": seed}
    return own | {
        "steps": data.steps,
        "rows": 16,
        "rate": 3e-3,
        "decay": 1.0,
        "levels": (),
        "stride": 4,
        "objective": "point",
    }


def datasets(quick: bool) -> dict[str, Series7]:
    """Both sets, or the first with few steps."""
    if quick:
        return {"sines": Series7(sines(), 24, 3, stamps=False)}
    return {"sines": Series7(sines(), 24, 200, stamps=False), "co2": Series7(co2(), 12, 100)}


def _worst(a: str, b: str) -> Callable[[Values], float]:
    return lambda v: max(v[a, f"mse{k}"] / v[b, f"mse{k}"] for k in AHEAD)


METHODS: dict[str, Make] = {
    "repeat": lambda data, seed: SeasonalNaive(horizon=data.horizon, season=1),
    "linear": line,
    **{f"autotimes {body}": autotimes(body) for body in BODIES},
    "smetimes language": smetimes("language"),
    "smetimes random": smetimes("random"),
    **{f"time-llm {body}": time_llm(body) for body in BODIES},
}

register_experiment(
    Experiment(
        "language",
        (94, 72, 90),
        "2402.02370",
        "Does a frozen language model forecast better than its untrained twin, than none, and than a line?",
        datasets=datasets,
        methods={name: trial(make) for name, make in METHODS.items()},
        baseline="linear",
        claims=(
            Claim(
                "AutoTimes' error is at most .05 of repeating the last value, at every horizon",
                _worst("autotimes language", "repeat"),
                at_most=0.05,
                on="sines",
            ),
            Claim(
                "and at most .85 of the same without a language model",
                _worst("autotimes language", "autotimes none"),
                at_most=0.85,
                on="sines",
            ),
            Claim(
                "so is its untrained twin's, with which the sheet was calibrated",
                _worst("autotimes random", "autotimes none"),
                at_most=0.85,
                on="sines",
            ),
            Claim(
                "the language matters: AutoTimes' error is at most .95 of its untrained twin's",
                _worst("autotimes language", "autotimes random"),
                at_most=0.95,
            ),
            Claim(
                "SMETimes' error is at most 1.05 of AutoTimes', at every horizon",
                _worst("smetimes language", "autotimes language"),
                at_most=1.05,
                on="sines",
            ),
            Claim(
                "the language matters: SMETimes' error is at most .95 of its untrained twin's",
                _worst("smetimes language", "smetimes random"),
                at_most=0.95,
            ),
            Claim(
                "Time-LLM's error is at most half of repeating the last value",
                _worst("time-llm language", "repeat"),
                at_most=0.5,
                on="sines",
            ),
            Claim("and at most 1.1 of a line's", _worst("time-llm language", "linear"), at_most=1.1, on="sines"),
            Claim(
                "the language matters: Time-LLM's error is at most .95 of its untrained twin's",
                _worst("time-llm language", "time-llm random"),
                at_most=0.95,
            ),
        ),
        minutes=20,
        lower=frozenset(f"mse{k}{more}" for k in AHEAD for more in ("", " told")),
        room="forecast",
    )
)
