"""Batches as pure functions of their number: the random generator of each, the rows it takes, and where its tensors go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.errors import InputError

Batch = dict[str, Tensor]


def generator_of(seed: int, number: int) -> torch.Generator:
    """The random generator of batch (or epoch) `number`. Runs of up to a million batches share none under different seeds."""
    return torch.Generator().manual_seed(1_000_003 * seed + number)


def drawn_rows(n: int, rows: int, number: int, seed: int = 0) -> Int[Tensor, "{rows}"]:
    """`rows` of `n` for batch `number`, each drawn from all of them."""
    return torch.randint(n, (rows,), generator=generator_of(seed, number))


def epoch_rows(n: int, rows: int, number: int, seed: int = 0, *, first: int = 0) -> Int[Tensor, "R"]:
    """`rows` of `n` for batch `number`: every epoch has an order of its own, and leaves out what fills no batch.

    With fewer examples than `rows` a batch is all of them. The orders of a seed are numbered, from `first` on.
    """
    if n < 1:
        raise InputError("there are no examples to learn from; give at least one.")
    each = max(1, n // rows)
    order = torch.randperm(n, generator=generator_of(seed, first + number // each))
    return order[number % each * rows :][:rows]


def row_batches(tensors: Mapping[str, Tensor], rows: int, seed: int = 0) -> Callable[[int], Batch]:
    """Batches of `rows` examples, of tensors that have a row for each: every epoch is a pass over all, in its own order."""
    sizes = {name: len(tensor) for name, tensor in tensors.items()}
    if len(set(sizes.values())) != 1:
        raise InputError(
            f"the entries have {', '.join(f'{n} rows of {name}' for name, n in sizes.items())}; give as many of each."
        )
    n = next(iter(sizes.values()))

    def batch(number: int) -> Batch:
        chosen = epoch_rows(n, rows, number, seed)
        return {name: tensor[chosen] for name, tensor in tensors.items()}

    return batch


def on_device(batch: Any, device: torch.device | str) -> Any:
    """`batch` with its tensors on `device`. Other things stay."""
    return mapped(batch, lambda tensor: tensor.to(device))


def mapped(batch: Any, change: Callable[[Tensor], Any]) -> Any:
    """`batch` with each tensor changed: a tensor, or mappings, tuples, lists and dataclasses of them. Other things stay."""
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: mapped(value, change) for name, value in batch.items()}
    if isinstance(batch, list | tuple):
        parts = [mapped(value, change) for value in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if is_dataclass(batch) and not isinstance(batch, type):
        return replace(batch, **{f.name: mapped(getattr(batch, f.name), change) for f in fields(batch) if f.init})
    return batch


def tokens_of(batch: Any) -> int:
    """How many tokens a batch has: those of `input_ids`, 0 without."""
    return batch["input_ids"].numel() if isinstance(batch, Mapping) and "input_ids" in batch else 0
