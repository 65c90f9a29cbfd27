"""`growth="auto"`: in every round the tree that promises most tokens a second, or none.

A round that drafts D levels and reads n guesses gives an expected 1 + E tokens, E the sum over guesses of the probability that
they and all above them are right, and takes draft(D) + pass(1 + n) seconds. `PassCosts` measures the passes, every round the
drafting, and every round also what was accepted:

* of heads, a[d, r]: how often the next token is the guess of rank r at depth d, given that the guesses above are right;
* of copied text, c[g, d]: how often the d-th token is right, given those before, by group g (how much was found again).

Estimates forget (the last forty observations count) and go on from one generation to the next. The plan that maximises (1 +
E) / seconds is chosen, plain decoding among them, as long as drafted rounds did not take longer than plain decoding of the
same tokens would have, by more than one pass and `TRIALS` of the time. While they did, or nothing pays, a plan is tried
only when what trials have cost so far is less than `TRIALS` of the time spent, and seldom, unless the last trial succeeded.
So a drafter that guesses nothing costs little, whatever it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.draft.core.acceptance import Walk
from manyheads.draft.core.costs import PassCosts
from manyheads.draft.core.drafter import Copying, Drafter, Stepwise
from manyheads.draft.core.growth import Fixed
from manyheads.draft.core.rounds import Accepted
from manyheads.draft.core.target import Target
from manyheads.draft.core.tree import Path, Proposal, Ranks, Tree, chain_of, joined, shaped
from manyheads.draft.core.trees import grown
from manyheads.draft.core.trunk import DraftTrunk

NODES, RANKS, DEPTH = 32, 6, 8
"""The most guesses of a plan, guesses of one node, and levels of a drafter that has no limit of its own."""
MEMORY, PRIOR = 40.0, 6.0
"""How many observations count, and how many the estimate from before is worth."""
TRIALS, AGAIN, REPLAN, CREDIT = 0.01, 16, 8, 4.0
"""The share of the time that trials may cost; rounds between two trials, and between two plans; passes of gains that are kept."""


class Rate:
    """A running probability: `hits` of `seen`, both forgotten at the rate 1 / `MEMORY`."""

    def __init__(self, prior: float) -> None:
        self.hits, self.seen = PRIOR * prior, PRIOR

    def __call__(self) -> float:
        return self.hits / self.seen

    def observe(self, hit: bool) -> None:
        """Count one more, and the others a little less."""
        kept = min(1.0, (MEMORY - 1) / self.seen)
        self.hits, self.seen = kept * self.hits + hit, kept * self.seen + 1

    def rest(self) -> None:
        """Keep the estimate as worth a prior, at the beginning of another text."""
        self.hits, self.seen = PRIOR * self(), PRIOR


@dataclass(frozen=True)
class Plan:
    """What a round does: heads draft the tree of `ranks` (None: not at all), `copied` tokens are taken from the text, at most.

    `expected` are the tokens of the round, `seconds` its time; `reach[d]` is the probability that the heads' tree holds the right
    token at depth d + 1 and at all above.
    """

    ranks: Ranks | None = None
    copied: int = 0
    expected: float = 1.0
    seconds: float = 0.0
    reach: tuple[float, ...] = ()

    @property
    def speed(self) -> float:
        """Expected tokens a second."""
        return self.expected / self.seconds

    @property
    def depth(self) -> int:
        """Levels that the heads draft."""
        return 0 if self.ranks is None else self.ranks.depth

    @property
    def nodes(self) -> int:
        """Guesses of the heads."""
        return 0 if self.ranks is None else len(self.ranks)


def plan_of_heads(
    acceptance: Float[Tensor, "K R"],
    costs: Callable[[int], float],
    draft: Callable[[int], float],
    nodes: int = NODES,
) -> Plan:
    """The depth and tree of heads that promise most tokens a second, for acceptance by depth and rank; plain decoding counts.

    `costs(n)` are the seconds of a pass of n tokens, `draft(D)` those of drafting D levels.
    """
    best, paths = Plan(seconds=costs(1)), None
    for depth in range(1, len(acceptance) + 1):
        expected, reach, chosen = 1.0, [0.0] * depth, []
        for path, chance in grown(acceptance[:depth], nodes):
            chosen.append(path)
            expected += chance
            reach[len(path) - 1] += chance
            seconds = draft(depth) + costs(1 + len(chosen))
            # A tree that does not use its last level is the same tree, drafted for longer.
            if reach[-1] and expected / seconds > best.speed:
                best = Plan(None, 0, expected, seconds, tuple(reach))
                paths = list(chosen)
    return best if paths is None else replace(best, ranks=_ranks(tuple(paths)))


@lru_cache(maxsize=256)
def _ranks(paths: tuple[Path, ...]) -> Ranks:
    """Cached: plans come back, and their masks with them."""
    return Ranks(paths)


def with_copied(heads: Plan, chances: Sequence[float], costs: Callable[[int], float]) -> Plan:
    """The best of plain decoding, the heads' plan, copied tokens (`chances[d]` given those before), and both together.

    Of both, a depth is reached with a probability between that of guesses that are right together (the larger one) and that of
    independent ones; half way is assumed.
    """
    sure: list[float] = []
    best = max((Plan(seconds=costs(1)), heads), key=lambda plan: plan.speed)
    for chance in chances:
        sure.append((sure[-1] if sure else 1.0) * chance)
    alone = 1.0
    for length, chance in enumerate(sure, start=1):
        alone += chance
        found = Plan(None, length, alone, costs(1 + length))
        best = max((best, found), key=lambda plan: plan.speed)
        if heads.ranks is None:
            continue
        expected = 1.0
        for d in range(max(length, len(heads.reach))):
            one = sure[d] if d < length else 0.0
            other = heads.reach[d] if d < len(heads.reach) else 0.0
            expected += (max(one, other) + 1 - (1 - one) * (1 - other)) / 2
        # The copied tokens and the heads' often begin alike: one node is shared, at least where both are right.
        seconds = heads.seconds - costs(1 + heads.nodes) + costs(1 + heads.nodes + length)
        both = Plan(heads.ranks, length, expected, seconds, heads.reach)
        best = max((best, both), key=lambda plan: plan.speed)
    return best


@dataclass
class _Estimates:
    """What is known of a drafter's parts: of heads, rates by depth and rank; of copied text, by group and depth."""

    heads: list[list[Rate]]
    copied: list[list[Rate]]
    level: float | None = None  # seconds of drafting a level

    def table(self) -> Float[Tensor, "K R"]:
        return torch.tensor([[rate() for rate in row] for row in self.heads], dtype=torch.double)

    def rest(self) -> None:
        for row in (*self.heads, *self.copied):
            for rate in row:
                rate.rest()


_ESTIMATES: WeakKeyDictionary[Drafter, _Estimates] = WeakKeyDictionary()


def _first_estimates(heads: Stepwise | None, copying: Copying | None) -> _Estimates:
    table: list[list[float]] = []
    if heads is not None:
        measured = None if heads.expected is None else heads.expected[:, :RANKS].tolist()
        depth = heads.depth or DEPTH
        table = [[0.6 * 0.4**rank for rank in range(RANKS)]] * depth if measured is None else measured[:depth]
    groups = 0 if copying is None else copying.groups
    again = [1 - 0.85 / (group + 1) for group in range(groups)]
    return _Estimates(
        heads=[[Rate(chance) for chance in row] for row in table],
        copied=[[Rate(first if d == 0 else max(first, 0.7)) for d in range(NODES)] for first in again],
    )


@dataclass
class _Drafted:
    """What one row was offered: nodes of the heads' tree and of the copied chain by their numbers in the whole tree."""

    heads: list[int] = field(default_factory=list)
    copied: list[int] = field(default_factory=list)
    group: int = 0


class Planner:
    """Drafts the rounds of one generation. `ranks` are the most guesses of a node: 1 for models that take no trees, for which
    also the parts are not joined."""

    def __init__(self, drafter: Drafter, costs: PassCosts, *, ranks: int = RANKS) -> None:
        parts = drafter.parts
        self.heads = next((part for part in parts if isinstance(part, Stepwise)), None)
        self.copying = next((part for part in parts if isinstance(part, Copying)), None)
        self._measured, self.ranks, self.scale = costs, ranks, 1.0
        if drafter not in _ESTIMATES:
            _ESTIMATES[drafter] = _first_estimates(self.heads, self.copying)
        self.estimates = _ESTIMATES[drafter]
        self.estimates.rest()
        self.round, self.tried, self.again = 0, -1, AGAIN
        self.elapsed = self.lost = self.on_trials = 0.0
        self.plan = Plan(seconds=costs(1))
        self._waiting: list[Accepted] = []
        self._offered: list[_Drafted] = []
        self._read_prompt = False

    @staticmethod
    def plans(drafter: Drafter) -> bool:
        """Whether every part is one that it can plan for, and no two of a kind."""
        heads = [part for part in drafter.parts if isinstance(part, Stepwise)]
        copying = [part for part in drafter.parts if isinstance(part, Copying)]
        return len(heads) <= 1 and len(copying) <= 1 and len(heads) + len(copying) == len(drafter.parts)

    def costs(self, tokens: int) -> float:
        """Seconds of a pass of so many tokens of each row, as passes take now: longer texts take longer."""
        return self.scale * self._measured(tokens)

    def propose(self, trunk: DraftTrunk, accepted: Accepted, target: Target, room: int) -> Proposal:
        """The guesses of this round, of at most `room` levels."""
        if self.heads is not None:
            self._waiting.append(accepted)
        rows = len(accepted.last)
        found = [(0, [])] * rows if self.copying is None else [self.copying.found(text) for text in accepted.text]
        self.plan = self._chosen(found, room)
        trees: list[list[tuple[Tree, list[int]]]] = [[] for _ in range(rows)]
        if self.plan.ranks is not None:
            assert self.heads is not None
            made = Fixed(self.plan.ranks).grow(self.heads, trunk, self._all_waiting(), target)
            for row, tree, tokens in zip(trees, made.trees, made.tokens.tolist(), strict=True):
                row.append((tree, tokens))
        if self.plan.copied:
            for row, (_, tokens) in zip(trees, found, strict=True):
                tokens = tokens[: self.plan.copied]
                row.append((chain_of(len(tokens)), tokens))
        return self._merged(trees, found, accepted)

    def observe(
        self, proposal: Proposal, walks: Sequence[Walk], active: Sequence[bool], drafting: float, all_: float
    ) -> None:
        """Learn from a round: what was accepted, and the seconds of drafting and of the whole round."""
        written = 0
        for offered, tree, (path, _), on in zip(self._offered, proposal.trees, walks, active, strict=True):
            if on:
                written += 1 + len(path)
                self._learn(offered, tree, path)
        ratio = (all_ - drafting) / self._measured(1 + proposal.tokens.shape[1])
        if self.round:
            ratio = min(ratio, 2 * self.scale)  # one interrupted pass says nothing about the others
        if ratio > 0:  # a coarse clock may see no time pass, which says nothing either
            self.scale += (ratio - self.scale) / min(self.round + 1, 10)
        plain = self.costs(1)
        all_ = min(all_, 2 * (self.costs(1 + proposal.tokens.shape[1]) + self._draft_seconds(self.plan.depth)))
        self.elapsed += all_
        if self.tried == self.round:
            self.on_trials = max(0.0, self.on_trials + all_ - plain * written / max(sum(active), 1))
            self.again = 1 if written > sum(active) else self.again  # one that succeeded is followed by another
        self.round += 1
        if proposal.tokens.shape[1]:
            # Gains are kept for a few rounds only: what was won long ago pays for no losses now.
            self.lost = max(-CREDIT * plain, self.lost + all_ - plain * written / max(sum(active), 1))
        if self.plan.ranks is not None:
            if self._read_prompt:  # the first time the prompt's states are read too
                level = drafting / self.plan.ranks.depth
                before = self.estimates.level
                self.estimates.level = level if before is None else before + 0.2 * (level - before)
            self._read_prompt = True

    def _learn(self, offered: _Drafted, tree: Tree, path: list[int]) -> None:
        along = [0, *path]
        right = set(along)
        if offered.heads:
            assert self.plan.ranks is not None
            number = {node: i for i, node in enumerate(offered.heads)}
            shape = self.plan.ranks
            for depth, node in enumerate(along):
                if node not in number or depth >= len(self.estimates.heads):
                    break
                for child in shape.tree.children[number[node]]:
                    rank = shape.paths[child - 1][-1]
                    if rank < len(self.estimates.heads[depth]):
                        self.estimates.heads[depth][rank].observe(offered.heads[child] in right)
        for depth, node in enumerate(offered.copied[1:]):
            self.estimates.copied[offered.group][depth].observe(node in right)
            if node not in right:
                break

    def _chosen(self, found: Sequence[tuple[int, list[int]]], room: int) -> Plan:
        plain = Plan(seconds=self.costs(1))
        if room < 1:
            return plain
        heads = self._heads_plan(room)
        # Rows share a plan: that of the row where least was found would draft little, that of the surest much; the mean decides.
        most = min(room, NODES, max(len(tokens) for _, tokens in found))
        rates = self.estimates.copied
        chances = [
            sum(rates[group][d]() if d < len(tokens) else 0.0 for group, tokens in found) / len(found)
            for d in range(most)
        ]
        best = with_copied(heads, chances, self.costs)
        if self.ranks == 1 and best.ranks is not None and best.copied:
            best = replace(best, copied=0)
        if (best.ranks is not None or best.copied) and self.lost <= TRIALS * self.elapsed + plain.seconds:
            return best
        return self._trial(plain, chances, room)

    def _heads_plan(self, room: int) -> Plan:
        """The heads' best plan, made anew every few rounds."""
        if self.heads is None:
            return Plan(seconds=self.costs(1))
        if self.round % REPLAN == 0 or room < DEPTH:
            table = self.estimates.table()[:room, : self.ranks]
            self._best_heads = plan_of_heads(table, self.costs, self._draft_seconds, NODES)
        return self._best_heads

    def _draft_seconds(self, depth: int) -> float:
        level = self.estimates.level
        return depth * (0.03 * self.costs(1) if level is None else level)

    def _trial(self, plain: Plan, chances: Sequence[float], room: int) -> Plan:
        """Nothing pays: the smallest guess all the same, where trials have cost little so far and the last one was long ago."""
        if self.round - self.tried < self.again:
            return plain
        copied, depth = min(2, len(chances)), min(2, room)
        if self.heads is not None and not (copied and self.round % 2):
            ranks = _ranks(((0,) * min(depth, len(self.estimates.heads)),))
            trial = Plan(ranks, 0, 1.0, self._draft_seconds(ranks.depth) + self.costs(1 + len(ranks)))
        elif copied:
            trial = Plan(None, copied, 1.0, self.costs(1 + copied))
        else:
            return plain
        if self.on_trials + trial.seconds - plain.seconds > TRIALS * self.elapsed:
            return plain
        self.tried, self.again = self.round, min(2 * self.again, 8 * AGAIN)
        return trial

    def _all_waiting(self) -> Accepted:
        """What was accepted in all rounds since heads were last asked."""
        waiting, self._waiting = self._waiting, []
        last, before = waiting[-1], sum(part.valid.shape[1] for part in waiting[:-1])
        if len(waiting) == 1:
            return last
        joint = {
            name: torch.cat([getattr(part, name) for part in waiting], 1)
            for name in ("hidden", "tokens", "positions", "valid")
        }
        return Accepted(**joint, last=before + last.last, text=last.text)

    def _merged(
        self, trees: list[list[tuple[Tree, list[int]]]], found: Sequence[tuple[int, list[int]]], accepted: Accepted
    ) -> Proposal:
        self._offered = []
        several, rows = [], []
        for row, (group, _) in zip(trees, found, strict=True):
            parents, tokens, places = joined(row)
            several.append(shaped(tuple(parents)))
            rows.append(tokens)
            heads = places[0] if self.plan.ranks is not None else []
            self._offered.append(_Drafted(heads, places[-1] if self.plan.copied else [], group))
        width = max(map(len, rows))
        padded = [tokens + [0] * (width - len(tokens)) for tokens in rows]
        placed = torch.tensor(padded, dtype=torch.long, device=accepted.last.device).reshape(len(rows), width)
        return Proposal(tuple(several), placed)
