"""n-gram heads to build into a model (#44): attention to the tokens after earlier occurrences of the last n tokens.

Akyürek et al., arXiv:2401.12973. For tokens s and hidden states h, both causal, positions counted from 0,

    M_n[i, j] = 1 if s[i-k] = s[j-1-k] for k = 0 .. n-1 and n <= j <= i, else 0
    out_i = A (sum_j M_n[i, j] h_j / sum_j M_n[i, j]) + B h_i

with A and B learned, `[D, D]`, with bias; where nothing matches, the mean is 0. The head attends to the token *after*
the match. On one-hot tokens the mean is the (n+1)-gram distribution of the text so far.

Departures: the released mask leaves out j = i, and with it a follower that is the present token ("aa"); here it is included.
As there, separators are ordinary tokens and break no match.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError


def matches(tokens: Int[Tensor, "B T"], orders: Sequence[int]) -> Iterator[Bool[Tensor, "B T T"]]:
    """M_n of each of the ascending `orders`, from one comparison of all tokens: order n adds a shifted diagonal to n - 1."""
    if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1:
        raise InputError(f"orders are {list(orders)}; give different whole numbers from 1 on, in ascending order.")
    same = F.pad(tokens[:, :, None] == tokens[:, None, :], (1, -1)).tril()  # [i, j]: token i is token j - 1
    matched = same
    for n in range(1, max(orders) + 1):
        if n > 1:
            matched = matched & F.pad(same, (n - 1, 1 - n, n - 1, 1 - n))
        if n in orders:
            yield matched


def mean_over(matched: Bool[Tensor, "B T S"], hidden: Float[Tensor, "B S D"]) -> Float[Tensor, "B T D"]:
    """The mean of `hidden` over the positions that each position matches; 0 without a match."""
    weight = matched.to(hidden.dtype)
    return weight @ hidden / weight.sum(-1, keepdim=True).clamp_min(1.0)


class NgramHead(nn.Module):
    """One n-gram head: `A mean + B h` (formula above)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attended = nn.Linear(width, width)
        self.own = nn.Linear(width, width)

    def forward(self, hidden: Float[Tensor, "B T D"], matched: Bool[Tensor, "B T T"]) -> Float[Tensor, "B T D"]:
        """What the head adds to the residual stream (formula above)."""
        added: Tensor = self.attended(mean_over(matched, hidden)) + self.own(hidden)
        return added


class NgramHeads(nn.Module):
    """A stack of n-gram heads to put between two layers: pre-norm residual blocks `h + head_n(norm(h))`, one for each order."""

    def __init__(self, width: int, orders: Sequence[int] = (1, 2, 3)) -> None:
        super().__init__()
        self.orders = tuple(orders)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.orders)
        self.heads = nn.ModuleList(NgramHead(width) for _ in self.orders)

    def forward(self, hidden: Float[Tensor, "B T D"], tokens: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        """The hidden states after the stack; `tokens` are those of `hidden`."""
        with torch.no_grad():
            masks = list(matches(tokens, self.orders))
        for norm, head, matched in zip(self.norms, self.heads, masks, strict=True):
            hidden = hidden + head(norm(hidden), matched)
        return hidden
