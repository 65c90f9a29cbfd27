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

No tensor is C x C: time and memory are linear in the number of channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Shape


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
        self, shape: Shape, *, width: int, core: int, hidden: int, layers: int, dropout: float, mixes: bool
    ) -> None:
        super().__init__()
        self.width = width
        self.embed = nn.Linear(shape.context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*[SoftsBlock(width, core, hidden, dropout, mixes) for _ in range(layers)])

    def forward(self, past_values: Float[Tensor, "B T C"]) -> Float[Tensor, "B C D"]:
        """States of the channels."""
        states: Tensor = self.blocks(self.dropout(self.embed(past_values.transpose(1, 2))))
        return states


@forecasts("softs")
@dataclass(kw_only=True, eq=False)
class Softs(NetworkForecaster):
    """`width` D, `core` d_c, `hidden` of the feed-forward layers; `mixes`: whether channels see the core at all."""

    PAPER: ClassVar[str] = "2404.14197"
    LOSS: ClassVar[str] = "mse"

    width: int = 256
    core: int = 256
    hidden: int = 256
    layers: int = 1
    dropout: float = 0.0
    mixes: bool = True
    rate: float = 3e-4

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
        )
