"""Series as forecasters see them: numbers on one regular grid of time, with the names that they came with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError

Frequency: TypeAlias = pd.offsets.BaseOffset | int
_SEASONS = {"D": 7, "B": 5, "W": 1, "MS": 12, "ME": 12, "BMS": 12, "BME": 12, "QS": 4, "QE": 4}


@dataclass(frozen=True)
class FrameColumns:
    """The names of a long frame: the series (None: there is one), the time, the targets and the covariates.

    `known` covariates are known ahead, `past` ones are not, `static` ones are one number a series. `style` is the convention
    in which forecasts are given back.
    """

    item: str | None
    time: str
    targets: tuple[str, ...]
    known: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    static: tuple[str, ...] = ()
    style: str = "chronos"

    @property
    def covariates(self) -> tuple[str, ...]:
        """Past-only ones, then those known ahead: the order of channels after the targets."""
        return self.past + self.known


@dataclass(frozen=True)
class Series:
    """One series: `values` [V, L] of V targets over L steps, NaN where missing, beginning at `times[0]`.

    `past` [P, L] and `known` [K, L + F] are covariates, the latter for F steps more; `static` [S].
    """

    name: Any
    times: pd.Index
    values: Float[np.ndarray, "V L"]
    past: Float[np.ndarray, "P L"]
    known: Float[np.ndarray, "K M"]
    static: Float[np.ndarray, "S"]

    def __len__(self) -> int:
        return int(self.values.shape[1])

    def until(self, end: int, ahead: int = 0) -> Series:
        """The first `end` steps; covariates known ahead stay for `ahead` steps more, if they are there."""
        return replace(
            self,
            times=self.times[:end],
            values=self.values[:, :end],
            past=self.past[:, :end],
            known=self.known[:, : end + ahead],
        )


@dataclass(frozen=True)
class Panel:
    """Series on grids of one frequency: an offset of pandas, or a whole number where times are numbers."""

    series: tuple[Series, ...]
    columns: FrameColumns
    freq: Frequency

    def __len__(self) -> int:
        return len(self.series)

    @property
    def n_targets(self) -> int:
        """V: how many targets a series has."""
        return len(self.columns.targets)

    @property
    def season(self) -> int:
        """Steps in a season: 24 of hourly series, 7 of daily ones, 12 of monthly ones, 1 where nothing is known."""
        return season_of(self.freq)

    @property
    def shortest(self) -> int:
        """The length of the shortest series."""
        return min(map(len, self.series))

    def without_last(self, steps: int, ahead: int | None = None) -> Panel:
        """What was known `steps` before the end; of known covariates `ahead` steps more (all that there are, if None)."""
        kept = tuple(one.until(len(one) - steps, steps if ahead is None else ahead) for one in self.series)
        return replace(self, series=kept)

    def longer_than(self, steps: int) -> Panel:
        """The series that have more than so many steps. `InputError` if none has."""
        kept = tuple(one for one in self.series if len(one) > steps)
        if not kept:
            raise InputError(f"no series has more than {steps} steps; give longer ones, or ask for less.")
        return replace(self, series=kept)

    def future_times(self, series: Series, horizon: int) -> pd.Index:
        """The `horizon` times that follow a series."""
        last = series.times[-1]
        if isinstance(self.freq, int):
            return pd.Index(last + self.freq * np.arange(1, horizon + 1))
        return pd.date_range(last, periods=horizon + 1, freq=self.freq)[1:]

    def stacked(self) -> Panel:
        """All series as the targets of one: for methods that mix channels. `InputError` unless they cover the same times."""
        first = self.series[0]
        for one in self.series[1:]:
            if len(one) != len(first) or one.times[0] != first.times[0]:
                raise InputError(
                    f"series {one.name!r} does not cover the same times as {first.name!r}, so that they cannot be channels of "
                    "one; give channels='targets'."
                )
        names = tuple(f"{one.name}/{target}" for one in self.series for target in self.columns.targets)
        values = np.concatenate([one.values for one in self.series])
        # Covariates of one series say nothing of the others'.
        columns = FrameColumns(None, self.columns.time, names, style=self.columns.style)
        empty = np.zeros((0, len(first)))
        return Panel((Series(first.name, first.times, values, empty, empty, np.zeros(0)),), columns, self.freq)


@dataclass(frozen=True)
class Forecasts:
    """Forecasts of a panel, a member a series: `point` [V, H], and `quantiles` [V, H, Q] of rising `levels`."""

    horizon: int
    levels: tuple[float, ...]
    point: Sequence[Float[np.ndarray, "V H"]]
    quantiles: Sequence[Float[np.ndarray, "V H Q"]]

    def ordered(self) -> Forecasts:
        """The same with quantiles that do not cross: sorted along the levels."""
        return replace(self, quantiles=[np.sort(q, -1) for q in self.quantiles])

    def unstacked(self, n: int) -> Forecasts:
        """Of forecasts of a stacked panel: those of its `n` series."""
        return replace(
            self, point=np.split(self.point[0], n), quantiles=np.split(self.quantiles[0], n) if self.quantiles else []
        )


def season_of(freq: Frequency) -> int:
    """Steps in a season of this frequency (see `Panel.season`)."""
    if isinstance(freq, int):
        return 1
    if isinstance(freq, pd.offsets.Tick) and freq.rule_code != "D":
        day = pd.Timedelta(days=1) / pd.Timedelta(freq)
        return round(day) if day == round(day) else 1
    months = getattr(freq, "kwds", {}).get("months")
    base = 12 if months else _SEASONS.get(freq.rule_code.split("-")[0], 1)
    steps = months or freq.n
    return base // steps if base % steps == 0 else 1
