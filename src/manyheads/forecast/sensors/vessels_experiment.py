"""Simulated vessels (#81): the forecaster beside dead reckoning and plain LSTMs."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.evaluation.experiment import Claim, Experiment, Values, register_experiment
from manyheads.forecast.sensors.tracks import CHANNELS, dead_reckoning, globe, history_of, plane, plausible, tracks_of
from manyheads.forecast.sensors.vessels import PAPER, VesselForecaster, zero_linear

STEP, LENGTH, HORIZON, FASTEST = 60.0, 40, 6, 60.0
OVERS = (1, 2, 3, 6)  # steps over which dead reckoning takes the speed: the best of them is the baseline


def simulated(n: int, seed: int, *, turning: bool = True) -> tuple[pd.DataFrame, Float[np.ndarray, "n H 2"]]:
    """Messages of n vessels about once a minute, and where each one truly is in the HORIZON minutes after the last.

    Speeds of 8 to 20 knots, constant turns of up to 6 degrees a minute, places off by 20 m; a fifth of the messages is missing,
    and 5 % of the rest are off by 5 to 60 nautical miles. Vessels are between 60 degrees south and north, also at the date line.
    """
    rng, frames, truth = np.random.default_rng([81, seed]), [], []
    for vessel in range(n):
        start = (float(rng.uniform(-60, 60)), float(rng.uniform(-180, 180)))
        speed, heading = rng.uniform(8, 20) / 60, rng.uniform(0, 2 * np.pi)
        turn = np.deg2rad(rng.uniform(-6, 6)) if turning else 0.0
        minutes = np.arange(LENGTH) + rng.uniform(-0.2, 0.2, LENGTH)
        sent = rng.random(LENGTH) >= 0.2
        sent[[0, -1]] = True
        minutes = minutes[sent]
        miles = _arc(minutes, speed, heading, turn) + rng.normal(0, 20 / 1852, (len(minutes), 2))
        wrong = rng.random(len(minutes)) < 0.05
        wrong[-1] = False  # the last one is where the truth begins
        way, far = rng.uniform(0, 2 * np.pi, len(minutes)), rng.uniform(5, 60, len(minutes))
        miles += wrong[:, None] * far[:, None] * np.stack([np.sin(way), np.cos(way)], -1)
        place = globe(miles, start)
        frames.append(
            pd.DataFrame({"mmsi": vessel, "time": 60 * minutes, "latitude": place[:, 0], "longitude": place[:, 1]})
        )
        after = minutes[-1] + np.arange(1, HORIZON + 1)
        truth.append(globe(_arc(after, speed, heading, turn), start))
    return pd.concat(frames, ignore_index=True), np.stack(truth)


def _arc(minutes: Float[np.ndarray, "m"], speed: float, heading: float, turn: float) -> Float[np.ndarray, "m 2"]:
    """East and north after a constant turn, in nautical miles; `np.sinc` makes a turn of 0 a straight line."""
    chord = speed * minutes * np.sinc(turn * minutes / 2 / np.pi)
    way = heading + turn * minutes / 2
    return np.stack([chord * np.sin(way), chord * np.cos(way)], -1)


def miles_off(found: Float[np.ndarray, "n H 2"], truth: Float[np.ndarray, "n H 2"]) -> Float[np.ndarray, "n H"]:
    """The distance of places [latitude, longitude], in nautical miles."""
    out = []
    for one, true in zip(found, truth, strict=True):
        origin = (float(true[0, 0]), float(true[0, 1]))
        out.append(np.hypot(*(plane(one[:, 0], one[:, 1], origin) - plane(true[:, 0], true[:, 1], origin)).T))
    return np.stack(out)


def reckoned(frame: pd.DataFrame, step: float, horizon: int, fastest: float, over: int) -> Float[np.ndarray, "n H 2"]:
    """Dead reckoning from each vessel's plausible messages: latitude and longitude at the next grid times."""
    out = []
    for track in tracks_of(frame).values():
        kept = track.at(plausible(track, fastest))
        ahead = dead_reckoning(history_of(kept, len(kept) - 1, step, max(OVERS) + 1), horizon, over)
        out.append(globe(ahead, (float(kept.latitude[-1]), float(kept.longitude[-1]))))
    return np.stack(out)


class _Lstm(nn.Module):
    """A plain LSTM that reads `channels` of a history."""

    def __init__(self, channels: int, width: int, layers: int, horizon: int) -> None:
        super().__init__()
        self.channels = channels
        self.lstm, self.head = nn.LSTM(channels, width, layers, batch_first=True), zero_linear(width, 2 * horizon)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B H 2"]:
        out: Tensor = self.head(self.lstm(x[..., : self.channels])[0][:, -1]).unflatten(-1, (-1, 2))
        return out


class LstmVessels(VesselForecaster):
    """The same inputs, loss and training with an LSTM of about as many parameters."""

    def _network(self) -> nn.Module:
        return _Lstm(CHANNELS, 2 * self.width, self.layers, self.horizon)


class PlainVessels(VesselForecaster):
    """An LSTM of positions and changes alone, without masks and gaps, of messages as they came (with a high `fastest`)."""

    def _network(self) -> nn.Module:
        return _Lstm(4, 2 * self.width, self.layers, self.horizon)


def _learned(made: type[VesselForecaster], fastest: float) -> Callable[[tuple[bool, int, int], int], dict[str, float]]:
    def run(data: tuple[bool, int, int], seed: int) -> dict[str, float]:
        turning, n, steps = data
        model = made(horizon=HORIZON, step=STEP, fastest=fastest, steps=steps, seed=seed)
        model.fit(simulated(n, seed, turning=turning)[0])
        frame, truth = simulated(200, 1000 + seed, turning=turning)
        found = model.predict(frame)[["latitude", "longitude"]].to_numpy().reshape(truth.shape)
        off = miles_off(found, truth)
        assert model.net_ is not None
        size = sum(p.numel() for p in model.net_.parameters())
        return {"error": float(off.mean()), "last": float(off[:, -1].mean()), "parameters": float(size)}

    return run


def _reckoning(data: tuple[bool, int, int], seed: int) -> dict[str, float]:
    frame, truth = simulated(200, 1000 + seed, turning=data[0])
    off = [miles_off(reckoned(frame, STEP, HORIZON, FASTEST, over), truth) for over in OVERS]
    best = min(off, key=np.mean)
    return {"error": float(best.mean()), "last": float(best[:, -1].mean())}


def _share(of: str) -> Callable[[Values], float]:
    return lambda v: v["vessels", "error"] / v[of, "error"]


register_experiment(
    Experiment(
        "vessels",
        (81,),
        PAPER,
        "Where will vessels be, from messages with gaps and outliers?",
        datasets=lambda quick: {
            "turns": (True, 30 if quick else 300, 20 if quick else 1000),
            "straight": (False, 30 if quick else 300, 20 if quick else 1000),
        },
        methods={
            "dead reckoning": _reckoning,
            "plain lstm": _learned(PlainVessels, 1e9),
            "lstm, same inputs": _learned(LstmVessels, FASTEST),
            "vessels": _learned(VesselForecaster, FASTEST),
        },
        baseline="dead reckoning",
        claims=(
            Claim(
                "on turns its error is at most .7 of dead reckoning", _share("dead reckoning"), at_most=0.7, on="turns"
            ),
            Claim("and at most .9 of a plain LSTM", _share("plain lstm"), at_most=0.9, on="turns"),
            Claim(
                "on straight tracks it is no worse than 1.1 of dead reckoning",
                _share("dead reckoning"),
                at_most=1.1,
                on="straight",
            ),
            Claim("of an LSTM with the same inputs (ours)", _share("lstm, same inputs"), at_most=1.0, on="turns"),
        ),
        minutes=6,
        lower=frozenset({"error", "last"}),
        room="forecast",
    )
)
