"""`NetworkForecaster`: a series trunk with forecast heads, trained over windows. A method fills in `trunk`.

The trunk is any module whose forward takes some of what `Windows.batch` names (past_values [B, T, C] first of all, as
Transformers' own series models do) and gives states [B, C, D] or [B, C, n, D]; `width` is the D (or n D) that a head reads. On it
stand, by `MultiHead`,

    objective "quantiles"    a quantile head; the point is its median
    objective "point"        the paper's own loss, and a quantile head whose gradient stops at the trunk
    objective "fourier", "bins"    a distribution over ordered bins (`densities.py`), whose quantiles are given

Longer horizons than `horizon` are rolled out: the point is taken for true, and the rest is forecast from it. Then quantiles of
later steps do not know of the earlier ones' error and are too narrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.forecast.core.densities import KINDS, DensityHorizonHead, DensitySettings
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.heads import (
    LEVELS,
    TARGET,
    HorizonHead,
    HorizonSettings,
    QuantileHorizonHead,
    QuantileHorizonSettings,
    checked_levels,
)
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.forecast.core.windows import WINDOW_MEMORY, Scale, Scaling, Shape, Windows, check_length
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.learning import Attached, MultiHead, Trunk
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.training import TrainSettings, epoch_rows

MOST_JUDGED = 4096  # windows that judge a state
POINT, QUANTILES = "point", "quantiles"
_SCALES = ("scales.mean", "scales.std")  # among the tensors of a file


@dataclass(kw_only=True, eq=False)
class NetworkForecaster(Forecaster):
    """What networks share. `channels` "series" makes all series the channels of one, for methods that mix channels.

    Trained by Adam for `epochs` over all windows, `rows` a batch, at most `minutes`; `patience` judgements (one an epoch) on the
    validation windows without a better one end it, and the best state counts.
    """

    LOSS: ClassVar[str] = "mse"
    SCALING: ClassVar[Scaling] = "window"
    WINDOWED: ClassVar[bool] = False  # whether losses are in the window's scale
    KEEPS: ClassVar[int | None] = 0

    context: int = 96
    objective: str = QUANTILES
    levels: tuple[float, ...] = LEVELS
    channels: str = "targets"
    epochs: int = 10
    steps: int | None = None
    minutes: float | None = None
    rows: int = 32
    rate: float = 1e-3
    decay: float = 0.0
    patience: int | None = 3
    stride: int = 1
    seed: int = 0

    heads_: MultiHead | None = field(default=None, init=False, repr=False)
    shape_: Shape | None = field(default=None, init=False, repr=False)
    scales_: dict[Any, Scale] = field(default_factory=dict, init=False, repr=False)
    run_: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("context", "epochs", "rows", "stride"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.rate, "rate", 0.0)
        check_choice(self.objective, "objective", (POINT, QUANTILES, *KINDS))
        check_choice(self.channels, "channels", ("targets", "series"))
        if len(self.levels):
            checked_levels(self.levels)
        if self.objective != POINT and not self.levels:
            raise InputError("there are no quantile levels to learn; give some, or objective='point'.")

    @property
    def ahead(self) -> int:
        """Steps that one pass predicts; more are rolled out."""
        return self.horizon

    def trunk(self, shape: Shape) -> nn.Module:
        """The trunk for windows of a shape, with a `width`, and weights drawn from torch's generator."""
        raise TypeError(f"{type(self).__name__} has no trunk.")

    def prepare(self, trunk: nn.Module, windows: Windows, places: Int[np.ndarray, "N 2"]) -> None:
        """What a trunk takes from the training windows before it learns."""

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """The heads on the trunk."""
        width: int = trunk.width  # type: ignore[assignment]
        heads = {}
        if self.objective in KINDS:
            density = DensitySettings(width, shape.horizon, shape.targets, self.objective, seed=self.seed)
            return {self.objective: Attached(DensityHorizonHead(density), TARGET, pool="tokens")}
        if self.objective == POINT:
            point = HorizonSettings(width, shape.horizon, shape.targets, self.LOSS, self.WINDOWED, self.seed)
            heads[POINT] = Attached(HorizonHead(point), TARGET, pool="tokens")
        if self.levels:
            ahead = QuantileHorizonSettings(
                width, shape.horizon, shape.targets, tuple(self.levels), self.WINDOWED, self.seed + 1
            )
            stops = "stops" if self.objective == POINT else "flows"
            heads[QUANTILES] = Attached(QuantileHorizonHead(ahead), TARGET, pool="tokens", gradient=stops)  # type: ignore[arg-type]
        return heads

    def built(self, shape: Shape) -> MultiHead:
        """Trunk and heads with new weights, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            trunk = self.trunk(shape)
            return MultiHead(Trunk(trunk, frozen=False), self.attached(trunk, shape))

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        panel = self._laid_out(panel)
        check_length(panel, self.ahead)
        held = self._held(panel) if validation is None else validation
        windows = self._windows(panel, held)
        # A series too short to have a window before the steps that judge only judges.
        own = [(s, n) for s, n in enumerate(windows.lengths) if not held or n - held > self.ahead]
        learned = windows.places([(s, windows.cuts(s, last=n - held)) for s, n in own])
        if not len(learned):
            raise InputError(
                f"no window of {self.context} + {self.ahead} steps is left to learn from; give longer series."
            )
        judged = windows.places(
            [(s, windows.cuts(s, max(n - held, 1))) for s, n in enumerate(windows.lengths)] if held else []
        )
        judged = judged[:: max(1, -(-len(judged) // MOST_JUDGED))]
        learned = learned[:: self.stride]
        heads = self.built(windows.shape)
        self.prepare(heads.trunk.module, windows, learned)
        settings = self._training(len(learned))

        def batch(i: int) -> dict[str, Tensor]:
            rows = epoch_rows(len(learned), self.rows, i, self.seed).numpy()
            return self._batch(windows, learned[np.sort(rows)])

        self.run_ = heads.fit(
            batch,
            settings,
            folder,
            judge=(lambda: self._judged(heads, windows, judged)) if len(judged) else None,
            log_every=settings.steps,
            bar=bar.step(self.METHOD, settings.steps),
        )
        self.heads_, self.shape_ = heads, windows.shape
        self.scales_ = {one.name: (m, s) for one, m, s in zip(panel.series, windows.mean, windows.std, strict=True)}

    def _batch(self, windows: Windows, places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
        """The batch of some windows; a method may add to it."""
        return windows.batch(places)

    def _training(self, windows: int) -> TrainSettings:
        settings = TrainSettings(
            steps=self.steps,
            epochs=self.epochs,
            minutes=self.minutes,
            rows=self.rows,
            rate=self.rate,
            warmup=1,
            decay=self.decay,
            floor=0.0,
            optimizer="adam",
            betas=(0.9, 0.999),
            weight_decay=0.0,
            clip=None,
            precision="fp32",
            patience=self.patience,
            seed=self.seed,
        )
        return settings.for_examples(windows)

    def _laid_out(self, panel: Panel) -> Panel:
        return panel.stacked() if self.channels == "series" and len(panel) > 1 else panel

    def _windows(self, panel: Panel, held: int | None = None) -> Windows:
        """Windows over a panel: to learn from, with `held` steps that judge; else in the scales of the series learned from."""
        scales = self.scales_ if held is None else None
        return Windows(
            panel,
            self.context,
            self.ahead,
            covariates=self.COVARIATES,
            scaling=self.SCALING,
            held=held or 0,
            scales=scales,
        )

    def _held(self, panel: Panel) -> int:
        """A tenth of a series, at least a horizon; nothing of short ones, which need all. The median one decides."""
        length = int(np.median([len(one) for one in panel.series]))
        held = max(self.ahead, length // 10)
        return held if length - held >= max(2 * self.ahead, self.context // 2) else 0

    @torch.no_grad()
    def _judged(self, heads: MultiHead, windows: Windows, places: Int[np.ndarray, "N 2"]) -> float:
        """The mean loss of the head that trains the trunk, over the validation windows."""
        total, each = 0.0, self._each(windows.shape)
        for first in range(0, len(places), each):
            part = places[first : first + each]
            total += float(heads.losses(self._batch(windows, part))[self.objective]) * len(part)
        return total / len(places)

    def _each(self, shape: Shape) -> int:
        """How many windows go into one batch that learns nothing."""
        return int(min(1024, max(1, WINDOW_MEMORY // (64 * shape.channels * (shape.context + shape.horizon)))))

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        if levels and not self.levels:
            raise InputError("this forecaster learned no quantiles; ask for quantile_levels=(), or fit it with levels.")
        heads, shape = self._learned
        laid = self._laid_out(panel)
        if laid.n_targets != shape.targets:
            raise InputError(
                f"it was fitted on {shape.targets} channels, and these are {laid.n_targets}; give as many, or fit it anew."
            )
        parts = []
        for first in range(0, horizon, self.ahead):
            parts.append(self._once(heads, laid, levels))
            if first + self.ahead < horizon:
                laid = extended(laid, parts[-1].point)
        point = [np.concatenate([p.point[i] for p in parts], 1)[:, :horizon] for i in range(len(laid))]
        quantiles = [np.concatenate([p.quantiles[i] for p in parts], 1)[:, :horizon] for i in range(len(laid))]
        found = Forecasts(horizon, levels, point, quantiles)
        return found.unstacked(len(panel)) if len(laid) != len(panel) else found

    @property
    def backbone(self) -> nn.Module:
        """The trained trunk. Where it has attention heads, `mh.open_model` opens it."""
        module: nn.Module = self._learned[0].trunk.module
        return module

    def opened(self) -> HeadModel:
        """What reads the series, by its attention heads. Errors are `open_model`'s where there are none."""
        return open_model(self.backbone)

    @property
    def _learned(self) -> tuple[MultiHead, Shape]:
        if self.heads_ is None or self.shape_ is None:
            raise InputError(f"this {type(self).__name__} was not fitted; call fit(df) first.")
        return self.heads_, self.shape_

    @torch.no_grad()
    def _once(self, heads: MultiHead, panel: Panel, levels: tuple[float, ...]) -> Forecasts:
        """The steps after each series that one pass predicts."""
        windows = self._windows(panel)
        places = np.array([(s, n) for s, n in enumerate(windows.lengths)])
        heads.eval()
        point, quantiles, each = [], [], self._each(windows.shape)
        for first in range(0, len(places), each):
            part = places[first : first + each]
            out = self._outputs(heads, self._batch(windows, part))
            own = {name: windows.original(part, value) for name, value in out.items()}
            at = own.get(QUANTILES)
            found = (
                np.zeros((len(part), panel.n_targets, self.ahead, 0))
                if at is None
                else interpolated(at, self.levels, levels)
            )
            quantiles += list(found)
            point += list(own[POINT] if POINT in own else interpolated(own[QUANTILES], self.levels, (0.5,))[..., 0])
        return Forecasts(self.ahead, levels, point, quantiles)

    def _outputs(self, heads: MultiHead, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the heads say of a batch, in the window's scale: `point` [B, V, H], `quantiles` [B, V, H, Q]."""
        found: dict[str, Tensor] = heads(batch)
        if self.objective in KINDS:
            head: DensityHorizonHead = heads.heads[self.objective]  # type: ignore[assignment]
            return {QUANTILES: head.quantiles(found[self.objective], tuple(self.levels))}
        return found

    def _tensors(self) -> dict[str, Tensor]:
        heads, _ = self._learned
        scales = {
            name: torch.from_numpy(np.stack([s[i] for s in self.scales_.values()])) for i, name in enumerate(_SCALES)
        }
        return dict(heads.state_dict()) | scales

    def _about(self) -> dict[str, Any]:
        _, shape = self._learned
        return {"shape": vars(shape)}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.shape_ = Shape(**about["shape"])
        self.heads_ = self.built(self.shape_)
        learned = dict(tensors)
        mean, std = (learned.pop(name).numpy() for name in _SCALES)
        names = [one.name for one in self._laid_out(self._fitted).series]
        self.scales_ = dict(zip(names, zip(mean, std, strict=True), strict=True))
        self.heads_.load_state_dict(learned)
        self.heads_.eval()


def interpolated(
    quantiles: Float[np.ndarray, "... Q"], own: tuple[float, ...], wanted: tuple[float, ...]
) -> Float[np.ndarray, "... W"]:
    """Quantiles of other levels, linear between the nearest learned ones; beyond the outermost ones they are those."""
    found = np.sort(quantiles, -1)
    at = np.interp(wanted, own, np.arange(len(own)))
    low = np.floor(at).astype(int)
    high, share = np.minimum(low + 1, len(own) - 1), at - low
    return found[..., low] * (1 - share) + found[..., high] * share


def extended(panel: Panel, point: Sequence[Float[np.ndarray, "V H"]]) -> Panel:
    """The panel as if its forecast had come true. Past-only covariates are missing from there on."""
    series = []
    for one, ahead in zip(panel.series, point, strict=True):
        steps = ahead.shape[1]
        times = one.times.append(panel.future_times(one, steps))
        past = np.pad(one.past, ((0, 0), (0, steps)), constant_values=np.nan)
        known = one.known
        if (short := len(one) + steps - known.shape[1]) > 0:
            known = np.pad(known, ((0, 0), (0, short)), constant_values=np.nan)
        series.append(replace(one, times=times, values=np.hstack([one.values, ahead]), past=past, known=known))
    return replace(panel, series=tuple(series))
