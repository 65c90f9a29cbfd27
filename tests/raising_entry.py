"""A pytest plugin: the entry of the row MANYHEADS_RAISING_ROW raises, whoever imported it, and what its tests then do is noted.

The function's own code is replaced in place: every module that holds the function, under any name, calls what raises, and the
function stays the same object. Of a class the constructor raises, so that `isinstance` and `issubclass` keep their answers.
The file MANYHEADS_RAISING_REPORT gets `{node: [[outcome, whether the entry raised], ...]}`, a pair for each phase of a test.
"""

from __future__ import annotations

import inspect
import json
import os
from pathlib import Path

from manyheads.catalogue import method

SAID = "the entry of this row was replaced by one that raises"
REPORT: dict[str, list[tuple[str, bool]]] = {}


def raising(*args, **kwargs):
    raise RuntimeError("the entry of this row was replaced by one that raises")


def break_entry(entry) -> None:
    """Make a function, a method or a class raise."""
    if isinstance(entry, type):
        entry.__init__ = raising
        return
    function = inspect.unwrap(getattr(entry, "__func__", entry))
    function.__defaults__ = function.__kwdefaults__ = None
    function.__code__ = raising.__code__.replace(co_freevars=function.__code__.co_freevars)


def note(report) -> None:
    REPORT.setdefault(report.nodeid, []).append((report.outcome, SAID in str(report.longrepr)))


def pytest_configure() -> None:
    break_entry(method(int(os.environ["MANYHEADS_RAISING_ROW"])).load())


pytest_runtest_logreport = note


def pytest_collectreport(report) -> None:
    if report.failed:
        note(report)


def pytest_sessionfinish() -> None:
    Path(os.environ["MANYHEADS_RAISING_REPORT"]).write_text(json.dumps(REPORT))
