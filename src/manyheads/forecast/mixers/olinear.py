"""OLinear (#50): linear layers in the domain where a window's steps are not correlated.

Yue et al., "OLinear: A Linear Model for Time Series Forecasting in Orthogonally Transformed Domain", arXiv:2505.08550, Table 2
(look-back 96, mean of the horizons 96 to 720, MSE / MAE): ETT .359 / .376, ECL .159 / .248, Weather .237 / .260, Traffic .451 /
.247.

    Q_i, Q_o       eigenvectors, as rows, of the correlation of the steps of a window, of T and of H steps; the mean over
                   channels, from the training part alone
    E              x phi, [B, C, d, T]; E Q_i^T along time, + a bias; flattened, W -> [B, C, D]
    a block        x = LN(x + W_o A W_v x), A = rows of softplus(W) over their sum, [C, C];    x = LN(x + FFN x)
    states         GELU(W_1 flat((W_2 x, reshaped [d, H]) Q_o + bias)), which a linear head reads
    loss           mean_i (i + 1)^-0.5 |error|

We take Pearson's correlation where the released code divides the covariance by one of the two variances, and dropout before A's
rows are divided by their sums, so that they sum to 1. The learned gain and shift of RevIN are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Shape, Windows

_SMALLEST = 1e-4  # variance, of a step over windows, below which a channel says nothing of correlation


class NormLin(nn.Module):
    """A x with A = softplus(W) / its rows' sums: [..., C, D] -> [..., C, D]. W is the identity plus noise at first."""

    def __init__(self, channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(channels) + torch.randn(channels, channels))
        self.dropout = nn.Dropout(dropout)

    @property
    def matrix(self) -> Float[Tensor, "C C"]:
        """A."""
        a = self.dropout(F.softplus(self.weight))
        return a / a.sum(-1, keepdim=True).clamp_min(1e-12)

    def forward(self, x: Float[Tensor, "*B C D"]) -> Float[Tensor, "*B C D"]:
        """What each channel reads of all."""
        return self.matrix @ x


class OLinearBlock(nn.Module):
    """Mixing over channels, then a feed-forward layer, each added and normalised."""

    def __init__(self, channels: int, width: int, hidden: int, dropout: float, mixes: bool) -> None:
        super().__init__()
        self.mix = NormLin(channels, dropout) if mixes else None
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B C D"]) -> Float[Tensor, "B C D"]:
        """[B, C, D] -> [B, C, D]."""
        v = self.value(x)
        x = self.norms[0](x + self.dropout(self.out(v if self.mix is None else self.mix(v))))
        mixed: Tensor = self.norms[1](x + self.dropout(self.feed(x)))
        return mixed


class OLinearTrunk(nn.Module):
    """The network up to what the last linear layer reads."""

    def __init__(
        self, shape: Shape, *, width: int, embedding: int, layers: int, dropout: float, mixes: bool = True
    ) -> None:
        super().__init__()
        context, horizon, self.width = shape.context, shape.horizon, width
        self.phi = nn.Parameter(torch.randn(embedding))
        self.rotation: Tensor
        self.rotation_ahead: Tensor
        self.register_buffer("rotation", torch.eye(context))
        self.register_buffer("rotation_ahead", torch.eye(horizon))
        self.before, self.after = (
            nn.Parameter(torch.zeros(embedding, context)),
            nn.Parameter(torch.zeros(embedding, horizon)),
        )
        self.embed = nn.Linear(embedding * context, width)
        self.blocks = nn.Sequential(
            *[OLinearBlock(shape.channels, width, width, dropout, mixes) for _ in range(layers)]
        )
        self.norm = nn.LayerNorm(width)
        self.ahead = nn.Linear(width, embedding * horizon)
        self.read = nn.Sequential(nn.Linear(embedding * horizon, width), nn.GELU())
        self.horizon = horizon

    def forward(self, past_values: Float[Tensor, "B T C"]) -> Float[Tensor, "B C D"]:
        """States of the channels."""
        x = past_values.transpose(1, 2) @ self.rotation.T  # x phi rotated is x rotated, times phi
        e = x[:, :, None] * self.phi[:, None] + self.before
        h = self.norm(self.blocks(self.embed(e.flatten(2))))
        y = self.ahead(h).unflatten(-1, (len(self.phi), self.horizon)) @ self.rotation_ahead + self.after
        states: Tensor = self.read(y.flatten(2))
        return states


@forecasts("olinear")
@dataclass(kw_only=True, eq=False)
class OLinear(NetworkForecaster):
    """`width` D, `embedding` d, layers and dropout as in the paper; `mixes`: whether channels are mixed at all."""

    PAPER: ClassVar[str] = "2505.08550"
    LOSS: ClassVar[str] = "decayed"

    width: int = 512
    embedding: int = 16
    layers: int = 2
    dropout: float = 0.0
    mixes: bool = True
    rate: float = 5e-4

    def trunk(self, shape: Shape) -> nn.Module:
        """The network up to what the last linear layer reads."""
        return OLinearTrunk(
            shape,
            width=self.width,
            embedding=self.embedding,
            layers=self.layers,
            dropout=self.dropout,
            mixes=self.mixes,
        )

    def prepare(self, trunk: nn.Module, windows: Windows, places: Int[np.ndarray, "N 2"]) -> None:
        """Both rotations, from the training part of the series."""
        for name, steps in (("rotation", self.context), ("rotation_ahead", self.horizon)):
            getattr(trunk, name).copy_(decorrelating(windows, steps))


def decorrelating(windows: Windows, steps: int) -> Float[Tensor, "n n"]:
    """Q: eigenvectors, as rows with falling eigenvalues, of the correlation of `steps` successive steps, the mean over channels.

    Rows x of such steps have uncorrelated x Q^T. Series without that many steps say nothing; if none has, Q is the identity.
    """
    total, n = torch.zeros(steps, steps, dtype=torch.float64), 0
    for series, length in enumerate(windows.lengths):
        learned = length - windows.held
        if learned < steps + 2:
            continue
        at = int(windows.starts[series])
        values = windows.values[at : at + learned, : windows.shape.targets].double()
        for channel in values.T:
            rows = channel.unfold(0, steps, 1)
            rows = rows - rows.mean(0)
            variance = rows.square().mean(0)
            if float(variance.min()) > _SMALLEST:
                total += (rows.T @ rows) / len(rows) / torch.outer(variance.sqrt(), variance.sqrt())
                n += 1
    if not n:
        return torch.eye(steps)
    _, vectors = torch.linalg.eigh(total / n)
    return vectors.flip(1).T.float().contiguous()
