"""Bars count up, and say how long a job takes only to somebody who asked."""

import pytest

from manyheads import progress
from manyheads.progress import Bar, Scaled, progressing


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_says_what_is_done_how_long_it_took_and_what_is_left(capsys, clock):
    with progressing() as bar:
        step = bar.step("needles", 40)
        clock[0] += 1
        step(1)
        clock[0] += 29
        step(9, note="loss 1.5")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "needles: 10 of 40, loss 1.5, 0:30 elapsed, 1:30 left\n"


def test_lines_come_every_few_seconds_and_not_at_every_call(capsys, clock):
    with progressing() as bar:
        step = bar.step("rows", 1000)
        for _ in range(1000):
            clock[0] += 0.03
            step()
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_what_was_done_before_does_not_count_as_fast(capsys, clock):
    with progressing() as bar:
        step = bar.step("steps", 100, done=90)
        clock[0] += 5
        step(5)
    assert capsys.readouterr().err == "steps: 95 of 100, 0:05 elapsed, 0:05 left\n"


def test_a_short_step_and_a_silent_bar_say_nothing(capsys, clock):
    with progressing() as bar:
        bar.step("a moment", 3)(3)
    with progressing(shown=False) as bar:
        step = bar.step("an hour", 3)
        clock[0] += 3600
        step(3)
    Bar().step("nothing")(5)
    assert capsys.readouterr() == ("", "")


def test_on_a_terminal_there_is_a_bar_and_it_vanishes(monkeypatch):
    from io import StringIO

    from rich.console import Console

    screen = StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    with progressing() as bar:
        step = bar.step("needles", 40)
        step(10, note="loss 1.5")
    assert "needles loss 1.5" in screen.getvalue()
    assert "10/40" in screen.getvalue()
    assert screen.getvalue().rstrip().endswith("\x1b[2K")  # the line was erased


def test_a_part_counts_in_the_units_of_its_job_and_adds_up_to_them():
    told = []

    class Counted(Bar):
        def __call__(self, more=1, /, note=""):
            told.append(more)

    part = Scaled(Counted(), units=4, of=6)
    for _ in range(6):
        part()
    assert told == [0, 1, 1, 0, 1, 1]
