"""Assembles planted heads, noise and MLPs into a Llama or a GPT-2, as `constructed.py` describes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from manyheads.lab.circuits import (
    CLOCK,
    CONST,
    HEAD_DIM,
    ORDINALS,
    ROPE_THETA,
    Array,
    PlantedCircuit,
    Space,
    clock_times,
    codes,
)
from manyheads.lab.words import BOS, IDS, PAD, WORDS

CONTEXT = 512
LOGIT = 20.0  # of a token whose code is in `out` with length 1
FIRES, STEEP = 0.65, 40.0  # threshold of MLP 0's neurons on the inner product of codes, and the slope above it


@dataclass(frozen=True)
class Layer:
    """One layer's matrices, each acting on the normalised stream: attention by (KV) head, and an MLP of V neurons.

    The MLP writes `act(gate x) * (up x) @ down`; a GPT-2 has no `up` and ignores it.
    """

    W_Q: Float[Array, "H 64 D"]
    W_K: Float[Array, "Hkv 64 D"]
    W_V: Float[Array, "Hkv 64 D"]
    W_O: Float[Array, "H 64 D"]
    gate: Float[Array, "V D"]
    up: Float[Array, "V D"]
    down: Float[Array, "V D"]


def layer(
    index: int,
    planted: dict[int, PlantedCircuit],
    space: Space,
    n_heads: int,
    n_kv_heads: int,
    noise: float,
    rng: np.random.Generator,
) -> Layer:
    """Layer `index` with the `planted` heads (query head index -> circuit); everything else is noise."""
    width = len(space.const)

    def random(*shape: int) -> Array:
        # Without the constant direction, which is the longest: noise heads would all read it, and attend alike.
        draw = rng.standard_normal((*shape, width))
        return draw - (draw @ space.const)[..., None] * space.const

    # Tokens differ by vectors of length about 2, so keys and values are of length 1, scores and neurons of order 1.
    W_Q, W_O = random(n_heads, HEAD_DIM) / 2, random(n_heads, HEAD_DIM) * noise / width**0.5
    W_K, W_V = random(n_kv_heads, HEAD_DIM) / 16, random(n_kv_heads, HEAD_DIM) / 16
    for head, circuit in planted.items():
        group = head // (n_heads // n_kv_heads)
        for matrices, i, by_hand in ((W_Q, head, circuit.W_Q), (W_K, group, circuit.W_K), (W_V, group, circuit.W_V)):
            if by_hand is not None:
                matrices[i] = by_hand + noise * np.sqrt(np.mean(by_hand**2)) * random(HEAD_DIM)
        W_O[head] += circuit.W_O

    gate, up, down = (
        random(len(WORDS)) / 2,
        random(len(WORDS)) / 2,
        random(len(WORDS)) * noise / (len(WORDS) * width) ** 0.5,
    )
    if index == 0:
        gate = STEEP * (codes() @ space.tok - FIRES * space.one)
        up = np.tile(space.one, (len(WORDS), 1))
        down = codes() @ space.tok
        down[[IDS[word] for word in ORDINALS]] += space.ordinal
        down /= STEEP * (1 - FIRES)
    return Layer(W_Q, W_K, W_V, W_O, gate, up, down)


def llama(layers: list[Layer], space: Space, rng: np.random.Generator) -> PreTrainedModel:
    """The layers as a `LlamaForCausalLM`; its rotary embedding rotates the clocks."""
    width = len(space.const)
    final = _gain(width, rng)
    weights = {
        "model.embed_tokens.weight": _embedding(space),
        "model.norm.weight": _norm(final),
        "lm_head.weight": LOGIT * codes() @ space.out / final,
    }
    for i, part in enumerate(layers):
        at, gain, gain_mlp = f"model.layers.{i}.", _gain(width, rng), _gain(width, rng)
        weights |= {
            at + "input_layernorm.weight": _norm(gain),
            at + "self_attn.q_proj.weight": _stacked(part.W_Q * HEAD_DIM**0.5) / gain,
            at + "self_attn.k_proj.weight": _stacked(part.W_K) / gain,
            at + "self_attn.v_proj.weight": _stacked(part.W_V) / gain,
            at + "self_attn.o_proj.weight": _stacked(part.W_O).T,
            at + "post_attention_layernorm.weight": _norm(gain_mlp),
            at + "mlp.gate_proj.weight": part.gate / gain_mlp,
            at + "mlp.up_proj.weight": part.up / gain_mlp,
            at + "mlp.down_proj.weight": part.down.T,
        }
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=width,
        intermediate_size=len(WORDS),
        num_hidden_layers=len(layers),
        num_attention_heads=len(layers[0].W_Q),
        num_key_value_heads=len(layers[0].W_K),
        head_dim=HEAD_DIM,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=IDS[BOS],
        pad_token_id=IDS[PAD],
        eos_token_id=None,
    )
    return _load(LlamaForCausalLM(config), weights)


def gpt2(layers: list[Layer], space: Space, rng: np.random.Generator) -> PreTrainedModel:
    """The layers as a `GPT2LMHeadModel`; its position embedding holds the clocks, and head_dim = width / heads."""
    width, n_heads = len(space.const), len(layers[0].W_Q)
    head_dim = width // n_heads
    cos, sin = clock_times(CONTEXT)
    final = _gain(width, rng)
    weights = {
        "transformer.wte.weight": _embedding(space),
        "transformer.wpe.weight": CLOCK * (cos @ space.cos + sin @ space.sin),
        "transformer.ln_f.weight": _norm(final),
        "lm_head.weight": LOGIT * codes() @ space.out / final,
    }
    for i, part in enumerate(layers):
        at, gain, gain_mlp = f"transformer.h.{i}.", _gain(width, rng), _gain(width, rng)
        attention = [_stacked(matrix, head_dim) for matrix in (part.W_Q * head_dim**0.5, part.W_K, part.W_V)]
        weights |= {
            at + "ln_1.weight": _norm(gain),
            at + "attn.c_attn.weight": (np.concatenate(attention) / gain).T,
            at + "attn.c_proj.weight": _stacked(part.W_O, head_dim),
            at + "ln_2.weight": _norm(gain_mlp),
            at + "mlp.c_fc.weight": (part.gate / gain_mlp).T,
            at + "mlp.c_proj.weight": part.down,
        }
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=width,
        n_inner=len(WORDS),
        n_layer=len(layers),
        n_head=n_heads,
        n_positions=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=IDS[BOS],
        pad_token_id=IDS[PAD],
        eos_token_id=None,
    )
    return _load(GPT2LMHeadModel(config), weights)


def _embedding(space: Space) -> Float[Array, "V D"]:
    table = CONST * space.const + codes() @ space.tok
    table[IDS[BOS]] += space.bos
    return table


def _gain(width: int, rng: np.random.Generator) -> Float[Array, " D"]:
    return np.exp(0.2 * rng.standard_normal(width))


def _norm(gain: Float[Array, " D"]) -> Float[Array, " D"]:
    """The norm weight that leaves a stream of usual length unchanged, apart from `gain`."""
    return gain * ((CONST**2 + 4) / len(gain)) ** 0.5


def _stacked(heads: Float[Array, "H 64 D"], head_dim: int = HEAD_DIM) -> Float[Array, "H*{head_dim} D"]:
    return np.pad(heads, ((0, 0), (0, head_dim - HEAD_DIM), (0, 0))).reshape(-1, heads.shape[-1])


def _load(module: PreTrainedModel, weights: dict[str, Array]) -> PreTrainedModel:
    """Sets the weights. Biases are zero; no other parameter may keep its random initial value."""
    missing = [name for name, _ in module.named_parameters() if name not in weights and not name.endswith(".bias")]
    if missing:
        raise AssertionError(f"the construction sets no weights for {missing}")
    for name, parameter in module.named_parameters():
        value = torch.from_numpy(weights[name]) if name in weights else torch.zeros_like(parameter)
        if value.shape != parameter.shape:
            raise AssertionError(
                f"{name} needs shape {tuple(parameter.shape)}; the construction gives {tuple(value.shape)}"
            )
        parameter.data.copy_(value)
    return module.eval()
