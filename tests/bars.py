"""A bar for tests of what a function says of its progress."""

from __future__ import annotations

from manyheads.progress import Bar


class Counting(Bar):
    """Puts every increment it is told into `counts`."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.counts.append(more)
