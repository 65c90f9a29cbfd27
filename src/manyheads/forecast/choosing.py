"""Which methods to try on a frame when nobody says: those that its length allows and that are done in minutes."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster
from manyheads.forecast.core.panel import Panel

FEW = 50  # series and targets: more are too many to fit one by one
ENOUGH = 200  # windows to learn from: below, a network learns nothing that a season does not say
_LEARNED, _FITTED = ("linear", "softs"), ("theta", "ets")


def forecaster_named(name: str, panel: Panel, horizon: int, **settings: Any) -> Forecaster:
    """A forecaster by its name, whose context and training suit the panel; `settings` it does not have are left aside.

    `InputError` lists the names.
    """
    known = FORECASTERS.all()
    if name not in known:
        raise InputError(f"there is no method {name!r}; choose from {', '.join(known)}.")
    cls = known[name]
    own = {one.name for one in fields(cls) if one.init}
    given: dict[str, Any] = {"horizon": horizon}
    given |= {key: value for key, value in settings.items() if key in own and value is not None}
    if "context" in own and "context" not in given:
        patch = given.get("patch", getattr(cls, "patch", 1))
        given["context"] = max(patch, context_for(panel, horizon) // patch * patch)  # whole patches, at least one
    return cls(**given)


def context_for(panel: Panel, horizon: int) -> int:
    """Steps to look back: some seasons and twice the horizon, at most a third of the longest series."""
    longest = max(map(len, panel.series))
    wanted = max(2 * horizon, 14 * panel.season if panel.season > 1 else 96)
    return max(2, min(wanted, 512, (longest - horizon) // 3))


def methods_for(panel: Panel, horizon: int) -> list[str]:
    """Names of methods to compare on this panel."""
    windows = sum(max(0, len(one) - 2 * horizon - context_for(panel, horizon)) for one in panel.series)
    names = ["seasonal_naive"]
    if len(panel) * panel.n_targets <= FEW:
        names += _FITTED
    if windows >= ENOUGH:
        names += _LEARNED
    return names
