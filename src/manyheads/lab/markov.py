"""Markov text: the best possible guess of a token, any number of steps ahead, is known; and a small trunk trained on it.

Of V = 64 tokens, the next one is a fixed permutation of the last with probability 0.7, else any of the 64, uniformly. From the
text so far, the token k steps ahead can be predicted with an accuracy of at most

    ceiling(k) = 0.7^k + (1 - 0.7^k) / 64        0.705, 0.498, 0.353, 0.252 for k = 1..4        in [0, 1], a share

by applying the permutation k times. A trained head that predicts k tokens ahead must reach it; a head with another accuracy
predicts another token. A head that is given the k - 1 tokens between can reach 0.705: this is the gain of drafting in sequence.
The permutation is one cycle, so that no two horizons (up to 63) have the same best guess.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from manyheads.errors import InputError
from manyheads.training import Batch, TrainSettings, fit, next_token_loss

VOCABULARY = 64
STAY = 0.7


def likely_successor(table_seed: int = 0) -> Int[Tensor, "64"]:
    """The permutation: `successor()[x]` follows x with probability 0.7 + 0.3 / 64. One cycle of all tokens."""
    order = np.random.default_rng((table_seed, 0)).permutation(VOCABULARY)
    table = np.empty_like(order)
    table[order] = np.roll(order, -1)
    return torch.from_numpy(table)


def ceiling(ahead: int) -> float:
    """The best top-1 accuracy `ahead` steps ahead of the last token known."""
    if ahead < 1:
        raise InputError(f"got {ahead} steps ahead; give at least 1, since the ceiling is of a later token.")
    return STAY**ahead + (1 - STAY**ahead) / VOCABULARY


def markov_text(n: int, length: int = 48, *, table_seed: int = 0, seed: int = 0) -> Int[Tensor, "n length"]:
    """`n` texts of `length` tokens, first tokens uniform. Equal seeds give equal texts."""
    if n < 1 or length < 1:
        raise InputError(f"texts and their tokens are counted from 1; got {n} texts of {length} tokens.")
    rng = np.random.default_rng((seed, 1))
    table = likely_successor(table_seed).numpy()
    tokens = rng.integers(VOCABULARY, size=(n, length))
    follows = rng.random((n, length)) < STAY
    for t in range(1, length):
        tokens[:, t] = np.where(follows[:, t], table[tokens[:, t - 1]], tokens[:, t])
    return torch.from_numpy(tokens)


def markov_model(*, steps: int = 400, table_seed: int = 0, seed: int = 0) -> LlamaForCausalLM:
    """Train the trunk (seconds on one core): a Llama of 2 layers, width 64 and 4 heads, 32 fresh texts of 48 tokens a step.

    It reaches `ceiling(1)` one step ahead, and reads up to 512 tokens. Its output matrix is not tied to the embedding.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)

    def batch_at(number: int) -> Batch:
        return {"input_ids": markov_text(32, table_seed=table_seed, seed=1 + seed + 100_000 * (number + 1))}

    settings = TrainSettings(steps=steps, rate=3e-3, warmup=20, weight_decay=0.01, precision="fp32", seed=seed)
    fit(model, batch_at, settings, loss=next_token_loss, device="cpu")
    return model.eval()
