"""Hydra heads: draft heads that read the tokens drafted before them, and Hydra++.

Ankner et al., arXiv:2402.05109. Head k = 1..K reads the hidden state and the embeddings of the root and the k - 1 guesses so far,

    y        = [h_t ; E(x_{t+1}) ; ... ; E(x_{t+k})]                                        [D + k E]
    logits_k = W_k block_n(... block_2(R y + r + SiLU(A y + a))) + w_k        block(y) = y + SiLU(W y + b)

which predicts x_{t+1+k}, with A, W and all biases zero and W_k a copy of the output matrix at first. **Hydra++** has four blocks
a head, and a decoder layer and a norm that prepare the hidden states (`prefix`). It learns from the trunk's own distribution
instead of data (`Recipe(teacher=1, data=0)`, the default).

Departure: R starts as the identity on h_t and zero on the tokens, so that an untrained head gives the trunk's logits; in the
paper it starts at random.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.block import CachedBlock
from manyheads.draft.core.drafter import DraftHeads, check_counts, residual_blocks
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trees import small_tree
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.drafters.medusa import Readouts


class Hydra(DraftHeads):
    """`heads` heads of `layers` blocks each; with `prefix` on states from a decoder layer of their own."""

    kind = "hydra"

    def __init__(
        self,
        trunk: DraftTrunk,
        heads: int = 4,
        layers: int = 1,
        prefix: bool = False,
        own_readout: bool = True,
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_counts(heads=heads, layers=layers)
        self.settings = {
            "heads": heads,
            "layers": layers,
            "prefix": prefix,
            "own_readout": own_readout,
            "vocabulary": None if vocabulary is None else list(vocabulary),
        }
        self.depth = heads
        self.growth = small_tree(heads)
        self.prefix = _Prefix(trunk) if prefix else None
        self.entries = nn.ModuleList(_Entry(trunk.width, trunk.embed_width, k) for k in range(1, heads + 1))
        self.blocks = nn.ModuleList(residual_blocks(trunk.width, layers - 1) for _ in range(heads))
        self.readouts = Readouts(trunk, heads, own_readout, biased=True, vocabulary=vocabulary)
        self.to(trunk.device, trunk.dtype)
        self._known: Tensor | None = None

    @classmethod
    def plus_plus(
        cls, trunk: DraftTrunk, heads: int = 4, own_readout: bool = True, vocabulary: Sequence[int] | None = None
    ) -> Hydra:
        """Hydra++: four-layer heads over a prefix layer."""
        return cls(trunk, heads=heads, layers=4, prefix=True, own_readout=own_readout, vocabulary=vocabulary)

    @property
    def vocabulary(self) -> Int[Tensor, "v"] | None:
        """The tokens it can guess, None for all."""
        return self.readouts.vocabulary

    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ v"]]:
        """Head k on every state that has a token k + 1 later, given the true tokens between."""
        known = hidden if self.prefix is None else self.prefix(hidden)
        tokens = trunk.embed(ids)
        out = []
        for k in range(len(self.entries)):
            end = ids.shape[1] - 2 - k
            parts = [known[:, :end], *(tokens[:, 1 + j : 1 + j + end] for j in range(k + 1))]
            out.append(self.readouts(trunk, k, self._state(k, torch.cat(parts, -1))))
        return out

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Empty the prefix layer's cache."""
        if self.prefix is not None:
            self.prefix.block.start(rows)

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """The first head's logits, of the token after the root."""
        state = accepted.state if self.prefix is None else self.prefix.read(accepted)
        self._known = torch.cat([state, trunk.embed(accepted.root)], -1)[:, None]
        return self._logits(trunk, 0, self._known)

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"]:
        """The next head's logits; each node reads the tokens along its path."""
        assert self._known is not None
        self._known = torch.cat([nodes.of_parents(self._known), trunk.embed(nodes.tokens)], -1)
        return self._logits(trunk, nodes.depth, self._known)

    def _logits(self, trunk: DraftTrunk, head: int, known: Float[Tensor, "B m I"]) -> Float[Tensor, "B m V"]:
        self.features = self._state(head, known)
        return self.readouts.of_all(self.readouts(trunk, head, self.features))

    def _state(self, head: int, known: Float[Tensor, "... I"]) -> Float[Tensor, "... D"]:
        state: Tensor = self.blocks[head](self.entries[head](known))
        return state


class _Entry(nn.Module):
    """`R y + SiLU(A y + a)`, from a state and k embeddings to a state."""

    def __init__(self, width: int, embed_width: int, tokens: int) -> None:
        super().__init__()
        size = width + tokens * embed_width
        self.skip = nn.Linear(size, width)
        self.linear = nn.Linear(size, width)
        with torch.no_grad():
            self.skip.weight.copy_(torch.eye(width, size))
            for start in (self.skip.bias, self.linear.weight, self.linear.bias):
                start.zero_()

    def forward(self, y: Float[Tensor, "... I"]) -> Float[Tensor, "... D"]:
        return self.skip(y) + F.silu(self.linear(y))


class _Prefix(nn.Module):
    """A decoder layer and a norm over the trunk's states."""

    def __init__(self, trunk: DraftTrunk) -> None:
        super().__init__()
        self.block = CachedBlock.like(trunk)
        self.norm = nn.RMSNorm(trunk.width, eps=1e-5)

    def forward(self, hidden: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.norm(self.block(hidden))

    def read(self, accepted: Accepted) -> Float[Tensor, "B D"]:
        states = self.block.read(accepted.hidden, accepted.positions, accepted.valid)
        return self.norm(states[accepted.rows, accepted.last])
