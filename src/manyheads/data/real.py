"""Real data that installs from packages (the extra `predict`): nothing is downloaded when they are asked for."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.resources import files
from typing import Any

import numpy as np
from jaxtyping import Float

from manyheads.data.labelled import Labelled
from manyheads.errors import InputError

TABLES = ("breast_cancer", "diabetes", "iris", "linnerud", "wine")


def digits() -> Labelled:
    """1,797 images of handwritten digits, [N, 8, 8] from 0 to 1, and which digit each is (Alpaydin and Kaynak, UCI)."""
    found = needed("sklearn.datasets").load_digits()
    return Labelled((found.images / 16).astype(np.float32), found.target, tuple(map(str, range(10))))


def table(name: str) -> Labelled:
    """One of scikit-learn's tables by name, [N, columns] as they are, with its target. `InputError` lists the names."""
    if name not in TABLES:
        raise InputError(f"there is no table {name!r}; choose from {', '.join(TABLES)}.")
    found = getattr(needed("sklearn.datasets"), f"load_{name}")()
    classes = tuple(map(str, found.target_names)) if np.issubdtype(found.target.dtype, np.integer) else ()
    return Labelled(found.data.astype(np.float32), found.target, classes)


def word_ratings() -> tuple[list[str], Float[np.ndarray, "N 10"]]:
    """The 7,520 words and emoticons of VADER (Hutto and Gilbert, 2014) and how ten people rated each, from -4 to 4."""
    needed("vaderSentiment")
    lines = (files("vaderSentiment") / "vader_lexicon.txt").read_text("utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    return [row[0] for row in rows], np.array([ast.literal_eval(row[3]) for row in rows], dtype=np.float64)


def needed(package: str) -> Any:
    """A package of the extra `predict`. `InputError` says how to install it."""
    try:
        return import_module(package)
    except ImportError:
        raise InputError(
            f"this needs {package.split('.')[0]}; install it by pip install 'manyheads[predict]'."
        ) from None
