"""Channels whose relation is known, for the experiments of mixers: lagged copies, one factor under noise, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.panel import FrameColumns, Panel, Series
from manyheads.forecast.core.windows import Windows

BURN_IN = 500


def channels_panel(values: Float[np.ndarray, "V L"]) -> Panel:
    """The rows as targets of one series, at whole numbers of time."""
    return Panel((_series("series", values),), _columns(len(values)), 1)


def items_panel(values: Float[np.ndarray, "N L"]) -> Panel:
    """The rows as series of one target each."""
    return Panel(tuple(_series(f"{i}", row[None]) for i, row in enumerate(values)), _columns(1), 1)


def _columns(targets: int) -> FrameColumns:
    return FrameColumns("item_id", "timestamp", tuple(f"y{v}" for v in range(targets)))


def _series(name: str, values: Float[np.ndarray, "V L"]) -> Series:
    empty = np.zeros((0, values.shape[1]))
    return Series(name, pd.RangeIndex(values.shape[1]), values, empty, empty, np.zeros(0))


def autoregression(
    rng: np.random.Generator, coefficients: Sequence[float], n: int, length: int
) -> Float[np.ndarray, "N L"]:
    """Series y_t = sum_j a_j y_(t-j) + noise, n of them, begun long before they are shown, each with variance 1."""
    noise = rng.standard_normal((n, length + BURN_IN))
    y = np.zeros_like(noise)
    for t in range(y.shape[1]):
        y[:, t] = noise[:, t] + sum(a * y[:, t - j] for j, a in enumerate(coefficients, 1) if t >= j)
    return standardised(y[:, BURN_IN:])


def standardised(y: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "N L"]:
    """Mean 0 and variance 1 over the steps."""
    found: np.ndarray = (y - y.mean(1, keepdims=True)) / y.std(1, keepdims=True)
    return found


def lagged_leaders(seed: int, length: int = 6000, lag: int = 24) -> Float[np.ndarray, "8 L"]:
    """Four AR(.5) leaders, which nobody can predict far, and after them their copies `lag` steps later."""
    leaders = autoregression(np.random.default_rng(seed), (0.5,), 4, length + lag)
    return np.concatenate([leaders[:, lag:], leaders[:, :-lag]])


def one_factor(seed: int, channels: int = 32, length: int = 6000, noise: float = 2.0) -> Float[np.ndarray, "N L"]:
    """An AR(2) factor of variance 1, and after it channels that are the factor and noise."""
    rng = np.random.default_rng(seed)
    factor = autoregression(rng, (1.9, -0.905), 1, length)
    return np.concatenate([factor, factor + noise * rng.standard_normal((channels, length))])


def three_groups(seed: int, each: int = 4, length: int = 4000, noise: float = 0.3) -> Float[np.ndarray, "N L"]:
    """Three groups of channels: a factor each (AR .97; AR .5; AR .85 and a daily wave) and noise, with variance 1."""
    rng = np.random.default_rng(seed)
    factors = [autoregression(rng, (a,), 1, length)[0] for a in (0.97, 0.5, 0.85)]
    factors[2] = factors[2] + np.sqrt(2) * np.sin(2 * np.pi * np.arange(length) / 24)
    rows = np.repeat(standardised(np.stack(factors)), each, 0)
    return standardised(rows + noise * rng.standard_normal(rows.shape))


def windows_after(
    forecaster: NetworkForecaster, panel: Panel, first: int, stride: int = 1
) -> tuple[Windows, Int[np.ndarray, "N 2"]]:
    """The windows whose first step to forecast is `first` or later."""
    length = panel.shortest
    windows = forecaster._windows(panel)
    ahead = range(first, length - forecaster.ahead + 1, stride)
    return windows, windows.places([(s, ahead) for s in range(len(panel))])


@torch.no_grad()
def squared_errors(
    forecaster: NetworkForecaster, panel: Panel, first: int, stride: int = 1
) -> Float[np.ndarray, "N V"]:
    """The mean squared error of each window from `first` on and target, in the scale of the series."""
    windows, places = windows_after(forecaster, panel, first, stride)
    heads, parts = forecaster._learned[0].eval(), []
    for i in range(0, len(places), 256):
        batch = forecaster._batch(windows, places[i : i + 256])
        parts.append(off_by(batch, forecaster._outputs(heads, batch)["point"]).square().mean(-1))
    return torch.cat(parts).double().numpy()


def off_by(batch: Mapping[str, Tensor], point: Float[Tensor, "B V H"]) -> Float[Tensor, "B V H"]:
    """The error of a point forecast, in the scale of the series."""
    off: Tensor = (batch["future"] - point) * batch["scale"][..., None]
    return off
