"""Several drafters in one round: their trees laid over each other, so that one pass verifies what any of them guesses.

Heads foresee new words, prompt lookup recites old ones at no cost. Where both guess the same they share nodes, and a token that
either foresaw is accepted. After SuffixDecoding's and SAM Decoding's pairing of lookup with draft models (arXiv:2411.04975 and
2411.10666).
Departure: those choose one of the two each round by how long the match is, here the trees are joined.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import nn

from manyheads.draft.core.drafter import Drafter
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Proposal, Tree
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError, UnsupportedError


class CombinedDrafter(Drafter):
    """Guesses what any of `drafters` guesses. A growth given to it is given to all."""

    kind = "together"

    def __init__(self, *drafters: Drafter) -> None:
        super().__init__()
        if len(drafters) < 2:
            raise InputError("give at least two drafters to guess together.")
        self.drafters = nn.ModuleList(drafters)

    def start(self, trunk: DraftTrunk, rows: int) -> None:
        """All forget."""
        for drafter in self._all:
            drafter.start(trunk, rows)

    def propose(self, trunk: DraftTrunk, certain: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """The union of all trees, row by row. `UnsupportedError` for guesses that were drawn: their odds cannot be joined."""
        proposals = [drafter.propose(trunk, certain, growth, target) for drafter in self._all]
        if any(proposal.odds is not None for proposal in proposals):
            raise UnsupportedError("drafters that draw their guesses cannot guess together; leave sample=True away.")
        trees: list[Tree] = []
        rows: list[list[int]] = []
        for row in range(len(proposals[0].trees)):
            parents, tokens = joined((p.trees[row], p.tokens[row].tolist()) for p in proposals)
            trees.append(_tree(tuple(parents)))
            rows.append(tokens)
        width = max(map(len, rows))
        padded = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        return Proposal(tuple(trees), torch.tensor(padded, dtype=torch.long, device=certain.last.device))

    @property
    def _all(self) -> list[Drafter]:
        return list(self.drafters)  # type: ignore[arg-type]


def joined(several: Iterable[tuple[Tree, list[int]]]) -> tuple[list[int], list[int]]:
    """Parents and tokens of the smallest tree in which every path of words of these trees is found."""
    parents: list[int] = []
    tokens: list[int] = []
    known: dict[tuple[int, int], int] = {}
    for tree, words in several:
        place = [0]
        for parent, word in zip(tree.parents, words, strict=False):
            key = (place[parent], word)
            if key not in known:
                parents.append(key[0])
                tokens.append(word)
                known[key] = len(parents)
            place.append(known[key])
    return parents, tokens


@lru_cache(maxsize=1024)
def _tree(parents: tuple[int, ...]) -> Tree:
    """Shapes come back, and a tree knows its mask once it was asked for it."""
    return Tree(parents)
