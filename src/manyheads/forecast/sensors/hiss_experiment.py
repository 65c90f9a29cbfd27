"""A fast carrier whose amplitude is the derivative of a slow target (#69): HiSS beside a flat state space and a flat LSTM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.sensors.hiss import SENSORS, Hiss, HissSettings, SensorRegressor

CHUNK, STEPS = 10, 200
_INPUTS, _OUTPUTS = 2, 1


def carried(n: int, seed: int) -> tuple[Float[np.ndarray, "N T I"], Float[np.ndarray, "N n O"]]:
    """Two sensors see a carrier of .2 to .4 turns a step with amplitude A_i > 0 in chunk i, and noise of .3.

    The target is y_i = .95 y_(i-1) + A_i - 1; log A is a slow autoregression.
    """
    rng, chunks = np.random.default_rng([69, seed]), STEPS // CHUNK
    level, y = np.zeros((n, chunks)), np.zeros((n, chunks))
    for i in range(1, chunks):
        level[:, i] = 0.8 * level[:, i - 1] + 0.4 * rng.normal(size=n)
    amplitude = np.exp(level)
    for i in range(chunks):
        y[:, i] = 0.95 * (y[:, i - 1] if i else 0) + amplitude[:, i] - 1
    turn = rng.uniform(0.2, 0.4, (n, 1)) * np.arange(STEPS) + rng.uniform(size=(n, 1))
    wave = np.repeat(amplitude, CHUNK, 1) * np.sin(2 * np.pi * turn)
    shares = np.array([1.0, -0.5])
    x = wave[..., None] * shares + 0.3 * rng.normal(size=(n, STEPS, 2))
    return x, y[..., None]


class _Lstm(Hiss):
    """The flat baseline with an LSTM in the place of the state spaces."""

    def __init__(self, settings: HissSettings, inputs: int, outputs: int) -> None:
        super().__init__(replace(settings, flat=True), inputs, outputs)
        self.low = _LstmStack(2 * inputs, settings.width, outputs)  # type: ignore[assignment]


class _LstmStack(nn.Module):
    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(inputs, width, num_layers=2, batch_first=True), nn.Linear(width, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.lstm(x)[0])
        return out


class _LstmRegressor(SensorRegressor):
    def _built(self, inputs: int, outputs: int) -> Hiss:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            return _Lstm(self.settings, inputs, outputs)


def _size(network: Hiss) -> int:
    return sum(p.numel() for p in network.parameters())


def equal_width(settings: HissSettings, made: Callable[[HissSettings, int, int], Hiss] = Hiss) -> HissSettings:
    """The flat settings whose network has as many parameters as that of `settings`, as nearly as its width allows."""
    wanted = _size(Hiss(settings, _INPUTS, _OUTPUTS))
    choices = [replace(settings, flat=True, width=width) for width in range(4, 100)]
    return min(choices, key=lambda one: abs(_size(made(one, _INPUTS, _OUTPUTS)) - wanted))


def _learned(kind: str) -> Callable[[int, int], dict[str, float]]:
    def run(n: int, seed: int) -> dict[str, float]:
        settings = HissSettings(chunk=CHUNK, seed=seed)
        own = {
            "hiss": settings,
            "flat": equal_width(settings),
            "lstm": equal_width(settings, _Lstm),
        }[kind]
        model = (_LstmRegressor if kind == "lstm" else SensorRegressor)(own, SENSORS)
        model.fit(*carried(n, seed))
        x, y = carried(n, 1000 + seed)
        return {"mse": float(((model.predict(x) - y) ** 2).mean() / y.var()), "parameters": float(model.n_parameters)}

    return run


register_experiment(
    Experiment(
        "hiss",
        (69,),
        "2402.10211",
        "Does a hierarchy of state spaces read a fast carrier better than a flat one?",
        datasets=lambda quick: {"carrier": 16 if quick else 128},
        methods={"hiss": _learned("hiss"), "flat": _learned("flat"), "flat lstm": _learned("lstm")},
        baseline="flat",
        claims=(
            Claim(
                "its error is at most .85 of a flat state space with as many parameters",
                lambda v: v["hiss", "mse"] / v["flat", "mse"],
                at_most=0.85,
            ),
            Claim(
                "and of a flat LSTM with as many",
                lambda v: v["hiss", "mse"] / v["flat lstm", "mse"],
                at_most=0.85,
            ),
        ),
        minutes=9,
        lower=frozenset({"mse"}),
        room="forecast",
    )
)
