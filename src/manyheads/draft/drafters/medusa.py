"""Medusa heads: each guesses one future token from the last hidden state alone. The baseline of all draft heads.

Cai et al., arXiv:2401.10774, "Medusa-1" (frozen trunk). Head k = 1..K is, on h_t after the final norm,

    logits_k = W_k block_n(... block_1(h_t))       block(y) = y + SiLU(W y + b)       W_k [V, D] copied from the output matrix

and predicts x_{t+1+k}. Blocks start at zero, so that an untrained head gives the trunk's logits. No head reads the guesses before
it: all nodes of a level share one distribution.

`own_readout=False` shares the trunk's output matrix between all heads instead: fewer weights, and a `FlashHead` can replace it.
With a `vocabulary` (token ids, such as `frequent`'s) heads guess only those tokens, and their output matrices have only those
rows; with both, all heads share a copy of those rows, which stays in the cache of the processor from level to level. Where that
matrix is most of a head, drafting and training become that much cheaper (EAGLE-3, arXiv:2503.01840; FR-Spec, arXiv:2502.14856).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.draft.core.drafter import DraftHeads, check_counts, residual_blocks
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trees import small_tree
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError
from manyheads.model.packing import Matrices


class Readouts(Matrices):
    """An output matrix for each head, copied from the trunk's; or, with `own=False`, the trunk's for all.

    `biased` gives every head its own bias, zero where the trunk has none. `vocabulary` lists the rows that are copied, or, with
    `own=False`, used: one copy of these rows, which is not trained, stands for all heads then.
    """

    vocabulary: Tensor | None
    shared: Tensor | None
    shared_bias: Tensor | None

    def __init__(
        self, trunk: DraftTrunk, heads: int, own: bool, biased: bool = False, vocabulary: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        if vocabulary is not None and not (set(vocabulary) <= set(range(trunk.vocab_size)) and len(vocabulary)):
            raise InputError(f"this vocabulary cannot be used: give some of the {trunk.vocab_size} token ids.")
        guessable = None if vocabulary is None else torch.tensor(vocabulary, device=trunk.device)
        self.register_buffer("vocabulary", guessable, persistent=False)
        self.full = trunk.vocab_size
        rows = slice(None) if guessable is None else guessable
        copies = heads if own else 0
        bias = trunk.readout_bias
        some = guessable is not None and not own
        self.register_buffer("shared", trunk.readout.detach()[rows] if some else None, persistent=False)
        self.register_buffer(
            "shared_bias", bias.detach()[rows] if some and bias is not None else None, persistent=False
        )
        bias = trunk.readout.new_zeros(trunk.vocab_size) if bias is None else bias
        self.weights = nn.ParameterList(nn.Parameter(trunk.readout.detach()[rows].clone()) for _ in range(copies))
        n_biases = copies if biased or trunk.readout_bias is not None else 0
        self.biases = nn.ParameterList(nn.Parameter(bias.detach()[rows].clone()) for _ in range(n_biases))

    def forward(self, trunk: DraftTrunk, head: int, states: Float[Tensor, "... D"]) -> Float[Tensor, "... v"]:
        """Logits of head number `head` (from 0), over the tokens it can guess."""
        if self.shared is not None:
            return self.product(states, self.shared, self.shared_bias)
        if not len(self.weights):
            return trunk.unembed(states)
        return self.product(states, self.weights[head], self.biases[head] if len(self.biases) else None)

    def matrices(self) -> list[Tensor]:
        """Those of its own, or the one that all heads share."""
        return list(self.weights) if self.shared is None else [self.shared]

    def of_all(self, logits: Float[Tensor, "... v"]) -> Float[Tensor, "... V"]:
        """Logits over all tokens, `-inf` for those that the heads cannot guess."""
        if self.vocabulary is None:
            return logits
        wide = logits.new_full((*logits.shape[:-1], self.full), -torch.inf)
        wide[..., self.vocabulary] = logits
        return wide


class Medusa(DraftHeads):
    """`heads` heads of `layers` residual blocks each."""

    kind = "medusa"

    def __init__(
        self,
        trunk: DraftTrunk,
        heads: int = 4,
        layers: int = 1,
        own_readout: bool = True,
        vocabulary: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        check_counts(heads=heads, layers=layers)
        self.settings = {
            "heads": heads,
            "layers": layers,
            "own_readout": own_readout,
            "vocabulary": None if vocabulary is None else list(vocabulary),
        }
        self.depth = heads
        self.growth = small_tree(heads)
        self.blocks = nn.ModuleList(residual_blocks(trunk.width, layers) for _ in range(heads))
        self.readouts = Readouts(trunk, heads, own_readout, vocabulary=vocabulary)
        self.to(trunk.device, trunk.dtype)
        self._state: Tensor | None = None

    @property
    def vocabulary(self) -> Int[Tensor, "v"] | None:
        """The tokens it can guess, None for all."""
        return self.readouts.vocabulary

    def teacher_forced(
        self, trunk: DraftTrunk, hidden: Float[Tensor, "B T D"], ids: Int[Tensor, "B T"]
    ) -> list[Float[Tensor, "B _ v"]]:
        """Head k on every state that has a token k + 1 later."""
        length = ids.shape[1]
        return [self._head(trunk, k, hidden[:, : length - 2 - k]) for k in range(len(self.blocks))]

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """The first head's logits, of the token after the root."""
        self._state = accepted.state[:, None]
        return self.readouts.of_all(self._head(trunk, 0, self._state))

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B 1 V"]:
        """The next head's logits, the same for all nodes."""
        assert self._state is not None
        return self.readouts.of_all(self._head(trunk, nodes.depth, self._state))

    def _head(self, trunk: DraftTrunk, head: int, states: Float[Tensor, "... D"]) -> Float[Tensor, "... v"]:
        return self.readouts(trunk, head, self.blocks[head](states))
