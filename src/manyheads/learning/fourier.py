"""Fourier head (#19): a smooth density in place of a linear layer over ordered bins.

Gillman et al., arXiv:2410.22269. A linear layer gives N + 1 complex numbers a_l; their autocorrelation c_k = sum_j a_(j+k) a_j*
has the coefficients of a density that is never negative and integrates to 1 over [-1, 1]:

    p(z) = 1/2 + Re sum over k = 1 .. N of (c_k / c_0) exp(i pi k z)  =  |sum_l a_l exp(i pi l z)|^2 / (2 c_0)

It is read at the centres of m bins, made to sum to 1, and put out as log(p + 1e-5), so that it stands where a linear layer
stood. The ends meet: -1 and 1 are neighbours. We compute the squared modulus, which is at least 0 in any precision; the released
code sums the series. The loss adds  gamma 2 mean sum_k 2 pi^2 k^2 |c_k|^2  with c_k as they are, as that code does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

from manyheads.inputs import check_integer, check_number
from manyheads.learning.binned import BinnedHead, centres
from manyheads.learning.head import LinearHead

FLOOR = 1e-5  # under the logarithm, as in the paper


@dataclass(frozen=True)
class FourierSettings:
    """`width` of the states, `bins`, `frequencies` N (fewer is smoother), `gamma` of the regulariser.

    The first weights and biases are those of a linear layer divided by `shrink`, so that the first density is nearly flat in z.
    """

    width: int
    bins: int
    frequencies: int = 12
    gamma: float = 1e-6
    shrink: float = 100.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.frequencies, "frequencies", 1)
        check_number(self.gamma, "gamma", 0.0)
        check_number(self.shrink, "shrink", 0.0, above=True)


class FourierHead(BinnedHead):
    """Logits of m ordered bins, from a density of N frequencies (formula above)."""

    Settings = FourierSettings
    cos: Tensor
    sin: Tensor

    def __init__(self, settings: FourierSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, 2 * (settings.frequencies + 1), settings.seed)
        with torch.no_grad():
            self.linear.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(settings.seed)).div_(
                settings.width**0.5
            )
            for p in self.linear.parameters():
                p.div_(settings.shrink)
        for name, wave in zip(("cos", "sin"), waves(settings.frequencies, settings.bins), strict=True):
            self.register_buffer(name, wave, persistent=False)
        self.roughness: Tensor | None = None

    def density(self, states: Float[Tensor, "... D"], z: Float[Tensor, "Z"]) -> Float[Tensor, "... Z"]:
        """p(z) at any places of [-1, 1]."""
        angle = torch.pi * torch.arange(self.settings.frequencies + 1, device=z.device)[:, None] * z
        real, imaginary = self._coefficients(states)
        return _modulus(real, imaginary, angle.cos(), angle.sin()) / (2 * _power(real, imaginary))

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... m"]:
        """log(p + 1e-5) of the bins, nearly normalised."""
        coefficients = self.linear(states)
        if self.training and self.settings.gamma:
            self.roughness = _roughness(*coefficients.float().chunk(2, -1))
        return log_density(coefficients, self.cos, self.sin)

    def loss(self, output: Float[Tensor, "N m"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Cross-entropy in nats, and in training the regulariser."""
        loss, rough = super().loss(output, target), self.roughness
        self.roughness = None  # belongs to the outputs just made
        return loss if rough is None else loss + self.settings.gamma * rough

    def _coefficients(self, states: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = self.linear(states).float().chunk(2, -1)
        return real, imaginary


def _modulus(real: Tensor, imaginary: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """|sum_l a_l exp(i angle_l)|^2."""
    return (real @ cos - imaginary @ sin).square() + (real @ sin + imaginary @ cos).square()


def _power(real: Tensor, imaginary: Tensor) -> Tensor:
    """c_0."""
    return (real.square() + imaginary.square()).sum(-1, keepdim=True).clamp_min(1e-30)


def log_density(
    coefficients: Float[Tensor, "... K"], cos: Float[Tensor, "N m"], sin: Float[Tensor, "N m"]
) -> Float[Tensor, "... m"]:
    """log(p + 1e-5) of bins from 2 (N + 1) numbers, the real parts of a first; `cos` and `sin` are of pi l z at their centres."""
    real, imaginary = coefficients.float().chunk(2, -1)
    p = _modulus(real, imaginary, cos, sin)
    return torch.log(p / p.sum(-1, keepdim=True).clamp_min(1e-30) + FLOOR)


def waves(frequencies: int, bins: int) -> tuple[Float[Tensor, "N m"], Float[Tensor, "N m"]]:
    """Cos and sin of pi l z for l = 0 .. N at the centres z of m bins."""
    angle = torch.pi * torch.arange(frequencies + 1)[:, None] * centres(bins)
    return angle.cos(), angle.sin()


def autocorrelation(real: Float[Tensor, "... N"], imaginary: Float[Tensor, "... N"]) -> Complex[Tensor, "... N"]:
    """c_0 .. c_N as complex numbers, by an FFT that is long enough not to wrap around."""
    n = real.shape[-1]
    spectrum = torch.fft.fft(torch.complex(real, imaginary), n=2 * n)
    return torch.fft.ifft(spectrum.abs().square())[..., :n]


def _roughness(real: Tensor, imaginary: Tensor) -> Tensor:
    c = autocorrelation(real, imaginary)
    k = torch.arange(c.shape[-1], device=c.device)
    return 2 * (2 * np.pi**2 * k**2 * c.abs().square()).sum(-1).mean()
