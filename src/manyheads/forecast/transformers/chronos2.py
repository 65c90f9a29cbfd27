"""Chronos-2 (#52): one network for single series, several targets, and covariates, past-only or known ahead.

Ansari et al., "Chronos-2: From Univariate to Universal Forecasting", arXiv:2510.15821. The network is in `chronos2_model`; skill
is 1 - the geometric mean of errors over seasonal naive's, over the 100 tasks of fev-bench:

    scaled quantile loss    Chronos-2 47.3 %    TiRex 42.6    TimesFM-2.5 42.3    Toto 40.7    Chronos-Bolt 38.9
    MASE                    35.5 %              30.0          30.2

    from scratch     `Chronos2(horizon=24).fit(df, known=["promotion"])`: a small one, trained on the frame
    released         `Chronos2.from_pretrained(folder, horizon=24).fit(df)`: learns nothing of the frame, unless `tunes`

A window's channels are x -> asinh((x - mean) / std) over what was observed in its context. Beyond one pass (`reach` steps) the
quantile paths .1 .. .9 are taken for true one by one, targets and past-only covariates alike, and each goes on by itself. Their
forecasts are pooled:

    q_tau        the weighted tau-quantile of the 9 Q values of a step; value j of path i weighs w_i w_j, where w is half the
                 distance between a level's neighbours (0 and 1 at the ends)

so that later steps know of the earlier ones' error. `across` makes all series of a batch one group when it forecasts: series may
then help each other, but a forecast depends on what else is in the batch. It is never used in training, where windows of one
series at different times would tell each other the future. We depart where variance is small: std is sqrt(var + 1e-5) of the
series scaled to unit variance, and not 1e-5 where it is 0 (`Chronos2Model.forecast_rows` is the released way to the bit).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.heads import LEVELS, TARGET
from manyheads.forecast.core.network import QUANTILES, NetworkForecaster, extended, interpolated
from manyheads.forecast.core.panel import Forecasts, Panel
from manyheads.forecast.core.windows import Scaling, Shape, Windows
from manyheads.forecast.transformers.chronos2_files import released_settings
from manyheads.forecast.transformers.chronos2_model import QUANTILES_21, Chronos2Config, Chronos2Head, Chronos2Model
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Attached, MultiHead
from manyheads.progress import Bar


@forecasts("chronos2")
@dataclass(kw_only=True, eq=False)
class Chronos2(NetworkForecaster):
    """`width` D, `n_heads` of `head_dim`, `hidden` of the feed-forward layers, `blocks` of two layers each, steps of a `patch`.

    `mixes`: whether the channels of a series see each other; `across`: whether all series of a batch do, when it forecasts.
    `reach`: steps of one pass (None: the horizon). `source` is a folder of released weights, `tunes` whether `fit` trains.
    """

    PAPER: ClassVar[str] = "2510.15821"
    COVARIATES: ClassVar[bool] = True
    SCALING: ClassVar[Scaling] = "asinh"
    WINDOWED: ClassVar[bool] = True

    context: int = 512
    levels: tuple[float, ...] = QUANTILES_21
    width: int = 64
    n_heads: int = 4
    head_dim: int = 16
    hidden: int = 256
    blocks: int = 3
    patch: int = 16
    dropout: float = 0.0
    factor: float = 1.0
    mixes: bool = True
    across: bool = False
    reach: int | None = None
    source: str | None = None
    tunes: bool = True

    # Of a forecaster that was saved: its own sizes, whatever the folder `source` holds by now.
    network_: dict[str, Any] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("width", "n_heads", "head_dim", "hidden", "blocks", "patch"):
            check_integer(getattr(self, name), name, 1)
        if self.head_dim % 2:
            raise InputError(f"head_dim is {self.head_dim}; rotary angles need an even one.")
        check_number(self.dropout, "dropout", 0.0, 1.0)
        if self.objective != QUANTILES:
            raise UnsupportedError("Chronos-2 learns quantiles and has no other objective; its point is the median.")
        if not self.tunes and self.source is None:
            raise InputError("without released weights there is nothing to forecast by; give source, or let it train.")

    @classmethod
    def from_pretrained(cls, folder: str | Path, **settings: Any) -> Chronos2:
        """One with released weights (`Chronos2Model.from_pretrained`), which `fit` only gives a history, unless `tunes=True`.

        Tuning is at a rate of 1e-6 for 1000 steps by default, as in the paper. Other settings are the forecaster's.
        """
        found = released_settings(folder)
        own = {"source": str(folder), "tunes": False, "levels": found["levels"], "reach": found["longest_horizon"]}
        own |= {"context": found["longest_context"], "patch": found["patch"], "rate": 1e-6, "steps": 1000}
        return cls(**own | settings)

    def trunk(self, shape: Shape) -> nn.Module:
        """The network, with released weights if there are any."""
        if self.source is None or self.network_ is not None:
            model = Chronos2Model(self._config())
        else:
            model = Chronos2Model.from_pretrained(self.source)
        model.config.mixes = self.mixes
        return model.eval()

    def _config(self) -> Chronos2Config:
        if self.network_ is not None:
            return Chronos2Config(**self.network_)
        return Chronos2Config(
            hidden_size=self.width,
            head_dim=self.head_dim,
            num_attention_heads=self.n_heads,
            intermediate_size=self.hidden,
            blocks=self.blocks,
            patch=self.patch,
            levels=self.levels,
            longest_context=self.context,
            longest_horizon=self.reach or self.horizon,
            time_scale=self.context,
            prediction_length=self.horizon,
            dropout=self.dropout,
            initializer_factor=self.factor,
        )

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """The network's own head, of the targets."""
        head: Chronos2Head = trunk.head  # type: ignore[assignment]
        head.settings = replace(head.settings, targets=shape.targets)
        return {QUANTILES: Attached(head, TARGET, pool="tokens")}

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        if self.tunes:
            super()._fit(panel, validation=validation, folder=folder, bar=bar)
            return
        self.scales_, panel = {}, self._laid_out(panel)
        windows = self._windows(panel)
        self.heads_, self.shape_ = self.built(windows.shape).eval(), windows.shape
        self.scales_ = {one.name: (m, s) for one, m, s in zip(panel.series, windows.mean, windows.std, strict=True)}

    def _windows(self, panel: Panel, held: int | None = None) -> Windows:
        """Of series that are all shorter than the context no window is longer than they are: the padding is not read."""
        longest = max(map(len, panel.series))
        if held is not None or longest >= self.context:
            return super()._windows(panel, held)
        other = copy.copy(self)
        other.context = longest
        return super(Chronos2, other)._windows(panel, held)

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        """One pass, and beyond it quantile paths."""
        steps = self.horizon if self.reach is None else min(horizon, self.reach)
        first = super(Chronos2, self._reaching(steps))._forecast(panel, min(horizon, steps), levels)
        if horizon <= steps:
            return first
        laid = self._laid_out(panel)
        later = Forecasts(horizon, self.levels, [], self._by_paths(laid, steps, horizon))
        later = later if len(laid) == len(panel) else later.unstacked(len(panel))
        return Forecasts(
            horizon,
            levels,
            [np.hstack([a, self._at(b, (0.5,))[..., 0]]) for a, b in zip(first.point, later.quantiles, strict=True)],
            [np.hstack([a, self._at(b, levels)]) for a, b in zip(first.quantiles, later.quantiles, strict=True)],
        )

    def _at(self, quantiles: Float[np.ndarray, "V H Q"], levels: tuple[float, ...]) -> Float[np.ndarray, "V H W"]:
        return interpolated(quantiles, self.levels, levels)

    def _reaching(self, steps: int) -> Chronos2:
        """The same network over another horizon."""
        other = copy.copy(self)
        other.horizon = steps
        return other

    def _by_paths(self, panel: Panel, steps: int, horizon: int) -> list[Float[np.ndarray, "V H Q"]]:
        """Quantiles of the steps from `steps` to `horizon` for each series, by the formula above."""
        ways = tuple(t for t in LEVELS if self.levels[0] <= t <= self.levels[-1]) or (0.5,)
        weights = np.outer(level_mass(ways), level_mass(self.levels)).ravel()
        targets, whole = panel.n_targets, _covariates_as_targets(panel)
        paths, own, parts = [whole] * len(ways), self._reaching(steps)._every(whole), []
        for done in range(steps, horizon, steps):
            paths = [
                extended(path, [self._at(q, (t,))[..., 0] for q in own]) for path, t in zip(paths, ways, strict=True)
            ]
            one = self if self.reach is None else self._reaching(min(steps, horizon - done))
            found = zip(*[one._every(path) for path in paths], strict=True)
            own = [weighted_quantiles(np.concatenate(of_one, -1), weights, self.levels) for of_one in found]
            parts.append([q[:targets] for q in own])
        return [np.hstack(of_one)[:, : horizon - steps] for of_one in zip(*parts, strict=True)]

    @torch.no_grad()
    def _every(self, panel: Panel) -> list[Float[np.ndarray, "C H Q"]]:
        """Quantiles of the targets of a panel in which all channels but those known ahead are targets."""
        heads, windows = self._learned[0].eval(), self._windows(panel)
        head: Any = heads.heads[QUANTILES]
        places, each, found = np.array([(s, n) for s, n in enumerate(windows.lengths)]), self._each(windows.shape), []
        for first in range(0, len(places), each):
            part = places[first : first + each]
            with self._grouped(heads):
                out = head.every(heads.trunk.states(self._batch(windows, part)))
            found += list(windows.original(part, out[:, : panel.n_targets, : self.horizon]))
        return found

    def _outputs(self, heads: MultiHead, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self._grouped(heads):
            found = super()._outputs(heads, batch)
        return {name: value[:, :, : self.horizon] for name, value in found.items()}

    @contextlib.contextmanager
    def _grouped(self, heads: MultiHead) -> Iterator[None]:
        """All series of a batch as one group, if that was asked for."""
        trunk: Any = heads.trunk.backbone
        trunk.across = self.across
        try:
            yield
        finally:
            trunk.across = False

    def _about(self) -> dict[str, Any]:
        network: Any = self.backbone
        return super()._about() | {"network": network.config.sizes()}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.network_ = dict(about["network"])
        super()._restore(tensors, about)


def level_mass(levels: Sequence[float]) -> Float[np.ndarray, "Q"]:
    """What share of a distribution each level stands for: half the distance between its neighbours, over their sum."""
    edges = np.array([0.0, *levels, 1.0])
    mass = (edges[2:] - edges[:-2]) / 2
    return mass / mass.sum()


def weighted_quantiles(
    samples: Float[np.ndarray, "... N"], weights: Float[np.ndarray, "N"], levels: Sequence[float]
) -> Float[np.ndarray, "... Q"]:
    """Quantiles of weighted samples, linear between their cumulated weights; below the first they are the first."""
    order = samples.argsort(-1, kind="stable")
    x, total = np.take_along_axis(samples, order, -1), weights[order].cumsum(-1)
    x, total = np.concatenate([x[..., :1], x], -1), np.insert(total / total[..., -1:], 0, 0.0, -1)
    found = []
    for level in levels:
        high = np.minimum((total <= level).sum(-1, keepdims=True), total.shape[-1] - 1)
        (t0, x0), (t1, x1) = (
            (np.take_along_axis(total, at, -1), np.take_along_axis(x, at, -1)) for at in (high - 1, high)
        )
        found.append(x0 + (level - t0) / np.maximum(t1 - t0, 1e-300) * (x1 - x0))
    return np.concatenate(found, -1)


def _covariates_as_targets(panel: Panel) -> Panel:
    """Past-only covariates are forecast too, to be taken for true."""
    columns = replace(panel.columns, targets=panel.columns.targets + panel.columns.past, past=())
    series = tuple(replace(one, values=np.vstack([one.values, one.past]), past=one.past[:0]) for one in panel.series)
    return replace(panel, series=series, columns=columns)
