"""Rows and their targets, and how they are split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Shaped

from manyheads.errors import InputError


@dataclass(frozen=True)
class Labelled:
    """N rows `x` (numbers of any shape, or texts) with targets `y`, one or several a row. `names` are those of classes."""

    x: Shaped[np.ndarray, "N ..."]
    y: Shaped[np.ndarray, "N ..."]
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y) or not len(self.x):
            raise InputError(
                f"there are {len(self.x)} rows and {len(self.y)} targets; give as many of both, at least one."
            )

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: Any) -> Labelled:
        """Some of the rows."""
        return Labelled(self.x[rows], self.y[rows], self.names)

    def split(self, shares: Sequence[float] = (0.6, 0.2, 0.2), seed: int = 0) -> tuple[Labelled, ...]:
        """Parts that hold about these shares of the rows. Rows that are equal are in one part: none is known from another.

        `InputError` for shares that do not add up to 1, or where a part would be empty.
        """
        if not shares or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
            raise InputError(f"shares are {list(shares)}; give numbers above 0 that add up to 1.")
        contents = np.array([_content(row) for row in self.x])
        kinds, where = np.unique(contents, return_inverse=True)
        order = np.random.default_rng(seed).permutation(len(kinds))
        bounds = np.round(np.cumsum([0.0, *shares]) * len(kinds)).astype(int)
        parts = [np.isin(where, order[low:high]) for low, high in pairwise(bounds)]
        if not all(part.any() for part in parts):
            raise InputError(f"{len(kinds)} different rows are too few for {len(shares)} parts of {list(shares)}.")
        return tuple(self[part] for part in parts)


def _content(row: Any) -> str:
    content = row.encode() if isinstance(row, str) else np.ascontiguousarray(row).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()
