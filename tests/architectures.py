"""Tiny random models of every architecture the model room must read, built from config classes: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
import transformers as tf
from transformers import PreTrainedModel

from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model

VOCAB = 61
COMMON = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA = dict(
    COMMON,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
GEMMA = dict(LLAMA, head_dim=16, sliding_window=6, query_pre_attn_scalar=16)
MOE = dict(num_experts_per_tok=2)
ENCODER = dict(LLAMA, max_position_embeddings=130)
IMAGE = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    image_size=16,
    patch_size=4,
    num_channels=3,
    num_labels=5,
)


def _decoder(name: str, **config: object) -> PreTrainedModel:
    model = getattr(tf, f"{name}ForCausalLM", None) or getattr(tf, f"{name}LMHeadModel")
    return model(getattr(tf, f"{name}Config")(**config))


DECODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": partial(_decoder, "GPT2", **COMMON, n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "llama": partial(_decoder, "Llama", **LLAMA),
    "mistral": partial(_decoder, "Mistral", **LLAMA, sliding_window=6),
    "qwen2": partial(_decoder, "Qwen2", **LLAMA),
    "qwen3": partial(_decoder, "Qwen3", **LLAMA, head_dim=16),
    "gemma2": partial(_decoder, "Gemma2", **GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": lambda: tf.Gemma3ForCausalLM(
        tf.Gemma3TextConfig(**GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    ),
    "phi3": partial(_decoder, "Phi3", **LLAMA),
    "gpt_neox": partial(
        _decoder,
        "GPTNeoX",
        **{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"},
    ),
    "opt": partial(
        _decoder,
        "OPT",
        **COMMON,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        word_embed_proj_dim=32,
    ),
    "olmo2": partial(_decoder, "Olmo2", **LLAMA),
    "granite": partial(
        _decoder,
        "Granite",
        **LLAMA,
        residual_multiplier=0.3,
        attention_multiplier=0.2,
        embedding_multiplier=2.0,
        logits_scaling=1.5,
    ),
    "gpt_oss": partial(_decoder, "GptOss", **LLAMA, head_dim=16, num_local_experts=4, **MOE, sliding_window=6),
    "mixtral": partial(_decoder, "Mixtral", **LLAMA, num_local_experts=4, **MOE),
    "qwen3_moe": partial(_decoder, "Qwen3Moe", **LLAMA, head_dim=16, num_experts=4, moe_intermediate_size=24, **MOE),
    "falcon": partial(
        _decoder,
        "Falcon",
        **COMMON,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        bias=True,
    ),
    "bloom": partial(_decoder, "Bloom", **COMMON, hidden_size=32, n_layer=3, n_head=4),
    "mpt": partial(_decoder, "Mpt", **COMMON, d_model=32, n_heads=4, n_layers=3, max_seq_len=128),
    "stablelm": partial(_decoder, "StableLm", **LLAMA),
}
_BERT = {k: v for k, v in ENCODER.items() if k != "num_key_value_heads"}
ENCODERS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**_BERT)),
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**_BERT)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**_BERT, local_attention=6, cls_token_id=1, sep_token_id=2)
    ),
}
VISION: dict[str, Callable[[], PreTrainedModel]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE, mlp_ratio=2)),
}
EVERY = {**DECODERS, **ENCODERS, **VISION}
EXTRA: dict[str, Callable[[], PreTrainedModel]] = {
    "falcon_alibi": partial(DECODERS["falcon"], alibi=True),
    "falcon_gqa": partial(DECODERS["falcon"], new_decoder_architecture=True, num_kv_heads=2),
    "stablelm_parallel": partial(DECODERS["stablelm"], use_parallel_residual=True, qk_layernorm=True),
    "llama_bias": partial(DECODERS["llama"], attention_bias=True),
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The named model in eval mode and float32, with weights large enough for heads to matter."""
    torch.manual_seed(seed)
    model = (EVERY | EXTRA)[name]().eval().float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.15 if parameter.ndim > 1 else 0.05))
    return model


def inputs_for(name: str, batch: int = 3, length: int = 11, seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids, or pixels for a vision model."""
    generator = torch.Generator().manual_seed(seed)
    if name in VISION:
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    return {"input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)}


@cache
def shared(name: str) -> PreTrainedModel:
    """One model of each kind for tests that leave it as it was."""
    return build(name)


@cache
def opened(name: str) -> HeadModel:
    """The shared model, opened."""
    return open_model(shared(name))


def padded(name: str, side: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch of three rows with 0, 2 and 5 padded positions."""
    ids = inputs_for(name, seed=seed)["input_ids"]
    mask = torch.ones_like(ids)
    for row, n in enumerate((0, 2, 5)):
        where = slice(0, n) if side == "left" else slice(ids.shape[1] - n, None)
        mask[row, where] = 0
    return {"input_ids": ids.where(mask.bool(), 0), "attention_mask": mask}
