"""Models of statistics, by statsmodels (the extra `forecast`): exponential smoothing, Theta, ARIMA.

Each series and target is fitted by itself on its last `most` steps when it is forecast; nothing is learned before. Gaps hold the
last observed value. Of several forms the one with the lowest AICc is taken. Quantiles are those of a normal distribution with the
model's own forecast variance. A series whose values are all equal stays where it is.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from importlib import import_module
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import Forecaster, forecasts
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.inputs import check_integer

_ONE_SD = 1 - 2 * (1 - NormalDist().cdf(1.0))  # how much of a normal distribution lies within one standard deviation


@dataclass(kw_only=True, eq=False)
class StatisticalForecaster(Forecaster):
    """`season` in steps (None: by the frequency), and how many of the last steps are looked at. Methods fill in `fitted`."""

    season: int | None = None
    most: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.most, "most", 10)

    def fitted(
        self, y: Float[np.ndarray, "L"], season: int, horizon: int
    ) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
        """Mean and standard deviation of the steps after `y`, which has a standard deviation of 1 and no gap."""
        raise TypeError(f"{type(self).__name__} does not say how it is fitted.")

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        z = np.array([NormalDist().inv_cdf(level) for level in levels])
        season = self.season or panel.season
        point, quantiles = [], []
        for one in panel.series:
            rows = [self._one(one.name, row, season, horizon) for row in one.values[:, -self.most :]]
            mean, sd = (np.stack([row[i] for row in rows]) for i in (0, 1))
            point.append(mean)
            quantiles.append(mean[..., None] + sd[..., None] * z)
        return Forecasts(horizon, levels, point, quantiles)

    def _one(
        self, name: Any, row: Float[np.ndarray, "L"], season: int, horizon: int
    ) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
        y = _without_gaps(row)
        level, size = y.mean(), y.std()
        if len(y) < 4 or size <= 1e-9 * abs(level):
            return np.full(horizon, y[-1]), np.zeros(horizon) + (0.0 if len(y) < 2 else size)
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")  # of fits that did not converge: the AICc judges them
                mean, sd = self.fitted((y - level) / size, season, horizon)
        except (ValueError, IndexError, np.linalg.LinAlgError) as error:
            raise InputError(
                f"{self.METHOD} cannot be fitted to series {name!r} ({error}); take another method."
            ) from None
        return level + size * np.asarray(mean), size * np.asarray(sd)


@forecasts("ets")
@dataclass(kw_only=True, eq=False)
class ETS(StatisticalForecaster):
    """Exponential smoothing with additive errors: trend none or damped, season none or additive (Hyndman et al., 2008)."""

    def fitted(
        self, y: Float[np.ndarray, "L"], season: int, horizon: int
    ) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
        """The best of four forms."""
        model = _statsmodels("statsmodels.tsa.exponential_smoothing.ets").ETSModel
        seasons = ["add"] if season > 1 and len(y) >= 3 * season else []
        fits = [
            model(
                pd.Series(y),
                trend=trend,
                damped_trend=trend is not None,
                seasonal=kind,
                seasonal_periods=season if kind else None,
            ).fit(disp=False)
            for trend in (None, "add")
            for kind in (None, *seasons)
        ]
        best = min(fits, key=lambda fit: _or_infinite(fit.aicc))
        found = best.get_prediction(start=len(y), end=len(y) + horizon - 1)
        mean = np.asarray(found.predicted_mean)
        low = np.asarray(found.pred_int(alpha=1 - _ONE_SD))[:, 0]
        return mean, np.abs(mean - low)


@forecasts("theta")
@dataclass(kw_only=True, eq=False)
class Theta(StatisticalForecaster):
    """The Theta method (Assimakopoulos and Nikolopoulos, 2000), with the season taken out where a test finds one."""

    def fitted(
        self, y: Float[np.ndarray, "L"], season: int, horizon: int
    ) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
        """The forecast and its spread."""
        model = _statsmodels("statsmodels.tsa.forecasting.theta").ThetaModel
        seasonal = season > 1 and len(y) >= 3 * season
        fit = model(y, period=season if seasonal else 1, deseasonalize=seasonal, method="additive").fit()
        mean = np.asarray(fit.forecast(horizon))
        low = np.asarray(fit.prediction_intervals(horizon, alpha=1 - _ONE_SD))[:, 0]
        return mean, np.abs(mean - low)


@forecasts("arima")
@dataclass(kw_only=True, eq=False)
class ARIMA(StatisticalForecaster):
    """ARIMA of low orders, the best by AICc, of what STL (Cleveland et al., 1990) leaves when it has taken the season out."""

    most: int = 250

    def fitted(
        self, y: Float[np.ndarray, "L"], season: int, horizon: int
    ) -> tuple[Float[np.ndarray, "H"], Float[np.ndarray, "H"]]:
        """The season comes back as it was last. Differenced once where one step tells most of the next."""
        model = _statsmodels("statsmodels.tsa.statespace.sarimax").SARIMAX
        seasonal = np.zeros(len(y))
        if season > 1 and len(y) >= 3 * season:
            seasonal = _statsmodels("statsmodels.tsa.seasonal").STL(y, period=season).fit().seasonal
        rest = y - seasonal
        d = int((rest[1:] - rest[:-1]).std() < 0.7 * rest.std())
        orders = ((0, d, 1), (1, d, 0), (1, d, 1), (2, d, 2))
        fits = [model(rest, order=order, trend=None if d else "c").fit(disp=False, maxiter=25) for order in orders]
        found = min(fits, key=lambda fit: _or_infinite(fit.aicc)).get_forecast(horizon)
        again = seasonal[-max(season, 1) :][np.arange(horizon) % max(season, 1)]
        return np.asarray(found.predicted_mean) + again, np.sqrt(np.maximum(np.asarray(found.var_pred_mean), 0))


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def _without_gaps(row: Float[np.ndarray, "L"]) -> Float[np.ndarray, "M"]:
    """From the first observed value on, gaps hold the last one before them."""
    seen = np.isfinite(row)
    if not seen.any():
        return np.zeros(1)
    row = row[int(seen.argmax()) :]
    last = np.maximum.accumulate(np.where(np.isfinite(row), np.arange(len(row)), 0))
    found: Float[np.ndarray, "M"] = row[last]
    return found


def _statsmodels(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise InputError("this needs statsmodels; install it by pip install 'manyheads[forecast]'.") from None
