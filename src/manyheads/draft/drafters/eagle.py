"""EAGLE: an autoregressive head that predicts the trunk's next hidden state. The usual baseline of newer drafters.

Li et al., EAGLE (arXiv:2401.15077) and EAGLE-3 (arXiv:2503.01840). One decoder layer reads, for each token, its embedding and
the state it was predicted from, and estimates the state after it:

    f_{t+1} = layer(F [E(x_{t+1}) ; h_t])          logits of x_{t+2} = W_lm f_{t+1}          F [D, E + D]

For each further guess the estimate replaces the state, f_{t+2} = layer(F [E(x_{t+2}) ; f_{t+1}]). It is trained on its own
estimates, `heads` steps deep (EAGLE-3's training-time test), from tokens or the trunk's distribution; the output matrix is the
trunk's. At first F passes h_t on, and the layer is the identity.

Departures: one state a token, the trunk's last, where EAGLE-3 joins states of three depths; no loss on the states themselves (as
in EAGLE-3); the full vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from manyheads.draft.core.block import CachedBlock
from manyheads.draft.core.drafter import DraftHeads, check_counts
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trees import small_tree
from manyheads.draft.core.trunk import DraftTrunk


class Eagle(DraftHeads):
    """Drafts any number of levels; trained on `heads` of them."""

    kind = "eagle"

    def __init__(self, trunk: DraftTrunk, heads: int = 4) -> None:
        super().__init__()
        check_counts(heads=heads)
        self.settings = {"heads": heads}
        self.growth = small_tree(heads)
        self.fuse = nn.Linear(trunk.embed_width + trunk.width, trunk.width, bias=False)
        with torch.no_grad():
            self.fuse.weight.zero_()
            self.fuse.weight[:, trunk.embed_width :] = torch.eye(trunk.width)
        self.block = CachedBlock.like(trunk)
        self.heads = heads
        self.to(trunk.device, trunk.dtype)
        self._root: Tensor | None = None

    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ V"]]:
        """Logits of every step. Step k sees the first step's columns up to its own, and of later steps only its own path."""
        tokens = trunk.embed(ids)
        memory = DynamicCache()
        length = ids.shape[1] - 1
        states, out = hidden[:, :length], []
        column = torch.arange(length, device=ids.device)
        seen = column[:, None] >= column
        own = torch.zeros(length, 0, dtype=torch.bool, device=ids.device)
        for k in range(self.heads):
            rows = length - k
            entered = self.fuse(torch.cat([tokens[:, 1 + k :], states[:, :rows]], -1))
            if k:
                own = torch.cat([own[:rows], torch.eye(rows, dtype=torch.bool, device=ids.device)], 1)
            mask = torch.cat([seen[:rows], own], 1)[None]
            states = self.block.masked(entered, column[None, :rows] + k, mask, memory)
            out.append(trunk.unembed(states[:, : rows - 1]))
        return out

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Empty the layer's cache."""
        self.block.start(rows)

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """Read the accepted states and the tokens predicted from them; logits of the token after the root."""
        entered = self.fuse(torch.cat([trunk.embed(accepted.tokens), accepted.hidden], -1))
        states = self.block.read(entered, accepted.positions, accepted.valid)
        self.features = states[accepted.rows, accepted.last][:, None]
        self._root = accepted.root_position[:, None] - 1
        return trunk.unembed(self.features)

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"]:
        """Logits after each node, from its token and its parent's estimate."""
        assert self._root is not None and self.features is not None
        entered = self.fuse(torch.cat([trunk.embed(nodes.tokens), nodes.of_parents(self.features)], -1))
        positions = (self._root + nodes.depth).expand(-1, nodes.tokens.shape[1])
        self.features = self.block.peek(entered, positions, nodes.within)
        return trunk.unembed(self.features)
