"""Which heads together make a successor circuit (#4), where none does alone: greedy choice of a summed circuit.

Gould et al., arXiv:2312.09230, look at single heads; where succession is spread over heads, their sum carries it. Starting
from nothing, add the head whose OV circuit raises the score of the sum most, until none does,

    score(S) = share of t with  argmax_{u in class(t)} sum_{h in S} ( E0[t] W_OV[h] W_U )[u] = succ(t)        in [0, 1]

The best of many is partly chance, so a random half of the ordinals chooses and the other half judges, beside random sets with
as many heads in each layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.atlas.patterns.copying import Embedding, token_embedding
from manyheads.atlas.successor_heads.ordinals import ordinals
from manyheads.atlas.successor_heads.scores import Classes
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets, p_value
from manyheads.heads import Head, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import ov_z, readout


@dataclass(frozen=True)
class SuccessorSet:
    """The heads in the order in which they were taken, their summed score on the ordinals that chose them and on the others.

    `random` has the score on the others of each different random set, matched by layer; `p_value` is how rarely it is as high
    as `held_out`.
    """

    order: tuple[Head, ...]
    heads: HeadSet
    chosen_on: float
    held_out: float
    random: tuple[float, ...]
    p_value: float


def successor_set(
    model: HeadModel,
    *,
    classes: Classes | None = None,
    first: Mapping[str, int] | None = None,
    embed: Embedding = "mlp",
    size: int = 8,
    n_random: int = 20,
    seed: int = 0,
) -> SuccessorSet:
    """At most `size` heads whose summed circuit finds most successors (formula above)."""
    if size < 1 or n_random < 20:
        raise InputError(f"a successor set needs size >= 1 and at least 20 random sets; got {size} and {n_random}.")
    tokens = ordinals(model, classes, first)
    x = token_embedding(model, tokens.ids.to(model.device), embed)
    z, unembedding = ov_z(model, x), readout(model, tokens.ids.to(model.device)).float()
    rows = tokens.has_successor.nonzero()[:, 0]
    outside = tokens.domain[rows, None] != tokens.domain
    logits_of = torch.empty(*model.shape, len(rows), len(tokens))  # [L, H, n, N]
    for layer in range(model.n_layers):
        back = torch.einsum("hde,ce->hdc", model.W_O(layer).detach().to(unembedding), unembedding)
        logits_of[layer] = torch.einsum("nhd,hdc->hnc", z[layer][rows.to(z.device)].to(back), back).cpu()
    logits_of.masked_fill_(outside, -torch.inf)
    choosing = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed)) < 0.5
    if not choosing.any() or choosing.all():
        raise InputError(f"{len(rows)} ordinals are too few to choose on one half and judge on the other.")

    def score(logits: Float[Tensor, "... n N"], where: Bool[Tensor, "n"]) -> Tensor:
        return (logits.argmax(-1) == rows + 1)[..., where].double().mean(-1)

    order: list[Head] = []
    total = torch.zeros(len(rows), len(tokens))
    while len(order) < size:
        rates = score(total + logits_of, choosing)
        for head in order:
            rates[head] = -1.0
        best = Head(*divmod(int(rates.argmax()), model.n_heads))
        if order and rates[best] <= score(total, choosing):
            break
        order.append(best)
        total = total + logits_of[best]
    heads = model.head_set(order)
    held_out = float(score(total, ~choosing))
    drawn = matched_sets(heads, n_random, seed)
    random = tuple(float(score(torch.stack([logits_of[h] for h in s]).sum(0), ~choosing)) for s in drawn)
    chosen_on = float(score(total, choosing))
    return SuccessorSet(tuple(order), heads, chosen_on, held_out, random, p_value(held_out, random))
