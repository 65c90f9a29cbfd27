"""CARIL (#107): a number is predicted twice, by regression and as a class over bins; confidence decides which is believed.

Arai et al., arXiv:2503.00783, for steering. With r the regression, p the probabilities of m bins of [-1, 1], c = max p with its
bin b, and H the entropy of p in nats, the answer is

    r                                            where c >= .9 and r lies in bin b or beside it
    the mean of 10 uniform draws from bin b      where c >= .9 and r lies farther off
    r                                            where c < .5 and H > 1.5: nothing is corrected there
    the mean of 10 draws from N(r, v)            elsewhere, v the variance of the m probabilities (not of steering)

With `draws=0` it is what the draws are on average: the centre of b, and r. Targets are scaled to [-1, 1] by `Span`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer
from manyheads.learning import Attached, LinearSettings, MultiHead, Pool, ScalarHead, Trunk
from manyheads.learning.binned import LinearBins, bins_of, centres
from manyheads.learning.trunk import Layer
from manyheads.predict.trunks import mlp
from manyheads.predict.words import thirds, word_states
from manyheads.training import ADAM, row_batches


@dataclass(frozen=True)
class Span:
    """From a target's unit to [-1, 1] and back: `low` and `high` are its ends, and what lies beyond is clipped."""

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise InputError(f"a scale goes from {self.low} to {self.high}; give a lower and a higher end.")

    def __call__(self, values: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """To [-1, 1]."""
        return ((values - self.low) / (self.high - self.low) * 2 - 1).clamp(-1, 1)

    def back(self, scaled: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """To the target's unit."""
        return (scaled + 1) / 2 * (self.high - self.low) + self.low


def confidence_heads(
    trunk: Trunk, width: int, bins: int = 11, *, layer: Layer = -1, pool: Pool = "mean", seed: int = 0
) -> MultiHead:
    """The two heads, "number" (scaled to [-1, 1]) and "bin" (`bins_of` the same), each with half of the loss, as in the paper."""
    number = ScalarHead(LinearSettings(width, 1, seed))
    classes = LinearBins(LinearSettings(width, check_integer(bins, "bins", 2), seed + 1))
    where: dict[str, Any] = {"layer": layer, "pool": pool, "weight": 0.5}
    return MultiHead(trunk, {"number": Attached(number, **where), "bin": Attached(classes, **where)})


@dataclass(frozen=True)
class Correction:
    """The rules above. `sure` and `unsure` bound the confidence, `entropy` is in nats."""

    sure: float = 0.9
    unsure: float = 0.5
    entropy: float = 1.5
    draws: int = 10
    seed: int = 0

    def __call__(self, number: Float[Tensor, "N"], p: Float[Tensor, "N m"]) -> Float[Tensor, "N"]:
        """The answers, on [-1, 1], from the regression and the bins' probabilities."""
        rule, draw = self.rule(number, p), torch.Generator().manual_seed(self.seed)
        best, bins = p.argmax(-1), p.shape[-1]
        centre = centres(bins)[best]
        spread = p.var(-1, unbiased=False).sqrt()
        if self.draws:
            uniform = (2 * torch.rand(self.draws, len(p), generator=draw) - 1) / bins
            centre = centre + uniform.mean(0)
            around = number + spread * torch.randn(self.draws, len(p), generator=draw).mean(0)
        else:
            around = number
        out = torch.where(rule == 1, centre, number)
        return torch.where(rule == 3, around, out)

    def rule(self, number: Float[Tensor, "N"], p: Float[Tensor, "N m"]) -> Float[Tensor, "N"]:
        """Which of the four rules holds, 0 to 3."""
        confidence, best = p.max(-1)
        near = (bins_of(number, p.shape[-1]) - best).abs() <= 1
        entropy = -torch.special.xlogy(p, p).sum(-1)
        lost = (confidence < self.unsure) & (entropy > self.entropy)
        rule = torch.where(lost, 2, 3)
        return torch.where(confidence >= self.sure, torch.where(near, 0, 1), rule).float()


def flipped(number: Float[Tensor, "N"], bins: Tensor, count: int) -> tuple[Float[Tensor, "N"], Tensor]:
    """The targets of a mirrored picture: the number changes its sign, and the bin is the one opposite."""
    return -number, count - 1 - bins


# Does the class correct the number?

Outputs = tuple[Tensor, Tensor, Tensor]  # the regression, the bins' probabilities, and the truth, all on [-1, 1]


def _steering(seed: int, n: int = 5000) -> Outputs:
    """Steering from N(0, .35); one regression in ten is far off; the class is right and sure 95 times of 100."""
    draw = torch.Generator().manual_seed(seed)
    truth = (0.35 * torch.randn(n, generator=draw)).clamp(-1, 1)
    number = truth + 0.03 * torch.randn(n, generator=draw)
    gross = (torch.rand(n, generator=draw) * 0.5 + 0.5) * torch.randn(n, generator=draw).sign()
    number = torch.where(torch.rand(n, generator=draw) < 0.1, truth + gross, number).clamp(-1, 1)
    best, right = bins_of(truth, 11), torch.rand(n, generator=draw) < 0.95
    said = torch.where(right, best, (best + torch.where(best < 9, 2, -2)).clamp(0, 10))
    sure = torch.where(right, 0.95, 0.6)
    p = ((1 - sure) / 10)[:, None].repeat(1, 11).scatter(1, said[:, None], sure[:, None])
    return number, p, truth


@cache
def _ratings(seed: int, epochs: int) -> Outputs:
    """From a word's state to its mean rating by ten people."""
    _, states, ratings = word_states()
    training, _, test = thirds(len(states), seed)
    truth = Span(-4, 4)(torch.tensor(ratings).float().mean(1))
    heads = confidence_heads(Trunk(mlp(384, 128, seed=seed), frozen=False), 128, seed=seed)
    data = {"input": states[training], "number": truth[training], "bin": bins_of(truth[training], 11)}
    steps = epochs * (len(training) // 64)
    heads.fit(row_batches(data, 64, seed), replace(ADAM, steps=steps, rate=1e-3, decay=0.5))
    with torch.no_grad():
        out = heads({"input": states[test]})
    return out["number"][:, 0].clamp(-1, 1), out["bin"].softmax(-1), truth[test]


def _answers(answer: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Callable[[int], Outputs], int], dict[str, float]]:
    def run(data: Callable[[int], Outputs], seed: int) -> dict[str, float]:
        number, p, truth = data(seed)
        sure = p.max(-1).values >= 0.9
        return {
            "error": float((answer(number, p) - truth).abs().mean()),
            "share that is sure": float(sure.float().mean()),
        }

    return run


def _ratio(method: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda values: values[method, "error"] / values["regression", "error"]


register_experiment(
    Experiment(
        "confidence",
        (107,),
        "2503.00783",
        "Does a class over bins tell when a regression is wrong?",
        datasets=lambda quick: {"steering": _steering, "ratings": lambda seed: _ratings(seed, 2 if quick else 20)},
        methods={
            "regression": _answers(lambda number, p: number),
            "corrected": _answers(Correction()),
            "corrected, no draws": _answers(Correction(draws=0)),
            "mean of the bins": _answers(lambda number, p: p @ centres(p.shape[-1])),
        },
        baseline="regression",
        claims=(
            Claim(
                "the error falls to at most half where one regression in ten is far off",
                _ratio("corrected"),
                at_most=0.5,
                on="steering",
            ),
            Claim("the error of real ratings does not rise", _ratio("corrected"), at_most=1.0, on="ratings"),
            Claim(
                "the draws are of use",
                lambda v: v["corrected", "error"] - v["corrected, no draws", "error"],
                at_most=0.0,
            ),
        ),
        minutes=1,
        lower=frozenset({"error"}),
    )
)
