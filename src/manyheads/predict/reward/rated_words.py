"""Real preferences with known noise: ten people's ratings of thousands of words, and what language models see in them.

Each person rated a word from -4 to 4 (VADER; Hutto and Gilbert, 2014). A person's two ratings compare two words: the higher one
is preferred, with a strength of 1, 2 or 3 (for 3 or more steps) or 0 for a tie. What all ten say is as good a truth as there is.
"""

from __future__ import annotations

from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.data import word_ratings
from manyheads.learning import features
from manyheads.model.opening import open_model
from manyheads.predict.words import word_states

LAYER = 20  # of SmolLM2's 30


def rated_words(trunk: str) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N 10"]]:
    """States and ratings of words: "minilm" has the mean states of 7,000, "smollm2" the last token's of every third of these."""
    return _smollm2() if trunk == "smollm2" else _minilm()


@cache
def _minilm() -> tuple[Tensor, Tensor]:
    _, states, ratings = word_states()
    return states, torch.tensor(ratings).float()


@cache
def _smollm2() -> tuple[Tensor, Tensor]:
    words, ratings = word_ratings()
    kept = [i for i, word in enumerate(words) if word.isascii() and word.isalpha()][::3]
    states = features(open_model("smollm2"), [f"The word {words[i]}" for i in kept], LAYER, "last", rows=64)
    scaled = (states - states.mean(0)) / states.std(0).clamp_min(1e-6)
    return scaled, torch.tensor(ratings[kept]).float()


def compared(
    rating: Float[Tensor, "N"], pairs: int, generator: torch.Generator
) -> tuple[Int[Tensor, "P 2"], Float[Tensor, "P"]]:
    """Random pairs of rows, the higher rated first, and their strengths: the difference, at most 3."""
    a, b = torch.randint(len(rating), (2, pairs), generator=generator)
    gap = rating[a] - rating[b]
    higher = torch.where((gap >= 0)[:, None], torch.stack([a, b], 1), torch.stack([b, a], 1))
    return higher, gap.abs().clamp_max(3.0)
