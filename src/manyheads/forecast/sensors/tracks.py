"""Tracks of vessels from a frame of irregular messages: implausible jumps dropped, and windows on an even grid of times.

With positions p in nautical miles on the plane that touches the globe at the newest message (phi_0, lam_0), degrees in,

    north, east     60 (phi - phi_0),  60 cos(phi_0) dlam                  dlam: the short way around the globe
    kept            the longest chain of messages in which |p_j - p_i| / (t_j - t_i) is at most `fastest` for each i, j in a row
    grid            t_0 - (T - 1) step, ..., t_0: p by interpolation between messages, none of them after t_0
    seen, gap       whether a message lies within half a step of a grid time; steps to the nearest one, at most 5

A message cannot say by itself that it is wrong, only that it and its neighbours cannot both be right: the longest chain wins.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from manyheads.errors import InputError

NAMES = {
    "vessel": ("vessel", "mmsi", "unique_id", "item_id", "icao24", "name"),
    "time": ("time", "timestamp", "ds", "basedatetime", "datetime"),
    "latitude": ("latitude", "lat"),
    "longitude": ("longitude", "lon", "long"),
    "speed": ("speed", "sog", "groundspeed"),
    "course": ("course", "cog", "track"),
}
MEASURED = ("speed", "course")  # the columns that a frame may leave out
CHANNELS = 10
LONGEST_GAP = 5.0  # steps
_LOOK = 256  # messages before one that its chain may come from: the cost stays linear in the length of a track


@dataclass(frozen=True)
class Track:
    """A vessel's messages in the order of time: seconds, degrees, speed in any unit, course in degrees (NaN: not told)."""

    time: Float[np.ndarray, "n"]
    latitude: Float[np.ndarray, "n"]
    longitude: Float[np.ndarray, "n"]
    speed: Float[np.ndarray, "n"]
    course: Float[np.ndarray, "n"]

    def __len__(self) -> int:
        return len(self.time)

    def at(self, rows: Any) -> Track:
        """Some of the messages."""
        return Track(self.time[rows], self.latitude[rows], self.longitude[rows], self.speed[rows], self.course[rows])


def track_columns(frame: pd.DataFrame) -> dict[str, str]:
    """Which column is which, by its name in any case. `InputError` names the one that is missing."""
    lower = {str(name).lower(): str(name) for name in frame.columns}
    found = {what: next((lower[n] for n in names if n in lower), "") for what, names in NAMES.items()}
    for what in NAMES:
        if not found[what] and what not in MEASURED:
            raise InputError(f"the frame has no column of {what}; name one of its columns {' or '.join(NAMES[what])}.")
    return {what: name for what, name in found.items() if name}


def tracks_of(frame: pd.DataFrame) -> dict[Any, Track]:
    """The tracks of a long frame, by vessel. Rows without a time or place are left out; of two at one time the later row stays.

    `InputError` for columns that are missing or no numbers, for latitudes beyond a pole, and for a frame without messages.
    """
    names = track_columns(frame)
    table = pd.DataFrame({"vessel": frame[names["vessel"]].to_numpy(), "time": seconds(frame[names["time"]])})
    for what in ("latitude", "longitude", *MEASURED):
        table[what] = _numbers(frame, names[what]) if what in names else np.nan
    table = table[np.isfinite(table[["time", "latitude", "longitude"]]).all(axis=1) & table["vessel"].notna()]
    if table.empty:
        raise InputError("the frame has no message with a vessel, a time and a place; give some.")
    if (table["latitude"].abs() > 90).any():
        vessel = table.loc[table["latitude"].abs() > 90, "vessel"].iloc[0]
        raise InputError(f"vessel {vessel!r} has a latitude beyond a pole; give degrees from -90 to 90.")
    table = table.sort_values("time", kind="stable").drop_duplicates(["vessel", "time"], keep="last")
    numbers = ["time", "latitude", "longitude", *MEASURED]
    return {v: Track(*(one[c].to_numpy(np.float64) for c in numbers)) for v, one in table.groupby("vessel", sort=True)}


def seconds(times: pd.Series) -> Float[np.ndarray, "n"]:
    """Times as seconds: numbers as they are, dates since 1970. NaN where there is none."""
    if pd.api.types.is_numeric_dtype(times) and not pd.api.types.is_bool_dtype(times):
        return np.asarray(times.to_numpy(np.float64))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that a format was guessed
            dates = pd.to_datetime(times, utc=True)
    except (ValueError, TypeError):
        raise InputError("the times are neither numbers of seconds nor dates; give one of these.") from None
    nanoseconds = dates.to_numpy("datetime64[ns]")
    return np.where(np.isnat(nanoseconds), np.nan, nanoseconds.astype(np.int64) / 1e9)


def plane(
    latitude: Float[np.ndarray, "*n"], longitude: Float[np.ndarray, "*n"], origin: tuple[float, float]
) -> Float[np.ndarray, "*n 2"]:
    """East and north of `origin` in nautical miles."""
    east = (longitude - origin[1] + 180) % 360 - 180
    return np.stack([60 * _shrink(origin[0]) * east, 60 * (latitude - origin[0])], -1)


def globe(miles: Float[np.ndarray, "*n 2"], origin: tuple[float, float]) -> Float[np.ndarray, "*n 2"]:
    """`plane`, undone: latitude, and longitude from -180 to 180."""
    latitude = (origin[0] + miles[..., 1] / 60).clip(-90, 90)
    longitude = origin[1] + miles[..., 0] / (60 * _shrink(origin[0]))
    return np.stack([latitude, (longitude + 180) % 360 - 180], -1)


def plausible(track: Track, fastest: float) -> Bool[np.ndarray, "n"]:
    """Which messages are kept: the longest chain in which no leg is faster than `fastest` knots (of equal ones the first)."""
    n = len(track)
    length, before = np.ones(n, int), np.full(n, -1)
    for i in range(1, n):
        rows = slice(max(0, i - _LOOK), i)
        off = plane(track.latitude[rows], track.longitude[rows], (track.latitude[i], track.longitude[i]))
        reached = np.hypot(*off.T) <= fastest * (track.time[i] - track.time[rows]) / 3600
        chains = np.where(reached, length[rows], 0)[::-1]  # of equal chains the newest message
        if chains.max():
            length[i], before[i] = chains.max() + 1, i - 1 - chains.argmax()
    kept, at = np.zeros(n, bool), int(length.argmax())
    while at >= 0:
        kept[at], at = True, int(before[at])
    return kept


def median_step(tracks: Mapping[Any, Track]) -> float:
    """The median time between messages, in seconds. `InputError` where no vessel has two."""
    gaps = np.concatenate([np.diff(track.time) for track in tracks.values()])
    if not len(gaps):
        raise InputError("no vessel has two messages; give longer tracks.")
    return float(np.median(gaps))


def history_of(track: Track, last: int, step: float, length: int) -> Float[np.ndarray, "T 10"]:
    """What is known at message `last` (later ones are not read), on the grid of the formula above.

    Channels: east, north; their change since the grid time before; seen, gap; latitude / 90; speed, sin and cos of the course of
    the nearest message (0 where not told).
    """
    past = track.at(slice(0, last + 1))
    now = past.time[-1]
    times = now - step * np.arange(length - 1, -1, -1)
    p = plane(past.latitude, past.longitude, (past.latitude[-1], past.longitude[-1]))
    at = np.stack([np.interp(times, past.time, p[:, c]) for c in (0, 1)], -1)
    near = _nearest(past.time, times)
    gap = np.abs(past.time[near] - times) / step
    course = np.deg2rad(past.course[near])
    parts = [gap <= 0.5, gap.clip(0, LONGEST_GAP), np.full(length, past.latitude[-1] / 90)]
    told = np.nan_to_num(np.stack([past.speed[near], np.sin(course), np.cos(course)], -1))
    change = np.diff(at, axis=0, prepend=at[:1])
    return np.concatenate([at, change, np.stack(parts, -1).astype(np.float64), told], -1)


def future_of(track: Track, last: int, step: float, horizon: int) -> Float[np.ndarray, "H 2"]:
    """East and north of message `last` at the next grid times; NaN after the end and further than a step from any message."""
    times = track.time[last] + step * np.arange(1, horizon + 1)
    p = plane(track.latitude, track.longitude, (track.latitude[last], track.longitude[last]))
    at = np.stack([np.interp(times, track.time, p[:, c]) for c in (0, 1)], -1)
    known = np.abs(track.time[_nearest(track.time, times)] - times) <= step
    return np.where((known & (times <= track.time[-1]))[:, None], at, np.nan)


def dead_reckoning(history: Float[np.ndarray, "*B T 10"], horizon: int, over: int = 3) -> Float[np.ndarray, "*B H 2"]:
    """The mean speed over the last `over` steps, kept: east and north at the next grid times, in nautical miles."""
    speed = history[..., -over:, 2:4].mean(-2)
    ahead: np.ndarray = speed[..., None, :] * np.arange(1, horizon + 1)[:, None]
    return ahead


def _nearest(times: Float[np.ndarray, "n"], wanted: Float[np.ndarray, "m"]) -> Int[np.ndarray, "m"]:
    right = (
        np.searchsorted(times, wanted).clip(1, max(1, len(times) - 1)) if len(times) > 1 else np.zeros(len(wanted), int)
    )
    if len(times) == 1:
        return right
    found: np.ndarray = right - (wanted - times[right - 1] < times[right] - wanted)
    return found


def _shrink(latitude: float) -> float:
    """How much shorter a degree of longitude is than one of latitude; not 0 at a pole, where east has no meaning."""
    return max(float(np.cos(np.deg2rad(latitude))), 0.01)


def _numbers(frame: pd.DataFrame, name: str) -> Float[np.ndarray, "n"]:
    try:
        return np.asarray(frame[name].to_numpy(np.float64, na_value=np.nan))
    except (ValueError, TypeError):
        raise InputError(f"the column {name!r} holds something that is no number; give numbers, or NaN.") from None
