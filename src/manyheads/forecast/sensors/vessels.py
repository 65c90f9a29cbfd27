"""Vessel AIS forecasting (#81): where vessels will be, from irregular, noisy messages.

Spadon et al., "Unfolding AIS transmission behavior for vessel movement modeling on noisy data leveraging machine learning",
arXiv:2202.13867 (IEEE Access 2023). With a vessel's history x on an even grid of times (`tracks.py`: positions, changes, masks,
gaps, speed, course as sine and cosine) and v its mean speed over the last three steps,

    u           GELU Conv1d(GELU Conv1d(x)), over time                          [B, T, D]
    s           the last states of a stacked bidirectional LSTM of FF(u)        [B, 2 D]
    forecast    p_0 + k v + scale R (W_k s + A_k x),   k = 1 .. m               nautical miles east and north of p_0
    loss        mean |(forecast - truth) / scale|^2 over what is known          scale: root mean square change of a step

The network reads directions relative to v, and R turns its answer back, so a track that is turned has a forecast that is turned.
With `oriented=False` directions are east and north, and R is 1: for vessels (or storms) to which the north matters.

Implausible jumps are dropped first. The backward pass of the LSTM runs over the history alone: nothing after p_0 is read. Vessels
that are held out to choose the best state share no message with those that train.

Departures. The forecast begins as dead reckoning (W and A are zero at first). A, a linear map of positions and changes, is ours:
without it the network was worse than dead reckoning on straight tracks. So are the axes along v. The forecast is for times on
the grid, not for those of messages that are yet to come. Each vessel is read by itself. The sizes are
ours: the paper's were not at hand.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.forecast.sensors.tracks import (
    CHANNELS,
    LONGEST_GAP,
    Track,
    dead_reckoning,
    future_of,
    globe,
    history_of,
    median_step,
    plausible,
    track_columns,
    tracks_of,
)
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import ADAM, fit, row_batches

KIND, PAPER = "vessels", "2202.13867"


class TrackNet(nn.Module):
    """Convolutions, a feed-forward layer and a bidirectional LSTM: histories to residuals of dead reckoning, in scales."""

    def __init__(self, history: int, width: int, layers: int, horizon: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList([nn.Conv1d(c, width, 3, padding=1) for c in (CHANNELS, width)])
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.lstm = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True)
        self.head, self.linear = zero_linear(2 * width, 2 * horizon), zero_linear(4 * history, 2 * horizon)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B H 2"]:
        """What the forecast is off dead reckoning."""
        u = x.mT
        for conv in self.convs:
            u = F.gelu(conv(u))
        _, (states, _) = self.lstm(self.feed(u.mT))
        out: Tensor = self.head(torch.cat([states[-2], states[-1]], -1)) + self.linear(x[..., :4].flatten(1))
        return out.unflatten(-1, (-1, 2))


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map that says 0 at first."""
    made = nn.Linear(inputs, outputs)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


@dataclass(kw_only=True, eq=False)
class VesselForecaster:
    """`history` grid times to the next `horizon`, `step` seconds apart (None: the median time between messages).

    `oriented` reads directions relative to the vessel's own, else north is up. No leg of a kept track is faster than `fastest`
    knots. A share `held` of the vessels chooses the best state (0: the last counts).
    """

    horizon: int = 6
    history: int = 16
    step: float | None = None
    fastest: float = 60.0
    oriented: bool = True
    width: int = 32
    layers: int = 2
    steps: int = 600
    rows: int = 64
    rate: float = 2e-3
    held: float = 0.1
    seed: int = 0

    net_: nn.Module | None = field(default=None, init=False, repr=False)
    step_: float = field(default=0.0, init=False)
    scale_: float = field(default=1.0, init=False)
    speed_: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        for name in ("horizon", "width", "layers", "steps", "rows"):
            check_integer(getattr(self, name), name, 1)
        check_integer(self.history, "history", 4)
        for name in ("fastest", "rate") if self.step is None else ("fastest", "rate", "step"):
            check_number(getattr(self, name), name, 0.0, above=True)
        check_number(self.held, "held", 0.0, 0.9)
        check_seed(self.seed)

    def fit(self, frame: pd.DataFrame, *, bar: Bar = Bar()) -> VesselForecaster:
        """Learn from a long frame of messages: vessel, time, latitude, longitude, and speed and course where there are any.

        `InputError` where no track is long enough for a history of two messages and one grid time after it.
        """
        tracks = self._kept(tracks_of(frame))
        self.step_ = self.step or median_step(tracks)
        order = np.random.default_rng(self.seed).permutation(len(tracks))
        names = [list(tracks)[i] for i in order]
        n = round(self.held * len(names))
        judged, learned = ([tracks[v] for v in part] for part in (names[:n], names[n:]))
        x, y = self._windows(learned)
        if not len(x):
            raise InputError(f"no vessel has two messages and one {self.step_:g} s later; give longer tracks.")
        self.scale_ = float(np.sqrt(np.mean(x[..., 2:4] ** 2) * 2)) or 1.0
        self.speed_ = float(np.sqrt(np.mean(x[..., 7] ** 2))) or 1.0
        self.net_ = self._built()
        held = self._batch(*self._windows(judged))
        settings = replace(
            ADAM, steps=self.steps, rows=self.rows, rate=self.rate, warmup=20, decay=0.5, clip=1.0, seed=self.seed
        )
        fit(
            self.net_,
            row_batches(self._batch(x, y), self.rows, self.seed),
            replace(settings, every=max(1, self.steps // 10)),
            loss=_loss,
            judge=(lambda: float(_loss(self._net, held))) if len(held["x"]) else None,
            bar=bar.step("vessels", self.steps),
            device="cpu",
        )
        self.net_.eval()
        return self

    def predict(self, frame: pd.DataFrame, n: int | None = None) -> pd.DataFrame:
        """A row a vessel and step: where each vessel of `frame` will be in the next n steps after its last plausible message.

        Columns are named and times written as in `frame`; longitudes are from -180 to 180. A vessel with one message stays.
        """
        net, n = self._net, check_integer(self.horizon if n is None else n, "n", 1, self.horizon)
        tracks = self._kept(tracks_of(frame))
        x = np.stack([history_of(t, len(t) - 1, self.step_, self.history) for t in tracks.values()])
        with torch.no_grad():
            residual = net(self._inputs(x)).double().numpy()
        miles = dead_reckoning(x, self.horizon) + self.scale_ * turned(residual, -self._heading(x))
        names, rows = track_columns(frame), []
        for (vessel, track), ahead in zip(tracks.items(), miles, strict=True):
            place = globe(ahead, (float(track.latitude[-1]), float(track.longitude[-1])))
            rows += [(vessel, track.time[-1] + self.step_ * (k + 1), *place[k]) for k in range(n)]
        out = pd.DataFrame(rows, columns=[names[what] for what in ("vessel", "time", "latitude", "longitude")])
        if not pd.api.types.is_numeric_dtype(frame[names["time"]]):
            dates = pd.to_datetime(out[names["time"]], unit="s", utc=True)
            aware = getattr(frame[names["time"]].dtype, "tz", None) is not None
            out[names["time"]] = dates if aware else dates.dt.tz_localize(None)
        return out

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings and weights into a new folder."""
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        about = {"step": self.step_, "scale": self.scale_, "speed": self.speed_}
        return save(folder, Card(KIND, PAPER, settings, self.seed, kind=KIND, about=about), self._net, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> VesselForecaster:
        """As it was saved; its forecasts are the same bits. `InputError` for another folder."""
        card, tensors = load(folder, KIND, "forecaster of vessels")
        try:
            made = cls(**card.settings)
            made.step_, made.scale_, made.speed_ = (float(card.about[name]) for name in ("step", "scale", "speed"))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} holds no forecaster of vessels that can be read ({error}).") from None
        made.net_ = made._built()
        fill(made.net_, tensors, folder)
        made.net_.eval()
        return made

    def _built(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self._network()

    def _network(self) -> nn.Module:
        return TrackNet(self.history, self.width, self.layers, self.horizon)

    def _kept(self, tracks: dict[Any, Track]) -> dict[Any, Track]:
        return {vessel: track.at(plausible(track, self.fastest)) for vessel, track in tracks.items()}

    def _windows(self, tracks: list[Track]) -> tuple[Float[np.ndarray, "N T 10"], Float[np.ndarray, "N H 2"]]:
        """A window that ends at each message from the second on, if any of its future is known."""
        x, y = [np.zeros((0, self.history, CHANNELS))], [np.zeros((0, self.horizon, 2))]
        for track in tracks:
            for last in range(1, len(track) - 1):
                future = future_of(track, last, self.step_, self.horizon)
                if np.isfinite(future).any():
                    x.append(history_of(track, last, self.step_, self.history)[None])
                    y.append(future[None])
        return np.concatenate(x), np.concatenate(y)

    def _batch(self, x: Float[np.ndarray, "N T 10"], y: Float[np.ndarray, "N H 2"]) -> dict[str, Tensor]:
        residual = (y - dead_reckoning(x, self.horizon)) / self.scale_
        return {"x": self._inputs(x), "y": torch.from_numpy(turned(residual, self._heading(x))).float()}

    def _heading(self, x: Float[np.ndarray, "N T 10"]) -> Float[np.ndarray, "N"]:
        """The angle of the mean speed of the last steps, from east, in radians; 0 where north is up."""
        east, north = dead_reckoning(x, 1)[:, 0].T
        return np.arctan2(north, east) if self.oriented else np.zeros(len(x))

    def _inputs(self, x: Float[np.ndarray, "N T 10"]) -> Float[Tensor, "N T 10"]:
        """Channels in units of about 1, whatever the speed of these vessels."""
        angle = self._heading(x)
        x = np.concatenate(
            [turned(x[..., :2], angle), turned(x[..., 2:4], angle), x[..., 4:8], turned(x[..., 8:], angle)], -1
        )
        units = [4 * self.scale_] * 2 + [self.scale_] * 2 + [1.0, LONGEST_GAP, 1.0, self.speed_, 1.0, 1.0]
        return torch.from_numpy(x / np.array(units)).float()

    @property
    def _net(self) -> nn.Module:
        if self.net_ is None:
            raise InputError("this VesselForecaster was not fitted; call fit(frame) first.")
        return self.net_


def turned(vectors: Float[np.ndarray, "N T 2"], angle: Float[np.ndarray, "N"]) -> Float[np.ndarray, "N T 2"]:
    """Vectors [east, north] in axes that are turned to the left by `angle`."""
    east, north, c, s = vectors[..., 0], vectors[..., 1], np.cos(angle)[:, None], np.sin(angle)[:, None]
    return np.stack([c * east + s * north, c * north - s * east], -1)


def _loss(net: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
    """The mean squared error over what is known of the future."""
    there = ~batch["y"].isnan()
    off = net(batch["x"]) - batch["y"].nan_to_num()
    return (off.square() * there).sum() / there.sum().clamp_min(1)
