"""Small models that slow tests train once and share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache

import torch
from transformers import LlamaForCausalLM

from manyheads.draft.core.drafter import DraftHeads
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.training.corpus import Corpus
from manyheads.draft.training.heads import TRAINING, Recipe, train
from manyheads.lab.markov import VOCABULARY, ceiling, markov_model, markov_text
from manyheads.lab.permutations import permutation_model
from manyheads.lab.small_llama import llama_config
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model


@lru_cache
def permutation_toy(seed: int = 0) -> HeadModel:
    return open_model(permutation_model(seed=seed))


@lru_cache
def markov_trunk(seed: int = 0) -> HeadModel:
    return open_model(markov_model(seed=seed))


def braided_text(n: int, strands: int, length: int = 32, seed: int = 0) -> torch.Tensor:
    """`n` texts of `strands` Markov texts that take turns: a token follows the one `strands` back, and no other."""
    return markov_text(n * strands, length // strands, seed=seed).view(n, strands, -1).transpose(1, 2).reshape(n, -1)


def braided_ceiling(strands: int, heads: int = 3, length: int = 32) -> list[float]:
    """The best top-1 accuracy of draft heads that see all that there is: the first tokens of the strands nobody can know."""
    guessed = [length - 2 - k for k in range(heads)]
    known = [g - max(0, strands - 2 - k) for k, g in enumerate(guessed)]
    return [(k * ceiling(1) + (g - k) / VOCABULARY) / g for k, g in zip(known, guessed, strict=True)]


@lru_cache
def forgetful_trunk(seed: int = 0) -> HeadModel:
    """A trunk that was never trained: its states tell their own token, and next to nothing of those before it."""
    torch.manual_seed(seed)
    config = llama_config(VOCABULARY, 64, 1, 4, intermediate_size=128, initializer_range=0.02)
    model = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return open_model(model)


def braided_heads(make: Callable[[DraftTrunk], DraftHeads], strands: int, steps: int, rate: float) -> list[float]:
    """Held-out top-1 accuracy of draft heads trained on braided texts beside the forgetful trunk."""
    trunk, ids = DraftTrunk(forgetful_trunk()), braided_text(3000, strands, seed=55)
    corpus = Corpus(ids, torch.ones_like(ids, dtype=torch.bool), trunk.model.fingerprint)
    torch.manual_seed(0)
    settings = dataclasses.replace(TRAINING, steps=steps, rows=32, rate=rate)
    recipe = Recipe(data=1.0, teacher=0.0, settings=settings)
    return train(trunk, make(trunk), corpus, recipe).top(1)
