"""Bars for tests of what a function says of its progress, and of what it leaves behind when it is stopped."""

from __future__ import annotations

from manyheads.progress import Bar


class Counting(Bar):
    """Puts every increment it is told into `counts`."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.counts.append(more)


class Stopped(Exception):
    """What `Stopping` raises."""


class Stopping(Bar):
    """Raises `Stopped` at its `last` increment, as `Ctrl-C` would."""

    def __init__(self, last: int) -> None:
        self.left = last

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.left -= 1
        if not self.left:
            raise Stopped
