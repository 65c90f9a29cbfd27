"""Similarity of a hidden chain of thought (#96) and the written one: the contrastive loss and retrieval.

    S_ij = cos(u_i, t_j) / tau        loss = (L(S) + L(S^T)) / 2 nats,   L(S) = mean_i -log softmax_j(S_ij)[i]
    retrieval = share of i with argmax_j cos(u_i, t_j) = i                in [0, 1], chance 1 / B

Rows whose chains are equal are left out of each other's softmax, and count as found for each other.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.training import Batch


def contrastive_loss(
    u: Float[Tensor, "B D"], t: Float[Tensor, "B D"], same: Bool[Tensor, "B B"], tau: float = 0.05
) -> Float[Tensor, ""]:
    """InfoNCE in both directions, in nats; `same[i, j]` marks equal chains i and j."""
    scores = cosines(u, t) / tau
    own = torch.arange(len(u), device=u.device)
    others = same & ~torch.eye(len(u), dtype=torch.bool, device=u.device)
    scores = scores.masked_fill(others, float("-inf"))
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2


def retrieved(u: Float[Tensor, "B D"], t: Float[Tensor, "B D"], same: Bool[Tensor, "B B"]) -> Float[Tensor, ""]:
    """The share of rows of u whose nearest t is that of their own chain."""
    return same[torch.arange(len(u), device=u.device), cosines(u, t).argmax(1)].float().mean()


def cosines(u: Float[Tensor, "B D"], t: Float[Tensor, "C D"]) -> Float[Tensor, "B C"]:
    """Cosines of all pairs of rows, in float32."""
    return F.normalize(u.float(), dim=-1) @ F.normalize(t.float(), dim=-1).T


def same_chain(chain: Int[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Bool[Tensor, "B B"]:
    """Entry (i, j): rows i and j hold the same tokens."""
    marked = chain.masked_fill(~mask, -1)
    return (marked[:, None] == marked[None]).all(-1)


def cross_entropy(logits: Float[Tensor, "B T V"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy of the tokens with weight 1, in nats, each predicted by the column before it."""
    counted = batch["weights"][:, 1:]
    return F.cross_entropy(logits[:, :-1][counted].float(), batch["input_ids"][:, 1:][counted])
