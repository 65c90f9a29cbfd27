"""Worked problems as token ids, and the batches that a hidden chain of thought (#96) learns from.

A row is prefix, [CoT], chain (stage 1) or prefix, [CoT], answer (stage 2), padded on the right, which a causal model does not
read. `slot` is the column of [CoT], whose id is a placeholder; `weights` are 1 on the tokens that are learned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.training import Batch, generator_of

Rows = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Worked:
    """Problems with written steps: row i is the text `prefixes[i] + chains[i] + answers[i]`, in token ids.

    An end token of a chain or an answer is part of it. `InputError` for uneven or empty parts.
    """

    prefixes: Rows
    chains: Rows
    answers: Rows

    def __post_init__(self) -> None:
        sizes = {len(part) for part in (self.prefixes, self.chains, self.answers)}
        if len(sizes) != 1 or 0 in sizes:
            raise InputError(
                f"every problem needs prefix, chain and answer; got {len(self.prefixes)}, {len(self.chains)}, "
                f"{len(self.answers)}."
            )
        if not all(chain(self.prefixes, self.chains, self.answers)):
            raise InputError("a prefix, chain or answer is empty; give at least one token.")

    def __len__(self) -> int:
        return len(self.prefixes)

    def at(self, rows: Sequence[int]) -> Worked:
        """The problems with these numbers."""
        return Worked(*([part[i] for i in rows] for part in (self.prefixes, self.chains, self.answers)))

    def written_out(self) -> Batch:
        """A batch for `training.fit` that teaches a model to write chain and answer: the full chain of thought."""
        rests = [[*c, *a] for c, a in zip(self.chains, self.answers, strict=True)]
        return text_batch(self.prefixes, rests)

    def without_steps(self) -> Batch:
        """The same without the chains: answers straight after prefixes."""
        return text_batch(self.prefixes, self.answers)


def text_batch(prefixes: Rows, rests: Rows) -> Batch:
    """`input_ids` and `weights`, 1 on the tokens of `rests`."""
    ids, mask = right_padded([[*p, *r] for p, r in zip(prefixes, rests, strict=True)])
    begin = torch.tensor([len(p) for p in prefixes])
    return {"input_ids": ids, "weights": mask & (torch.arange(ids.shape[1]) >= begin[:, None])}


def batch_with_chain(data: Worked) -> Batch:
    """Stage 1: the chain after [CoT], and the chain by itself."""
    chains, mask = right_padded(data.chains)
    return _with_hole(data.prefixes, data.chains) | {"chain": chains, "chain_mask": mask}


def batch_with_answer(data: Worked) -> Batch:
    """Stage 2: the answer after [CoT]."""
    return _with_hole(data.prefixes, data.answers)


def _with_hole(prefixes: Rows, rests: Rows) -> Batch:
    return text_batch([[*p, 0] for p in prefixes], rests) | {"slot": torch.tensor([len(p) for p in prefixes])}


def drawn(data: Worked, rows: int, seed: int, make: Callable[[Worked], Batch]) -> Callable[[int], Batch]:
    """A function from batch number to a batch of `rows` different problems (all, if fewer), the same at every call."""

    def batch_at(number: int) -> Batch:
        order = torch.randperm(len(data), generator=generator_of(seed, number))
        return make(data.at(order[:rows].tolist()))

    return batch_at


def right_padded(rows: Rows, device: torch.device | None = None) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids, zeros after a row's end, and the mask of real tokens."""
    if not rows or not all(rows):
        raise InputError("a row of tokens is empty; give at least one token.")
    lengths = torch.tensor([len(row) for row in rows], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)
    return ids, torch.arange(longest, device=device) < lengths[:, None]
