"""Linear attention over the window of a series comes near least squares and does not beat it (#26).

arXiv:2510.09776. A window of n values of an AR(p) series is a Hankel matrix Hk [p + 1, m + 1], m = n - p: column j holds
x_j .. x_{j+p}, and the last column x_{n-p+1} .. x_n and 0. A layer without softmax, where M leaves out the last column,

    Hk + (1 / m) P Hk M Hk^T Q Hk            P, Q [p + 1, p + 1]; the forecast is the entry at the bottom right

**Claim.** At finite n its risk is strictly above that of the linear predictor, by about B_p / n; fed with its own forecasts it
falls to the mean. **Theory** (by hand). With P = diag(0, .., 0, 1) and Q = diag(C^-1, 0), C the covariance of p values, the
forecast is (1 / m) sum_j x_{j+p} u_j^T C^-1 u_q, where u_j is p values from x_j on and u_q the last p. As n grows,
(1 / m) sum_j x_{j+p} u_j tends to the covariance of a value with those before it, and the forecast to the linear predictor.
**Refuted by** a trained layer below least squares on any seed, or by a gap at n = 28 above .6 of that at n = 8 (p = 3).

A seed is one series, and one model is trained on it, as in the released code: nothing is said of series of other coefficients.
Series are standardised. The layer is cubic in its input, so that fed with its forecasts it can also run to infinity: we count
how often.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.evaluation import Claim, Experiment, Together, register_experiment
from manyheads.inputs import check_integer
from manyheads.training import ADAM, fit_seeds, generator_of

RUNAWAY = 100.0  # in standard deviations of the series


@dataclass(frozen=True)
class AutoregressiveSeries:
    """A stationary AR(`order`) series of `length`: coefficients uniform in [-.9, .9], all roots outside the unit circle."""

    order: int = 3
    length: int = 50_000

    def __post_init__(self) -> None:
        check_integer(self.order, "order", 1, 10)
        check_integer(self.length, "length", 1000)

    def coefficients(self, seed: int = 0) -> Float[np.ndarray, "p"]:
        """Of the previous value first."""
        rng = np.random.default_rng((seed, 0))
        while True:
            drawn = rng.uniform(-0.9, 0.9, self.order)
            if np.abs(np.roots([1.0, *-drawn])).max() < 1:  # the roots of the reversed polynomial: their inverses
                return drawn

    def draw(self, seed: int = 0) -> tuple[Float[Tensor, "N"], float]:
        """The series, standardised, and the variance of its noise, which no forecast can go below."""
        a, rng = self.coefficients(seed), np.random.default_rng((seed, 1))
        x = 0.05 * rng.standard_normal(self.length + 500)
        for t in range(self.order, len(x)):
            x[t] += a @ x[t - self.order : t][::-1]
        x = x[500:]  # what came before has forgotten its start
        return torch.from_numpy((x - x.mean()) / x.std()).float(), float(0.05**2 / x.var())


def hankel(history: Float[Tensor, "B n"], order: int) -> Float[Tensor, "B p1 m1"]:
    """The matrix of the formula above, with 0 for what comes next."""
    padded = torch.cat([history, torch.zeros_like(history[:, :1])], -1)
    return padded.unfold(-1, order + 1, 1).transpose(1, 2)


class HankelAttention(nn.Module):
    """Layers of the formula above: `P` and `Q` [layers, p + 1, p + 1], from .01 N(0, 1)."""

    def __init__(self, order: int, layers: int = 1, *, seed: int = 0) -> None:
        super().__init__()
        check_integer(layers, "layers", 1)
        self.order = order
        generator = torch.Generator().manual_seed(seed)
        drawn = 0.01 * torch.randn(2, layers, order + 1, order + 1, generator=generator)
        self.P, self.Q = nn.Parameter(drawn[0].clone()), nn.Parameter(drawn[1].clone())

    def forward(self, history: Float[Tensor, "B n"]) -> Float[Tensor, "B"]:
        """The next value; a history is longer than the order."""
        tokens = hankel(history, self.order)
        for p, q in zip(self.P, self.Q, strict=True):
            seen = tokens[..., :-1]
            tokens = tokens + p @ (seen @ seen.transpose(1, 2) / seen.shape[-1]) @ q @ tokens
        return tokens[:, -1, -1]


def built_hankel(covariance: Float[Tensor, "p p"]) -> HankelAttention:
    """The layer of the theory, for the covariance of p values in a row."""
    order = len(covariance)
    model = HankelAttention(order)
    with torch.no_grad():
        model.P.zero_()
        model.P[0, -1, -1] = 1
        model.Q.zero_()
        model.Q[0, :-1, :-1] = torch.linalg.inv(covariance)
    return model


def least_squares(series: Float[Tensor, "N"], order: int) -> Float[Tensor, "p"]:
    """The AR(p) fit without constant, of the oldest value first."""
    rows = series.unfold(0, order + 1, 1).double()
    found = torch.linalg.lstsq(rows[:, :-1], rows[:, -1:]).solution
    return found[:, 0].to(series.dtype)


def trained_hankel(
    series: Float[Tensor, "N"],
    order: int,
    history: int,
    *,
    layers: int = 1,
    seed: int = 0,
    length: int = 1500,
    rate: float = 0.02,
) -> HankelAttention:
    """The layer trained on windows of `history` values and the next one."""
    return trained_hankels([series], order, history, layers=layers, seeds=(seed,), length=length, rate=rate)[0]


def trained_hankels(
    series: Sequence[Float[Tensor, "N"]],
    order: int,
    history: int,
    *,
    layers: int = 1,
    seeds: Sequence[int] = (0,),
    length: int = 1500,
    rate: float = 0.02,
) -> list[HankelAttention]:
    """The same with several seeds at once, each with a series of its own."""
    check_integer(history, "history", order + 1, min(map(len, series)) - 1)
    models = [HankelAttention(order, layers, seed=seed) for seed in seeds]

    def draw(number: int, windows: Tensor, seed: int) -> Tensor:
        return windows[torch.randint(len(windows), (256,), generator=generator_of(seed, number))]

    def loss(module: Any, rows: Tensor) -> Float[Tensor, ""]:
        return (module(rows[:, :-1]) - rows[:, -1]).square().mean()

    windows = [one.unfold(0, history + 1, 1) for one in series]
    draws = [partial(draw, windows=own, seed=seed) for own, seed in zip(windows, seeds, strict=True)]
    fit_seeds(models, draws, replace(ADAM, steps=length, rate=rate, decay=0.5, clip=1.0), loss=loss)
    return [model.eval() for model in models]


def rolled_out(model: Any, history: Float[Tensor, "B n"], steps: int) -> Float[Tensor, "B steps"]:
    """Forecasts, each of which joins the history of the next. What runs beyond RUNAWAY becomes infinite and stays so."""
    check_integer(steps, "steps", 1)
    n = history.shape[1]
    with torch.no_grad():
        for _ in range(steps):
            found = model(history.clamp(-RUNAWAY, RUNAWAY))
            gone = (found.abs() > RUNAWAY) | ~found.isfinite() | history[:, -1].isinf()
            history = torch.cat([history, found.masked_fill(gone, torch.inf)[:, None]], -1)
    return history[:, n:]


def _tried(history: int, layers: int = 1) -> Together:
    def run(data: AutoregressiveSeries, seeds: Sequence[int]) -> list[dict[str, float]]:
        drawn = [data.draw(seed) for seed in seeds]
        cut = data.length * 7 // 10
        steps = 1500 if data.length >= 50_000 else 800
        starts = [series[:cut] for series, _ in drawn]
        models = trained_hankels(starts, data.order, history, layers=layers, seeds=seeds, length=steps)
        given = zip(models, drawn, seeds, strict=True)
        return [_measured(model, series, floor, cut, history, seed) for model, (series, floor), seed in given]

    return Together(run)


def _measured(
    model: HankelAttention, series: Float[Tensor, "N"], floor: float, cut: int, history: int, seed: int
) -> dict[str, float]:
    order = model.order
    weights = least_squares(series[:cut], order)
    rows = series[cut:].unfold(0, history + 1, 1)
    seen, true = rows[:, :-1], rows[:, -1]
    with torch.no_grad():
        loss, untrained = (
            float((one(seen) - true).square().mean())
            for one in (model, HankelAttention(order, len(model.P), seed=seed))
        )
    best = float((seen[:, -order:] @ weights - true).square().mean())
    paths = rolled_out(model, seen[:: len(seen) // 200], 100)
    stayed = paths[paths.isfinite().all(-1)]
    linear = rolled_out(lambda h: h[:, -order:] @ weights, seen[:: len(seen) // 200], 100)
    return {
        "loss": loss,
        "untrained": untrained,
        "least squares": best,
        "gap": loss / best - 1,
        "above the noise": best / floor - 1,
        "ran away": 1 - len(stayed) / len(paths),
        "end of roll-outs": _end(stayed),
        "end of least squares": _end(linear),
    }


def _end(paths: Float[Tensor, "B steps"]) -> float:
    """The root mean square of the last ten forecasts over that of a standardised series, 1; NaN where no path is left."""
    return float(paths[:, -10:].square().mean().sqrt())


register_experiment(
    Experiment(
        "autoregression",
        (26,),
        "2510.09776",
        "Does linear attention over a window beat least squares, and where do its own forecasts lead it?",
        datasets=lambda quick: {"AR(3)": AutoregressiveSeries(length=20_000 if quick else 50_000)},
        methods={
            "n = 8": _tried(8),
            "n = 28": _tried(28),
            "n = 53": _tried(53),
            "two layers, n = 28": _tried(28, 2),
        },
        baseline="n = 8",
        claims=(
            Claim(
                "the trained layer's loss is above least squares at every n",
                lambda v: min(v[f"n = {n}", "gap"] for n in (8, 28, 53)),
                at_least=0.0,
            ),
            Claim(
                "the gap at n = 28 is below .6 of that at n = 8",
                lambda v: v["n = 28", "gap"] / v["n = 8", "gap"],
                at_most=0.6,
            ),
            Claim(
                "and at n = 53 below that at n = 28",
                lambda v: v["n = 53", "gap"] / v["n = 28", "gap"],
                at_most=1.0,
            ),
            Claim("two layers do not beat it either", lambda v: v["two layers, n = 28", "gap"], at_least=0.0),
            Claim(
                "least squares is within 2 % of the noise",
                lambda v: abs(v["n = 28", "above the noise"]),
                at_most=0.02,
            ),
            Claim(
                "roll-outs from n = 28 that stay finite fall below .1 deviations in 100 steps",
                lambda v: v["n = 28", "end of roll-outs"],
                at_most=0.1,
            ),
            Claim("no roll-out from n = 28 runs away", lambda v: v["n = 28", "ran away"], at_most=0.0),
        ),
        minutes=3,
        lower=frozenset({"loss", "gap"}),
        room="lab",
    )
)
