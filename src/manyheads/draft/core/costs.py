"""What a pass of the model costs by the number of tokens it reads: measured on this machine, once a model and process."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import nn

from manyheads.draft.core.tree import chain_of
from manyheads.model.headmodel import HeadModel
from manyheads.model.tree_pass import TreePass

SIZES = (1, 2, 4, 8, 16, 32)
_KNOWN: WeakKeyDictionary[nn.Module, dict[tuple[int, int, bool], PassCosts]] = WeakKeyDictionary()


@dataclass(frozen=True)
class PassCosts:
    """Seconds of a pass by its tokens (of one row), at a few sizes in rising order; between and beyond them, along lines.

    A larger pass never counts as cheaper than a smaller one: where it was measured so, it was noise.
    """

    measured: Mapping[int, float]

    def __post_init__(self) -> None:
        most, rising = 0.0, {}
        for size in sorted(self.measured):
            most = max(most, self.measured[size])
            rising[size] = most
        object.__setattr__(self, "measured", rising)
        object.__setattr__(self, "_sizes", list(rising))

    def __call__(self, tokens: int) -> float:
        sizes: list[int] = self._sizes  # type: ignore[attr-defined]
        if len(sizes) == 1:
            return self.measured[sizes[0]]
        above = min(max(bisect_left(sizes, tokens), 1), len(sizes) - 1)
        low, high = sizes[above - 1], sizes[above]
        slope = (self.measured[high] - self.measured[low]) / (high - low)
        return max(self.measured[low] + slope * (tokens - low), self.measured[sizes[0]])


def clock(device: torch.device) -> Callable[[], float]:
    """Processor time where one thread computes, which other load does not change; else time."""
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


@torch.inference_mode()
def pass_costs(model: HeadModel, rows: int, packed: bool) -> PassCosts:
    """Time passes of 1, 2, 4, ... tokens after a short text, up to 32 or until a pass costs three times the first."""
    known = _KNOWN.setdefault(model.plain, {})
    key = rows, torch.get_num_threads(), packed
    if key not in known:
        now, reader = clock(model.device), TreePass(model)
        reader.begin(rows)
        found: dict[int, float] = {}
        for size in (8, *SIZES):  # the first is the short text
            within, depths = chain_of(size - 1).on(model.device)
            tokens = torch.ones(rows, size, dtype=torch.long, device=model.device)
            taken = []
            for _ in range(1 if not found or found[1] > 0.5 else 3):
                begun = now()
                reader.tree(tokens, within[None], depths[None]).logits.argmax(-1).tolist()
                taken.append(now() - begun)
                if len(found) or size != 8:
                    reader.cache.forget()
            if not reader.cache.columns:
                reader.cache.keep([list(range(size))] * rows)
                continue
            found[size] = min(taken)
            if found[size] > 3 * found[1]:
                break
        known[key] = PassCosts(found)
    return known[key]
