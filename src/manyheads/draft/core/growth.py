"""How a tree grows from a drafter's logits: in a fixed shape, by joint probability, or as a chain that may stop early."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.draft.core.rounds import Accepted, Levels, Nodes
from manyheads.draft.core.target import Target, draw
from manyheads.draft.core.tree import MOST_NODES, Proposal, Ranks, Tree, chain_of
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.errors import InputError


class Growth(ABC):
    """Chooses tokens from a drafter's logits."""

    @abstractmethod
    def grow(self, drafter: Levels, trunk: DraftTrunk, accepted: Accepted, target: Target) -> Proposal:
        """The tree of guesses of one round."""

    @property
    @abstractmethod
    def depth(self) -> int:
        """The most levels it asks a drafter for."""


class Fixed(Growth):
    """Always the same tree of ranks (`Ranks`), as Medusa and Hydra draft."""

    def __init__(self, ranks: Ranks | Iterable[Sequence[int]]) -> None:
        self.ranks = ranks if isinstance(ranks, Ranks) else Ranks(ranks)

    def __repr__(self) -> str:
        return f"Fixed({self.ranks})"

    @property
    def depth(self) -> int:
        return self.ranks.depth

    def grow(self, drafter: Levels, trunk: DraftTrunk, accepted: Accepted, target: Target) -> Proposal:
        levels = self.ranks.levels(accepted.hidden.device)
        logits = drafter.first(trunk, accepted)
        rows, tokens = logits.shape[0], []
        for depth, level in enumerate(levels, start=1):
            best = logits.topk(level.width).indices
            chosen = best[:, level.parents, level.ranks] if best.shape[1] > 1 else best[:, 0, level.ranks]
            tokens.append(chosen)
            if depth == len(levels):
                break
            nodes = Nodes(chosen[:, level.expanded], level.grandparents, level.within, depth)
            logits = drafter.next(trunk, nodes)
        return Proposal((self.ranks.tree,) * rows, torch.cat(tokens, 1))


@dataclass
class BestFirst(Growth):
    """The `nodes` likeliest continuations by the product of the drafter's own probabilities: a new tree every round.

    At each level at most `beam` nodes propose their `children` best tokens, and the `beam` likeliest of these are expanded next
    (EAGLE-2, arXiv:2406.16858). `floor` drops tokens less likely than that share of their node's best, `top_p` those beyond that
    mass; `levels` bounds the depth. Clover (arXiv:2405.00263) has a floor of 1/4 and fixes how many nodes each level keeps; here
    all levels share one budget.
    """

    nodes: int = 16
    beam: int = 4
    children: int = 4
    levels: int = 4
    floor: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        sizes = self.nodes, self.beam, self.children, self.levels
        if min(sizes) < 1 or max(sizes) > MOST_NODES:
            raise InputError(f"nodes, beam, children and levels must each be 1 to {MOST_NODES}, not {sizes}.")

    @property
    def depth(self) -> int:
        return self.levels

    def grow(self, drafter: Levels, trunk: DraftTrunk, accepted: Accepted, target: Target) -> Proposal:
        logits = drafter.first(trunk, accepted)
        rows, device = logits.shape[0], logits.device
        # Candidates of all levels share one numbering, from 1; `above` holds each expanded node's number, 0 is the root.
        # Only `beam` of them are expanded, but all compete in `_best`, so each must remember its parent's number.
        total = logits.new_zeros(rows, 1)
        within = torch.zeros(rows, 1, 0, dtype=torch.bool, device=device)
        above = torch.zeros(rows, 1, dtype=torch.long, device=device)
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        offset, depths = 1, min(self.levels, drafter.depth or self.levels)
        for depth in range(1, depths + 1):
            log_p, tokens = self._kept(logits, total)
            joint = log_p.flatten(1)
            places = above[:, :, None].expand(-1, -1, log_p.shape[2]).flatten(1)
            found.append((joint, tokens.flatten(1), places))
            if depth == depths:
                break
            # `picked` indexes flattened (parent, child) pairs. The quotient is the parent's place in the call before, by which
            # the drafter finds the states it kept.
            total, picked = joint.topk(min(self.beam, joint.shape[1]))
            parents = picked // log_p.shape[2]
            chosen = tokens.flatten(1).gather(1, picked)
            above = picked + offset
            offset += joint.shape[1]
            # A child sees what its parent saw: take the parents' rows of the mask, and add one column for each new node.
            lineage = (
                within.gather(1, parents[:, :, None].expand(-1, -1, within.shape[2]))
                if depth > 1
                else within.expand(-1, picked.shape[1], -1)
            )
            itself = torch.eye(picked.shape[1], dtype=torch.bool, device=device).expand(rows, -1, -1)
            within = torch.cat([lineage, itself], 2)
            logits = drafter.next(trunk, Nodes(chosen, parents, within, depth))
        return self._best(*(torch.cat(part, 1) for part in zip(*found, strict=True)))

    def _kept(self, logits: Float[Tensor, "B #m V"], total: Float[Tensor, "B m"]) -> tuple[Tensor, Tensor]:
        """Joint log-probability `[B, m, c]` and token of every node's best children."""
        logits = logits.float()
        best = logits.topk(min(self.children, logits.shape[-1]))
        # A log-probability above 0 would make a child likelier than its parent: `_best` could keep it without the parent.
        log_p = (best.values - logits.logsumexp(-1, keepdim=True)).clamp(max=0.0)  # rounding may exceed log 1
        if self.floor:
            log_p = log_p.where(log_p >= log_p[..., :1] + torch.tensor(self.floor).log(), -torch.inf)
        if self.top_p < 1:
            before = log_p.exp().cumsum(-1) - log_p.exp()
            log_p = log_p.where(before < self.top_p, -torch.inf)
        m = total.shape[1]
        return total[:, :, None] + log_p, best.indices.expand(-1, m, -1)

    def _best(self, joint: Tensor, tokens: Tensor, parents: Tensor) -> Proposal:
        """Keep the likeliest candidates. A parent is at least as likely as its children and wins ties: it is kept too."""
        size = min(self.nodes, joint.shape[1])
        # Back in order of level after the choice: a node keeps its rank among its siblings, and parents stay before children.
        kept = joint.sort(dim=1, descending=True, stable=True).indices[:, :size].sort(1).values
        trees, rows = [], []
        for row, (places, worth) in enumerate(zip(kept.tolist(), joint.gather(1, kept).tolist(), strict=True)):
            places = [p for p, w in zip(places, worth, strict=True) if w > -torch.inf]
            number = {place + 1: node for node, place in enumerate(places, start=1)} | {0: 0}
            above = parents[row, places].tolist()
            trees.append(Tree(tuple(number[a] for a in above)))
            rows.append(tokens[row, places])
        width = max(map(len, rows))
        padded = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])
        return Proposal(tuple(trees), padded)


StopRule = Callable[[Levels, Nodes, Tensor], Float[Tensor, "B"]]
"""(drafter that just read a guess, the guess, the logits it was made from) -> the probability that it is accepted, `[B]`."""


@dataclass
class Chain(Growth):
    """One guess after another, `length` at most.

    With `sample` tokens are drawn from the drafter's own distribution (under the target's sampling settings) instead of its best
    token; a draft model needs this to be fast at higher temperatures. `stop` gives the probability that a token just read is
    accepted if all before it were. Drafting ends when the probability of any rejection exceeds `threshold`, but not before
    `shortest` tokens (SpecDec++, arXiv:2405.19715). The newest token has not been read then; it is proposed all the same.
    """

    length: int = 4
    sample: bool = False
    stop: StopRule | None = None
    threshold: float = 0.7
    shortest: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.length <= MOST_NODES:
            raise InputError(f"a chain has 1 to {MOST_NODES} tokens, not {self.length}.")

    @property
    def depth(self) -> int:
        return self.length

    def grow(self, drafter: Levels, trunk: DraftTrunk, accepted: Accepted, target: Target) -> Proposal:
        logits = drafter.first(trunk, accepted)
        sure = torch.ones(len(logits), device=logits.device)
        tokens: list[Tensor] = []
        drawn_from: list[Tensor] = []
        longest = min(self.length, drafter.depth or self.length)
        sampled = self.sample and not target.greedy
        for depth in range(1, longest + 1):
            if sampled:
                drawn_from.append(target.probabilities(logits[:, 0]))
                tokens.append(draw(drawn_from[-1], target.generator)[:, None])
            else:
                tokens.append(logits[:, 0].argmax(-1, keepdim=True))
            if depth == longest or (depth >= self.shortest and bool((1 - sure > self.threshold).all())):
                break
            one = torch.zeros(1, 1, dtype=torch.long, device=logits.device)
            nodes = Nodes(tokens[-1], one, torch.ones(1, 1, depth, dtype=torch.bool, device=logits.device), depth)
            before, logits = logits, drafter.next(trunk, nodes)
            if self.stop is not None:
                sure = sure * self.stop(drafter, nodes, before)
        drawn = torch.stack([*drawn_from, torch.zeros_like(drawn_from[0])], 1) if sampled else None
        return Proposal((chain_of(len(tokens)),) * len(logits), torch.cat(tokens, 1), drawn)
