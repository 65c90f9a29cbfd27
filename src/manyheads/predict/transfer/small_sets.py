"""Small data sets for experiments with transfer: clusters whose classes are known, and sentences about functions.

The sentences are real and always there: the first line of the documentation of functions of pandas, NumPy, PyTorch and Python's
own library, with the question which of the four it is from. Other versions of these libraries have other sentences.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError

SOURCES = (
    ("pandas", "pandas.DataFrame", "pandas.Series"),
    ("numpy", "numpy.ndarray"),
    ("torch", "torch.nn", "torch.nn.functional"),
    (
        "os",
        "statistics",
        "itertools",
        "string",
        "pathlib",
        "datetime",
        "collections",
        "functools",
        "inspect",
        "json",
        "logging",
    ),
)
LONGEST = 100  # characters of a sentence
NAMES = re.compile(r"(?i):[a-z]+:|[`*]|\b(pandas|numpy|np|pytorch|torch|python)\b\.?")


def clusters(
    n: int, centres: Float[Tensor, "K d"], generator: torch.Generator
) -> tuple[Float[Tensor, "n d"], Int[Tensor, "n"]]:
    """`n` points around random centres, with variance 1 in each direction, and which centre each is from."""
    which = torch.randint(len(centres), (n,), generator=generator)
    return centres[which] + torch.randn(n, centres.shape[1], generator=generator), which


def documented(n: int, seed: int = 0) -> tuple[list[str], Int[Tensor, "n"]]:
    """`n` shuffled sentences about functions, as many from each library, and the number of the library (`SOURCES`).

    Names of the libraries and marks of the markup are taken out. `InputError` for more than there are.
    """
    rng, found = random.Random(seed), list[tuple[str, int]]()
    for label, modules in enumerate(SOURCES):
        sentences = sorted({one for name in modules for one in _sentences(name)})
        need = (n + 3 - label) // 4
        if need > len(sentences):
            raise InputError(
                f"{SOURCES[label][0]} has {len(sentences)} sentences for the {need} asked of it; ask for fewer."
            )
        found += [(one, label) for one in rng.sample(sentences, need)]
    rng.shuffle(found)
    return [text for text, _ in found], torch.tensor([label for _, label in found])


def _sentences(name: str) -> Sequence[str]:
    module, _, last = name.rpartition(".")
    try:
        owner = importlib.import_module(name)
    except ImportError:
        owner = getattr(importlib.import_module(module), last)
    texts = (getattr(getattr(owner, one, None), "__doc__", None) for one in sorted(dir(owner)))
    return [clean for text in texts if isinstance(text, str) and (clean := _first(text))]


def _first(text: str) -> str:
    """The first sentence of prose, without names and markup; "" where there is none."""
    for part in inspect.cleandoc(text).split("\n\n"):
        words = part.split()
        if len(words) >= 5 and words[0][0].isupper() and "(" not in words[0] and "->" not in words[:8]:
            return " ".join(NAMES.sub("", " ".join(words).split(". ")[0][:LONGEST]).split())
    return ""
