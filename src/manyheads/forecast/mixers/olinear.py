"""OLinear (#50): linear layers in the domain where a window's steps are not correlated.

Yue et al., "OLinear: A Linear Model for Time Series Forecasting in Orthogonally Transformed Domain", arXiv:2505.08550, Table 2
(look-back 96, mean of the horizons 96 to 720, MSE / MAE): ETT .359 / .376, ECL .159 / .248, Weather .237 / .260, Traffic .451 /
.247.

    Q_i, Q_o       eigenvectors, as rows, of the correlation of the steps of a window, of T and of H steps; the mean over
                   channels, from the training part alone
    E              x phi, [B, C, d, T]; E Q_i^T along time, + a bias [C, 1, T]; flattened, W -> [B, C, D]
    a block        x = LN(x + W_o A W_v x), A = rows of softplus(W) over their sum, [C, C];    x = LN(x + FFN x)
    states         GELU(W_1 flat((W_2 LN(x), reshaped [d, H]) Q_o + a bias [C, 1, H])), which a linear head reads
    loss           mean_i (i + 1)^-0.5 |error|

We take Pearson's correlation where the released code divides the covariance by one of the two variances, and dropout before A's
rows are divided by their sums, so that they sum to 1. The learned gain and shift of RevIN are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.heads import HorizonHead, HorizonSettings
from manyheads.forecast.core.network import POINT, NetworkForecaster
from manyheads.forecast.core.windows import Shape, Windows
from manyheads.forecast.mixers.planted import channels_panel, lagged_leaders, squared_errors
from manyheads.forecast.mixers.softs import Softs
from manyheads.learning import Attached

_MOST = 1 << 16  # windows that a correlation is taken over
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
        self.feed = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Dropout(dropout), nn.Linear(hidden, width))
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
        self.before = nn.Parameter(torch.zeros(shape.channels, context))
        self.after = nn.Parameter(torch.zeros(shape.channels, horizon))
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
        h = self.norm(self.blocks(self._embedded(past_values.transpose(1, 2))))
        y = self.ahead(h).unflatten(-1, (len(self.phi), self.horizon)) @ self.rotation_ahead
        states: Tensor = self.read((y + self.after[:, None]).flatten(2))
        return states

    def _embedded(self, x: Float[Tensor, "B C T"]) -> Float[Tensor, "B C D"]:
        """W of the flattened E, which is linear in x: so phi goes into the weights, and E is never made."""
        weight = self.embed.weight.unflatten(-1, (len(self.phi), -1))  # [D, d, T]
        by_phi = torch.einsum("wdt,d->wt", weight, self.phi)
        bias = self.before @ weight.sum(1).T + self.embed.bias  # [C, D]
        return x @ self.rotation.T @ by_phi.T + bias


@dataclass(frozen=True)
class DroppedSettings(HorizonSettings):
    """As `HorizonSettings`; the share of the forecast's steps that are dropped in training."""

    dropout: float = 0.0


class DroppedHorizonHead(HorizonHead):
    """A `HorizonHead` whose forecast is 0, the window's mean, at random steps in training. That draws forecasts to the mean."""

    Settings = DroppedSettings

    def forward(self, states: Float[Tensor, "B C *n D"]) -> Float[Tensor, "B V H"]:
        """The forecast in the scale of the window."""
        return F.dropout(super().forward(states), self.settings.dropout, self.training)


@forecasts("olinear")
@dataclass(kw_only=True, eq=False)
class OLinear(NetworkForecaster):
    """`width` D, `embedding` d, layers and dropout as in the paper; `mixes`: whether channels are mixed at all.

    `output_dropout` drops steps of the point forecast itself, as the released code does at the rate of `dropout`.
    """

    PAPER: ClassVar[str] = "2505.08550"
    LOSS: ClassVar[str] = "decayed"

    width: int = 512
    embedding: int = 16
    layers: int = 2
    dropout: float = 0.0
    output_dropout: float = 0.0
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

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """The heads on the trunk; the point's with its dropout."""
        heads = super().attached(trunk, shape)
        if POINT in heads and self.output_dropout:
            settings = DroppedSettings(**vars(heads[POINT].head.settings), dropout=self.output_dropout)
            heads[POINT] = replace(heads[POINT], head=DroppedHorizonHead(settings))
        return heads

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
            rows = rows[:: -(-len(rows) // _MOST)]  # neighbours are nearly equal, and memory has an end
            rows = rows - rows.mean(0)
            variance = rows.square().mean(0)
            if float(variance.min()) > _SMALLEST:
                total += (rows.T @ rows) / len(rows) / torch.outer(variance.sqrt(), variance.sqrt())
                n += 1
    if not n:
        return torch.eye(steps)
    _, vectors = torch.linalg.eigh(total / n)
    return vectors.flip(1).T.float().contiguous()


def _lagged(made: Callable[..., NetworkForecaster]) -> Callable[[int, int], dict[str, float]]:
    def run(steps: int, seed: int) -> dict[str, float]:
        values = lagged_leaders(seed)
        panel, first = channels_panel(values), values.shape[1] * 4 // 5
        some = {"context": 48, "horizon": 24, "objective": "point", "levels": (), "patience": None}
        forecaster = made(**some, steps=steps, rate=1e-3, seed=seed)
        forecaster.fit_panel(panel.without_last(values.shape[1] - first), validation=0)
        leaders, copies = np.split(squared_errors(forecaster, panel, first).mean(0), 2)
        return {"mse of copies": float(copies.mean()), "mse of leaders": float(leaders.mean())}

    return run


register_experiment(
    Experiment(
        "lagged_leaders",
        (50, 56),
        "2505.08550",
        "Of eight channels four follow the others 24 steps later: who forecasts them?",
        datasets=lambda quick: {"AR(.5)": 60 if quick else 1000},
        methods={
            "olinear unmixed": _lagged(partial(OLinear, width=64, mixes=False)),
            "olinear": _lagged(partial(OLinear, width=64)),
            "softs": _lagged(partial(Softs, width=64, core=32, hidden=64)),
            "linear": _lagged(LinearForecaster),
        },
        baseline="olinear unmixed",
        claims=(
            Claim(
                "OLinear's MSE on the copies is at most .4 of that without mixing",
                lambda v: v["olinear", "mse of copies"] / v["olinear unmixed", "mse of copies"],
                at_most=0.4,
            ),
            Claim(
                "one core cannot copy from a certain channel: SOFTS's MSE on the copies is at least twice OLinear's",
                lambda v: v["softs", "mse of copies"] / v["olinear", "mse of copies"],
                at_least=2.0,
            ),
            Claim(
                "leaders are forecast by nobody: mixing improves them by less than 5 %",
                lambda v: v["olinear", "mse of leaders"] / v["olinear unmixed", "mse of leaders"],
                at_least=0.95,
            ),
        ),
        minutes=6,
        lower=frozenset({"mse of copies", "mse of leaders"}),
        room="forecast",
    )
)
