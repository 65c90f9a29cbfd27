"""Heads that turn a series trunk's states into a forecast: a point for each step, or quantiles.

States are [B, C, D], a row a channel, or [B, C, n, D], which are flattened. Of the C channels the first V are targets.
With y [B, V, H] in the scale of the window, m its mask and s [B, V] the window's std, losses are means over what m counts:

    mse        s^2 (y - x)^2                       mae    s |y - x|         decayed    s (i + 1)^-0.5 |y - x|, i from 0 on
    quantile   s 2 max(t (y - q_t), (t - 1)(y - q_t)), the mean over levels t (Koenker and Bassett, 1978)

that is, in the scale of the series; with `windowed` s is 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_choice
from manyheads.learning import Head, LinearHead

Target = tuple[Float[Tensor, "B V H"], Float[Tensor, "B V H"], Float[Tensor, "B V"]]
TARGET = ("future", "counted", "scale")
LEVELS = tuple(round(0.1 * i, 1) for i in range(1, 10))


@dataclass(frozen=True)
class HorizonSettings:
    """`width` of the (flattened) states, steps, targets, loss, whether it is in the window's scale; the seed of the weights."""

    width: int
    horizon: int
    targets: int
    loss: str = "mse"
    windowed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice(self.loss, "loss", tuple(_LOSSES))


class HorizonHead(Head):
    """W h + b for each target: the H steps at once."""

    Settings = HorizonSettings

    def __init__(self, settings: HorizonSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.horizon, settings.seed)

    def forward(self, states: Float[Tensor, "B C *n D"]) -> Float[Tensor, "B V H"]:
        """The forecast in the scale of the window."""
        out: Tensor = self.linear(of_targets(states, self.settings.targets))
        return out

    def loss(self, output: Float[Tensor, "B V H"], target: Target) -> Float[Tensor, ""]:
        """The loss of the formulas above."""
        future, counted, scale = target
        size = torch.ones_like(scale) if self.settings.windowed else scale
        return mean_of_counted(_LOSSES[self.settings.loss](future - output, size[..., None]), counted)

    def metrics(self, output: Float[Tensor, "B V H"], target: Target) -> dict[str, float]:
        """Mean squared and mean absolute error, in the scale of the series."""
        future, counted, scale = target
        off = (future - output) * scale[..., None]
        return {"mse": float(mean_of_counted(off.square(), counted)), "mae": float(mean_of_counted(off.abs(), counted))}


@dataclass(frozen=True)
class QuantileHorizonSettings:
    """As `HorizonSettings`, with rising levels in (0, 1)."""

    width: int
    horizon: int
    targets: int
    levels: tuple[float, ...] = LEVELS
    windowed: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "levels", checked_levels(self.levels))


class QuantileHorizonHead(Head):
    """W h + b for each target, step and level. Where quantiles cross they are sorted when they are used, which costs no loss."""

    Settings = QuantileHorizonSettings
    levels: Tensor

    def __init__(self, settings: QuantileHorizonSettings) -> None:
        super().__init__(settings)
        self.linear = LinearHead.seeded(settings.width, settings.horizon * len(settings.levels), settings.seed)
        self.register_buffer("levels", torch.tensor(settings.levels), persistent=False)

    def forward(self, states: Float[Tensor, "B C *n D"]) -> Float[Tensor, "B V H Q"]:
        """The quantiles in the scale of the window."""
        out: Tensor = self.linear(of_targets(states, self.settings.targets))
        return out.unflatten(-1, (self.settings.horizon, len(self.settings.levels)))

    def loss(self, output: Float[Tensor, "B V H Q"], target: Target) -> Float[Tensor, ""]:
        """The mean quantile loss."""
        future, counted, scale = target
        size = torch.ones_like(scale) if self.settings.windowed else scale
        return mean_of_counted(pinball(future, output, self.levels).mean(-1) * size[..., None], counted)

    def metrics(self, output: Float[Tensor, "B V H Q"], target: Target) -> dict[str, float]:
        """The quantile loss in the scale of the series, and how far the share of values below a quantile is off, at most."""
        future, counted, scale = target
        below = [mean_of_counted((future <= output[..., q]).float(), counted) for q in range(len(self.levels))]
        return {
            "quantile_loss": float(
                mean_of_counted(pinball(future, output, self.levels).mean(-1) * scale[..., None], counted)
            ),
            "coverage_error": float((torch.stack(below) - self.levels).abs().max()),
        }


def pinball(
    y: Float[Tensor, "*B"], quantiles: Float[Tensor, "*B Q"], levels: Float[Tensor, "Q"]
) -> Float[Tensor, "*B Q"]:
    """2 max(t (y - q_t), (t - 1)(y - q_t)): of the median it is the absolute error."""
    off = y[..., None] - quantiles
    return 2 * torch.maximum(levels * off, (levels - 1) * off)


def checked_levels(levels: Any) -> tuple[float, ...]:
    """Levels as a tuple. `InputError` unless they are in (0, 1) and rise."""
    found = tuple(float(level) for level in levels)
    if not found or min(found) <= 0 or max(found) >= 1 or list(found) != sorted(set(found)):
        raise InputError(f"quantile levels are {list(found)}; give rising numbers between 0 and 1.")
    return found


def of_targets(states: Tensor, targets: int) -> Float[Tensor, "B V D"]:
    """The states of the targets alone, flattened to one a channel."""
    own = states[:, :targets]
    return own.flatten(2) if own.ndim > 3 else own


def mean_of_counted(values: Float[Tensor, "B V H"], counted: Float[Tensor, "B V H"]) -> Float[Tensor, ""]:
    """The mean over what was observed."""
    return (values * counted).sum() / counted.sum().clamp_min(1)


def _decayed(off: Tensor, size: Tensor) -> Tensor:
    """Later steps weigh less, as the ones that are harder to predict (OLinear, arXiv:2505.08550)."""
    steps = torch.arange(1, off.shape[-1] + 1, device=off.device)
    return off.abs() * size * steps.pow(-0.5)


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": lambda off, size: (off * size).square(),
    "mae": lambda off, size: off.abs() * size,
    "decayed": _decayed,
}
