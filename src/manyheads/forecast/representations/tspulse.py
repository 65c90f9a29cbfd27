"""TSPulse (#86): one small trunk that fills gaps, finds anomalies, compares series and forecasts.

Ekambaram et al., "TSPulse: Dual Space Tiny Pre-Trained Models for Rapid Time-Series Analysis", arXiv:2505.13033 (ICLR 2026):
zero-shot imputation MSE .074 (.106 after block masks), anomalies VUS-PR .480 on univariate series, retrieval PREC@3 .612.

    fitted = TSPulse(context=512).fit(df)
    fitted.impute(df)          # the frame with its gaps filled
    fitted.anomaly(df)         # a score a step: of the time head, of the spectrum head, of the forecast head, and the largest
    fitted.embed(df)           # a row a series, from the registers of its last window; near rows are series alike
    fitted.predict()           # a short forecast, as of any forecaster

A window is masked, and the trunk says the hidden points from both views (`tspulse_network.py`). The loss is

    MSE of hidden points from time tokens + MSE of the spectrum + MSE of hidden points from it + signature + forecast MSE

A mask hides a share of the points, drawn from 0 to `most_hidden`: `whole_patches` of them as patches, the rest scattered.

We depart from the paper: it learns from the user's series, not from a collection of millions; the mask token is in the unit of
the window; the signature counts by its mean over windows, where the released code divides it by the number of bins
once more; the decoder does not mix channels, and there is no classifier.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.network import POINT, QUANTILES, NetworkForecaster
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.core.windows import Shape, Windows
from manyheads.forecast.representations.tspulse_network import (
    SignatureHead,
    SpectrumHead,
    TSPulseTrunk,
    ViewSettings,
    WindowHead,
    inverse_spectrum,
    seen_as,
)
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.learning import Attached, MultiHead

SCORES = ("time", "spectrum", "forecast")


@forecasts("tspulse")
@dataclass(kw_only=True, eq=False)
class TSPulse(NetworkForecaster):
    """`patch` steps a token, `width` D, `registers`, blocks of encoder and decoder; `dual`: whether there is a spectrum."""

    PAPER: ClassVar[str] = "2505.13033"
    WINDOWED: ClassVar[bool] = True

    context: int = 128
    horizon: int = 16
    objective: str = POINT
    patch: int = 8
    width: int = 32
    registers: int = 4
    blocks: int = 4
    decoder_blocks: int = 1
    dropout: float = 0.0
    dual: bool = True
    most_hidden: float = 0.3
    whole_patches: float = 0.2
    rate: float = 1e-2
    decay: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("patch", "width", "registers", "blocks", "decoder_blocks"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.most_hidden, "most_hidden", 0.0, 0.9, above=True)
        check_number(self.whole_patches, "whole_patches", 0.0, 1.0)
        check_choice(self.objective, "objective", (POINT,))
        if self.context % self.patch or self.context % 2 or self.context < 4:
            raise InputError(
                f"context is {self.context}; give an even number of steps that is a multiple of the patch, {self.patch}."
            )

    def trunk(self, shape: Shape) -> nn.Module:
        """The mixer."""
        blocks = (self.blocks, self.decoder_blocks)
        return TSPulseTrunk(shape.context, self.patch, self.width, self.registers, blocks, self.dropout, self.dual)

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """Each head on the tokens of its view; those of the forecast on the registers."""
        heads = {name: replace(one, layer="registers") for name, one in super().attached(trunk, shape).items()}
        view = ViewSettings(self.width, self.patch, self.seed + 2)
        heads["time"] = Attached(WindowHead(view), ("whole", "asked"), "time_view", "tokens")
        if self.dual:
            bins = ViewSettings(self.registers * self.width, shape.context // 2 - 1, self.seed + 3)
            target = ("whole", "asked", "size", "complete")
            heads["spectrum"] = Attached(SpectrumHead(view), target, "spectrum_view", "tokens")
            heads["signature"] = Attached(SignatureHead(bins), ("whole", "complete"), "registers", "tokens")
        return heads

    def impute(self, df: pd.DataFrame) -> pd.DataFrame:
        """The frame's times with every missing target filled; what was observed stays. Times between rows are added.

        Each gap is the mean over the windows that hold it, half a context apart; where a whole window is missing, about the mean
        of the series.
        """
        panel, windows = self._read(df)
        sums = [np.zeros_like(one.values) for one in panel.series]
        counts = [np.zeros(len(one)) for one in panel.series]
        for places in self._parts(self._tiles(windows, self.context // 2), windows):
            found = self._rebuilt(windows, places, None)["time"]
            for (s, cut), values in zip(places, found, strict=True):
                low = max(0, cut - self.context)
                sums[s][:, low:cut] += values[:, low - cut :]
                counts[s][low:cut] += 1
        filled = [
            np.where(np.isfinite(one.values), one.values, total / n)
            for one, total, n in zip(panel.series, sums, counts, strict=True)
        ]
        return _frame(panel, filled, panel.columns.targets)

    def anomaly(self, df: pd.DataFrame) -> pd.DataFrame:
        """How odd each step is, from 0 to 1 in its series: `time`, `spectrum` and `forecast`, and `score`, the largest.

        Each patch is hidden in turn, and its squared error counts; of the forecast, that of the steps after a window. Errors are
        means over targets, in the unit of the series. A missing step, and one without a forecast, has 0.
        """
        panel, windows = self._read(df)
        names = [name for name in SCORES if self.dual or name != "spectrum"]
        odd = [np.zeros((len(names) + 1, len(one))) for one in panel.series]
        for places in self._parts(self._tiles(windows, self.context), windows, self.context // self.patch):
            for first in range(0, self.context, self.patch):
                hidden = torch.zeros(len(places), self.context, panel.n_targets, dtype=torch.bool)
                hidden[:, first : first + self.patch] = True
                found = self._rebuilt(windows, places, hidden)
                for i, name in enumerate(names[:-1]):
                    _put(
                        odd, i, panel, places - [0, self.context - first], found[name][..., first : first + self.patch]
                    )
        ahead = [(s, range(min(self.context, n), n, self.horizon)) for s, n in enumerate(windows.lengths)]
        for places in self._parts(windows.places(ahead), windows):
            _put(odd, len(names) - 1, panel, places, self._rebuilt(windows, places, None)[POINT])
        for scores in odd:
            low, high = scores.min(1, keepdims=True), scores.max(1, keepdims=True)
            scores[:] = (scores - low) / np.where(high > low, high - low, 1.0)
            scores[-1] = scores[:-1].max(0)
        return _frame(panel, odd, (*names, "score"))

    def embed(self, df: pd.DataFrame, by: str = "registers") -> pd.DataFrame:
        """A row for the last window of each series, under the series' name; series alike are near by Euclidean distance.

        By "registers" their states after the encoder, [series, targets x registers x width]; by "signature" the log shares of
        the bins of the spectrum that the signature head reads off them, [series, targets x (context / 2 - 1)].
        """
        check_choice(by, "by", ("registers", "signature") if self.dual else ("registers",))
        panel, windows = self._read(df)
        places = np.array([(s, n) for s, n in enumerate(windows.lengths)])
        rows = [self._rows(self._view(windows, part, None), by) for part in self._parts(places, windows)]
        return pd.DataFrame(np.concatenate(rows), index=pd.Index([one.name for one in panel.series], name="item"))

    @torch.no_grad()
    def _rows(self, view: dict[str, Tensor], by: str) -> Float[np.ndarray, "B E"]:
        heads = self._learned[0]
        if by == "signature":
            rows: Tensor = heads(view)["signature"].log_softmax(-1)
        else:
            rows = heads.trunk.states(view, "encoder")[:, :, -self.registers :]
        return rows.flatten(1).numpy()

    def _read(self, df: pd.DataFrame) -> tuple[Panel, Windows]:
        """A frame called as the one it was fitted on. Series it does not know are scaled by themselves."""
        known, (heads, shape) = self._fitted.columns, self._learned
        columns = columns_of(df, item=known.item, time=known.time, target=known.targets, past=known.past)
        panel = self._laid_out(panel_of(df, replace(columns, style=known.style), self._fitted.freq))
        if panel.n_targets != shape.targets:
            raise InputError(f"it was fitted on {shape.targets} channels, and these are {panel.n_targets}.")
        heads.eval()
        return panel, self._windows(panel)

    def _tiles(self, windows: Windows, stride: int) -> Int[np.ndarray, "N 2"]:
        """Windows that cover every series; the last ends where it ends."""
        return np.array(
            [(s, cut) for s, n in enumerate(windows.lengths) for cut in (*range(min(self.context, n), n, stride), n)]
        )

    def _parts(
        self, places: Int[np.ndarray, "N 2"], windows: Windows, copies: int = 1
    ) -> Iterator[Int[np.ndarray, "B 2"]]:
        each = max(1, self._each(windows.shape) // copies)
        for first in range(0, len(places), each):
            yield places[first : first + each]

    @torch.no_grad()
    def _rebuilt(
        self, windows: Windows, places: Int[np.ndarray, "B 2"], hidden: Bool[Tensor, "B T C"] | None
    ) -> dict[str, Float[np.ndarray, "B C S"]]:
        """What the heads say of windows and of what follows, in the unit of the data."""
        heads = self._learned[0]
        view = self._view(windows, places, hidden)
        said = heads(view)
        if self.dual:
            said["spectrum"] = inverse_spectrum(said["spectrum"], view["size"])
        unit, shift = view["unit"][..., None], view["shift"][..., None]
        return {
            name: windows.original(places, said[name] * unit + shift)
            for name in ("time", "spectrum", POINT)
            if name in said
        }

    def _view(
        self, windows: Windows, places: Int[np.ndarray, "B 2"], hidden: Bool[Tensor, "B T C"] | None
    ) -> dict[str, Tensor]:
        batch = windows.batch(places)
        batch |= {"window": batch["past_values"], "target": batch["future"]}
        return seen_as(batch, torch.zeros_like(batch["window"], dtype=torch.bool) if hidden is None else hidden)

    def _batch(self, windows: Windows, places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
        """Windows under a mask that is drawn by the seed and by which windows they are, so that a resumed run has the same."""
        drawn = torch.Generator().manual_seed(zlib.crc32(np.ascontiguousarray(places).tobytes()) + 2**32 * self.seed)
        size = (len(places), windows.shape.context, windows.shape.channels)
        return self._view(windows, places, self.masks(size, drawn))

    def masks(self, size: tuple[int, int, int], generator: torch.Generator) -> Bool[Tensor, "B T C"]:
        """Which points are hidden: a share of each window, drawn from 0 to `most_hidden`, part of it as whole patches."""
        rows, steps, channels = size
        rate = self.most_hidden * torch.rand(rows, 1, 1, generator=generator)
        patches = torch.rand(rows, steps // self.patch, channels, generator=generator) < rate * self.whole_patches
        points = torch.rand(size, generator=generator) < rate * (1 - self.whole_patches)
        return points | patches.repeat_interleave(self.patch, 1)

    @torch.no_grad()
    def _judged(self, heads: MultiHead, windows: Windows, places: Int[np.ndarray, "N 2"]) -> float:
        """The mean over the validation windows of the sum of the losses that train the trunk."""
        total, parts = 0.0, list(self._parts(places, windows))
        for part in parts:
            losses = heads.losses(self._batch(windows, part))
            total += len(part) * sum(float(loss) for name, loss in losses.items() if name != QUANTILES)
        return total / len(places)

    def _outputs(self, heads: MultiHead, batch: Any) -> dict[str, Tensor]:
        """The forecast of a window in which nothing is hidden, in the window's own scale."""
        view = seen_as(batch, torch.zeros_like(batch["window"], dtype=torch.bool))
        said = {name: value for name, value in heads(view).items() if name in (POINT, QUANTILES)}
        return {
            name: value * _column(view["unit"], value) + _column(view["shift"], value) for name, value in said.items()
        }


def _column(each: Float[Tensor, "B C"], value: Tensor) -> Tensor:
    return each[(...,) + (None,) * (value.ndim - 2)]


def _put(odd: list[np.ndarray], row: int, panel: Panel, places: Int[np.ndarray, "B 2"], said: np.ndarray) -> None:
    """Squared errors of steps said from each place on, as means over targets in the unit of the series."""
    for (s, start), values in zip(places, said, strict=True):
        truth = panel.series[s].values
        low, high = max(0, start), min(start + values.shape[1], truth.shape[1])
        if high <= low:  # before the beginning of a short series
            continue
        size = np.nanstd(truth, axis=1, keepdims=True)
        off = (truth[:, low:high] - values[:, low - start : high - start]) / np.where(size > 0, size, 1.0)
        there = np.isfinite(off)
        odd[s][row, low:high] = np.square(np.where(there, off, 0.0)).sum(0) / np.maximum(there.sum(0), 1)


def _frame(panel: Panel, rows: list[np.ndarray], names: tuple[str, ...]) -> pd.DataFrame:
    """A row a series and time, a column a name."""
    columns, parts = panel.columns, []
    for one, values in zip(panel.series, rows, strict=True):
        part = pd.DataFrame({columns.time: one.times} | dict(zip(names, values, strict=True)))
        if columns.item is not None:
            part.insert(0, columns.item, one.name)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)
