"""Jobs of the explorer: what takes time runs one after another in one thread, with a place in the queue, progress, and an end.

    waiting -> running -> done | failed | cancelled        a job that waits may be cancelled too

Hooks in a model are of the whole process, so two passes at once would see each other's edits. One thread makes results right.
"""

from __future__ import annotations

import secrets
import sys
import threading
import traceback
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from manyheads.errors import InputError, ManyheadsError
from manyheads.progress import Bar

State = Literal["waiting", "running", "done", "failed", "cancelled"]
WAITING = 16  # jobs that may wait
KEPT = 32  # jobs that have ended and whose results can still be fetched


class Cancelled(Exception):
    """The job was cancelled; raised inside it, at its next report of progress."""


class Full(ManyheadsError):
    """The queue takes no more jobs."""


@dataclass(eq=False)
class Job:
    """One piece of work, and how far it is. `result` is what it gave, `sentence` why it failed."""

    kind: str
    work: Callable[[Bar], Any]
    id: str = field(default_factory=lambda: secrets.token_urlsafe(9))
    state: State = "waiting"
    result: Any = None
    sentence: str = ""
    step: str = ""
    done: int = 0
    total: int | None = None
    stop: threading.Event = field(default_factory=threading.Event)

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in ("done", "failed", "cancelled")


class _Reporting(Bar):
    """Writes progress into a job, and ends it where it was cancelled."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        if self.job.stop.is_set():
            raise Cancelled
        self.job.done += more

    def step(self, name: str, total: int | None = None, *, done: int = 0) -> Bar:
        self(0)
        self.job.step, self.job.total, self.job.done = name, total, done
        return self


class Jobs:
    """The queue. `add` puts a job at its end; `place` says how many are before it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[Job] = []
        self._known: OrderedDict[str, Job] = OrderedDict()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="explorer jobs", daemon=True)
        self._thread.start()

    def add(self, kind: str, work: Callable[[Bar], Any]) -> Job:
        """Queue a job. `Full` if too many wait."""
        with self._changed:
            if self._closed:
                raise InputError("the explorer is closing; start it again.")
            if len(self._waiting) >= WAITING:
                raise Full(f"{WAITING} jobs wait already; try again when some are done.")
            job = Job(kind, work)
            self._waiting.append(job)
            self._known[job.id] = job
            self._changed.notify()
            return job

    def get(self, name: str) -> Job | None:
        """The job of that id, if it is still known."""
        return self._known.get(name)

    def place(self, job: Job) -> int:
        """How many jobs run before this one; 0 for the one that runs or has ended."""
        with self._changed:
            running = any(one.state == "running" for one in self._known.values())
            return self._waiting.index(job) + running if job in self._waiting else 0

    def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, at its next report of progress if it runs."""
        job.stop.set()
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                job.state = "cancelled"
                self._forget()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for job in self._known.values():
                job.stop.set()
            self._waiting.clear()
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._waiting.pop(0)
                job.state = "running"
            self._do(job)
            with self._changed:
                self._forget()

    def _do(self, job: Job) -> None:
        try:
            bar = _Reporting(job)
            bar(0)
            job.result = job.work(bar)
            job.state = "done"
        except Cancelled:
            job.state = "cancelled"
        except ManyheadsError as error:
            job.sentence, job.state = str(error), "failed"
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            job.sentence = (
                f"this should not have happened: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            )
            job.state = "failed"
        finally:
            job.work = _nothing  # which may hold tensors

    def _forget(self) -> None:
        ended = [name for name, job in self._known.items() if job.ended]
        for name in ended[: max(0, len(ended) - KEPT)]:
            del self._known[name]


def _nothing(bar: Bar) -> None:
    """What an ended job still does."""
