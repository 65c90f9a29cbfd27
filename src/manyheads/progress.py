"""How far a job is: one word for whoever works and whoever looks.

A function that may take long has an argument `bar` and calls it with what has been done *since the last call*. The default is a
`Bar` that shows nothing; a caller who wants to see asks for it:

    with progressing() as bar:
        mh.atlas.survey(model, bar=bar)

`progressing` writes to standard error: bars on a terminal, and elsewhere a plain line every few seconds, with the time that has
passed and the time that remains.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

QUIET = 2.0  # seconds that a step may take before plain lines speak of it
EVERY = 10.0  # seconds between plain lines


class Bar:
    """What is told how far a job is; this one tells nobody. Calls count up: each says what was done since the one before."""

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        """`more` units of this step are done; `note` says in a few words how it stands (a loss, say)."""

    def step(self, name: str, total: int | None = None, *, done: int = 0) -> Bar:
        """Begin a part of the job with a name and a size, of which `done` was done before. None: nobody knows the size."""
        return self


class Scaled(Bar):
    """Counts the `of` units of a part of a job as `units` of the job's bar."""

    def __init__(self, bar: Bar, units: int, of: int) -> None:
        self.bar, self.units, self.of, self.done, self.told = bar, units, of, 0, 0

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.done += more
        now = self.done * self.units // self.of
        self.bar(now - self.told, note=note)
        self.told = now


class TimeIsUp(Exception):
    """A job was ended by its `Deadline`."""


class Deadline(Bar):
    """Ends what it watches: raises `TimeIsUp` from the first call after `seconds`. `done` counts the calls' units."""

    def __init__(self, seconds: float) -> None:
        self.started, self.seconds, self.done, self.over = time.monotonic(), seconds, 0, False

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.done += more
        if time.monotonic() - self.started > self.seconds:
            self.over = True
            raise TimeIsUp

    def step(self, name: str, total: int | None = None, *, done: int = 0) -> Bar:
        return self

    def whole(self, units: int) -> float:
        """Seconds that all `units` would take, by how far it came; 0 where it came to the end."""
        return (time.monotonic() - self.started) * units / max(self.done, 1) if self.over else 0.0


class _Live(Bar):
    """A bar of rich, on a terminal."""

    def __init__(self, bars: Progress, name: str = "", total: int | None = None, done: int = 0) -> None:
        self._bars, self._name = bars, name
        self._task = bars.add_task(name, total=total, completed=done) if name else None

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        if self._task is not None:
            self._bars.update(self._task, advance=more, description=f"{self._name} {note}".rstrip())

    def step(self, name: str, total: int | None = None, *, done: int = 0) -> Bar:
        return _Live(self._bars, name, total, done)


class _Plain(Bar):
    """Plain lines, for logs and pipes. A step that is over in a moment says nothing."""

    def __init__(self, console: Console, name: str = "", total: int | None = None, done: int = 0) -> None:
        self._console, self._name, self._total, self._done, self._before = console, name, total, done, done
        self._started = time.monotonic()
        self._next = self._started + QUIET

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self._done += more
        now = time.monotonic()
        if not self._name or now < self._next:
            return
        self._next = now + EVERY
        self._console.print(self._line(now - self._started, note), markup=False, highlight=False, soft_wrap=True)

    def _line(self, elapsed: float, note: str) -> str:
        count = f"{self._done}" if self._total is None else f"{self._done} of {self._total}"
        parts = [f"{self._name}: {count}", *([note] if note else []), f"{_clock(elapsed)} elapsed"]
        here = self._done - self._before
        if self._total is not None and here > 0:
            parts.append(f"{_clock(elapsed * max(0, self._total - self._done) / here)} left")
        return ", ".join(parts)

    def step(self, name: str, total: int | None = None, *, done: int = 0) -> Bar:
        return _Plain(self._console, name, total, done)


@contextlib.contextmanager
def progressing(shown: bool = True) -> Iterator[Bar]:
    """A bar to hand on, for the length of a `with` block. What it shows on a terminal vanishes at the end."""
    console = Console(stderr=True)
    if not shown:
        yield Bar()
    elif not console.is_terminal:
        yield _Plain(console)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bars:
            yield _Live(bars)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
