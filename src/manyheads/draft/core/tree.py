"""Trees of guessed tokens: node 0 is the newest accepted token, every other node continues its parent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError

Path = tuple[int, ...]
MOST_NODES = 1024
"""Of one tree, and steps of a path, where one is made to order: beyond it a pass costs more than all it could save."""


@dataclass(frozen=True)
class Tree:
    """`parents[i - 1]` is the parent of node i = 1..N, and comes before it; node 0 is the root."""

    parents: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.parents)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Steps below the root, of nodes 0..N."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent] + 1)
        return tuple(depths)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """The children of nodes 0..N, in the order in which they are tried."""
        children: list[list[int]] = [[] for _ in range(len(self) + 1)]
        for node, parent in enumerate(self.parents, start=1):
            children[parent].append(node)
        return tuple(map(tuple, children))

    @cached_property
    def within(self) -> Bool[Tensor, "{len(self)}+1 {len(self)}+1"]:
        """Entry (i, j): node i sees node j, which is itself or an ancestor."""
        seen = torch.eye(len(self) + 1, dtype=torch.bool)
        for node, parent in enumerate(self.parents, start=1):
            seen[node] |= seen[parent]
        return seen

    @cached_property
    def _placed(self) -> dict[torch.device, tuple[Tensor, Tensor]]:
        return {}

    def on(
        self, device: torch.device
    ) -> tuple[Bool[Tensor, "{len(self)}+1 {len(self)}+1"], Int[Tensor, "{len(self)}+1"]]:
        """`within` and `depths` as tensors on a device, cached: shapes repeat every round."""
        if device not in self._placed:
            self._placed[device] = self.within.to(device), torch.tensor(self.depths, device=device)
        return self._placed[device]

    def path(self, node: int) -> list[int]:
        """The nodes from just below the root to `node`."""
        path: list[int] = []
        while node:
            path.append(node)
            node = self.parents[node - 1]
        return path[::-1]


@cache
def chain_of(length: int) -> Tree:
    """Each node continues the one before."""
    return Tree(tuple(range(length)))


@lru_cache(maxsize=4096)
def shaped(parents: tuple[int, ...]) -> Tree:
    """The tree of these parents. Cached: shapes repeat, and a tree keeps its mask once computed."""
    return Tree(parents)


def joined(several: Sequence[tuple[Tree, list[int]]]) -> tuple[list[int], list[int], list[list[int]]]:
    """Parents and tokens of the smallest tree that contains every path of tokens of these trees; and, for each of them, the
    numbers that its nodes (the root first) have there."""
    parents: list[int] = []
    tokens: list[int] = []
    known: dict[tuple[int, int], int] = {}
    places: list[list[int]] = []
    for tree, drafted in several:
        place = [0]
        for parent, token in zip(tree.parents, drafted, strict=False):
            key = (place[parent], token)
            if key not in known:
                parents.append(key[0])
                tokens.append(token)
                known[key] = len(parents)
            place.append(known[key])
        places.append(place)
    return parents, tokens, places


@dataclass(frozen=True)
class Proposal:
    """Guesses for a batch: one tree and its tokens for each row; smaller trees are padded with tokens that belong to no node.

    `drawn_from` `[B, N + 1, V]` is the distribution from which each node's children were *drawn*, without replacement, in
    order. None: they were chosen, not drawn, and a lossless rule only has to follow the target's own choice.
    """

    trees: tuple[Tree, ...]
    tokens: Int[Tensor, "B N"]
    drawn_from: Float[Tensor, "B N+1 V"] | None = None


@dataclass(frozen=True)
class Level:
    """One level of a tree of ranks. Node j continues node `parents[j]` of the nodes expanded one level up, with that node's
    `ranks[j]`-th best token of the `width` best. `expanded` are the nodes of this level that have children, `grandparents` their
    parents, and `within` marks each of them and its ancestors among all nodes expanded so far."""

    parents: Int[Tensor, "n"]
    ranks: Int[Tensor, "n"]
    width: int
    expanded: Int[Tensor, "m"]
    grandparents: Int[Tensor, "1 m"]
    within: Bool[Tensor, "1 m S"]


class Ranks:
    """A fixed tree whose nodes are named by ranks: (0, 2) is the third best token after the best one.

    Missing prefixes of a path are added. `InputError` for an empty tree.
    """

    def __init__(self, paths: Iterable[Sequence[int]]) -> None:
        paths = [tuple(path) for path in paths]
        if any(len(path) > MOST_NODES for path in paths):
            raise InputError(f"a path of ranks is longer than {MOST_NODES}; give shorter ones.")
        every = {tuple(path[:k]) for path in paths for k in range(1, len(path) + 1)}
        if not every or any(rank < 0 for path in every for rank in path):
            raise InputError("a tree needs at least one path of ranks, each 0 or more, such as [(0,), (1,), (0, 0)].")
        self.paths: tuple[Path, ...] = tuple(sorted(every, key=lambda path: (len(path), path)))
        number = {path: i for i, path in enumerate(self.paths, start=1)} | {(): 0}
        self.tree = Tree(tuple(number[path[:-1]] for path in self.paths))
        self._levels_at: dict[torch.device, tuple[Level, ...]] = {}

    def __len__(self) -> int:
        return len(self.paths)

    def __repr__(self) -> str:
        return f"Ranks({len(self)} nodes, {self.depth} deep)"

    @property
    def depth(self) -> int:
        """Length of the longest path."""
        return len(self.paths[-1])

    @classmethod
    def chain(cls, length: int) -> Ranks:
        """The best token at each of `length` levels."""
        return cls([(0,) * min(length, MOST_NODES + 1)])

    def levels(self, device: torch.device) -> tuple[Level, ...]:
        """The tree, level by level."""
        if device not in self._levels_at:
            self._levels_at[device] = tuple(self._made(device))
        return self._levels_at[device]

    def _made(self, device: torch.device) -> Iterable[Level]:
        inner = {path[:-1] for path in self.paths}
        above: list[Path] = [()]
        handed: list[Path] = []
        for depth in range(1, self.depth + 1):
            here = [path for path in self.paths if len(path) == depth]
            below = [path for path in here if path in inner]
            handed += below
            yield Level(
                parents=torch.tensor([above.index(path[:-1]) for path in here], device=device),
                ranks=torch.tensor([path[-1] for path in here], device=device),
                width=1 + max(path[-1] for path in here),
                expanded=torch.tensor([i for i, path in enumerate(here) if path in inner], device=device).long(),
                grandparents=torch.tensor([[above.index(path[:-1]) for path in below]], device=device).long(),
                within=torch.tensor([path[: len(h)] == h for path in below for h in handed], device=device)
                .bool()
                .reshape(1, len(below), len(handed)),
            )
            above = below
