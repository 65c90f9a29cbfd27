"""Systems that say what they see in a picture: `predictor(name)` gives one, and `manyheads vision predict` calls it on files.

@predicts("head-pose")
def _load(folder: Path | None) -> Predictor: ...      # None: the weights that come with the package
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from manyheads.registry import Registry


@dataclass(frozen=True)
class Sight:
    """What was found: a row of plain numbers and words for each thing, the picture with it drawn in, and remarks."""

    rows: list[dict[str, Any]]
    drawn: Float[np.ndarray, "H W 3"]
    notes: tuple[str, ...] = field(default=())


Predictor = Callable[[Float[np.ndarray, "H W 3"]], Sight]
Loading = Callable[[Path | None], Predictor]

_PREDICTORS: Registry[Loading] = Registry("vision")


def predicts(name: str) -> Callable[[Loading], Loading]:
    """Register what loads a system."""

    def add(load: Loading) -> Loading:
        _PREDICTORS.add(name, load)
        return load

    return add


def predictors() -> list[str]:
    """The names of the systems that see pictures."""
    return list(_PREDICTORS.all())


def predictor(name: str, folder: str | Path | None = None) -> Predictor:
    """A trained system: with the weights of `folder`, or its own. `InputError` lists the known ones."""
    return _PREDICTORS[name](None if folder is None else Path(folder))
