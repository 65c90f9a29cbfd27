"""Intervals over everything that was drawn: seeds, probes and triggers are drawn again together (bootstrap).

    estimate = mean of x        interval = 2.5 % and 97.5 % of the means of x[drawn rows, drawn columns, ...]

Every axis is resampled by itself, with replacement; an axis of length one stays. So the interval is about other seeds and other
probes, not about these alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from manyheads.errors import InputError

DRAWS = 2000


@dataclass(frozen=True)
class Interval:
    """A mean with the interval that holds 95 % of its bootstrap draws."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    @property
    def answer(self) -> str:
        """Which side of 0 the whole interval lies on."""
        return "above 0" if self.low > 0 else "below 0" if self.high < 0 else "not apart from 0"


def interval_of(values: Float[np.ndarray, "..."], *, seed: int = 0, draws: int = DRAWS) -> Interval:
    """Mean and interval of `values` over all their axes (formula above)."""
    return contrast({"": values}, {"": 1.0}, seed=seed, draws=draws)


def contrast(
    parts: Mapping[str, Float[np.ndarray, "..."]], weights: Mapping[str, float], *, seed: int = 0, draws: int = DRAWS
) -> Interval:
    """The weighted sum of the parts' means. The first two axes (seeds, probes) are shared, and drawn once for all parts."""
    arrays = {name: np.asarray(part, dtype=np.float64) for name, part in parts.items()}
    shared = {array.shape[:2] for array in arrays.values()}
    if len(shared) != 1 or any(array.size == 0 or array.ndim == 0 for array in arrays.values()):
        raise InputError("an interval needs values of the same seeds and probes, at least one of each.")
    rng = np.random.default_rng(seed)
    drawn = np.zeros(draws)
    for i in range(draws):
        first = [rng.integers(size, size=size) for size in next(iter(shared))]
        for name, array in arrays.items():
            rest = [rng.integers(size, size=size) for size in array.shape[2:]]
            drawn[i] += weights[name] * array[np.ix_(*first, *rest)].mean()
    mean = sum(weights[name] * float(array.mean()) for name, array in arrays.items())
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(float(mean), float(low), float(high))
