"""Which guesses count: greedy, lossless under sampling, or typical acceptance.

**Chosen guesses** (the tree is made of a drafter's best tokens). The target makes its own choice at every node, best or drawn.
The walk goes down as long as that choice is among the node's children. So every token is the target's own choice, and the result
is exactly greedy decoding, or sampling from the target. No rule accepts a chosen child more often than its probability. Random
numbers belong to positions in the text, so that even sampled tokens do not depend on the guesses.

**Drawn guesses** (children drawn from q). A child x is accepted with probability min(1, p(x) / q(x)); after a rejection p becomes
max(p - q, 0) and q loses x, both renormalised, and the next child is tried. When no child is left, the token is drawn from the
remaining p. Every token then has the target's distribution (arXiv:2211.17192 and 2302.01318 for chains, 2305.09781 for trees,
2402.14160 for draws without replacement).

**Typical acceptance** (arXiv:2401.10774): a child is accepted if p(x) > min(epsilon, delta exp(-entropy of p)). Faster and *not*
lossless: the output no longer has the target's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.draft.core.target import Target, draw
from manyheads.draft.core.tree import Proposal, Tree
from manyheads.errors import UnsupportedError

Acceptance = Literal["lossless", "typical"]
FORBIDDEN = "the rules forbid every token here, or the logits are not numbers; loosen the rules, or stop earlier."
Walk = tuple[list[int], int]
"""The accepted nodes from the root down, and the token that follows them."""


def accept(
    scores: Float[Tensor, "B {proposal.tokens.shape[1]}+1 V"],
    proposal: Proposal,
    target: Target,
    lengths: Sequence[int],
    rule: Acceptance = "lossless",
) -> list[Walk]:
    """The accepted path and next token of each row, from the target's scores at the root and after every guess.

    `lengths` are those of the texts, root included.
    """
    if rule == "typical" and not target.greedy:
        return [typical(target.probabilities(s), *row) for s, row in zip(scores, _rows(proposal), strict=True)]
    if proposal.drawn_from is None or target.greedy:
        choices = target.choose(scores, _places(proposal, lengths, scores.device)).tolist()
        return [follow(choice, *row) for choice, row in zip(choices, _rows(proposal), strict=True)]
    probabilities = target.probabilities(scores)
    rows = zip(probabilities, proposal.drawn_from, _rows(proposal), strict=True)
    return [reject(p, q, *row, target.generator) for p, q, row in rows]


def _places(
    proposal: Proposal, lengths: Sequence[int], device: torch.device
) -> Int[Tensor, "B {proposal.tokens.shape[1]}+1"]:
    """The position, in its row's text, of the token after each node."""
    size = proposal.tokens.shape[1] + 1
    places = [
        [length + depth for depth in tree.depths] + [length] * (size - len(tree.depths))
        for tree, length in zip(proposal.trees, lengths, strict=True)
    ]
    return torch.tensor(places, device=device)


def _rows(proposal: Proposal) -> list[tuple[Tree, list[int]]]:
    return list(zip(proposal.trees, proposal.tokens.tolist(), strict=True))


def follow(choices: list[int], tree: Tree, tokens: list[int]) -> Walk:
    """Walk down while the target's choice is among the guesses."""
    node = 0
    path: list[int] = []
    while True:
        wanted = choices[node]
        node = next((child for child in tree.children[node] if tokens[child - 1] == wanted), 0)
        if not node:
            return path, wanted
        path.append(node)


def reject(
    p: Float[Tensor, "M V"],
    q: Float[Tensor, "M V"],
    tree: Tree,
    tokens: list[int],
    generator: torch.Generator | None = None,
) -> Walk:
    """Rejection sampling down the tree; `q[i]` is what node i's children were drawn from."""
    node = 0
    path: list[int] = []
    while True:
        rest, drafted = p[node], q[node]
        if bool(rest.isnan().any()):
            raise UnsupportedError(FORBIDDEN)
        # Children are tried in the order they were drawn: p and q change after each rejection, so the order matters.
        for child in tree.children[node]:
            token = tokens[child - 1]
            # rand * q < p is rand < p / q without a division by zero.
            if torch.rand((), generator=generator, device=p.device) * drafted[token] < rest[token]:
                node = child
                path.append(child)
                break
            left = (rest - drafted).clamp(min=0)
            # Nothing is left only if p and q are equal up to rounding: then p itself is the right distribution.
            rest = _normalised(left) if bool(left.any()) else rest
            drafted = _without(drafted, token)
        else:
            return path, int(draw(rest[None], generator))


def typical(p: Float[Tensor, "M V"], tree: Tree, tokens: list[int], epsilon: float = 0.09, delta: float = 0.3) -> Walk:
    """The longest path of typical tokens (rule above), and the target's best token after it."""
    entropy = -(p * p.clamp(min=1e-30).log()).sum(-1)
    bound = (delta * (-entropy).exp()).clamp(max=epsilon)
    best: list[int] = []
    reached: dict[int, list[int]] = {0: []}
    # Parents come before children, so one pass finds all accepted paths.
    for node, parent in enumerate(tree.parents, start=1):
        if parent in reached and bool(p[parent, tokens[node - 1]] > bound[parent]):
            reached[node] = [*reached[parent], node]
            best = max(best, reached[node], key=len)
    return best, int(p[best[-1] if best else 0].argmax())


def _normalised(x: Float[Tensor, "V"]) -> Float[Tensor, "V"]:
    return x / x.sum().clamp(min=1e-30)


def _without(q: Float[Tensor, "V"], token: int) -> Float[Tensor, "V"]:
    q = q.clone()
    q[token] = 0
    return _normalised(q)
