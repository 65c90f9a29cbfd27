"""Small models that slow tests train once and share."""

from __future__ import annotations

from functools import lru_cache

from manyheads.lab.markov import markov_model
from manyheads.lab.permutations import permutation_model
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model


@lru_cache
def permutation_toy(seed: int = 0) -> HeadModel:
    return open_model(permutation_model(seed=seed))


@lru_cache
def markov_trunk(seed: int = 0) -> HeadModel:
    return open_model(markov_model(seed=seed))
