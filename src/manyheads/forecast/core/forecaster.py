"""`Forecaster`: fit, predict, predict_df, backtest, save and load. A method fills in `_fit` and `_forecast`.

    forecaster = OLinear(horizon=24).fit(df)            # a long frame, in either convention (`frames`)
    forecaster.predict()                                # the 24 steps after the frame
    forecaster.predict_df(other, quantile_levels=(0.1, 0.5, 0.9))
    forecaster.backtest(df, windows=5).scores()         # beside seasonal naive
    forecaster.save("folder"); Forecaster.load("folder")

A forecaster is a dataclass of its settings, so `get_params`, `set_params` and scikit-learn's `clone` work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import pandas as pd
from torch import Tensor

from manyheads.errors import InputError
from manyheads.forecast.core.frames import columns_of, frame_of, panel_of, with_future
from manyheads.forecast.core.heads import LEVELS, checked_levels
from manyheads.forecast.core.panel import Forecasts, FrameColumns, Frequency, Panel, Series
from manyheads.inputs import check_integer, clause
from manyheads.learning import Card, load, save
from manyheads.progress import Bar
from manyheads.registry import Registry

Made = TypeVar("Made", bound="type[Forecaster]")
FORECASTERS: Registry[type[Forecaster]] = Registry("forecast")
KIND, HISTORY = "forecaster", "history.parquet"


def forecasts(name: str) -> Callable[[Made], Made]:
    """Register a class of forecasters by the name that the command line knows."""

    def add(cls: Made) -> Made:
        cls.METHOD = name
        FORECASTERS.add(name, cls)
        return cls

    return add


@dataclass(kw_only=True, eq=False)
class Forecaster:
    """What every method has. `horizon` is how many steps it predicts unless it is told otherwise."""

    METHOD: ClassVar[str] = ""
    PAPER: ClassVar[str] = ""
    COVARIATES: ClassVar[bool] = False  # whether it reads covariates; others leave them aside
    KEEPS: ClassVar[int | None] = None  # steps of history that a saved one needs to go on; None: all

    horizon: int = 24

    panel_: Panel | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check_integer(self.horizon, "horizon", 1)

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        """Learn from a panel; statistical methods have nothing to learn before they see the series to go on from."""

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        """The steps after each series."""
        raise TypeError(f"{type(self).__name__} does not say how it forecasts.")

    def _tensors(self) -> dict[str, Tensor]:
        """What was learned, for a file."""
        return {}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Put back what `_tensors` and `_about` gave."""

    def _about(self) -> dict[str, Any]:
        """What else a file needs to build this again."""
        return {}

    def fit(
        self,
        df: pd.DataFrame,
        *,
        item: str | None = None,
        time: str | None = None,
        target: str | Sequence[str] | None = None,
        known: Sequence[str] = (),
        past: Sequence[str] | None = None,
        static: Sequence[str] = (),
        freq: str | Frequency | None = None,
        validation: int | None = None,
        folder: str | Path | None = None,
        bar: Bar = Bar(),
    ) -> Forecaster:
        """Learn from a long frame, and remember it to `predict` from.

        FrameColumns are found by the two conventions or named. `known` covariates are known ahead; other columns of numbers are
        past-only ones, unless `past` names which. The last `validation` steps judge when to stop. With a `folder` an interrupted
        training goes on there. `InputError` says what is wrong with the frame, by the name of the series.
        """
        columns = columns_of(df, item=item, time=time, target=target, known=known, past=past, static=static)
        return self.fit_panel(panel_of(df, columns, freq), validation=validation, folder=folder, bar=bar)

    def fit_panel(
        self, panel: Panel, *, validation: int | None = None, folder: str | Path | None = None, bar: Bar = Bar()
    ) -> Forecaster:
        """As `fit`, from a panel."""
        if validation is not None:
            check_integer(validation, "validation", 0, max(map(len, panel.series)) - 1)
        self._fit(panel, validation=validation, folder=None if folder is None else Path(folder), bar=bar)
        self.panel_ = panel
        return self

    def predict(
        self,
        horizon: int | None = None,
        *,
        future_df: pd.DataFrame | None = None,
        quantile_levels: Sequence[float] = LEVELS,
    ) -> pd.DataFrame:
        """The `horizon` steps after the frame that it was fitted on, as a frame in its convention."""
        return self._framed(self._fitted, future_df, horizon, quantile_levels)

    def predict_df(
        self,
        df: pd.DataFrame,
        future_df: pd.DataFrame | None = None,
        quantile_levels: Sequence[float] = LEVELS,
        *,
        horizon: int | None = None,
    ) -> pd.DataFrame:
        """The steps after another frame, whose columns are called as in the one it was fitted on."""
        columns = self._fitted.columns
        names = {"item": columns.item, "time": columns.time, "target": columns.targets, "known": columns.known}
        read = columns_of(df, **names, past=columns.past, static=columns.static)  # type: ignore[arg-type]
        panel = panel_of(df, replace(read, style=columns.style), self._fitted.freq)
        return self._framed(panel, future_df, horizon, quantile_levels)

    def forecast_panel(
        self, panel: Panel, horizon: int | None = None, quantile_levels: Sequence[float] = LEVELS
    ) -> Forecasts:
        """The steps after each series of a panel, with quantiles that do not cross. `InputError` names what is not finite."""
        steps = check_integer(self.horizon if horizon is None else horizon, "horizon", 1)
        levels = checked_levels(quantile_levels) if len(quantile_levels) else ()
        found = self._forecast(panel, steps, levels).ordered()
        for one, point, quantiles in zip(panel.series, found.point, found.quantiles, strict=True):
            if not np.isfinite(point).all() or not np.isfinite(quantiles).all():
                raise InputError(f"{self.METHOD} has no finite forecast of series {one.name!r}; look at its values.")
        return found

    def _framed(
        self, panel: Panel, future: pd.DataFrame | None, horizon: int | None, levels: Sequence[float]
    ) -> pd.DataFrame:
        steps = self.horizon if horizon is None else horizon
        if self.COVARIATES or future is not None:
            panel = with_future(panel, future, steps)
        return frame_of(panel, self.forecast_panel(panel, steps, levels), self.METHOD)

    def backtest(self, df: pd.DataFrame, **options: Any) -> Any:
        """Forecasts from several cuts of a frame, beside seasonal naive (`forecast.backtest`); what it learned is not used."""
        run = import_module("manyheads.forecast.backtest").backtest  # above this file: it knows a forecaster
        names = ("item", "time", "target", "known", "past", "static")
        columns = columns_of(df, **{name: options.pop(name) for name in names if name in options})
        return run(self, panel_of(df, columns, options.pop("freq", None)), **options)

    @property
    def _fitted(self) -> Panel:
        if self.panel_ is None:
            raise InputError(f"this {type(self).__name__} was not fitted; call fit(df) first.")
        return self.panel_

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Its settings by name, as scikit-learn asks for them."""
        return {one.name: getattr(self, one.name) for one in fields(self) if one.init}

    def set_params(self, **params: Any) -> Forecaster:
        """Change settings. `InputError` for one that is not there."""
        if unknown := set(params) - set(self.get_params()):
            raise InputError(f"{type(self).__name__} has no setting {sorted(unknown)[0]!r}.")
        for name, value in params.items():
            setattr(self, name, value)
        self.__post_init__()
        return self

    def fresh(self, **changes: Any) -> Forecaster:
        """One with the same settings that has learned nothing."""
        return type(self)(**copy.deepcopy(self.get_params()) | changes)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings, what was learned and the history it goes on from into a new folder."""
        panel = self._fitted
        about = {"columns": asdict(panel.columns), "freq": _written(panel.freq), **self._about()}
        card = Card(self.METHOD, self.PAPER, self.get_params(), getattr(self, "seed", None), kind=KIND, about=about)
        kept = panel if self.KEEPS is None else _tail(panel, max(self.KEEPS, getattr(self, "context", 0)))
        return save(
            folder, card, self._tensors(), also=lambda into: _history(kept).to_parquet(into / HISTORY), force=force
        )

    @staticmethod
    def load(folder: str | Path) -> Forecaster:
        """A forecaster as it was saved; its forecasts are the same bits. `InputError` for another folder."""
        card, tensors = load(folder, KIND, "forecaster")
        try:
            cls = FORECASTERS[card.method]
            made = cls(**_tuples(card.settings))
            columns = FrameColumns(**_tuples(card.about["columns"]))
            freq = _read(card.about["freq"])
            made.panel_ = _panel(pd.read_parquet(Path(folder) / HISTORY), columns, freq)
            made._restore(tensors, card.about)
        except (KeyError, TypeError, ValueError, OSError) as error:
            raise InputError(f"{folder} holds no forecaster that can be read ({clause(error)}).") from None
        return made


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _written(freq: Frequency) -> int | str | dict[str, int]:
    if isinstance(freq, int):
        return freq
    months = getattr(freq, "kwds", {}).get("months")
    return {"months": months} if months else freq.freqstr


def _read(freq: int | str | dict[str, int]) -> Frequency:
    if isinstance(freq, dict):
        return pd.offsets.DateOffset(months=int(freq["months"]))
    return freq if isinstance(freq, int) else pd.tseries.frequencies.to_offset(freq)


def _tail(panel: Panel, steps: int) -> Panel:
    series = tuple(
        Series(
            one.name,
            one.times[-steps:],
            one.values[:, -steps:],
            one.past[:, -steps:],
            one.known[:, max(0, len(one) - steps) :],
            one.static,
        )
        for one in panel.series
    )
    return replace(panel, series=series)


def _history(panel: Panel) -> pd.DataFrame:
    """A row a series and step; the series by its number, so that any name comes back as it was."""
    parts = []
    for i, one in enumerate(panel.series):
        known = one.known[:, : len(one)]
        part = {"name": one.name, "i": i, "time": one.times}
        rows = {"y": one.values, "p": one.past, "k": known, "s": np.repeat(one.static[:, None], len(one), 1)}
        part |= {f"{kind}{c}": channel for kind, channels in rows.items() for c, channel in enumerate(channels)}
        parts.append(pd.DataFrame(part))
    return pd.concat(parts, ignore_index=True)


def _panel(table: pd.DataFrame, columns: FrameColumns, freq: Frequency) -> Panel:
    series = []
    for _, part in table.groupby("i", sort=True):
        values, past, known, static = (
            part[[f"{kind}{c}" for c in range(len(names))]].to_numpy(dtype=np.float64).T
            for kind, names in zip("ypks", (columns.targets, columns.past, columns.known, columns.static), strict=True)
        )
        series.append(Series(part["name"].iloc[0], pd.Index(part["time"]), values, past, known, static[:, 0]))
    return Panel(tuple(series), columns, freq)
