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
from typing import Any, ClassVar

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.growth import Chain, Growth
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal
from manyheads.draft.core.trunk import DraftTrunk


class Drafter(nn.Module, ABC):
    """Guesses tokens. State that lasts from round to round is made in `start` and belongs to one generation.

    `growth` is the shape of tree that suits it (None: a chain).
    """

    kind: ClassVar[str]
    growth: Growth | None = None

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Forget earlier generations; `rows` texts are about to be written."""

    @abstractmethod
    def propose(self, trunk: DraftTrunk, certain: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """A tree a row."""


class Stepwise(Drafter):
    """A drafter that says level by level what may follow; a growth makes the tree.

    `depth` is how many levels it can draft (None: any number); `features` `[B, m, D]`, where a drafter has them, are the states
    behind the logits it gave last, for rules that decide when to stop.
    """

    depth: int | None = None
    features: Tensor | None = None

    @abstractmethod
    def first(self, trunk: DraftTrunk, certain: Accepted) -> Float[Tensor, "B 1 V"]:
        """Take in what became certain; the logits of the token after the root."""

    @abstractmethod
    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"] | Float[Tensor, "B 1 V"]:
        """The logits of the token after each node; one entry stands for all where they do not depend on the node."""

    def propose(self, trunk: DraftTrunk, certain: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """The tree that `growth` (or its own, or else a chain) makes of what it says."""
        return (growth or self.growth or Chain(self.depth or 4)).grow(self, trunk, certain, target)


class DraftHeads(Stepwise):
    """A drafter that is trained beside a frozen trunk. What it was built with is `settings`, saved with its weights."""

    settings: dict[str, Any]

    @property
    def vocabulary(self) -> Int[Tensor, "v"] | None:
        """The tokens that it can guess, where these are not all. In drafting the others' logits are `-inf`."""
        return None

    @classmethod
    def build(cls, trunk: DraftTrunk, **settings: Any) -> DraftHeads:
        """A fresh one for this trunk."""
        return cls(trunk, **settings)  # type: ignore[call-arg]

    @abstractmethod
    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ v"]]:
        """What the heads say of a text that is known: entry k (from 0) holds the logits `[B, T - 2 - k, v]`, over `vocabulary`,
        whose column t predicts `ids[:, t + 2 + k]` from `hidden[:, :t + 1]` and `ids[:, :t + 2 + k]`."""

    def extra_loss(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
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
