"""Windows over a panel: what a network reads and what it is compared with, scaled, as batches of tensors.

A window at a cut t of a series reads the `context` steps before t and is compared with the `horizon` steps from t on. Its
channels are the targets, then past-only covariates, then those known ahead. Every channel is scaled twice:

    by its series      z = (y - mean) / std             over the observed steps that were given for training
    by its window      x = (z - mean) / std             over the observed steps of the context, std = sqrt(var + 1e-5)

so that series of any size train together and a shift of level costs nothing (Kim et al., RevIN, ICLR 2022). A missing step of
the context holds the last observed value before it, never a later one; steps before the series begins are missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.forecast.core.panel import Frequency, Panel, Series
from manyheads.inputs import check_choice

Scale = tuple[np.ndarray, np.ndarray]  # mean and std of each channel
Scaling = Literal["window", "asinh", "series"]
EPSILON = 1e-5
N_TIMES = 5  # calendar features
WINDOW_MEMORY = 1 << 27  # numbers in one batch of forecasting: half a GiB


@dataclass(frozen=True)
class Shape:
    """What a network is built for: steps read and predicted, V targets, P past-only covariates, K known ahead."""

    context: int
    horizon: int
    targets: int
    past: int = 0
    known: int = 0

    @property
    def channels(self) -> int:
        """C = V + P + K."""
        return self.targets + self.past + self.known


class Windows:
    """Every window of a panel. `scaling` "asinh" adds x -> asinh(x) (Chronos-2), "series" leaves the window's scale out.

    A series' own scale is that of `scales` under its name, else that of all its steps but the last `held`, which judge.
    """

    def __init__(
        self,
        panel: Panel,
        context: int,
        horizon: int,
        *,
        covariates: bool = False,
        scaling: Scaling = "window",
        held: int = 0,
        scales: Mapping[Any, Scale] | None = None,
    ) -> None:
        self.scaling = check_choice(scaling, "scaling", ("window", "asinh", "series"))
        self.panel, columns = panel, panel.columns
        own = (len(columns.past), len(columns.known)) if covariates else (0, 0)
        self.shape = Shape(context, horizon, panel.n_targets, *own)
        self.scales = scales or {}
        self.held, self.lengths = held, [len(one) for one in panel.series]
        parts = [self._padded(one, panel.freq) for one in panel.series]
        self.starts = np.cumsum([0, *[part[0].shape[1] for part in parts[:-1]]]) + context
        self.mean, self.std = (np.stack([part[i] for part in parts]) for i in (3, 4))  # [N, C]
        # Channels last, so that a window is read from one place of memory.
        self.values = torch.from_numpy(np.concatenate([part[0].T for part in parts]))  # [S, C]
        self.observed = torch.from_numpy(np.concatenate([part[1].T for part in parts]))  # [S, C]
        self.times = torch.from_numpy(np.concatenate([part[2] for part in parts]))  # [S, 5]

    def _padded(self, one: Series, freq: Frequency) -> tuple[np.ndarray, ...]:
        """Scaled channels [C, context + L + horizon], filled forwards; what was observed; times; mean and std [C]."""
        context, horizon, length = self.shape.context, self.shape.horizon, len(one)
        total = context + length + horizon
        channels = np.full((self.shape.channels, total), np.nan)
        v, p = self.shape.targets, self.shape.past
        channels[:v, context : context + length] = one.values
        if self.shape.channels > v:
            channels[v : v + p, context : context + length] = one.past
            known = one.known[:, : length + horizon]
            channels[v + p :, context : context + known.shape[1]] = known
        own = self.scales.get(one.name)
        mean, std = own if own is not None else _scale(channels[:, context : context + length], self.held)
        scaled = (channels - mean[:, None]) / std[:, None]
        observed = np.isfinite(scaled)
        times = _calendar(one.times, freq, context, horizon)
        return _forward_filled(scaled).astype(np.float32), observed, times, mean, std

    def cuts(self, series: int, first: int | None = None, last: int | None = None) -> range:
        """The cuts of a series for training: whole windows, or of a short series those with half a context at least."""
        length, (context, horizon) = self.lengths[series], (self.shape.context, self.shape.horizon)
        end = (length if last is None else last) - horizon
        low = max(1, min(context, end // 2)) if first is None else first
        return range(low, max(end, low if first is None else 0) + 1)

    def places(self, which: Sequence[tuple[int, range]]) -> Int[np.ndarray, "N 2"]:
        """Windows as rows (series, cut), those alone that have an observed target before and after the cut."""
        rows = np.concatenate(
            [np.stack([np.full(len(r), s), np.asarray(r)], 1) for s, r in which if len(r)] or [np.zeros((0, 2), int)]
        )
        if not len(rows):
            return rows
        seen = np.concatenate([[0], np.cumsum(self.observed[:, : self.shape.targets].any(1).numpy())])
        at = self.starts[rows[:, 0]] + rows[:, 1]
        before = seen[at] - seen[at - self.shape.context]
        after = seen[at + self.shape.horizon] - seen[at]
        return rows[(before > 0) & (after > 0)]

    def batch(self, places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
        """What networks read and heads are compared with:

        past_values [B, T, C], past_observed_mask [B, T, C], past_time_features [B, T, 5], future_time_features [B, H, 5],
        future_covariates [B, H, K] and future_covariates_mask; future [B, V, H], counted [B, V, H] (0 where missing), scale
        [B, V], the window's std.
        """
        shape = self.shape
        at = torch.from_numpy(self.starts[places[:, 0]] + places[:, 1])
        steps = torch.arange(-shape.context, shape.horizon)
        index = at[:, None] + steps
        x, seen, times = self.values[index], self.observed[index], self.times[index]
        past, mask = x[:, : shape.context], seen[:, : shape.context]
        mean, std = self._window_scale(past, mask)
        x = (x - mean[:, None]) / std[:, None]
        x = torch.where(seen | (steps < 0)[None, :, None], x, 0.0)  # a future that is not known is 0
        x = torch.asinh(x) if self.scaling == "asinh" else x
        past, future = x[:, : shape.context], x[:, shape.context :]
        v = shape.targets
        return {
            "past_values": past,
            "past_observed_mask": mask.to(past.dtype),
            "past_time_features": times[:, : shape.context],
            "future_time_features": times[:, shape.context :],
            "future_covariates": future[:, :, v + shape.past :],
            "future_covariates_mask": seen[:, shape.context :, v + shape.past :].to(past.dtype),
            "future": future[:, :, :v].transpose(1, 2).contiguous(),
            "counted": seen[:, shape.context :, :v].transpose(1, 2).to(past.dtype),
            "scale": std[:, :v],
        }

    def _window_scale(
        self, past: Float[Tensor, "B T C"], mask: Bool[Tensor, "B T C"]
    ) -> tuple[Float[Tensor, "B C"], Float[Tensor, "B C"]]:
        if self.scaling == "series":
            return torch.zeros_like(past[:, 0]), torch.ones_like(past[:, 0])
        weight = mask.to(past.dtype)
        n = weight.sum(1).clamp_min(1)
        mean = (past * weight).sum(1) / n
        return mean, (((past - mean[:, None]) * weight).square().sum(1) / n + EPSILON).sqrt()

    def original(
        self, places: Int[np.ndarray, "B 2"], values: Float[Tensor, "B V H *Q"]
    ) -> Float[np.ndarray, "B V H *Q"]:
        """A network's outputs in the unit of the data."""
        v = self.shape.targets
        at = torch.from_numpy(self.starts[places[:, 0]] + places[:, 1])
        index = at[:, None] + torch.arange(-self.shape.context, 0)
        mean, std = self._window_scale(self.values[index], self.observed[index])
        outer = tuple(slice(None) for _ in range(2)) + (None,) * (values.ndim - 2)
        x = torch.sinh(values) if self.scaling == "asinh" else values
        x = x.double() * std[:, :v].double()[outer] + mean[:, :v].double()[outer]
        size, level = (stat[places[:, 0], :v] for stat in (self.std, self.mean))
        found: np.ndarray = x.numpy() * size[outer] + level[outer]
        return found


def _scale(channels: Float[np.ndarray, "C L"], held: int) -> Scale:
    """Mean and std of each channel over what was observed before the last `held` steps, or at all where nothing was.

    Where all are equal the std is their size, so that it is never 0.
    """
    seen = channels[:, : max(1, channels.shape[1] - held)]
    if not np.isfinite(seen).any(1).all():
        seen = channels
    there = np.isfinite(seen)
    count = np.maximum(there.sum(1), 1)
    mean = np.where(there, seen, 0.0).sum(1) / count
    std = np.sqrt((np.where(there, seen - mean[:, None], 0.0) ** 2).sum(1) / count)
    return mean, np.where(std > 1e-9 * np.abs(mean), std, np.where(mean == 0, 1.0, np.abs(mean)))


def _forward_filled(x: Float[np.ndarray, "C L"]) -> Float[np.ndarray, "C L"]:
    """Missing values are the last observed ones; before the first they are 0, the mean."""
    last = np.where(np.isfinite(x), np.arange(x.shape[1]), -1)
    np.maximum.accumulate(last, axis=1, out=last)
    return np.where(last >= 0, np.take_along_axis(x, np.maximum(last, 0), 1), 0.0)


def _calendar(times: pd.Index, freq: Frequency, before: int, after: int) -> Float[np.ndarray, "S 5"]:
    """Minute, hour, weekday, day of the month, day of the year, each from -0.5 to 0.5; zeros where times are numbers."""
    total = before + len(times) + after
    out = np.zeros((total, N_TIMES), dtype=np.float32)
    if isinstance(freq, int):
        return out
    ahead = pd.date_range(times[-1], periods=after + 1, freq=freq)[1:]
    when = times.append(ahead)
    parts = (when.minute / 59, when.hour / 23, when.day_of_week / 6, (when.day - 1) / 30, (when.day_of_year - 1) / 365)
    out[before:] = np.stack([np.asarray(part) for part in parts], 1) - 0.5
    return out


def check_length(panel: Panel, horizon: int) -> None:
    """`InputError` where no series has a step to learn from beside a horizon."""
    if max(map(len, panel.series)) < horizon + 2:
        longest = max(panel.series, key=len)
        raise InputError(
            f"the longest series, {longest.name!r}, has {len(longest)} steps, too few to learn a horizon of {horizon}."
        )
