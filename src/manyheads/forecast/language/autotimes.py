"""AutoTimes (#94): a frozen language model reads segments of a series as tokens and says the next one.

Liu et al., "AutoTimes: Autoregressive Time Series Forecasters via Large Language Models", arXiv:2402.02370, one model for all
horizons, mean of 96 to 720, MSE / MAE: ETTh1 .389 / .422, ECL .159 / .253, Weather .235 / .273, Traffic .374 / .264, Solar .197 /
.242. Without the language model ECL at 96 is .171 (with it .129), with one layer of attention .156.

    v_j      Enc s_j, linear or W_2 tanh(W_1 s), of the j-th segment of P steps in the window's scale      [P] -> [D]
    t_j      the last state of the text "from {start} to {end}" in the language model, read once           [D]
    e_j      v_j / |v_j| + c t_j / |t_j|, c is learned and 1 at first; without stamps v_j
    s_j+1    Dec, linear, of the frozen model's state j; squared error of all of them, in the scale of the series

Longer horizons are rolled out, and the stamps move on with them. A stamp depends on time alone.

We depart: c and the maps are all that learns, at one rate; the rate falls linearly. A context in which earlier segments of the
series serve as a prompt is a longer `context` here, in training and in use.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.next_patch import NextPatchForecaster
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.core.windows import Shape, Windows
from manyheads.forecast.language.frozen import FrozenLanguage, LanguageForecaster, LanguageTrunk
from manyheads.inputs import check_integer


def segment_map(inputs: int, hidden: int, outputs: int) -> nn.Module:
    """A linear map, or with `hidden` > 0 W_2 tanh(W_1 x)."""
    if not hidden:
        return nn.Linear(inputs, outputs)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))


def segments(past_values: Float[Tensor, "B T C"], patch: int) -> Float[Tensor, "B C n P"]:
    """The segments of each channel."""
    return past_values.transpose(1, 2).unflatten(-1, (-1, patch))


def spans(panel: Panel, places: Int[np.ndarray, "B 2"], context: int, patch: int) -> Iterator[tuple[int, str]]:
    """For the segments of each window, one window after the other: the step at which it starts, and its time as text."""
    for series, cut in places.tolist():
        for first in range(cut - context, cut, patch):
            yield first, f"from {_time(panel, series, first)} to {_time(panel, series, first + patch - 1)}"


def _time(panel: Panel, series: int, step: int) -> str:
    times = panel.series[series].times
    return str(times[step]) if 0 <= step < len(times) else str(times[0] + step * panel.freq)


class AutoTimesTrunk(LanguageTrunk):
    """From windows, and their stamps, to the states that say the next segment."""

    def __init__(self, language: FrozenLanguage, body: str, patch: int, hidden: int) -> None:
        super().__init__(language, body)
        self.patch = patch
        self.encode = segment_map(patch, hidden, language.width)
        self.stamp = nn.Parameter(torch.ones(()))

    def forward(
        self, past_values: Float[Tensor, "B T C"], stamps: Float[Tensor, "B n D"] | None = None
    ) -> Float[Tensor, "B C n D"]:
        """The states of each channel's segments."""
        vectors = self.encode(segments(past_values, self.patch))
        if stamps is not None:
            vectors = F.normalize(vectors, dim=-1) + self.stamp * F.normalize(stamps, dim=-1)[:, None]
        return self.body(vectors.flatten(0, 1)).unflatten(0, vectors.shape[:2])


@forecasts("autotimes")
@dataclass(kw_only=True, eq=False)
class AutoTimes(NextPatchForecaster, LanguageForecaster):
    """`patch` P steps a segment. `hidden` > 0: Enc has a hidden layer of that width. `stamps`: whether times are read as text.

    Without a language model (`body` "attention" or "none") there are no stamps.
    """

    PAPER: ClassVar[str] = "2402.02370"

    context: int = 168
    hidden: int = 0
    stamps: bool = True
    rate: float = 1e-3
    decay: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.hidden, "hidden", 0)

    def trunk(self, shape: Shape) -> nn.Module:
        """The two maps' first one, the scalar of the stamps, and the body."""
        return AutoTimesTrunk(self.language, self.body, self.patch, self.hidden)

    def _batch(self, windows: Windows, places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
        batch = windows.batch(places)
        if self.stamps and self.reads_series:
            texts = [text for _, text in spans(windows.panel, places, self.context, self.patch)]
            batch["stamps"] = self.language.read(texts).unflatten(0, (len(places), -1))
        return batch
