"""Output heads over ordered bins of a number, with which others are compared: linear, a mixture of Gaussians, and quantiles.

The bins are m equal ones of [-1, 1] with centres z_b = -1 + (2 b + 1) / m. A target is the number of its bin, 0 to m - 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.learning import Head, LinearHead


def centres(bins: int) -> Float[Tensor, "m"]:
    """z_b of the formula above."""
    return -1 + (2 * torch.arange(check_integer(bins, "bins", 2)) + 1) / bins


def bins_of(values: Float[Tensor, "N"], bins: int) -> Int[Tensor, "N"]:
    """The bin of each number of [-1, 1]; what lies outside goes to the outermost ones. `InputError` for NaN."""
    if bool(values.isnan().any()):
        raise InputError("NaN has no bin; leave such rows out.")
    return ((values + 1) / 2 * bins).floor().long().clamp(0, bins - 1)


def smoothness(pmf: Float[Tensor, "N m"]) -> Float[Tensor, "N"]:
    """How rough each distribution over ordered bins is; lower is smoother. The Fourier head's paper (arXiv:2410.22269):

    sum over s = 1 .. 100 of  6 / (pi s)^2  ||p - g_s * p||_2        g_s: a Gaussian of s bins, wrapped around
    """
    m = pmf.shape[-1]
    away = torch.arange(m, device=pmf.device)
    distance = torch.minimum(away, m - away).to(pmf)
    spectrum = torch.fft.rfft(pmf)
    total = torch.zeros_like(pmf[..., 0])
    for s in range(1, 101):
        g = torch.exp(-0.5 * (distance / s) ** 2)
        smoothed = torch.fft.irfft(spectrum * torch.fft.rfft(g / g.sum()), n=m)
        total = total + 6 / (np.pi * s) ** 2 * (pmf - smoothed).norm(dim=-1)
    return total


class BinnedHead(Head):
    """A head whose outputs are logits of bins: cross-entropy, and how far its mean is off."""

    def loss(self, output: Float[Tensor, "N m"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(output, target)

    def metrics(self, output: Float[Tensor, "N m"], target: Int[Tensor, "N"]) -> dict[str, float]:
        """Cross-entropy in nats, the mean absolute error of the distribution's mean on [-1, 1], and how rough it is."""
        p, z = output.softmax(-1), centres(output.shape[-1]).to(output)
        error = (p @ z - z[target]).abs().mean()
        return {
            "nll": float(F.cross_entropy(output.detach(), target)),
            "mae": float(error),
            "roughness": float(smoothness(p).mean()),
        }


class LinearBins(LinearHead, BinnedHead):
    """W h + b: every bin by itself, whatever its neighbours say."""

    metrics = BinnedHead.metrics


@dataclass(frozen=True)
class MixtureSettings:
    """`width` of the states, `bins`, how many Gaussians, and the seed of the initial weights."""

    width: int
    bins: int
    components: int = 2
    seed: int = 0


class MixtureHead(BinnedHead):
    """A mixture of Gaussians (Bishop, 1994), whose density at the bins' centres is made to sum to 1."""

    Settings = MixtureSettings
    z: Tensor

    def __init__(self, settings: MixtureSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, 3 * settings.components, settings.seed)
        self.register_buffer("z", centres(settings.bins), persistent=False)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... m"]:
        """Log-probabilities of the bins."""
        weight, mean, scale = self.linear(states).chunk(3, -1)
        scale = F.softplus(scale) + 1e-2  # a component on one point would have an infinite density
        apart = (self.z - mean[..., None]) / scale[..., None]
        density = weight.log_softmax(-1)[..., None] - scale.log()[..., None] - apart.square() / 2
        return density.logsumexp(-2).log_softmax(-1)


@dataclass(frozen=True)
class QuantileSettings:
    """`width` of the states, the levels in (0, 1), rising, and the seed of the initial weights."""

    width: int
    levels: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75, 0.9)
    seed: int = 0

    def __post_init__(self) -> None:
        levels = tuple(self.levels)
        if not levels or min(levels) <= 0 or max(levels) >= 1 or list(levels) != sorted(set(levels)):
            raise InputError(f"levels are {list(levels)}; give rising numbers between 0 and 1.")
        object.__setattr__(self, "levels", levels)


class QuantileHead(Head):
    """Quantiles of a number that never cross: the lowest, then steps that are never negative.

    With y the target and q_t the quantile of level t, the loss is the mean of max(t (y - q_t), (t - 1)(y - q_t)) (Koenker and
    Bassett, 1978), in the target's unit.
    """

    Settings = QuantileSettings
    levels: Tensor

    def __init__(self, settings: QuantileSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, len(settings.levels), settings.seed)
        self.register_buffer("levels", torch.tensor(settings.levels), persistent=False)

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... Q"]:
        """The quantiles, rising."""
        first, steps = self.linear(states).split([1, len(self.settings.levels) - 1], -1)
        return torch.cat([first, F.softplus(steps)], -1).cumsum(-1)

    def loss(self, output: Float[Tensor, "N Q"], target: Float[Tensor, "N"]) -> Float[Tensor, ""]:
        """The mean quantile loss."""
        off = target.to(output)[:, None] - output
        return torch.maximum(self.levels * off, (self.levels - 1) * off).mean()

    def metrics(self, output: Float[Tensor, "N Q"], target: Float[Tensor, "N"]) -> dict[str, float]:
        """The quantile loss, and how far the share of targets below each quantile is from its level, at most."""
        below = (target[:, None] <= output).float().mean(0)
        return {
            "quantile_loss": float(self.loss(output, target)),
            "coverage_error": float((below - self.levels).abs().max()),
        }
