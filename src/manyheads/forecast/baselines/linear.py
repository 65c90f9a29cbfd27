"""One linear layer from the context to the horizon, the same for every channel: what networks have to beat.

Zeng et al., "Are Transformers Effective for Time Series Forecasting?", arXiv:2205.13504 (NLinear, in the window's
own scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.forecast.core.forecaster import forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.windows import Shape


class Values(nn.Module):
    """The scaled values of the context themselves, as states of the channels, times one learned number."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.width = context
        self.size = nn.Parameter(
            torch.ones(1)
        )  # a trunk without a parameter could not be trained with a head that stops

    def forward(self, past_values: Float[Tensor, "B T C"]) -> Float[Tensor, "B C T"]:
        """[B, T, C] -> [B, C, T]."""
        return self.size * past_values.transpose(1, 2)


@forecasts("linear")
@dataclass(kw_only=True, eq=False)
class LinearForecaster(NetworkForecaster):
    """Channels share the layer and do not see each other."""

    PAPER: ClassVar[str] = "2205.13504"

    context: int = 336

    def trunk(self, shape: Shape) -> nn.Module:
        """The values of the context."""
        return Values(shape.context)
