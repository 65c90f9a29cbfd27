"""Pairs of rows of a batch: which row was preferred to which, and how strongly.

Each row carries the number of its pair and a signed strength: +m for the preferred one, -m for the other, 0 for both of a tie.
So the rows of a batch may stand in any order, and a row whose partner is missing is noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from manyheads.errors import InputError
from manyheads.training import Batch, epoch_rows


def pair_target(strength: Float[Tensor, "P"]) -> Float[Tensor, "2*P 2"]:
    """Targets of 2 P rows, of which 2 i is preferred to 2 i + 1 with a strength of 0 or more."""
    if bool((strength < 0).any()) or not bool(strength.isfinite().all()):
        raise InputError("strengths are 0 or more, 0 for a tie; put the preferred one first where it is negative.")
    pair = torch.arange(len(strength), device=strength.device).to(strength).repeat_interleave(2)
    return torch.stack([pair, torch.stack([strength, -strength], 1).flatten()], 1)


def pairs_of(target: Float[Tensor, "N 2"]) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Float[Tensor, "P"]]:
    """The rows that are preferred, their partners, and the strengths. `InputError` for a row without its partner."""
    if target.ndim != 2 or target.shape[1] != 2:
        raise InputError(
            f"targets of pairs have shape [rows, 2], number and signed strength, not {list(target.shape)}."
        )
    pair, signed = target.unbind(1)
    numbers, counts = pair.unique(return_counts=True)
    if bool((counts != 2).any()):
        lost = int((counts != 2).nonzero()[0])
        raise InputError(
            f"pair {numbers[lost]:g} has {int(counts[lost])} rows in this batch; keep both rows of a pair."
        )
    first, second = pair.argsort(stable=True).view(-1, 2).unbind(1)
    if bool((signed[first] != -signed[second]).any()):
        wrong = int((signed[first] != -signed[second]).nonzero()[0])
        raise InputError(f"the strengths of pair {pair[first[wrong]]:g} are not +m and -m; give both rows the same m.")
    swapped = signed[first] < 0
    preferred, other = torch.where(swapped, second, first), torch.where(swapped, first, second)
    return preferred, other, signed[preferred]


def pair_batches(
    inputs: Shaped[Tensor, "P 2 ..."],
    strength: Float[Tensor, "P"],
    rows: int,
    seed: int = 0,
    *,
    name: str = "reward",
    entry: str = "input",
) -> Callable[[int], Batch]:
    """Batches of `rows` pairs: `inputs` has the preferred one of each first. Every epoch is a pass over all, in its own order."""
    if len(inputs) != len(strength):
        raise InputError(f"there are {len(inputs)} pairs and {len(strength)} strengths; give as many of both.")

    def batch(number: int) -> dict[str, Any]:
        chosen = epoch_rows(len(inputs), rows, number, seed)
        return {entry: inputs[chosen].flatten(0, 1), name: pair_target(strength[chosen])}

    return batch


def pair_accuracy(gap: Float[Tensor, "P"], strength: Float[Tensor, "P"] | None = None) -> float:
    """The share of pairs with gap > 0, where `gap` is the score of the preferred one less the other's; a gap of 0 is half right.

    Pairs of strength 0 do not count. NaN without any.
    """
    kept = gap if strength is None else gap[strength > 0]
    return float(((kept > 0).double() + (kept == 0).double() / 2).mean())
