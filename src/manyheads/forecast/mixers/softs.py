"""SOFTS (#56): channels talk through one shared core.

Han et al., "SOFTS: Efficient Multivariate Time Series Forecasting with Series-Core Fusion", arXiv:2404.14197, Table 2
(look-back 96, mean of the horizons 96 to 720, MSE / MAE): ECL .174 / .264, Traffic .409 / .267, Weather .255 / .278, ETTh1 .449 /
.442, ETTh2 .373 / .400.

    x            W x + b, T -> D, for each channel                                              [B, C, D]
    h            G_2 GELU(G_1 x)                                                                [B, C, d_c]
    core         softmax over channels of h, for each of the d_c by itself; in training one channel is drawn from it, else
                 core = sum_C softmax(h) h                                                      [B, 1, d_c]
    STAR(x)      G_4 GELU(G_3 [x, core])
    a block      x = LN(x + STAR(x)), x = LN(x + FFN x)

No tensor is C x C: time and memory are linear in the number of channels. In evaluation mode a forecast is the same every time; in
training mode it is random. Where the calendar is used, the hour, weekday and so on of the window's steps are tokens that take
part in pooling and are dropped at the output, as in the paper.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.baselines.linear import Values
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.heads import TARGET, HorizonHead, HorizonSettings
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.core.windows import Scaling, Shape, Windows
from manyheads.forecast.mixers.planted import channels_panel, one_factor
from manyheads.learning import Attached, MultiHead, Trunk
from manyheads.training import ADAM, epoch_rows


class Star(nn.Module):
    """Series-core fusion: [B, C, D] -> [B, C, D]."""

    def __init__(self, width: int, core: int) -> None:
        super().__init__()
        self.to_core = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, core))
        self.fuse = nn.Sequential(nn.Linear(width + core, width), nn.GELU(), nn.Linear(width, width))

    def core(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B 1 d"]:
        """The core: a channel drawn for each of its dimensions in training, else the mean under the same probabilities."""
        h = self.to_core(x)
        p = h.softmax(1)
        if not self.training:
            return (p * h).sum(1, keepdim=True)
        rows = p.transpose(1, 2).flatten(0, 1)
        at = torch.multinomial(rows, 1).unflatten(0, (len(x), h.shape[-1])).transpose(1, 2)
        return h.gather(1, at)

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """What each channel makes of itself and the core."""
        out: Tensor = self.fuse(torch.cat([x, self.core(x).expand(-1, x.shape[1], -1)], -1))
        return out


class SoftsBlock(nn.Module):
    """STAR and a feed-forward layer, each added and normalised."""

    def __init__(self, width: int, core: int, hidden: int, dropout: float, mixes: bool) -> None:
        super().__init__()
        self.star = (
            Star(width, core) if mixes else nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        )
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """[B, C, D] -> [B, C, D]."""
        x = self.norms[0](x + self.dropout(self.star(x)))
        mixed: Tensor = self.norms[1](x + self.dropout(self.feed(x)))
        return mixed


class SoftsTrunk(nn.Module):
    """The network up to the states that the last linear layer reads."""

    def __init__(
        self,
        shape: Shape,
        *,
        width: int,
        core: int,
        hidden: int,
        layers: int,
        dropout: float = 0.0,
        mixes: bool = True,
        calendar: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.calendar = width, calendar
        self.embed = nn.Linear(shape.context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[SoftsBlock(width, core, hidden, dropout, mixes) for _ in range(layers)])

    def forward(
        self, past_values: Float[Tensor, "B T C"], past_time_features: Float[Tensor, "B T 5"] | None = None
    ) -> Float[Tensor, "B C D"]:
        """States of the channels."""
        n = past_values.shape[-1]
        if self.calendar and past_time_features is not None:
            past_values = torch.cat([past_values, past_time_features], -1)
        states: Tensor = self.blocks(self.dropout(self.embed(past_values.transpose(1, 2))))
        return states[:, :n]


@forecasts("softs")
@dataclass(kw_only=True, eq=False)
class Softs(NetworkForecaster):
    """`width` D, `core` d_c, `hidden` of the feed-forward layers; `mixes`: whether channels see the core at all.

    With `calendar` the hour, weekday and so on of the window are channels beside the others. `normalised`: by the window; the
    paper leaves that out where channels share their level (PEMS).
    """

    PAPER: ClassVar[str] = "2404.14197"
    LOSS: ClassVar[str] = "mse"

    width: int = 256
    core: int = 256
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.0
    mixes: bool = True
    calendar: bool = False
    normalised: bool = True
    rate: float = 3e-4

    def _windows(self, panel: Panel, held: int | None = None) -> Windows:
        scaling: Scaling = "window" if self.normalised else "series"
        scales = self.scales_ if held is None else None
        return Windows(panel, self.context, self.ahead, scaling=scaling, held=held or 0, scales=scales)

    def trunk(self, shape: Shape) -> nn.Module:
        """The network up to the states."""
        return SoftsTrunk(
            shape,
            width=self.width,
            core=self.core,
            hidden=self.hidden,
            layers=self.layers,
            dropout=self.dropout,
            mixes=self.mixes,
            calendar=self.calendar,
        )


HORIZON, CHANNELS, NEAR = 24, 32, 6


def _factor(made: Callable[[Shape], nn.Module]) -> Callable[[int, int], dict[str, float]]:
    """A trunk that learns the clean factor from the noisy channels, unscaled by the window."""

    def run(steps: int, seed: int) -> dict[str, float]:
        windows = Windows(channels_panel(one_factor(seed, CHANNELS)), 48, HORIZON, scaling="series")
        cuts = windows.places([(0, windows.cuts(0))])
        learned, judged = cuts[: len(cuts) * 4 // 5], cuts[len(cuts) * 4 // 5 + HORIZON :]

        def batch(places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
            found = windows.batch(places)
            factor = found["future"][:, :1].expand(-1, CHANNELS, -1)
            ones = torch.ones_like(factor)
            return {
                "past_values": found["past_values"][..., 1:],
                "future": factor,
                "counted": ones,
                "scale": ones[..., 0],
            }

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            trunk = made(Shape(48, HORIZON, CHANNELS))
        width: int = trunk.width  # type: ignore[assignment]
        head = HorizonHead(HorizonSettings(width, HORIZON, CHANNELS, seed=seed))
        heads = MultiHead(Trunk(trunk, frozen=False), {"point": Attached(head, TARGET, pool="tokens")})
        settings = replace(ADAM, steps=steps, rate=1e-3, seed=seed)
        heads.fit(lambda i: batch(learned[epoch_rows(len(learned), 32, i, seed).numpy()]), settings, log_every=steps)
        found = {}
        for name, mode in (("mse", False), ("mse in training mode", True)):
            heads.train(mode)
            with torch.no_grad():
                given = batch(judged)
                found[name] = float((given["future"] - heads(given)["point"])[..., :NEAR].square().mean())
        return found

    return run


def _trunk(mixes: bool) -> Callable[[Shape], nn.Module]:
    return lambda shape: SoftsTrunk(shape, width=64, core=32, hidden=64, layers=1, mixes=mixes)


register_experiment(
    Experiment(
        "one_factor",
        (56,),
        "2404.14197",
        "32 noisy channels of one factor: does the core find it?",
        datasets=lambda quick: {"AR(2)": 60 if quick else 500},
        methods={
            "softs unmixed": _factor(_trunk(False)),
            "softs": _factor(_trunk(True)),
            "linear": _factor(lambda shape: Values(shape.context)),
        },
        baseline="softs unmixed",
        claims=(
            Claim(
                "its MSE over 6 steps is at most .45 of that without mixing",
                lambda v: v["softs", "mse"] / v["softs unmixed", "mse"],
                at_most=0.45,
            ),
            Claim(
                "forecasts with a core that is drawn, as in training, are worse",
                lambda v: v["softs", "mse in training mode"] / v["softs", "mse"],
                at_least=1.02,
            ),
        ),
        minutes=2,
        lower=frozenset({"mse", "mse in training mode"}),
        room="forecast",
    )
)
