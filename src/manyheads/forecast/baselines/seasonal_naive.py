"""Seasonal naive: the last season once more.

x_(t+i) is the newest observed value a whole number of seasons before t + i. Quantiles are those of a normal distribution around
it whose variance is that of the errors one season ahead, times how many seasons ahead (Hyndman and Athanasopoulos, Forecasting:
Principles and Practice, 5.5). A value that never was observed in its season is the last observed one.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from jaxtyping import Float

from manyheads.forecast.core.forecaster import Forecaster, forecasts
from manyheads.forecast.core.panel import Forecasts, Panel


@forecasts("seasonal_naive")
@dataclass(kw_only=True, eq=False)
class SeasonalNaive(Forecaster):
    """`season` in steps; None: by the frequency."""

    season: int | None = None

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        season = self.season or panel.season
        z = np.array([NormalDist().inv_cdf(level) for level in levels])
        point, quantiles = [], []
        for one in panel.series:
            x, sd = _repeated(one.values, season, horizon), _deviation(one.values, season)
            ahead = np.sqrt(np.arange(horizon) // season + 1.0)
            point.append(x)
            quantiles.append(x[..., None] + sd[:, None, None] * ahead[:, None] * z)
        return Forecasts(horizon, levels, point, quantiles)


def _repeated(y: Float[np.ndarray, "V L"], season: int, horizon: int) -> Float[np.ndarray, "V H"]:
    """Each step's newest observed value at the same place of the season; else the newest of all."""
    v, length = y.shape
    last = np.array([row[np.isfinite(row)][-1] if np.isfinite(row).any() else 0.0 for row in y])
    whole = np.pad(y, ((0, 0), (-length % season, 0)), constant_values=np.nan).reshape(v, -1, season)
    at = np.where(np.isfinite(whole), np.arange(whole.shape[1])[:, None], -1).max(1)  # [V, season]
    found = np.take_along_axis(whole, np.maximum(at, 0)[:, None], 1)[:, 0]
    newest = np.where(at >= 0, found, last[:, None])
    return newest[:, np.arange(horizon) % season]


def _deviation(y: Float[np.ndarray, "V L"], season: int) -> Float[np.ndarray, "V"]:
    """The root mean square of errors one season ahead; 0 where there is none."""
    if y.shape[1] <= season:
        return np.zeros(len(y))
    off = y[:, season:] - y[:, :-season]
    seen = np.isfinite(off)
    return np.sqrt(np.where(seen, off, 0.0) ** 2 @ np.ones(off.shape[1]) / np.maximum(seen.sum(1), 1))
