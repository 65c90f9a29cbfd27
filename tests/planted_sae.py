"""Autoencoders and texts for the tests of attention-output features."""

from __future__ import annotations

import random

import torch
from torch.nn import functional as F
from transformers import LlamaForCausalLM

from manyheads.lab.small_llama import llama_config
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.tasks import TASKS
from manyheads.trace.sae.autoencoder import AttentionSae, head_outputs, principal_components, projection_sae


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
    return projection_sae(layer, model.n_heads, principal_components(x, rank), x.mean(0))


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


WORDS = 48


def superposed(seed: int = 0) -> tuple[HeadModel, torch.Tensor]:
    """A layer of four heads that attends evenly and says one direction a word, and the directions `[48, 32]`, of unit length.

    So heads' outputs are means of a few of 48 directions in 32 dimensions: more than any basis holds.
    """
    config = llama_config(WORDS, 64, 1, 4, head_dim=8, max_position_embeddings=16)
    model = LlamaForCausalLM(config).eval()
    directions = F.normalize(torch.randn(WORDS, 32, generator=torch.Generator().manual_seed(seed)), dim=-1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :WORDS] = torch.eye(WORDS)
        model.model.layers[0].input_layernorm.weight.fill_(1 / 8)  # the norm makes a unit vector 8 long
        model.model.layers[0].self_attn.v_proj.weight[:, :WORDS] = 4 * directions.T
    return open_model(model), directions


def superposed_texts(number: int) -> torch.Tensor:
    """256 texts of four different words each."""
    generator = torch.Generator().manual_seed(number)
    return torch.rand(256, WORDS, generator=generator).argsort(1)[:, :4]
