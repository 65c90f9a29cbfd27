"""The one interface of everything that guesses tokens, and what the trainable ones share.

A round of decoding: the trunk's last pass left hidden states and one token more, the *root*, which is certain but not yet read.
The drafter says which tokens may follow it, level by level: `first` looks at what became certain and gives the logits after the
root, `next` the logits after drafted tokens. A *growth* (`manyheads.draft.core.growth`) chooses tokens from these logits and so
decides the shape of the tree; drafters know nothing of shapes.

Positions: from the hidden state h_t of token x_t the trunk made x_{t+1}, the root. `first` predicts x_{t+2}, and the k-th call of
`next` predicts x_{t+2+k}.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.tree import Proposal
from manyheads.draft.core.trunk import Trunk

if TYPE_CHECKING:
    from manyheads.draft.core.growth import Growth
    from manyheads.draft.core.target import Target


@dataclass(frozen=True)
class Certain:
    """What became certain since the drafter was last asked.

    Row b brings the states `hidden[b, j]` where `valid[b, j]`, of the tokens at `positions[b, j]`, in order; `tokens[b, j]` is
    the token that follows it. The last valid one's is the root, and its column is `last[b]`. `text[b]` are all of a row's
    tokens, root included.
    """

    hidden: Float[Tensor, "B A D"]
    tokens: Int[Tensor, "B A"]
    positions: Int[Tensor, "B A"]
    valid: Bool[Tensor, "B A"]
    last: Int[Tensor, "B"]
    text: Sequence[list[int]]

    @property
    def rows(self) -> Int[Tensor, "B"]:
        """0..B-1."""
        return torch.arange(len(self.last), device=self.last.device)

    @property
    def state(self) -> Float[Tensor, "B D"]:
        """The hidden state from which the trunk made the root."""
        return self.hidden[self.rows, self.last]

    @property
    def root(self) -> Int[Tensor, "B"]:
        """The token that is certain and unread."""
        return self.tokens[self.rows, self.last]

    @property
    def root_position(self) -> Int[Tensor, "B"]:
        """Where the root stands."""
        return self.positions[self.rows, self.last] + 1


@dataclass(frozen=True)
class Nodes:
    """Drafted tokens that shall have children: `tokens` `[B, m]`, all `depth` steps below the root.

    `parents` `[1 or B, m]` number the nodes of the call before (zeros at depth 1, whose parent is the root); `within`
    `[1 or B, m, S]` says which of all nodes handed over in this round, S of them in the order of the calls and these the last,
    each one descends from or is.
    """

    tokens: Int[Tensor, "B m"]
    parents: Int[Tensor, "#B m"]
    within: Bool[Tensor, "#B m S"]
    depth: int

    def of_parents(self, states: Float[Tensor, "B n ..."]) -> Float[Tensor, "B m ..."]:
        """The parents' entries of what the call before kept."""
        if states.shape[1] == 1:
            return states.expand(-1, self.tokens.shape[1], *states.shape[2:])
        if len(self.parents) == 1:
            return states[:, self.parents[0]]
        rows = torch.arange(len(states), device=states.device)[:, None]
        return states[rows, self.parents]


class Drafter(nn.Module, ABC):
    """Guesses tokens. State that lasts from round to round is made in `start` and belongs to one generation.

    `growth` is the shape of tree that suits it (None: a chain).
    """

    kind: ClassVar[str]
    growth: Growth | None = None

    def start(self, trunk: Trunk, rows: int) -> None:
        """Forget earlier generations; `rows` texts are about to be written."""

    @abstractmethod
    def propose(self, trunk: Trunk, certain: Certain, growth: Growth | None, target: Target) -> Proposal:
        """A tree a row."""


class Stepwise(Drafter):
    """A drafter that says level by level what may follow; a growth makes the tree.

    `depth` is how many levels it can draft (None: any number); `features` `[B, m, D]`, where a drafter has them, are the states
    behind the logits it gave last, for rules that decide when to stop.
    """

    depth: int | None = None
    features: Tensor | None = None

    @abstractmethod
    def first(self, trunk: Trunk, certain: Certain) -> Float[Tensor, "B 1 V"]:
        """Take in what became certain; the logits of the token after the root."""

    @abstractmethod
    def next(self, trunk: Trunk, nodes: Nodes) -> Float[Tensor, "B m V"] | Float[Tensor, "B 1 V"]:
        """The logits of the token after each node; one entry stands for all where they do not depend on the node."""

    def propose(self, trunk: Trunk, certain: Certain, growth: Growth | None, target: Target) -> Proposal:
        """The tree that `growth` (or its own, or else a chain) makes of what it says."""
        from manyheads.draft.core.growth import Chain

        return (growth or self.growth or Chain(self.depth or 4)).grow(self, trunk, certain, target)


class DraftHeads(Stepwise):
    """A drafter that is trained beside a frozen trunk. What it was built with is `settings`, saved with its weights."""

    settings: dict[str, Any]

    @property
    def vocabulary(self) -> Int[Tensor, "v"] | None:
        """The tokens that it can guess, where these are not all. In drafting the others' logits are `-inf`."""
        return None

    @classmethod
    def build(cls, trunk: Trunk, **settings: Any) -> DraftHeads:
        """A fresh one for this trunk."""
        return cls(trunk, **settings)  # type: ignore[call-arg]

    @abstractmethod
    def teacher_forced(
        self, trunk: Trunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B ? v"]]:
        """What the heads say of a text that is known: entry k (from 0) holds the logits `[B, T - 2 - k, v]`, over `vocabulary`,
        whose column t predicts `ids[:, t + 2 + k]` from `hidden[:, :t + 1]` and `ids[:, :t + 2 + k]`."""

    def extra_loss(
        self, trunk: Trunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""] | float:
        """What a method adds to the loss over tokens."""
        return 0.0


def residual_blocks(width: int, layers: int) -> nn.Sequential:
    """`layers` blocks `y + SiLU(W y)`, each with weights of its own, W zero: at first they hand on what they get."""
    return nn.Sequential(*(ResidualBlock(width) for _ in range(layers)))


class ResidualBlock(nn.Module):
    """`y + SiLU(W y + b)`, W and b zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, y: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The block."""
        return y + F.silu(self.linear(y))
