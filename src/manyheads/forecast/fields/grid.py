"""Fields [time, channel, lat, lon] of a user, latitude weights, and the climatology that anomalies are taken from.

With latitudes phi in degrees, and a field's value y of channel c at time t, phase p = t mod period,

    w_i         cos(phi_i) / mean_i cos(phi_i)                             no unit, mean 1
    clim        mean over training times of one phase, for each cell       [P, C, lat, lon], the channel's unit
    sigma_c     sqrt(mean w (y - clim)^2)                                  [C], the channel's unit
    anomaly     (y - clim) / sigma_c                                       no unit

Missing values (NaN) do not count. A cell without any value in training is not forecast.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError

_LATITUDE, _LONGITUDE, _CHANNEL = ("lat", "latitude", "y"), ("lon", "longitude", "x"), ("channel", "variable", "level")


@dataclass(frozen=True)
class GridFields:
    """Values [T, C, lat, lon], and where their rows and columns lie, in degrees."""

    values: Float[np.ndarray, "T C I J"]
    latitude: Float[np.ndarray, "I"]
    longitude: Float[np.ndarray, "J"]

    @property
    def wraps(self) -> bool:
        """Whether the columns go around the globe."""
        step = np.diff(self.longitude)
        even = len(step) > 0 and np.allclose(step, step[0], rtol=1e-2)
        return bool(even and abs(abs(step[0]) * len(self.longitude) - 360) < abs(step[0]) / 2)


def fields_of(data: Any, latitude: Any = None, longitude: Any = None) -> GridFields:
    """Fields from an array [time, channel, lat, lon] or [time, lat, lon], or an xarray DataArray in any order of these.

    Rows and columns lie where `latitude` and `longitude` say, else where the array's own coordinates do, else evenly over the
    globe from north to south. `InputError` for other shapes, and for coordinates that do not fit.
    """
    if hasattr(data, "dims") and hasattr(data, "coords"):
        data, latitude, longitude = _of_xarray(data, latitude, longitude)
    values = np.asarray(data)
    values = values[:, None] if values.ndim == 3 else values
    if values.ndim != 4 or not np.issubdtype(values.dtype, np.number) or 0 in values.shape:
        raise InputError(f"the fields have shape {list(np.shape(data))}; give numbers [time, channel, lat, lon].")
    rows, columns = values.shape[2:]
    phi = 90 - 180 / rows * (np.arange(rows) + 0.5) if latitude is None else np.asarray(latitude, np.float64)
    lam = 360 / columns * np.arange(columns) if longitude is None else np.asarray(longitude, np.float64)
    if phi.shape != (rows,) or lam.shape != (columns,) or not (np.abs(phi) <= 90).all() or not np.isfinite(lam).all():
        raise InputError(
            f"the grid has {rows} latitudes and {columns} longitudes in degrees, and {phi.size} and {lam.size} were given; "
            "give one for each row and column, latitudes from -90 to 90."
        )
    if np.isinf(values).any() or np.isnan(values).all():
        raise InputError(
            "the fields hold infinity, or nothing but NaN; give finite numbers, and NaN where one is missing."
        )
    return GridFields(values.astype(np.float32), phi, lam)


def _of_xarray(data: Any, latitude: Any, longitude: Any) -> tuple[Any, Any, Any]:
    """An xarray's values in our order, with its own coordinates where none were given. No import: it is asked what it has."""
    named = {str(name).lower(): name for name in data.dims}
    rows, columns, channel = (next((named[n] for n in names if n in named), None) for names in _NAMES)
    if "time" not in named or rows is None or columns is None or len(data.dims) != 3 + (channel is not None):
        raise InputError(
            f"the array's dimensions are {', '.join(map(str, data.dims))}; give time, lat and lon, and channel if it has several."
        )
    order = [named["time"], *([] if channel is None else [channel]), rows, columns]
    own = [np.asarray(data.coords[name]) if name in data.coords else None for name in (rows, columns)]
    return (
        data.transpose(*order).values,
        own[0] if latitude is None else latitude,
        own[1] if longitude is None else longitude,
    )


_NAMES = (_LATITUDE, _LONGITUDE, _CHANNEL)


def latitude_weights(latitude: Float[np.ndarray, "I"]) -> Float[Tensor, "I 1"]:
    """The weights w of the formula above, for each row of a field."""
    cosine = np.cos(np.deg2rad(latitude)).clip(0)
    return torch.from_numpy(cosine / cosine.mean()).float()[:, None]


def weighted_mse(
    output: Float[Tensor, "*B I J"],
    target: Float[Tensor, "*B I J"],
    weights: Float[Tensor, "I 1"],
) -> Float[Tensor, ""]:
    """The sum of w (output - target)^2 / sum w over what the target has (NaN: nothing), in its unit squared."""
    there = ~target.isnan()
    counted = weights * there
    return (counted * (output - target.nan_to_num()).square()).sum() / counted.sum().clamp_min(1e-6)


@dataclass(frozen=True)
class Climatology:
    """The mean of each phase and cell, the standard deviation of each channel's anomalies, and which cells are ever seen."""

    mean: Float[Tensor, "P C I J"]
    sigma: Float[Tensor, "C"]
    seen: Bool[Tensor, "C I J"]

    @classmethod
    def of(cls, fields: GridFields, period: int | None = None) -> Climatology:
        """From training fields whose first is of phase 0. `period` steps are a year, or a day; without one there is one phase."""
        values = fields.values.astype(np.float64)
        phases = min(period or 1, len(values))
        if period is not None and len(values) < 2 * period:
            raise InputError(f"{len(values)} fields are less than two periods of {period}; give more, or no period.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing is NaN, as it should be
            whole = np.nanmean(values, 0)
            mean = np.stack([np.nanmean(values[p::phases], 0) for p in range(phases)])
        mean = np.where(np.isnan(mean), whole, mean)
        anomaly = values - mean[np.arange(len(values)) % phases]
        weights = latitude_weights(fields.latitude).numpy() * ~np.isnan(anomaly)
        found = np.nansum(weights * anomaly**2, (0, 2, 3)) / np.maximum(weights.sum((0, 2, 3)), 1e-9)
        # A channel that never changes has only the anomaly 0, in any scale.
        sigma = np.where(found > 1e-12 * np.nanmax(np.abs(values), (0, 2, 3)) ** 2, np.sqrt(found), 1.0)
        seen = torch.from_numpy(~np.isnan(whole))
        return cls(torch.from_numpy(np.nan_to_num(mean)).float(), torch.from_numpy(sigma).float(), seen)

    def at(self, times: Int[Tensor, "*B"]) -> Float[Tensor, "*B C I J"]:
        """The climatology of steps counted from the first of training."""
        return self.mean[times % len(self.mean)]

    def anomaly(self, values: Float[Tensor, "*B C I J"], times: Int[Tensor, "*B"]) -> Float[Tensor, "*B C I J"]:
        """(y - clim) / sigma_c; NaN stays NaN."""
        return (values - self.at(times)) / self.sigma[:, None, None]

    def field(self, anomaly: Float[Tensor, "*B C I J"], times: Int[Tensor, "*B"]) -> Float[Tensor, "*B C I J"]:
        """The field clim + sigma_c anomaly in the channel's unit; NaN where a cell was never seen."""
        found = self.at(times) + self.sigma[:, None, None] * anomaly
        return found.masked_fill(~self.seen, torch.nan)
