"""`Head`: a module that reads a trunk's states, and its loss."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Head(nn.Module):
    """A module that reads a trunk's states: `forward` makes an output of them, `loss` compares it with a target.

    `settings` is a frozen dataclass of all that builds the head again: `type(head)(head.settings)` has the same shapes.
    """

    def __init__(self, settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def loss(self, output: Tensor, target: Tensor) -> Float[Tensor, ""]:
        """How far an output is from its target. Heads fill this in."""
        raise TypeError(f"{type(self).__name__} has no loss of its own; fill in its loss method.")

    def described(self) -> dict[str, Any]:
        """The settings as JSON, for a card."""
        return asdict(self.settings)


@dataclass(frozen=True)
class LinearSettings:
    """`width` of the states, `outputs`, and the seed of the initial weights."""

    width: int
    outputs: int
    seed: int = 0


class LinearHead(Head):
    """W h + b, a class by cross-entropy (nats). W is from N(0, 1 / width), b is zero at first."""

    def __init__(self, settings: LinearSettings, generator: torch.Generator | None = None) -> None:
        super().__init__(settings)
        draw = generator or torch.Generator().manual_seed(settings.seed)
        self.linear = nn.Linear(settings.width, settings.outputs)
        with torch.no_grad():
            self.linear.weight.copy_(torch.randn(self.linear.weight.shape, generator=draw) / settings.width**0.5)
            self.linear.bias.zero_()

    def forward(self, states: Float[Tensor, "... D"]) -> Float[Tensor, "... C"]:
        """Logits."""
        out: Tensor = self.linear(states)
        return out

    def loss(self, output: Float[Tensor, "N C"], target: Int[Tensor, "N"]) -> Float[Tensor, ""]:
        """Mean cross-entropy in nats."""
        return F.cross_entropy(output, target)
