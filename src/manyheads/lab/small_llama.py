"""The config of a small Llama without special tokens, for models that are built by hand or trained in minutes."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig


def llama_config(vocab_size: int, width: int, layers: int, heads: int, **settings: Any) -> LlamaConfig:
    """`layers` layers of `heads` heads on a stream of `width`; an MLP of 8 neurons and 64 positions unless `settings` say else.

    `settings` are those of `LlamaConfig`. Embedding and unembedding are not tied, and no token begins, ends or pads a text.
    """
    plain: dict[str, Any] = {
        "intermediate_size": 8,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    return LlamaConfig(**plain | settings, **sizes)
