"""The heads of multi-token prediction as a drafter.

Head k of `FutureHeads` predicts the token k ahead. The first is the trunk; heads 2..n draft n - 1 levels, each from the trunk's
last state alone, as Medusa's do (arXiv:2404.19737, section 3.2, "self-speculative decoding").
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from manyheads.draft.core.drafter import Stepwise
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trees import small_tree
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.multi_token.model import FutureHeads
from manyheads.errors import InputError


class MultiTokenDrafter(Stepwise):
    """Drafts with heads that were trained with their trunk. `InputError` for a single head, which is the trunk."""

    kind = "multi_token"

    def __init__(self, heads: FutureHeads) -> None:
        super().__init__()
        if heads.n < 2:
            raise InputError("one head is the model itself and guesses nothing; train two or more.")
        self.heads = heads
        self.depth = heads.n - 1
        self.growth = small_tree(self.depth)
        self._state: Tensor | None = None

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """The second head's logits, of the token after the root."""
        self._state = accepted.state[:, None]
        return self._logits(trunk, 0)

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B 1 V"]:
        """The next head's logits, the same for all nodes."""
        return self._logits(trunk, nodes.depth)

    def _logits(self, trunk: DraftTrunk, level: int) -> Float[Tensor, "B 1 V"]:
        assert self._state is not None
        return trunk.unembed(self.heads.hidden(level + 2, self._state))
