"""Autoencoders and texts for the tests of attention-output features."""

from __future__ import annotations

import random

import torch

from manyheads.model.headmodel import HeadModel
from manyheads.tasks import TASKS
from manyheads.trace.sae.autoencoder import AttentionSae, head_outputs


def random_sae(model: HeadModel, layer: int, features: int = 24, seed: int = 0) -> AttentionSae:
    generator = torch.Generator().manual_seed(seed)
    width = model.n_heads * model.head_dim

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    return AttentionSae(
        layer,
        model.n_heads,
        draw(width, features),
        0.1 * draw(features),
        draw(features, width),
        0.1 * draw(width),
        model.fingerprint,
    )


def pca_sae(model: HeadModel, layer: int, ids: torch.Tensor, rank: int) -> AttentionSae:
    """The projection onto the `rank` directions of most variance, written as an autoencoder: a pair of features a direction."""
    x = head_outputs(model, layer, ids)
    mean = x.mean(0)
    v = torch.linalg.svd(x - mean, full_matrices=False).Vh[:rank]
    both = torch.cat([v, -v])
    return AttentionSae(layer, model.n_heads, both.T.contiguous(), torch.zeros(2 * rank), both, mean, model.fingerprint)


def task_text(model: HeadModel, rows: int, length: int, *, seed: int, split: str) -> torch.Tensor:
    """Examples of all task families, packed end to end behind the token that texts begin with, `[rows, length]`."""
    streams = [task.stream(seed, split) for task in TASKS.values()]
    rng, ids = random.Random(seed), []
    while len(ids) < rows * (length - 1):
        example = next(rng.choice(streams))
        text = f"{example.prompt}{example.answer}{example.continuation}\n"
        ids += model.tokenizer(text, add_special_tokens=False)["input_ids"]
    packed = torch.tensor(ids[: rows * (length - 1)]).view(rows, length - 1)
    return torch.cat([torch.full((rows, 1), model.tokenizer.bos_token_id), packed], 1)
