"""What is at the last position, where the answer is predicted: states, and what every head and MLP adds there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.readers import Activation, Reader, Site


class LastState(Reader):
    """Keeps one site's value at the last position: `values[l]` `[B, ...]`."""

    def __init__(self, site: Site, layers: Collection[int] | None = None) -> None:
        self.site, self.layers = site, layers  # type: ignore[misc]
        self.values: dict[int, Tensor] = {}

    def read(self, call: Activation) -> None:
        self.values[call.layer] = call.value[:, -1].detach().clone()


@dataclass(frozen=True)
class Writes:
    """What one layer adds to the residual stream at the last position: each head, the attention as a whole, the MLP.

    The heads and the output projection's bias sum to `attention`.
    """

    heads: Float[Tensor, "B H D"]
    attention: Float[Tensor, "B D"]
    mlp: Float[Tensor, "B D"]


def last_writes(model: HeadModel, inputs: Any, layers: Collection[int] | None = None) -> dict[int, Writes]:
    """The writes of `layers` (None: all), from one pass. `UnsupportedError` where norms follow each addition (BERT)."""
    layout = model.layout
    if layout.blocks[0].post_norms is not None:
        raise UnsupportedError(
            f"{type(model.plain).__name__} norms its residual stream after each addition, so no write reaches the answer as "
            "it is; use a model whose norms come before."
        )
    z, attention, mlp = (LastState(site, layers) for site in ("z", "attention_write", "mlp_write"))
    model.read(inputs, z, attention, mlp, keep=1)
    return {
        layer: Writes(_heads(model, layer, z.values[layer]), attention.values[layer], mlp.values[layer])
        for layer in sorted(z.values)
    }


def _heads(model: HeadModel, layer: int, z: Float[Tensor, "B H Dh"]) -> Float[Tensor, "B H D"]:
    """`z_h W_O[h]`, through the norm inside the branch where there is one (its denominator that of the sum)."""
    block, layout = model.layout.blocks[layer], model.layout
    projected = torch.einsum("bhd,hde->bhe", z, model.W_O(layer).detach().to(z))
    if block.attention_write is not block.projection:
        norm = FoldedNorm.of(block.attention_write, layout.hidden_size)
        bias = model.bias_O(layer)
        total = projected.sum(1) if bias is None else projected.sum(1) + bias.detach()
        projected = (norm.direction(projected) / norm.sigma(total)[:, None]).to(projected)
    return projected * layout.residual_scale
