"""Prompt lookup: guess that what followed these tokens before follows them again. Costs nothing; good where text is copied.

Take the longest n-gram at the end of the text, at most `longest` tokens, that occurred before. The tokens after its last
occurrence are the chain of guesses. This is Saxena's "prompt lookup decoding", `prompt_lookup_num_tokens` in Transformers.
Departure: the last earlier occurrence is taken; Transformers takes the first.
"""

from __future__ import annotations

import torch

from manyheads.draft.core.drafter import Copying
from manyheads.draft.core.growth import Growth
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import MOST_NODES, Proposal, chain_of
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError


class PromptLookup(Copying):
    """Guesses up to `length` tokens by looking up the last `longest` to 1 tokens in the text so far."""

    kind = "prompt_lookup"

    def __init__(self, length: int = 8, longest: int = 3) -> None:
        super().__init__()
        if not (1 <= length <= MOST_NODES and longest >= 1):
            raise InputError(f"length {length} must be 1 to {MOST_NODES}, and longest {longest} at least 1.")
        self.length, self.longest = length, longest

    @property
    def groups(self) -> int:
        """A group for each length of what was found again, 1 to `longest`."""
        return self.longest

    def propose(self, trunk: DraftTrunk, accepted: Accepted, growth: Growth | None, target: Target) -> Proposal:
        """One chain for each row, empty where nothing was found."""
        found = [self.continuation(text) for text in accepted.text]
        width = max(map(len, found))
        tokens = [row + [0] * (width - len(row)) for row in found]
        placed = torch.tensor(tokens, dtype=torch.long, device=accepted.last.device).reshape(len(found), width)
        return Proposal(tuple(chain_of(len(row)) for row in found), placed)

    def continuation(self, text: list[int]) -> list[int]:
        """The tokens that followed the end of `text` the last time; empty if it is new."""
        return self.found(text)[1]

    def found(self, text: list[int]) -> tuple[int, list[int]]:
        """The same, behind the number of tokens that were found again, less one."""
        for n in range(min(self.longest, len(text) - 1), 0, -1):
            end = text[-n:]
            for start in range(len(text) - n - 1, -1, -1):
                if text[start] == end[0] and text[start : start + n] == end:
                    return n - 1, text[start + n : start + n + self.length]
        return 0, []
