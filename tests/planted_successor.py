"""A Llama by hand whose first MLP writes domain + decade + residue (mod 10), and a head that increments the residue.

    E0[t] = v_residue + DECADE v_decade + DOMAIN v_domain        orthonormal v; one MLP neuron for each v, the others noise
    successor head (layer 1): v_residue -> says residue + 1, keeps decade and domain; so 19 -> 10: it cannot carry
    copying head (layer 2): says the filler it sees
    shared: residues 0-4 are the successor head's, 5-9 its partner's, so that only their sum increments
    all heads attend evenly; the others write noise

Numbers 0-100, number words and ordinals 1-20, months 1-12, then fillers: token ids in this order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.heads import Head
from manyheads.lab.small_llama import llama_config

WIDTH, HEADS, LAYERS, NEURONS, FILLERS = 256, 4, 3, 128, 7
DECADE, DOMAIN, SAID = 0.8, 0.9, 8.0
SIZES = {"number": (0, 101), "number word": (1, 20), "ordinal": (1, 20), "month": (1, 12)}
SUCCESSOR, PARTNER, COPYING = Head(1, 2), Head(1, 0), Head(2, 1)


@dataclass(frozen=True)
class Planted:
    """The model, its classes with the index of their first items, and the directions behind E0, `[10, D]` and so on."""

    model: mh.HeadModel
    classes: dict[str, list[int]]
    first: dict[str, int]
    residue: Tensor
    decade: Tensor
    domain: Tensor
    fillers: list[int]


def planted(*, n_kv_heads: int = HEADS, shared: bool = False, noise: float = 0.02, seed: int = 0) -> Planted:
    classes, tokens = {}, []
    for number, (name, (start, size)) in enumerate(SIZES.items()):
        classes[name] = list(range(len(tokens), len(tokens) + size))
        tokens += [(index % 10, index // 10, number) for index in range(start, start + size)]
    fillers = list(range(len(tokens), len(tokens) + FILLERS))
    n_vocab = len(tokens) + FILLERS
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q
    code, residue, decade, domain, say = basis.split([n_vocab, 10, 11, 4, WIDTH - n_vocab - 25])
    say_residue, say_decade, say_domain, say_filler, _ = say.split([10, 11, 4, FILLERS, len(say) - 25 - FILLERS])
    config = llama_config(n_vocab, WIDTH, LAYERS, HEADS, intermediate_size=NEURONS, num_key_value_heads=n_kv_heads)
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    group, width = HEADS // n_kv_heads, WIDTH // HEADS

    def random(*shape: int) -> Tensor:
        return noise * torch.randn(*shape, generator=generator)

    for layer in model.model.layers:
        layer.input_layernorm.weight.fill_(WIDTH**-0.5)  # unit vectors stay as they are
        layer.post_attention_layernorm.weight.fill_(WIDTH**-0.5)
        layer.self_attn.q_proj.weight.zero_()
        layer.self_attn.v_proj.weight.copy_(random(n_kv_heads * width, WIDTH))
        layer.self_attn.o_proj.weight.copy_(random(WIDTH, WIDTH))
        layer.mlp.down_proj.weight.zero_()
    model.model.layers[0].self_attn.o_proj.weight.zero_()
    model.model.norm.weight.fill_(WIDTH**-0.5)
    model.model.embed_tokens.weight.copy_(code)

    mlp = model.model.layers[0].mlp
    reads = torch.zeros(25, n_vocab)
    for token, (r, d, c) in enumerate(tokens):
        reads[[r, 10 + d, 21 + c], token] = 1
    writes = torch.cat([residue, DECADE * decade, DOMAIN * domain])
    fired = torch.nn.functional.silu(torch.tensor(10.0))
    mlp.gate_proj.weight.copy_(torch.cat([10 * reads @ code, random(NEURONS - 25, WIDTH)]))
    mlp.up_proj.weight.copy_(code.sum(0).expand(NEURONS, -1))
    mlp.down_proj.weight.copy_(torch.cat([writes / fired, random(NEURONS - 25, WIDTH)]).T)

    def plant(head: Head, reads: Tensor, writes: Tensor) -> None:
        attention = model.model.layers[head.layer].self_attn
        value, out = torch.zeros(width, WIDTH), torch.zeros(width, WIDTH)
        value[: len(reads)], out[: len(writes)] = reads, writes
        kv = head.index // group
        attention.v_proj.weight[kv * width : (kv + 1) * width] = value
        attention.o_proj.weight[:, head.index * width : (head.index + 1) * width] = out.T

    said = torch.cat([say_residue.roll(-1, 0), say_decade, say_domain])
    if shared:
        kept = torch.cat([decade / 2, domain / 2])
        plant(SUCCESSOR, torch.cat([residue[:5], kept]), torch.cat([said[:5], said[10:]]))
        plant(PARTNER, torch.cat([residue[5:], kept]), said[5:])
    else:
        plant(SUCCESSOR, torch.cat([residue, decade, domain]), said)
    plant(COPYING, code[fillers], say_filler)
    unembedding = torch.zeros(n_vocab, WIDTH)
    for token, (r, d, c) in enumerate(tokens):
        unembedding[token] = say_residue[r] + say_decade[d] + say_domain[c]
    unembedding[fillers] = say_filler
    model.lm_head.weight.copy_(SAID * unembedding)
    first = {name: start for name, (start, _) in SIZES.items()}
    return Planted(mh.open_model(model), classes, first, residue, decade, domain, fillers)
