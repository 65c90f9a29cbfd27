"""What each paper claims, in our words, its own headline figure (headlines.json), and what became of it here (verdicts.json).

The verdicts are written by `manyheads replicate --out src/manyheads/catalogue/verdicts.json`.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from manyheads.errors import InputError


def headline(number: int) -> tuple[str, str]:
    """The claim of a system's paper, and the figure that the paper gives for it. `InputError` if there is no such system."""
    found = _headlines().get(str(number))
    if found is None:
        raise InputError(f"there is no system {number!r}; the catalogue has 1 to {len(_headlines())}.")
    return found["claim"], found["paper"]


def replicated(number: int) -> str:
    """How many claims of a system got which verdict when they were tried again, such as "3 held, 1 missed"; "" if not tried."""
    told = _verdicts().get(str(number), {})
    return ", ".join(f"{n} {verdict}" for verdict, n in told.items() if verdict != "not built")


@cache
def _verdicts() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(
        files("manyheads.catalogue").joinpath("verdicts.json").read_text("utf-8")
    )
    return found


@cache
def _headlines() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(
        files("manyheads.catalogue").joinpath("headlines.json").read_text("utf-8")
    )
    return found
