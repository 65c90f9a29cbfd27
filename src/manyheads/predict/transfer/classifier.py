"""Classified examples, and a classifier made of a trunk and a linear head: what the methods of this folder tune."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.learning import LinearHead, Pool, Trunk
from manyheads.model.headmodel import HeadModel


@dataclass(frozen=True)
class Classified:
    """Examples with their classes. `inputs` is what the trunk takes: a tensor, or a mapping of tensors, a row an example."""

    inputs: Any
    labels: Int[Tensor, "N"]

    def __post_init__(self) -> None:
        first = next(iter(self.inputs.values())) if isinstance(self.inputs, Mapping) else self.inputs
        if len(first) != len(self.labels) or not len(self.labels):
            raise InputError(
                f"there are {len(first)} inputs and {len(self.labels)} labels; give one label for each input."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Int[Tensor, "R"] | slice) -> Classified:
        """Some of the examples."""
        whole = self.inputs
        some = {k: v[index] for k, v in whole.items()} if isinstance(whole, Mapping) else whole[index]
        return Classified(some, self.labels[index])


class TrunkClassifier(nn.Module):
    """A trunk's pooled state phi(x) at one layer, and a linear head on it: trained, saved and moved together."""

    def __init__(
        self, model: HeadModel | nn.Module, head: LinearHead, layer: int | str = -1, pool: Pool = "mean"
    ) -> None:
        super().__init__()
        trunk = Trunk(model, frozen=False)
        self.trunk, self.head, self._states = trunk.module, head, lambda inputs: trunk.states(inputs, layer, pool)

    def features(self, inputs: Any) -> Float[Tensor, "B D"]:
        """phi(x), with gradients."""
        phi: Tensor = self._states(inputs)
        return phi

    def forward(self, inputs: Any) -> Float[Tensor, "B C"]:
        """Logits."""
        logits: Tensor = self.head(self.features(inputs))
        return logits

    @torch.no_grad()
    def all_features(self, data: Classified, rows: int = 64) -> Float[Tensor, "N D"]:
        """Phi of all examples without dropout, a few at a time."""
        mode = self.training
        self.eval()
        parts = [self.features(data.rows(slice(i, i + rows)).inputs).cpu() for i in range(0, len(data), rows)]
        self.train(mode)
        return torch.cat(parts)
