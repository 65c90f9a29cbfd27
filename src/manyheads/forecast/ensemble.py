"""Several forecasters as one: the mean of their quantiles, level by level (Vincent, 1912), and of their points.

Averaging quantiles keeps the shape of the members' distributions, where mixing their densities would widen it (Ratcliff, 1979).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster, forecasts
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.progress import Bar


@forecasts("ensemble")
@dataclass(kw_only=True, eq=False)
class Ensemble(Forecaster):
    """`members` are names of methods, each with a dictionary of its settings; all have this one's horizon."""

    members: tuple[tuple[str, dict[str, Any]], ...] = (
        ("linear", {}),
        ("softs", {"width": 128, "core": 64, "hidden": 128}),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.members) < 2:
            raise InputError("an ensemble has at least two members; name more of them.")
        self.made_ = [self._made(name, settings) for name, settings in self.members]

    def _made(self, name: str, settings: Mapping[str, Any]) -> Forecaster:
        known = FORECASTERS.all()
        if name not in known or known[name] is Ensemble:
            raise InputError(f"there is no method {name!r} for an ensemble; choose from {', '.join(known)}.")
        try:
            return known[name](horizon=self.horizon, **settings)
        except TypeError as error:
            raise InputError(f"the settings of {name} in an ensemble do not fit: {error}.") from None

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        for i, one in enumerate(self.made_):
            one.fit_panel(panel, validation=validation, folder=None if folder is None else folder / str(i), bar=bar)

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        found = [one.forecast_panel(panel, horizon, levels) for one in self.made_]
        point = [np.mean([f.point[i] for f in found], 0) for i in range(len(panel))]
        quantiles = [np.mean([f.quantiles[i] for f in found], 0) for i in range(len(panel))]
        return Forecasts(horizon, levels, point, quantiles)

    def _tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{name}": tensor for i, one in enumerate(self.made_) for name, tensor in one._tensors().items()}

    def _about(self) -> dict[str, Any]:
        return {"members": [one._about() for one in self.made_]}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        for i, (one, its) in enumerate(zip(self.made_, about["members"], strict=True)):
            one.panel_ = self.panel_
            own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            one._restore(own, its)
