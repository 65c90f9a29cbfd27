"""Linear attention over the window of a series comes near least squares and does not beat it (#26).

arXiv:2510.09776. A window of n values of an AR(p) series is a Hankel matrix Hk [p + 1, m + 1], m = n - p: column j holds
x_j .. x_{j+p}, and the last column x_{n-p+1} .. x_n and 0. A layer without softmax, where M leaves out the last column,

    Hk + (1 / m) P Hk M Hk^T Q Hk            P, Q [p + 1, p + 1]; the forecast is the entry at the bottom right

With softmax, Hk^T Q Hk becomes its softmax over all columns, the last one too: M leaves that column out after the normalisation,
as in the reference, and nothing is divided by m, since the weights are an average already.

**Claim.** At finite n its risk is strictly above that of the linear predictor, by about B_p / n; fed with its own forecasts it
falls to the mean. **Theory** (by hand). With P = diag(0, .., 0, 1) and Q = diag(C^-1, 0), C the covariance of p values, the
forecast is (1 / m) sum_j x_{j+p} u_j^T C^-1 u_q, where u_j is p values from x_j on and u_q the last p. As n grows,
(1 / m) sum_j x_{j+p} u_j tends to the covariance of a value with those before it, and the forecast to the linear predictor.
**Refuted by** a trained layer below least squares on any seed, by a gap at n = p + 25 above .6 of that at n = p + 5 (p = 3), or
by roll-outs that stay finite and do not fall.

A seed is one series, and one model is trained on it, as in the released code: nothing is said of series of other coefficients.
Series are standardised. The layer is cubic in its input, so that fed with its forecasts it can also run to infinity: we count
how often. Of the others, with the root mean square r_h of the h-th forecasts, the contraction is (r_b / r_10)^(1 / (b - 10)), b
the last step up to 50 at which r_b > 1e-5. Below 1 they fall to the mean; below that of least squares faster than they should.
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

from manyheads.errors import InputError
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
    """Layers of the formula above, or with `softmax`: `P` and `Q` [layers, p + 1, p + 1], from .01 N(0, 1)."""

    def __init__(self, order: int, layers: int = 1, *, softmax: bool = False, seed: int = 0) -> None:
        super().__init__()
        check_integer(layers, "layers", 1)
        self.order, self.softmax = order, softmax
        generator = torch.Generator().manual_seed(seed)
        drawn = 0.01 * torch.randn(2, layers, order + 1, order + 1, generator=generator)
        self.P, self.Q = nn.Parameter(drawn[0].clone()), nn.Parameter(drawn[1].clone())

    def forward(self, history: Float[Tensor, "B n"]) -> Float[Tensor, "B"]:
        """The next value; a history is longer than the order."""
        tokens = hankel(history, self.order)
        for p, q in zip(self.P, self.Q, strict=True):
            seen = tokens[..., :-1]
            if self.softmax:
                weights = (tokens.transpose(1, 2) @ q @ tokens).softmax(1)
                tokens = tokens + p @ seen @ weights[:, :-1]
                continue
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
    softmax: bool = False,
    seed: int = 0,
    length: int = 1500,
    rate: float = 0.02,
) -> HankelAttention:
    """The layer trained on windows of `history` values and the next one."""
    (model,) = trained_hankels(
        [series], order, history, layers=layers, softmax=softmax, seeds=(seed,), length=length, rate=rate
    )
    return model


def trained_hankels(
    series: Sequence[Float[Tensor, "N"]],
    order: int,
    history: int,
    *,
    layers: int = 1,
    softmax: bool = False,
    seeds: Sequence[int] = (0,),
    length: int = 1500,
    rate: float = 0.02,
) -> list[HankelAttention]:
    """The same with several seeds at once, each with a series of its own."""
    check_integer(history, "history", order + 1, min(map(len, series)) - 1)
    models = [HankelAttention(order, layers, softmax=softmax, seed=seed) for seed in seeds]

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


def contraction(paths: Float[Tensor, "B steps"]) -> float:
    """By what factor a step shrinks forecasts (formula above); NaN without paths, or where they are 0 at step 10."""
    if paths.shape[1] <= 10:
        raise InputError(f"paths have {paths.shape[1]} steps; give more than 10.")
    size = paths[:, :50].square().mean(0).sqrt()
    large = (size[10:] > 1e-5).long().cumprod(0).sum()
    if not len(paths) or not large or not size[9] > 1e-5:
        return float("nan")
    return float((size[9 + large] / size[9]) ** (1 / large))


def _tried(more: int, layers: int = 1, *, softmax: bool = False) -> Together:
    def run(data: AutoregressiveSeries, seeds: Sequence[int]) -> list[dict[str, float]]:
        drawn = [data.draw(seed) for seed in seeds]
        cut, history = data.length * 7 // 10, data.order + more
        steps = 1500 if data.length >= 50_000 else 800
        models = trained_hankels(
            [series[:cut] for series, _ in drawn],
            data.order,
            history,
            layers=layers,
            softmax=softmax,
            seeds=seeds,
            length=steps,
        )
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
            for one in (model, HankelAttention(order, len(model.P), softmax=model.softmax, seed=seed))
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
        "contraction": contraction(stayed),
        "contraction of least squares": contraction(linear),
    }


def _end(paths: Float[Tensor, "B steps"]) -> float:
    """The root mean square of the last ten forecasts over that of a standardised series, 1; NaN where no path is left."""
    return float(paths[:, -10:].square().mean().sqrt())


def _smaller(n: int, than: int) -> Any:
    return lambda v: v[f"n = p + {n}", "gap"] / v[f"n = p + {than}", "gap"]


def _of(method: str, metric: str) -> Any:
    return lambda v: v[method, metric]


register_experiment(
    Experiment(
        "autoregression",
        (26,),
        "2510.09776",
        "Does linear attention over a window beat least squares, and where do its own forecasts lead it?",
        datasets=lambda quick: {
            f"AR({order})": AutoregressiveSeries(order, 20_000 if quick else 50_000)
            for order in ((3,) if quick else (3, 5, 7))
        },
        methods={
            "n = p + 5": _tried(5),
            "n = p + 25": _tried(25),
            "n = p + 50": _tried(50),
            "two layers, n = p + 25": _tried(25, 2),
            "softmax, n = p + 25": _tried(25, softmax=True),
        },
        baseline="n = p + 5",
        claims=(
            Claim(
                "the trained layer's loss is above least squares at every n",
                lambda v: min(v[f"n = p + {n}", "gap"] for n in (5, 25, 50)),
                at_least=0.0,
            ),
            Claim("the gap at n = 28 is below .6 of that at n = 8", _smaller(25, 5), at_most=0.6, on="AR(3)"),
            Claim("and at n = 53 below that at n = 28", _smaller(50, 25), at_most=1.0, on="AR(3)"),
            Claim("with p = 5 the gap falls from n = 10 to 30", _smaller(25, 5), at_most=1.0, on="AR(5)"),
            Claim("and to 55", _smaller(50, 25), at_most=1.0, on="AR(5)"),
            Claim("with p = 7 it falls from n = 12 to 32", _smaller(25, 5), at_most=1.0, on="AR(7)"),
            Claim("and to 57", _smaller(50, 25), at_most=1.0, on="AR(7)"),
            Claim("two layers do not beat it either", _of("two layers, n = p + 25", "gap"), at_least=0.0),
            Claim("nor does softmax", _of("softmax, n = p + 25", "gap"), at_least=0.0),
            Claim(
                "least squares is within 2 % of the noise",
                lambda v: abs(v["n = p + 25", "above the noise"]),
                at_most=0.02,
            ),
            Claim(
                "roll-outs from n = p + 25 that stay finite fall below .1 deviations in 100 steps",
                _of("n = p + 25", "end of roll-outs"),
                at_most=0.1,
            ),
            Claim("they contract", _of("n = p + 25", "contraction"), at_most=0.99),
            Claim(
                "at least as fast as those of least squares",
                lambda v: v["n = p + 25", "contraction"] - v["n = p + 25", "contraction of least squares"],
                at_most=0.0,
            ),
            Claim("no roll-out from n = p + 25 runs away", _of("n = p + 25", "ran away"), at_most=0.0),
        ),
        minutes=10,
        lower=frozenset({"loss", "gap"}),
        room="lab",
    )
)
