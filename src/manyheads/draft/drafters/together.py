"""Several drafters in one round: their trees are merged, so that one pass verifies what any of them guesses.

Heads predict new text, prompt lookup copies old text at no cost. Equal guesses share nodes, and a token that either guessed is
accepted. After SuffixDecoding and SAM Decoding, which combine lookup with draft models (arXiv:2411.04975 and 2411.10666).
Departure: those choose one of the two each round by the length of the match; here the trees are merged.
"""

from __future__ import annotations

import torch
from torch import nn

from manyheads.draft.core.drafter import Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal, Tree, joined, shaped
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError, UnsupportedError


class CombinedDrafter(Drafter):
    """Guesses what any of `drafters` guesses. A growth given to it is passed to all."""

    kind = "together"

    def __init__(self, *drafters: Drafter) -> None:
        super().__init__()
        if len(drafters) < 2:
            raise InputError(f"got {len(drafters)} drafter to combine; give at least two drafters.")
        self.drafters = nn.ModuleList(drafters)

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """Start every drafter afresh."""
        for drafter in self._all:
            drafter.start(trunk, rows)

    def propose(self, trunk: DraftTrunk, accepted: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """The union of all trees, row by row. `UnsupportedError` for drawn guesses: their distributions cannot be joined."""
        proposals = [drafter.propose(trunk, accepted, growth, target) for drafter in self._all]
        if any(proposal.drawn_from is not None for proposal in proposals):
            raise UnsupportedError(
                "drafters that draw their guesses cannot be combined; use growths without sample=True."
            )
        trees: list[Tree] = []
        rows: list[list[int]] = []
        for row in range(len(proposals[0].trees)):
            parents, tokens, _ = joined([(p.trees[row], p.tokens[row].tolist()) for p in proposals])
            trees.append(shaped(tuple(parents)))
            rows.append(tokens)
        width = max(map(len, rows))
        padded = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        return Proposal(tuple(trees), torch.tensor(padded, dtype=torch.long, device=accepted.last.device))

    @property
    def parts(self) -> list[Drafter]:
        """The drafters, those of combined ones among them too."""
        return [part for drafter in self._all for part in drafter.parts]

    @property
    def _all(self) -> list[Drafter]:
        return list(self.drafters)  # type: ignore[arg-type]
