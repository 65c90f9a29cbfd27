"""What each paper claims, in our words, and its own headline figure (headlines.json)."""

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


@cache
def _headlines() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = json.loads(
        files("manyheads.catalogue").joinpath("headlines.json").read_text("utf-8")
    )
    return found
