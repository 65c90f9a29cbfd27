"""Is a Fourier head (#19, `learning/fourier.py`) better than a linear layer over ordered bins? The paper's claims, tried.

Gillman et al., arXiv:2410.22269: on the paper's toys, whose distributions are known, and on ten people's ratings of real words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.learning import LinearSettings, MultiHead, Trunk
from manyheads.learning.binned import (
    BinnedHead,
    LinearBins,
    MixtureHead,
    MixtureSettings,
    bins_of,
    centres,
    smoothness,
)
from manyheads.learning.fourier import FourierHead, FourierSettings
from manyheads.predict.trunks import mlp
from manyheads.predict.words import thirds, word_states
from manyheads.training import ADAM, row_batches

# Is it better than a linear layer? The paper's toys, whose distributions are known, and ten people's ratings of real words.


@dataclass(frozen=True)
class _Toy:
    """Inputs, targets in [-1, 1] (one or several a row), and the true distribution over bins of the last rows, the test's."""

    x: Float[Tensor, "N D"]
    y: Float[Tensor, "N K"]
    truth: Float[Tensor, "R m"]
    epochs: int
    judged: int = 0  # rows before the test's that judge: the best epoch counts


def _datasets(quick: bool) -> dict[str, Callable[[int], _Toy]]:
    epochs = 8 if quick else 100
    return {
        "mixture": lambda seed: _two_gaussians(seed, epochs),
        "beta": lambda seed: _two_betas(seed, epochs),
        "ratings": lambda seed: _ratings(seed, max(1, epochs // 16)),
    }


def _two_gaussians(seed: int, epochs: int, n: int = 3000, test: int = 1000) -> _Toy:
    """The target is near one of the two inputs, with a standard deviation of .1."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-0.8, 0.8, (n, 2))
    y = np.where(rng.random(n) < 0.5, x[:, 0], x[:, 1]) + rng.normal(0, 0.1, n)
    off = centres(50) - torch.tensor(x[-test:, :, None]).float()
    return _toy(x, y, torch.exp(-0.5 * (off / 0.1) ** 2).sum(1), epochs)


def _two_betas(seed: int, epochs: int, n: int = 3000, test: int = 1000) -> _Toy:
    """The target is plus or minus a draw of Beta(100 |x_0|, 100 |x_1|), which is sharp."""
    rng = np.random.default_rng(seed)
    first = rng.uniform(-0.8, 0.8, n)
    x = np.stack([first, rng.normal(first, 0.1)], 1)
    a, b = np.abs(100 * x).T
    y = rng.choice([-1, 1], n) * rng.beta(a, b)
    a, b = (torch.tensor(side[-test:, None]) for side in (a, b))
    z = centres(50).abs().double()
    return _toy(x, y, ((a - 1) * z.log() + (b - 1) * torch.log1p(-z)).softmax(-1).float(), epochs)


def _toy(x: Any, y: Any, truth: Tensor, epochs: int) -> _Toy:
    return _Toy(torch.tensor(x).float(), torch.tensor(y).float()[:, None], truth / truth.sum(-1, keepdim=True), epochs)


def _ratings(seed: int, epochs: int) -> _Toy:
    """From a word's state to what one of ten people says of it, -4 to 4; the truth is what all ten say."""
    _, states, ratings = word_states()
    training, other, test = thirds(len(states), seed)
    order = torch.cat([training, other, test])
    y = torch.tensor(ratings).float()[order]
    truth = functional.one_hot((y[-len(test) :] + 4).long(), 9).float().mean(1)
    return _Toy(states[order], y * 2 / 9, truth, epochs, len(other))


def _tried(make: Callable[[int, int, int], BinnedHead]) -> Callable[[Callable[[int], _Toy], int], dict[str, float]]:
    def run(data: Callable[[int], _Toy], seed: int) -> dict[str, float]:
        toy = data(seed)
        first, bins = len(toy.x) - len(toy.truth), toy.truth.shape[1]
        trunk = Trunk(mlp(toy.x.shape[1], 64, 32, seed=seed), frozen=False)
        heads = MultiHead(trunk, {"bin": make(32, bins, seed)})
        # Of several people's answers each epoch sees one.
        which = torch.randint(toy.y.shape[1], (first,), generator=torch.Generator().manual_seed(seed))
        y = bins_of(toy.y[torch.arange(first), which], bins)
        learned, epoch = first - toy.judged, (first - toy.judged) // 32
        rows, rest = ({"input": toy.x[part], "bin": y[part]} for part in (slice(learned), slice(learned, first)))
        settings = replace(ADAM, steps=toy.epochs * epoch, every=epoch if toy.judged else None, rate=1e-3)
        judge = (lambda: float(heads.losses(rest)["bin"])) if toy.judged else None
        heads.fit(row_batches(rows, 32, seed), settings, judge=judge)
        with torch.no_grad():
            p = heads({"input": toy.x[first:]})["bin"].softmax(-1)
        kl = torch.special.xlogy(toy.truth, toy.truth / (p + 1e-10)).sum(-1).mean()
        return {
            "kl": float(kl),
            "roughness": float(smoothness(p).mean()),
            "roughness of the truth": float(smoothness(toy.truth).mean()),
        }

    return run


register_experiment(
    Experiment(
        "fourier",
        (19,),
        "2410.22269",
        "Does a density of few frequencies fit ordered bins better than a linear layer?",
        datasets=_datasets,
        methods={
            "linear": _tried(lambda width, bins, seed: LinearBins(LinearSettings(width, bins, seed))),
            "fourier 12": _tried(lambda width, bins, seed: FourierHead(FourierSettings(width, bins, 12, seed=seed))),
            "fourier 4": _tried(lambda width, bins, seed: FourierHead(FourierSettings(width, bins, 4, seed=seed))),
            "two gaussians": _tried(lambda width, bins, seed: MixtureHead(MixtureSettings(width, bins, 2, seed))),
        },
        baseline="linear",
        claims=(
            Claim(
                "its divergence from the truth is at most .6 of a linear head's (paper: .171 to .238)",
                lambda v: v["fourier 12", "kl"] / v["linear", "kl"],
                at_most=0.6,
                on="mixture",
            ),
            Claim(
                "its roughness is within 15 % of the truth's",
                lambda v: abs(v["fourier 12", "roughness"] / v["fourier 12", "roughness of the truth"] - 1),
                at_most=0.15,
                on="mixture",
            ),
            Claim(
                "a sharp density needs more than 4 frequencies (paper: .56 to .19)",
                lambda v: v["fourier 4", "kl"] / v["fourier 12", "kl"],
                at_least=1.5,
                on="beta",
            ),
            Claim(
                "on what ten people say of real words it is no worse than a linear head",
                lambda v: v["fourier 4", "kl"] - v["linear", "kl"],
                at_most=0.0,
                on="ratings",
            ),
        ),
        minutes=8,
        lower=frozenset({"kl", "roughness"}),
    )
)
