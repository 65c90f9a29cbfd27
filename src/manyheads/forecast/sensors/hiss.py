"""HiSS (#69): a state space over each chunk of k raw sensor steps, and another one over the chunks.

"Hierarchical State Space Models for Continuous Sequence-to-Sequence Modeling", arXiv:2402.10211 (mean squared error, best flat
model -> best HiSS: .883 -> .566, .176 -> .132, .980 -> .901, .0382 -> .0265, .0319 -> .0251; on TotalCapture a flat LSTM is
better).

    u          [x, x_t - x_(t-1)], scaled by the training sequences, clipped to +- 5                  [B, T, 2 D_in]
    low        over each chunk by itself, its last step                                               [B, T / k, S]
    high       over the chunks, then a linear map                                                     [B, T / k, D_out]
    a layer    x + GLU(W GELU(SSM(LN x))), SSM a diagonal state space for each channel (S4D, arXiv:2206.11893):
               h_t = exp(d A) h_(t-1) + (exp(d A) - 1) / A u_t,  y_t = 2 Re(C h_t) + D u_t,  A complex, Re A < 0, N states

Output i reads the steps before (i + 1) k and no later one, exactly. The state space is computed in blocks: inside of one by a
triangular matrix, between them by the state, so that memory grows with T and not with its square.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.learning import Card, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit, row_batches

_BLOCK = 64  # steps of one triangular matrix
_CLIP = 5.0
SENSORS = TrainSettings(
    epochs=40,
    rows=16,
    rate=2e-3,
    warmup=20,
    optimizer="adamw",
    weight_decay=0.01,
    decay=0.3,
    floor=0.0,
    precision="fp32",
)
"""AdamW that falls to 0: shorter than the paper's 300 epochs of Adam at 1e-4."""


class DiagonalStateSpace(nn.Module):
    """A state space of N complex states for each of D channels."""

    def __init__(self, width: int, states: int) -> None:
        super().__init__()
        self.log_step = nn.Parameter(torch.empty(width).uniform_(math.log(1e-3), math.log(1e-1)))
        self.log_decay = nn.Parameter(torch.full((width, states), math.log(0.5)))
        self.turn = nn.Parameter(math.pi * torch.arange(states).float().expand(width, -1).clone())
        self.read = nn.Parameter(torch.randn(width, states, 2) * 0.5**0.5)
        self.skip = nn.Parameter(torch.randn(width))

    def forward(self, u: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What comes out at each step, from a state of zero at first."""
        out, state = [], None
        for block in u.split(_BLOCK, 1):
            y, state = self._block(block, state)
            out.append(y)
        return torch.cat(out, 1) + self.skip * u

    def _block(
        self, u: Float[Tensor, "B S D"], state: Complex[Tensor, "B D N"] | None
    ) -> tuple[Float[Tensor, "B S D"], Complex[Tensor, "B D N"]]:
        a = torch.complex(-self.log_decay.exp(), self.turn)
        exponent = a * self.log_step.exp()[:, None]
        steps = torch.arange(u.shape[1] + 1, device=u.device)
        power = (exponent[..., None] * steps).exp()  # [D, N, S + 1]
        drive, read = (power[..., 1] - 1) / a, torch.view_as_complex(self.read)
        kernel = 2 * torch.einsum("dn,dns->ds", read * drive, power[..., :-1]).real
        lag = steps[:-1, None] - steps[:-1]
        # Zeros above the diagonal, not small numbers: what comes later must not move a bit.
        matrix = kernel[:, lag.clamp_min(0)] * (lag >= 0)
        y = torch.einsum("dlj,bjd->bld", matrix, u)
        after = torch.einsum("bjd,dnj->bdn", u.to(power.dtype), drive[..., None] * power[..., :-1].flip(-1))
        if state is not None:
            y = y + 2 * torch.einsum("bdn,dnl->bld", state * read, power[..., 1:]).real
            after = after + state * power[..., -1]
        return y, after


class StateSpaceLayer(nn.Module):
    """Norm, state space, gate; added to the stream."""

    def __init__(self, width: int, states: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.space = nn.LayerNorm(width), DiagonalStateSpace(width, states)
        self.gate, self.dropout = nn.Linear(width, 2 * width), nn.Dropout(dropout)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The stream after it."""
        out: Tensor = x + self.dropout(F.glu(self.gate(F.gelu(self.space(self.norm(x))))))
        return out


class StateSpaceStack(nn.Module):
    """A linear map, layers, a linear map: [B, T, inputs] -> [B, T, outputs]."""

    def __init__(self, inputs: int, width: int, outputs: int, layers: int, states: int, dropout: float) -> None:
        super().__init__()
        parts = [StateSpaceLayer(width, states, dropout) for _ in range(layers)]
        self.layers = nn.Sequential(nn.Linear(inputs, width), *parts, nn.Linear(width, outputs))

    def forward(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T O"]:
        """What comes out at each step."""
        out: Tensor = self.layers(x)
        return out


@dataclass(frozen=True)
class HissSettings:
    """`chunk` k, widths and layers of the two levels, the `summary` of a chunk, N `states`; a `flat` one has a single level.

    The flat model has the layers of both at `width`, over all raw steps, and is read at every k-th.
    """

    chunk: int = 10
    width: int = 32
    layers: int = 2
    high_width: int = 32
    high_layers: int = 2
    summary: int = 32
    states: int = 16
    dropout: float = 0.0
    flat: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk", "width", "layers", "high_width", "high_layers", "summary", "states"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.dropout, "dropout", 0.0, 1.0)
        check_seed(self.seed)


class Hiss(nn.Module):
    """The network; `mean` and `std` [2 D_in] of what it reads are set when it is fitted. The loss of a batch is its call."""

    mean: Tensor
    std: Tensor

    def __init__(self, settings: HissSettings, inputs: int, outputs: int) -> None:
        super().__init__()
        self.settings, s = settings, settings
        self.register_buffer("mean", torch.zeros(2 * inputs))
        self.register_buffer("std", torch.ones(2 * inputs))
        if s.flat:
            layers = s.layers + s.high_layers
            self.low = StateSpaceStack(2 * inputs, s.width, outputs, layers, s.states, s.dropout)
        else:
            self.low = StateSpaceStack(2 * inputs, s.width, s.summary, s.layers, s.states, s.dropout)
            self.high = StateSpaceStack(s.summary, s.high_width, outputs, s.high_layers, s.states, s.dropout)

    def outputs(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B n O"]:
        """An output a chunk. `InputError` unless T is a whole number of chunks."""
        k = self.settings.chunk
        if x.shape[1] % k or not x.shape[1]:
            raise InputError(f"sequences have {x.shape[1]} steps, no whole number of chunks of {k}; cut or pad them.")
        u = self.scaled(x)
        if self.settings.flat:
            flat: Tensor = self.low(u)[:, k - 1 :: k]
            return flat
        chunks = u.unflatten(1, (-1, k))
        last = self.low(chunks.flatten(0, 1))[:, -1]
        out: Tensor = self.high(last.unflatten(0, chunks.shape[:2]))
        return out

    def scaled(self, x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T I2"]:
        """The steps and their first differences, scaled and clipped."""
        return ((with_differences(x) - self.mean) / self.std).clamp(-_CLIP, _CLIP)

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """The mean squared error over the targets that are there."""
        there = ~batch["y"].isnan()
        off = self.outputs(batch["x"]) - torch.where(there, batch["y"], 0.0)
        return (off.square() * there).sum() / there.sum().clamp_min(1)


def with_differences(x: Float[Tensor, "B T I"]) -> Float[Tensor, "B T I2"]:
    """[x, x_t - x_(t-1)]; the first difference is 0."""
    return torch.cat([x, torch.diff(x, dim=1, prepend=x[:, :1])], -1)


class SensorRegressor:
    """Fit, predict, save and load of `Hiss`: sequences of raw steps to targets that come every `chunk` steps."""

    def __init__(self, settings: HissSettings = HissSettings(), training: TrainSettings = SENSORS) -> None:
        self.settings, self.training = settings, training

    def fit(self, x: Float[np.ndarray, "N T I"], y: Float[np.ndarray, "N n O"], *, bar: Bar = Bar()) -> SensorRegressor:
        """Learn. Targets that are NaN do not count; inputs have to be finite. Split by sequences, not by windows of one."""
        k = self.settings.chunk
        if len(x) != len(y) or x.shape[1] != k * y.shape[1]:
            raise InputError(
                f"{x.shape[:2]} raw steps do not go with {y.shape[:2]} targets; give {k} steps for each target."
            )
        if not np.isfinite(x).all() or np.isinf(y).any() or np.isnan(y).all():
            raise InputError("inputs have to be finite, and targets finite or NaN, not all NaN; fill the gaps first.")
        rows = torch.from_numpy(np.asarray(x, dtype=np.float32))
        u = with_differences(rows).flatten(0, 1)
        flat = np.asarray(y, dtype=np.float64).reshape(-1, y.shape[-1])
        self.y_mean_, self.y_std_ = np.nanmean(flat, 0), np.maximum(np.nanstd(flat, 0), 1e-9)
        self.network_ = self._built(x.shape[-1], y.shape[-1])
        self.network_.mean.copy_(u.mean(0))
        self.network_.std.copy_(u.std(0).clamp_min(1e-6))
        scaled = torch.from_numpy(((y - self.y_mean_) / self.y_std_).astype(np.float32))
        settings = replace(self.training, seed=self.settings.seed).for_examples(len(x))
        assert settings.steps is not None
        batches = row_batches({"x": rows, "y": scaled}, settings.rows, settings.seed)
        fit(self.network_, batches, settings, bar=bar.step("hiss", settings.steps), device="cpu")
        self.network_.eval()
        return self

    @torch.no_grad()
    def predict(self, x: Float[np.ndarray, "N T I"]) -> Float[np.ndarray, "N n O"]:
        """The targets, in their unit."""
        out = self._fitted.outputs(torch.from_numpy(np.asarray(x, dtype=np.float32)))
        found: Float[np.ndarray, "N n O"] = out.double().numpy() * self.y_std_ + self.y_mean_
        return found

    @property
    def n_parameters(self) -> int:
        """How many numbers were learned."""
        return sum(p.numel() for p in self._fitted.parameters())

    @property
    def _fitted(self) -> Hiss:
        if not hasattr(self, "network_"):
            raise InputError("this SensorRegressor was not fitted; call fit(x, y) first.")
        return self.network_

    def _built(self, inputs: int, outputs: int) -> Hiss:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return Hiss(self.settings, inputs, outputs)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings and weights into a new folder."""
        sizes = {"inputs": len(self._fitted.mean) // 2, "outputs": len(self.y_mean_)}
        about: dict[str, Any] = sizes | {"y_mean": self.y_mean_.tolist(), "y_std": self.y_std_.tolist()}
        card = Card("hiss", "2402.10211", vars(self.settings), self.settings.seed, kind="sensors", about=about)
        return save(folder, card, self._fitted, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> SensorRegressor:
        """One as it was saved: its predictions are the same bits."""
        card, tensors = load(folder, "sensors", "sensor model")
        made = cls(HissSettings(**card.settings))
        made.network_ = made._built(card.about["inputs"], card.about["outputs"]).eval()
        made.network_.load_state_dict(tensors)
        made.y_mean_, made.y_std_ = np.array(card.about["y_mean"]), np.array(card.about["y_std"])
        return made
