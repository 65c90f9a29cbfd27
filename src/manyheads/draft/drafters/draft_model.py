"""A smaller language model of the same vocabulary drafts for a larger one: speculative decoding in its first form.

Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318. The small model keeps a key/value cache of its own and drafts
chains or trees like any other drafter. With `Chain(sample=True)` it draws from its own distribution, as in those papers; this is
faster at higher temperatures.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.draft.core.drafter import Stepwise
from manyheads.draft.core.rounds import Accepted, Nodes
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.tree_pass import Seen, TreePass


class DraftModel(Stepwise):
    """Drafts with `small`, any causal language model that reads the same token ids."""

    kind = "draft_model"

    def __init__(self, small: HeadModel) -> None:
        super().__init__()
        self.small = small
        self._reader = TreePass(small)
        self._read: list[int] = []

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Begin with an empty cache. `InputError` for another vocabulary."""
        ours, theirs = self.small.vocab_size, trunk.model.vocab_size
        if ours != theirs:
            raise InputError(
                f"the draft model has {ours} tokens and the model {theirs}; give models that share one vocabulary."
            )
        self._reader.begin(rows)
        self._read = [0] * rows

    def first(self, trunk: DraftTrunk, accepted: Accepted) -> Float[Tensor, "B 1 V"]:
        """Read the accepted tokens; the small model's logits after the root."""
        new = [text[n:] for text, n in zip(accepted.text, self._read, strict=True)]
        self._read = [len(text) for text in accepted.text]
        width = max(1, *map(len, new))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in new], device=self.small.device)
        counts = [len(row) for row in new]
        steps = torch.arange(width, device=ids.device)
        # Drafted columns of the last round go: accepted ones among them are read again, which keeps the cache simple.
        self._reader.cache.forget()
        seen = self._reader.tree(ids, (steps[:, None] >= steps)[None], steps[None])
        self._reader.cache.keep([list(range(n)) for n in counts])
        last = torch.tensor([max(n - 1, 0) for n in counts], device=ids.device)
        rows = torch.arange(len(counts), device=ids.device)
        return self._logits(trunk, Seen(seen.logits[rows, last][:, None], seen.hidden[rows, last][:, None]))

    def next(self, trunk: DraftTrunk, nodes: Nodes) -> Float[Tensor, "B m V"]:
        """Read the drafted tokens; the logits after each."""
        tokens: Int[Tensor, "B m"] = nodes.tokens.to(self.small.device)
        depths = torch.full((1, tokens.shape[1]), nodes.depth - 1, device=tokens.device)
        return self._logits(trunk, self._reader.tree(tokens, nodes.within.to(tokens.device), depths))

    def _logits(self, trunk: DraftTrunk, seen: Seen) -> Float[Tensor, "B m V"]:
        self.features = seen.hidden
        return seen.logits.to(trunk.device)
