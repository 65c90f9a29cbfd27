"""The heads of multi-token prediction as a drafter: what they were trained on, they can guess.

Head k of `FutureHeads` says the token k ahead; the first is the trunk, so that heads 2..n draft n - 1 levels, each from the
trunk's last state alone, as Medusa's do (arXiv:2404.19737, section 3.2, "self-speculative decoding").
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

    def first(self, trunk: DraftTrunk, certain: Accepted) -> Float[Tensor, "B 1 V"]:
        """What the second head says."""
        self._state = certain.state[:, None]
        return self._said(trunk, 0)

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B 1 V"]:
        """What the next head says, whatever was drafted."""
        return self._said(trunk, nodes.depth)

    def _said(self, trunk: DraftTrunk, level: int) -> Float[Tensor, "B 1 V"]:
        assert self._state is not None
        return trunk.unembed(self.heads.hidden(level + 2, self._state))
