"""The interface of all drafters, and what the trainable ones share.

A round of decoding: the trunk's last pass gave hidden states and one more token, the *root*, which is accepted but not yet read
by the trunk. The drafter predicts the tokens after it, level by level: `first` reads what was accepted and gives the logits after
the root, `next` gives the logits after drafted tokens. A *growth* (`manyheads.draft.core.growth`) chooses tokens from these
logits and so decides the shape of the tree; drafters do not know the shape.

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
from manyheads.errors import InputError


class Drafter(nn.Module, ABC):
    """Guesses tokens. State that lasts from round to round is made in `start` and belongs to one generation.

    `growth` is the default shape of its trees (None: a chain).
    """

    kind: ClassVar[str]
    growth: Growth | None = None

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Forget earlier generations; `rows` texts are about to be written."""

    @property
    def parts(self) -> list[Drafter]:
        """The drafters that it joins: itself."""
        return [self]

    @abstractmethod
    def propose(self, trunk: DraftTrunk, accepted: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """One tree of guesses for each row."""


class Copying(Drafter):
    """A drafter that guesses from the text alone, at no cost. Its guesses come in groups, one as sure as the other."""

    @abstractmethod
    def found(self, text: list[int]) -> tuple[int, list[int]]:
        """The group (0, 1, ...; a later one is surer) and the tokens that may follow `text`; none where nothing was found."""

    @property
    @abstractmethod
    def groups(self) -> int:
        """How many groups there are."""


class Stepwise(Drafter):
    """A drafter that predicts level by level; a growth makes the tree.

    `depth` is how many levels it can draft (None: any number); `features` `[B, m, D]`, where a drafter has them, are the states
    that its last logits were made from, for rules that decide when to stop. `expected` `[K, R]` is the acceptance by depth and
    rank that was measured before, if it was: `growth="auto"` begins with it.
    """

    depth: int | None = None
    features: Tensor | None = None
    expected: Float[Tensor, "K R"] | None = None

    @abstractmethod
    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """Read what was accepted; the logits of the token after the root."""

    @abstractmethod
    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"] | Float[Tensor, "B 1 V"]:
        """The logits of the token after each node; one entry stands for all where they do not depend on the node."""

    def propose(self, trunk: DraftTrunk, accepted: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """The tree that `growth` (or its own, or else a chain) makes from its logits."""
        return (growth or self.growth or Chain(self.depth or 4)).grow(self, trunk, accepted, target)


class DraftHeads(Stepwise):
    """A drafter trained on a frozen trunk. `settings` are its constructor arguments, saved with its weights."""

    settings: dict[str, Any]

    @property
    def vocabulary(self) -> Int[Tensor, "v"] | None:
        """The tokens it can guess, None for all. In drafting the logits of all others are `-inf`."""
        return None

    @classmethod
    def build(cls, trunk: DraftTrunk, **settings: Any) -> DraftHeads:
        """An untrained drafter for this trunk."""
        return cls(trunk, **settings)  # type: ignore[call-arg]

    @abstractmethod
    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ v"]]:
        """Logits of all heads on a known text: entry k (from 0) holds the logits `[B, T - 2 - k, v]`, over `vocabulary`,
        whose column t predicts `ids[:, t + 2 + k]` from `hidden[:, :t + 1]` and `ids[:, :t + 2 + k]`."""

    def extra_loss(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> Float[Tensor, ""] | float:
        """A method's own term beside the loss over tokens; 0 by default."""
        return 0.0


MOST_HEADS = 64
"""Tokens ahead that heads may guess, and layers of each: published drafters have at most 8 and 4."""


def check_counts(**counts: int) -> None:
    """`InputError` unless each is a whole number from 1 to `MOST_HEADS`: a drafter's file may say anything."""
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MOST_HEADS:
            raise InputError(f"{name} is {count!r}; give at least 1 {name.rstrip('s')}, and {MOST_HEADS} at most.")


def residual_blocks(width: int, layers: int) -> nn.Sequential:
    """`layers` blocks `y + SiLU(W y)`, each with its own weights, W zero: at first they return their input."""
    return nn.Sequential(*(ResidualBlock(width) for _ in range(layers)))


class ResidualBlock(nn.Module):
    """`y + SiLU(W y + b)`, W and b zero at first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, y: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The formula above; shapes are kept."""
        return y + F.silu(self.linear(y))
