"""Heads that give a whole distribution of each step: logits of ordered bins, each by itself or from a density of few frequencies.

The m bins are equal ones of [-span, span] in the window's scale, so of so many standard deviations of the context; what lies
outside goes to the outermost ones. A "fourier" head (#19, arXiv:2410.22269) has a density of N frequencies for each target and
step, which is smooth; "bins" has a number for each bin. Quantiles are those of the distribution, linear inside a bin.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.forecast.core.heads import Target, mean_of_counted, of_targets
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.learning import Head, LinearHead
from manyheads.learning.binned import bins_of
from manyheads.learning.fourier import log_density, waves

KINDS = ("fourier", "bins")


@dataclass(frozen=True)
class DensitySettings:
    """`width` of the (flattened) states, steps, targets, the kind, bins, span, frequencies (of "fourier"), the weights' seed."""

    width: int
    horizon: int
    targets: int
    kind: str = "fourier"
    bins: int = 128
    span: float = 5.0
    frequencies: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.kind, "kind", KINDS)
        check_integer(self.bins, "bins", 2)
        check_integer(self.frequencies, "frequencies", 1)
        check_number(self.span, "span", 0.0, above=True)


class DensityHorizonHead(Head):
    """Logits of the bins of each target and step; cross-entropy in nats."""

    Settings = DensitySettings
    cos: Tensor
    sin: Tensor

    def __init__(self, settings: DensitySettings) -> None:
        super().__init__(settings)
        self.each = 2 * (settings.frequencies + 1) if settings.kind == "fourier" else settings.bins
        self.linear = LinearHead.seeded(settings.width, settings.horizon * self.each, settings.seed)
        for name, wave in zip(("cos", "sin"), waves(settings.frequencies, settings.bins), strict=True):
            self.register_buffer(name, wave, persistent=False)

    def forward(self, states: Float[Tensor, "B C *n D"]) -> Float[Tensor, "B V H m"]:
        """Log-probabilities, nearly normalised."""
        out = self.linear(of_targets(states, self.settings.targets)).unflatten(-1, (self.settings.horizon, self.each))
        return log_density(out, self.cos, self.sin) if self.settings.kind == "fourier" else out.log_softmax(-1)

    def loss(self, output: Float[Tensor, "B V H m"], target: Target) -> Float[Tensor, ""]:
        """Mean cross-entropy of what was observed, in nats."""
        future, counted, _ = target
        number = bins_of((future / self.settings.span).flatten(), self.settings.bins).reshape(future.shape)
        nats = -output.log_softmax(-1).gather(-1, number[..., None])[..., 0]
        return mean_of_counted(nats, counted)

    def quantiles(self, output: Float[Tensor, "B V H m"], levels: tuple[float, ...]) -> Float[Tensor, "B V H Q"]:
        """The quantiles of those levels, in the window's scale."""
        if not levels:
            raise InputError("there are no levels to give quantiles of; name some.")
        cdf = output.softmax(-1).cumsum(-1)
        wanted = (
            torch.tensor(levels, dtype=cdf.dtype, device=cdf.device).expand(*cdf.shape[:-1], len(levels)).contiguous()
        )
        at = torch.searchsorted(cdf.contiguous(), wanted).clamp_max(self.settings.bins - 1)
        high = cdf.gather(-1, at)
        low = torch.where(at > 0, cdf.gather(-1, (at - 1).clamp_min(0)), torch.zeros_like(high))
        share = ((wanted - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        place: Tensor = (at + share) / self.settings.bins
        return (2 * place - 1) * self.settings.span
