"""Fixed trees: the best one for a measured acceptance, and a small default.

`a[k, r]` is the probability that the target's next token is the drafter's guess of rank r at depth k + 1, given that all guesses
above it are right. A tree then gives 1 + the sum over its nodes of the product of a along the node's path: tokens a round. A node
is never worth more than its parent or its better sibling, so adding the best node each time gives the best tree of every
size (Medusa, arXiv:2401.10774, section 2.3.3; Hydra, arXiv:2402.05109, appendix).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.draft.core.growth import Fixed
from manyheads.draft.core.tree import MOST_NODES, Path, Ranks
from manyheads.errors import InputError


def best_ranks(acceptance: Float[Tensor, "K R"], nodes: int) -> Ranks:
    """The tree of `nodes` nodes with the most expected tokens. `InputError` if depth and ranks allow no tree of that size."""
    if acceptance.ndim != 2 or not 1 <= nodes <= MOST_NODES or not bool(acceptance.isfinite().all()):
        raise InputError(
            f"acceptance {list(acceptance.shape)} and {nodes} nodes: give a finite matrix [K, R] and 1 to {MOST_NODES} nodes."
        )
    paths = [path for path, _ in grown(acceptance, nodes)]
    if len(paths) < nodes:
        depth, width = acceptance.shape
        raise InputError(f"{depth} heads with {width} ranks make a tree of {len(paths)} nodes at most, not {nodes}.")
    return Ranks(paths)


def grown(acceptance: Float[Tensor, "K R"], nodes: int) -> Iterator[tuple[Path, float]]:
    """Paths of ranks with the product of their acceptances, the best first: any beginning of the list is a best tree."""
    depth, width = acceptance.shape
    order = acceptance.argsort(dim=1, descending=True, stable=True).tolist()
    worth = acceptance.double().tolist()
    heap: list[tuple[float, Path, float]] = []

    def offer(above: Path, place: int, parent_p: float) -> None:
        """Put the `place`-th best continuation of a path on the heap."""
        level = len(above)
        if level < depth and place < width:
            rank = order[level][place]
            chance = parent_p * worth[level][rank]
            heapq.heappush(heap, (-chance, (*above, rank), parent_p))

    offer((), 0, 1.0)
    for _ in range(nodes):
        if not heap:
            return
        chance, path, parent_p = heapq.heappop(heap)
        yield path, -chance
        offer(path[:-1], order[len(path) - 1].index(path[-1]) + 1, parent_p)
        offer(path, 0, -chance)


def expected_tokens(acceptance: Float[Tensor, "K R"], ranks: Ranks) -> float:
    """Expected tokens a round, the trunk's own included, for acceptance `a[k, r]` (formula above)."""
    total = 1.0
    for path in ranks.paths:
        total += float(torch.stack([acceptance[k, rank] for k, rank in enumerate(path)]).double().prod())
    return total


def small_tree(depth: int) -> Fixed:
    """At most 16 nodes, for an assumed acceptance of 0.6 * 0.4^rank: a default before anything is measured."""
    ranks = 0.6 * 0.4 ** torch.arange(4.0)
    return Fixed(best_ranks(ranks.expand(depth, -1), min(16, sum(4**k for k in range(1, depth + 1)))))
