"""Which stretches of the past, channels, covariates and attention heads made a forecast.

A part is taken away, the method forecasts again, and with the point x of all parts and x' without one, the truth y and the
history's seasonal error e (`metrics`), over the H steps of one target and over windows of the past,

    effect    mean |x' - x| / e                       how far the forecast moves
    harm      mean (|y - x'| - |y - x|) / e           how much worse it gets

A stretch of the past then holds the mean of the same place in the other seasons of the look-back (without seasons, of all of it);
a channel or covariate holds its own values of another time, a whole number of seasons away, so that they stay likely values; a
head gives its mean over windows and tokens. This works for every forecaster; heads for trunks that `open_model` opens.

Heads are tested as everywhere: those with the largest effect on half of the windows, ablated together on the other half, beside
random sets with as many heads in each layer (`evaluation.controls`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation import Control, matched_sets
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.metrics import seasonal_error
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.panel import Panel, Series
from manyheads.heads import HeadSet, mean_stderr
from manyheads.inputs import check_integer
from manyheads.model.editing.edits import Ablate
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.report import Reported

STRETCHES = 48  # the most stretches of the past
SHARE = 0.1  # of the heads, at least one, that are tested together
Change = Callable[[Series], Series]


@dataclass(frozen=True)
class ForecastExplanation(Reported):
    """A row a part in `table`: kind (past, channel, covariate, head), part, effect, effect_stderr, harm, harm_stderr.

    `parts` are the stretches of the past as (first, last) steps from the end, `heads` those tested together and `control` what
    came out, None where the trunk has no heads that can be read (`no_heads` says why).
    """

    table: pd.DataFrame
    parts: list[tuple[int, int]]
    method: str
    series: Series
    target: int
    target_name: str
    ahead: pd.Index
    point: Float[np.ndarray, "H"]
    quantiles: Float[np.ndarray, "H Q"]
    windows: int
    heads: HeadSet | None = None
    control: Control | None = None
    no_heads: str = ""

    @property
    def says(self) -> str:
        """The result in a sentence or two."""
        best = self.table.sort_values("effect", ascending=False).iloc[0]
        said = f"What moves this forecast of {self.target_name} most is {best['part']} ({best['kind']})."
        if self.control is None or self.heads is None:
            return said
        names = ", ".join(map(str, self.heads))
        return (
            f"{said} Heads {names}, ablated together, move it by {self.control.effect:.3f}, random heads of the same layers by "
            f"{self.control.mean:.3f} (p = {self.control.p_value:.3f})."
        )


def explain_forecast(
    forecaster: Forecaster,
    panel: Panel,
    *,
    item: Any = None,
    target: str | None = None,
    horizon: int | None = None,
    windows: int = 8,
    n_random: int = 99,
    quantile_levels: Sequence[float] = (),
    seed: int = 0,
    bar: Bar = Bar(),
) -> ForecastExplanation:
    """Explain a fitted forecaster's forecast of one series and target (the first ones, unless named).

    `InputError` for a series or target that is not there, or a series too short for two windows.
    """
    horizon = check_integer(forecaster.horizon if horizon is None else horizon, "horizon", 1)
    series, v = _chosen(panel, item, target)
    span = _span(forecaster, panel, series)
    fit = min(check_integer(windows, "windows", 2), (len(series) - 2) // horizon - 1)
    if fit < 2:
        raise InputError(f"series {series.name!r} has {len(series)} steps, too few for two windows of {horizon}.")
    histories = [series.until(len(series) - horizon * (w + 1), horizon) for w in range(fit)]
    looked = _Looked(forecaster, replace(panel, series=tuple(histories)), series, v, horizon)
    stretches = _stretches(span, panel.season)
    changes = [
        *(("past", _when(series, part), _without_stretch(part, span, panel.season)) for part in stretches),
        *_others(panel, v, span, seed),
    ]
    model, why = _opened(forecaster)
    n_heads = 0 if model is None else len(model.heads)
    done = bar.step("explain", len(changes) + n_heads + (n_random if model else 0))
    rows = []
    for kind, name, change in changes:
        rows.append((kind, name, *looked.measured(looked.changed(change))))
        done(1, note=name)
    heads, control = None, None
    if model is not None:
        effects = {}
        for head in model.heads:
            with model.editing(Ablate([head], "mean")):
                effects[head] = looked.changed(None)
            rows.append(("head", str(head), *looked.measured(effects[head])))
            done(1, note=str(head))
        heads, control = _tested(model, looked, effects, n_random, seed, done)
    whole = forecaster.forecast_panel(replace(panel, series=(series,)), horizon, quantile_levels)
    names = ["kind", "part", "effect", "effect_stderr", "harm", "harm_stderr"]
    return ForecastExplanation(
        pd.DataFrame(rows, columns=names),
        stretches,
        forecaster.METHOD,
        series,
        v,
        panel.columns.targets[v],
        panel.future_times(series, horizon),
        whole.point[0][v],
        whole.quantiles[0][v],
        fit,
        heads,
        control,
        why,
    )


class _Looked:
    """The windows of one series: what was forecast of them, and what is when something is changed."""

    def __init__(self, forecaster: Forecaster, panel: Panel, whole: Series, v: int, horizon: int) -> None:
        self.forecaster, self.panel, self.v, self.horizon = forecaster, panel, v, horizon
        e = seasonal_error(panel, panel.season)[:, v]
        spread = np.array([np.nanstd(one.values[v]) for one in panel.series])
        self.error = np.where(
            e > 0, e, np.where(spread > 0, spread, 1.0)
        )  # a series that repeats exactly has no such error
        ends = [len(one) for one in panel.series]
        self.truth = np.stack([whole.values[v, n : n + horizon] for n in ends])
        self.base = self.changed(None)

    def changed(self, change: Change | None) -> Float[np.ndarray, "W H"]:
        """The point forecast of each window, of changed histories."""
        series = self.panel.series if change is None else tuple(map(change, self.panel.series))
        panels = [replace(self.panel, series=series)]
        if getattr(self.forecaster, "channels", "targets") == "series":  # each history is a panel of its own
            panels = [replace(self.panel, series=(one,)) for one in series]
        found = [x[self.v] for one in panels for x in self.forecaster.forecast_panel(one, self.horizon, ()).point]
        return np.stack(found)

    def moved(self, found: Float[np.ndarray, "W H"]) -> Float[np.ndarray, "W"]:
        """The effect on each window."""
        return np.abs(found - self.base).mean(1) / self.error

    def measured(self, found: Float[np.ndarray, "W H"]) -> tuple[float, float, float, float]:
        """Effect and harm, each with its standard error over windows."""
        harm = np.nanmean(np.abs(self.truth - found) - np.abs(self.truth - self.base), 1) / self.error
        effect = self.moved(found)
        out = [float(x) for values in (effect, harm) for x in mean_stderr(values[np.isfinite(values)])]
        return out[0], out[1], out[2], out[3]


def _chosen(panel: Panel, item: Any, target: str | None) -> tuple[Series, int]:
    names = {str(one.name): one for one in panel.series}
    series = panel.series[0] if item is None else names.get(str(item))
    if series is None:
        raise InputError(f"there is no series {item!r}; choose from {', '.join(list(names)[:10])}.")
    targets = panel.columns.targets
    if target is not None and target not in targets:
        raise InputError(f"there is no target {target!r}; choose from {', '.join(targets)}.")
    return series, targets.index(target) if target is not None else 0


def _span(forecaster: Forecaster, panel: Panel, series: Series) -> int:
    """How far back is looked: what the network reads, else ten seasons."""
    wanted = forecaster.context if isinstance(forecaster, NetworkForecaster) else max(10 * panel.season, 48)
    return min(wanted, len(series) - 1)


def _stretches(span: int, season: int) -> list[tuple[int, int]]:
    """(first, last) steps from the end, the oldest first; a season each, or a part of one where the look-back is short."""
    each = season if season > 1 and span >= 3 * season else max(1, -(-span // 12))
    each = max(each, -(-span // STRETCHES))
    ends = range(0, span, each)
    return [(-min(span, end + each), -end - 1) for end in reversed(ends)]


def _when(series: Series, part: tuple[int, int]) -> str:
    return f"{-part[1]} to {-part[0]} steps back" if part[1] != part[0] else f"{-part[0]} steps back"


def _without_stretch(part: tuple[int, int], span: int, season: int) -> Change:
    def change(one: Series) -> Series:
        values = one.values.copy()
        low, high = max(0, len(one) + part[0]), max(0, len(one) + part[1] + 1)
        seen = values[:, max(0, len(one) - span) :].copy()
        offset = len(one) - seen.shape[1]
        seen[:, max(0, low - offset) : max(0, high - offset)] = np.nan
        level = _mean(seen)
        for step in range(low, high):
            same = _mean(seen[:, (step - offset) % season :: season]) if season > 1 else level
            values[:, step] = np.where(np.isfinite(same), same, level)
        return replace(one, values=values)

    return change


def _mean(x: Float[np.ndarray, "V n"]) -> Float[np.ndarray, "V"]:
    seen = np.isfinite(x)
    n = seen.sum(1)
    return np.where(n > 0, np.where(seen, x, 0.0).sum(1) / np.maximum(n, 1), np.nan)


def _others(panel: Panel, v: int, span: int, seed: int) -> Iterator[tuple[str, str, Change]]:
    """Other targets and covariates, each with its values of another time."""
    kinds = (("channel", "values", panel.columns.targets), ("covariate", "past", panel.columns.past))
    for kind, field, names in (*kinds, ("covariate", "known", panel.columns.known)):
        for i, name in enumerate(names):
            if field != "values" or i != v:
                yield kind, name, _elsewhere(field, i, span, panel.season, seed)


def _elsewhere(field: str, i: int, span: int, season: int, seed: int) -> Change:
    def change(one: Series) -> Series:
        channels = getattr(one, field).copy()
        length = channels.shape[1]
        low, high = -(-span // season), (length - span) // season
        rng = np.random.default_rng([seed, len(one)])
        shift = season * int(rng.integers(low, high + 1)) if high >= low else season * max(1, length // (2 * season))
        channels[i] = np.roll(channels[i], shift)
        return replace(one, **{field: channels})

    return change


def _opened(forecaster: Forecaster) -> tuple[HeadModel | None, str]:
    if not isinstance(forecaster, NetworkForecaster):
        return None, f"{forecaster.METHOD} has no trunk."
    try:
        return forecaster.opened(), ""
    except (InputError, UnsupportedError) as error:
        return None, str(error)


def _tested(
    model: HeadModel, looked: _Looked, effects: dict[Any, Float[np.ndarray, "W H"]], n_random: int, seed: int, done: Bar
) -> tuple[HeadSet, Control]:
    """Heads chosen on the even windows, beside random ones on the odd windows."""
    k = max(1, math.ceil(SHARE * len(effects)))
    size = {head: float(np.nanmean(looked.moved(found)[::2])) for head, found in effects.items()}
    heads = model.head_set(sorted(size, key=lambda head: -size[head])[:k])
    rows = []
    for one in (heads, *matched_sets(heads, n_random, seed)):
        with model.editing(Ablate(one, "mean")):
            rows.append(looked.moved(looked.changed(None))[1::2])
        done(1, note="random heads")
    return heads, Control.of(np.stack(rows))
