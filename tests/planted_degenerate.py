"""A bigram model whose likeliest text is degenerate, though few of its texts are."""

from __future__ import annotations

import torch
from transformers import LlamaForCausalLM

from manyheads.lab.small_llama import llama_config
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model

END, PROMPTS, WORDS = 0, 12, 24
FIRST = PROMPTS + 1
VOCAB = FIRST + WORDS
LOOPS = 4


def bigram_table(seed: int = 0) -> torch.Tensor:
    """`table[i, j]` = p(j | i). After prompt i the end has 0.1, and `i % 9` words have 0.1003 each, so that a beam of `i % 9 + 1`
    sees the end. A word ends a text at 0.2, so no text with words is likelier than 0.0201; the last `LOOPS` words, which prompts
    rarely lead to, say themselves again at 0.7 and end at 0.1.
    """
    generator = torch.Generator().manual_seed(seed)
    table = torch.zeros(VOCAB, VOCAB)
    for token in range(VOCAB):
        row = torch.zeros(VOCAB)
        row[FIRST:] = torch.rand(WORDS, generator=generator) + 0.5
        if token and token < FIRST:
            likely = FIRST + torch.randperm(WORDS - LOOPS, generator=generator)[: token % 9]
            row[likely] = 0
            row *= (0.9 - 0.1003 * len(likely)) / row.sum()
            row[likely], row[END] = 0.1003, 0.1
        elif token >= FIRST:
            loops = token >= VOCAB - LOOPS
            row[token] = 0
            row *= (0.2 if loops else 0.8) / row.sum()
            row[token], row[END] = (0.7, 0.1) if loops else (0.0, 0.2)
        else:
            row[END] = 1
        table[token] = row
    return table


def bigram_model(table: torch.Tensor) -> HeadModel:
    """A one-layer Llama that writes nothing to its residual stream and looks `table` up in its unembedding."""
    config = llama_config(VOCAB, 64, 1, 2, eos_token_id=END, pad_token_id=END)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.zero_()
        model.model.embed_tokens.weight[:, :VOCAB] = torch.eye(VOCAB)
        model.lm_head.weight[:, :VOCAB] = table.clamp_min(1e-9).log().T / 8
    return open_model(model)


def prompts() -> torch.Tensor:
    return torch.arange(1, FIRST)[:, None]
