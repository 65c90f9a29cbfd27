"""Damaged files, odd values and odd command lines, a few of each kind; `python benchmarks/fuzz.py` runs ten thousand."""

from __future__ import annotations

from fuzzing import fuzz


def test_nothing_that_users_bring_ends_in_a_traceback(tmp_path):
    ran, failures = fuzz(250, tmp_path, told=lambda line: None)
    assert ran >= 250
    assert not failures, "\n\n".join(f"{place}\n{how}" for place, how in failures.items())
