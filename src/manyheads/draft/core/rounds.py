"""The data that the decoding loop, a drafter and a growth exchange in one round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from manyheads.draft.core.trunk import DraftTrunk


@dataclass(frozen=True)
class Accepted:
    """What was accepted since the drafter's last call.

    Row b has the states `hidden[b, j]` where `valid[b, j]`, of the tokens at `positions[b, j]`, in order; `tokens[b, j]` is the
    token after each. The last valid column is `last[b]`, and the token after it is the root. `text[b]` are all tokens of a row,
    root included.
    """

    hidden: Float[Tensor, "B A D"]
    tokens: Int[Tensor, "B A"]
    positions: Int[Tensor, "B A"]
    valid: Bool[Tensor, "B A"]
    last: Int[Tensor, "B"]
    text: Sequence[list[int]]

    @property
    def rows(self) -> Int[Tensor, "B"]:
        """0..B-1, to index one column a row."""
        return torch.arange(len(self.last), device=self.last.device)

    @property
    def state(self) -> Float[Tensor, "B D"]:
        """The hidden state from which the trunk made the root."""
        return self.hidden[self.rows, self.last]

    @property
    def root(self) -> Int[Tensor, "B"]:
        """The newest accepted token, which the trunk has not read yet."""
        return self.tokens[self.rows, self.last]

    @property
    def root_position(self) -> Int[Tensor, "B"]:
        """The root's position in the text."""
        return self.positions[self.rows, self.last] + 1


@dataclass(frozen=True)
class Nodes:
    """Drafted tokens to be expanded: `tokens` `[B, m]`, all `depth` steps below the root.

    `parents` `[1 or B, m]` index the nodes of the previous call (zeros at depth 1, whose parent is the root). `within`
    `[1 or B, m, S]` marks the node itself and its ancestors among the S nodes of all calls of this round, these ones last.
    """

    tokens: Int[Tensor, "B m"]
    parents: Int[Tensor, "#B m"]
    within: Bool[Tensor, "#B m S"]
    depth: int

    def of_parents(self, states: Shaped[Tensor, "B n ..."]) -> Shaped[Tensor, "B m ..."]:
        """The parents' entries of `states`, which the previous call kept."""
        if states.shape[1] == 1:
            return states.expand(-1, self.tokens.shape[1], *states.shape[2:])
        if len(self.parents) == 1:
            return states[:, self.parents[0]]
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, self.parents]


@runtime_checkable
class Levels(Protocol):
    """What a growth needs of a drafter: logits, level by level (see `Stepwise`)."""

    kind: ClassVar[str]
    depth: int | None
    features: Tensor | None

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """The logits of the token after the root."""
        ...

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"] | Float[Tensor, "B 1 V"]:
        """The logits of the token after each node."""
        ...
