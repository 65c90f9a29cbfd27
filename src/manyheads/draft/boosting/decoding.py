"""One pass of a chain: what each model waits for, what is kept from pass to pass, and how the models' answers become one.

Layer l of model j waits for layer l of model j - 1, and for nothing above it. So with a thread a model a chain of n models with L
layers is through after L + n - 1 layers, and not n L. The same futures serve both orders: in turn, each is there already.

    fused[v] = sum_j w_j log p_j(v) for the tokens v among the k likeliest of any model, else -inf        sum_j w_j = 1
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KeysValues = tuple[Float[Tensor, "B H _ Dh"], Float[Tensor, "B H _ Dh"]]


def fused_logits(logits: Sequence[Float[Tensor, "*N V"]], top_k: int, shares: Sequence[float]) -> Float[Tensor, "*N V"]:
    """One answer of several (formula above). Models that agree give the log-probabilities of their `top_k` likeliest tokens."""
    fused, candidates = torch.zeros(()), torch.zeros((), dtype=torch.bool)
    for own, share in zip(logits, shares, strict=True):
        log_p = own.to(torch.promote_types(own.dtype, torch.float32)).log_softmax(-1)
        likeliest = log_p.topk(min(top_k, log_p.shape[-1]), -1).indices
        candidates = candidates.to(log_p.device) | torch.zeros_like(log_p, dtype=torch.bool).scatter(
            -1, likeliest, True
        )
        fused = fused.to(log_p.device) + share / sum(shares) * log_p
    return fused.masked_fill(~candidates, -torch.inf)


@dataclass
class ChainMemory:
    """What a generation keeps: the predecessors' own caches, and the keys and values that the readers made of their states."""

    caches: list[Any] = field(default_factory=list)
    read: dict[tuple[int, int], KeysValues] = field(default_factory=dict)

    def given_to(self, model: int, given: Mapping[str, Any]) -> dict[str, Any]:
        """A predecessor's inputs: as the last model's, with a cache of its own. Called in order, before any model runs."""
        if len(self.caches) == model:
            self.caches.append(copy.deepcopy(given["past_key_values"]))  # at the first pass, while it is empty
        return {**given, "past_key_values": self.caches[model]}

    def extended(self, place: tuple[int, int], new: KeysValues) -> KeysValues:
        """The keys and values of all tokens so far."""
        if place in self.read:
            new = tuple(torch.cat(pair, 2) for pair in zip(self.read[place], new, strict=True))  # type: ignore[assignment]
        self.read[place] = new
        return new


class ChainPass:
    """The states and logits of models 0 .. `last` in one pass, as promises; and which token may read which, how far apart.

    A padded token may read itself, so that its row of the softmax is not empty; nobody reads it.
    """

    def __init__(self, last: int, n_layers: int, given: Mapping[str, Any], memory: ChainMemory | None) -> None:
        self.last, self.memory = last, memory
        self.states: list[list[Future[Tensor]]] = [[Future() for _ in range(n_layers)] for _ in range(last)]
        self.logits: list[Future[Tensor]] = [Future() for _ in range(last)]
        self.apart, self.seen = _placed(given, 0 if memory is None else _length(memory))

    def failed(self, model: int, error: BaseException) -> None:
        """Hand an error of a model to whoever waits for it."""
        for promise in (*self.states[model], self.logits[model]):
            if not promise.done():
                promise.set_exception(error)


def _length(memory: ChainMemory) -> int:
    return next((keys.shape[2] for keys, _ in memory.read.values()), 0)


def _placed(given: Mapping[str, Any], past: int) -> tuple[Int[Tensor, "B T S"], Bool[Tensor, "B T S"]]:
    ids = given["input_ids"]
    size = past + ids.shape[1]
    mask = given.get("attention_mask")
    mask = torch.ones(len(ids), size, dtype=torch.long, device=ids.device) if mask is None else mask[:, :size].long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    column = torch.arange(size, device=ids.device)
    ends = column[past:, None]
    seen = (column <= ends) & mask.bool()[:, None] | (column == ends)
    return positions[:, past:, None] - positions[:, None], seen
