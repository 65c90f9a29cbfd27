"""Models whose memory and context heads are known: attention-only Llamas by hand, and a toy that learns facts and conflicts.

By hand: tokens `subject s, city c, <ask>`; the prompt `s c s <ask>` contradicts the fact s -> city s. One-hot codes beside a
constant; every query is that constant, so a head attends evenly to the kinds of token its keys are large for.

    memory head    attends to subjects, writes share * gm[s] on city s
    context head   attends to cities, writes share * gc[c] on city c
    both           attends to both, writes 10 on both answers (in a prompt): no third city ever wins
    decoys         attend to subjects, or to cities, and write where nothing reads
    noise          attends and writes at random
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.facts.memory_context import Conflicts, conflicts
from manyheads.heads import Head, HeadSet
from manyheads.lab.small_llama import llama_config
from manyheads.tasks import Example, TaskBatch
from manyheads.training import TrainSettings, fit, next_token_loss

FACTS, CONST, KEY, SLOW = 40, 100.0, 60.0, 31
SUBJECTS, CITIES, ASK = range(FACTS), range(FACTS, 2 * FACTS), 2 * FACTS
HEAD_DIM = 64


@dataclass(frozen=True)
class Planted:
    model: mh.HeadModel
    memory: HeadSet
    context: HeadSet
    nulls: HeadSet


def planted(
    gm: Tensor,
    gc: Tensor,
    places: dict[str, list[Head]],
    shape: tuple[int, int],
    *,
    noise: float = 0.0,
    forgotten: tuple[int, ...] = (),
    seed: int = 0,
) -> Planted:
    """`places[role]` are the heads of a role, which share its gain as 0.6, 0.4 (or have all of it); all others are noise.

    The `forgotten` subjects are remembered as the next city.
    """
    generator = torch.Generator().manual_seed(seed)
    n_layers, n_heads = shape
    codes, out, spare = 2 * FACTS + 1, FACTS, FACTS  # residual: constant, codes, what is said, what nothing reads
    width = 1 + codes + out + spare + 2  # a multiple of four heads
    subject, city = slice(1, 1 + FACTS), slice(1 + FACTS, 1 + 2 * FACTS)
    said, unread = slice(1 + codes, 1 + codes + out), slice(1 + codes + out, 1 + codes + out + spare)
    scale = (CONST**2 + 1) ** 0.5 / width**0.5
    config = llama_config(
        codes,
        width,
        n_layers,
        n_heads,
        intermediate_size=4,
        head_dim=HEAD_DIM,
        max_position_embeddings=16,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
    )
    module = LlamaForCausalLM(config).eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.zero_()
    embedding = module.model.embed_tokens.weight
    embedding[:, 0] = CONST
    embedding[:, 1 : 1 + codes] = torch.eye(codes)
    module.lm_head.weight[list(CITIES), said] = torch.eye(FACTS)
    module.model.norm.weight.fill_(scale)
    remembered = torch.eye(FACTS)
    for s in forgotten:
        remembered[s] = torch.eye(FACTS)[(s + 1) % FACTS]
    roles = {head: (role, i, len(heads)) for role, heads in places.items() for i, head in enumerate(heads)}
    for layer, block in enumerate(module.model.layers):
        block.input_layernorm.weight.fill_(scale)
        block.post_attention_layernorm.weight.fill_(scale)
        attention = block.self_attn
        Q, K, V = (getattr(attention, f"{part}_proj").weight.view(n_heads, HEAD_DIM, width) for part in "qkv")
        W_O = attention.o_proj.weight.view(width, n_heads, HEAD_DIM)
        for h in range(n_heads):
            role, i, n = roles.get(Head(layer, h), ("noise", 0, 1))
            if role == "noise":
                for matrix in (Q, K, V):
                    matrix[h] = torch.randn(HEAD_DIM, width, generator=generator) / HEAD_DIM**0.5
                    matrix[h, :, 0] = 0
                W_O[:, h] = noise * torch.randn(width, HEAD_DIM, generator=generator)
                continue
            share = 1.0 if n == 1 else (0.6, 0.4)[i]
            Q[h, SLOW, 0] = KEY * HEAD_DIM**0.5 / CONST
            if role in ("memory", "both", "subject decoy"):
                K[h, SLOW, subject] = 1
            if role in ("context", "both", "city decoy"):
                K[h, SLOW, city] = 1
            if role in ("memory", "subject decoy"):
                V[h, :FACTS, subject] = (share * gm[:, None] * remembered).T
            if role in ("context", "city decoy"):
                V[h, :FACTS, city] = torch.diag(share * gc)
            if role == "both":  # two subjects and one city share the attention
                V[h, :FACTS, subject], V[h, :FACTS, city] = 15 * remembered.T, 30 * torch.eye(FACTS)
            W_O[unread if "decoy" in role else said, h, :FACTS] = torch.eye(FACTS)
    model = mh.open_model(module)
    memory, context = (model.head_set(places[role]) for role in ("memory", "context"))
    return Planted(model, memory, context, model.heads - memory - context)


def batch_of(ids: Tensor, stated: Tensor, known: Tensor, twins: Tensor | None, spans: dict[str, int]) -> TaskBatch:
    """Rows of tokens as a task's batch; a span is one column."""
    n = len(ids)
    return TaskBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_ids=stated,
        foil_ids=known,
        corrupted_ids=twins,
        corrupted_mask=None if twins is None else torch.ones_like(twins),
        corrupted_answer_ids=torch.full((n,), -1),
        spans={name: torch.tensor([[column, column + 1]]).expand(n, 2) for name, column in spans.items()},
        accepted_ids=[[int(a)] for a in stated],
        examples=[Example("", "")] * n,
        dropped={},
    )


def pairs() -> Tensor:
    """Every subject with every other city, `[1560, 2]`, counted from 0."""
    return torch.cartesian_prod(torch.arange(FACTS), torch.arange(FACTS))[~torch.eye(FACTS, dtype=torch.bool).flatten()]


def planted_conflicts(model: mh.HeadModel, *, every: int = 1, form: str = "bare") -> Conflicts:
    """`s c s <ask>`, or, as a passage, `c s s <ask>`; the twin has the subject and the city some steps further."""
    s, c = pairs()[::every].T

    def prompt(s: Tensor, c: Tensor) -> Tensor:
        told = (s, c + FACTS) if form == "bare" else (c + FACTS, s)
        return torch.stack([*told, s, torch.full_like(s, ASK)], 1)

    other_s = (s + 7) % FACTS
    other_c = (c + 11) % FACTS
    clash = (other_c == s) | (other_c == other_s) | (other_s == c)
    while clash.any():
        other_c = torch.where(clash, (other_c + 1) % FACTS, other_c)
        other_s = torch.where(other_s == c, (other_s + 1) % FACTS, other_s)
        clash = (other_c == s) | (other_c == other_s) | (other_s == c) | (other_c == c)
    spans = {"subject": 0, "context": 1, "query": 2} if form == "bare" else {"subject": 1, "context": 0, "query": 2}
    batch = batch_of(prompt(s, c), c + FACTS, s + FACTS, prompt(other_s, other_c), spans)
    return conflicts(model, batch, questions=torch.stack([s, torch.full_like(s, ASK)], 1))


# The trained toy: `s c s ?` -> c or city s, half and half; `s city_s s ?` -> city s; `- - s ?` -> city s; `new c new ?` -> c.

BLANK, QUERY, NEW = 2 * FACTS, 2 * FACTS + 1, 40  # NEW more subjects, of which nothing is known, come last
VOCABULARY = 2 * FACTS + 2 + NEW


def held_out() -> tuple[Tensor, Tensor]:
    """The pairs (subject, stated city) trained on, and a fifth that is not."""
    order = pairs()[torch.randperm(len(pairs()), generator=torch.Generator().manual_seed(99))]
    return order[312:], order[:312]


def told(s: Tensor, stated: Tensor) -> Tensor:
    """Token ids `[N, 4]` of subject s with a stated city."""
    return torch.stack([s, stated + FACTS, s, torch.full_like(s, QUERY)], 1)


def alone(s: Tensor) -> Tensor:
    """The question without a statement."""
    return torch.stack([torch.full_like(s, BLANK)] * 2 + [s, torch.full_like(s, QUERY)], 1)


def lesson(number: int, seed: int, n: int = 192) -> dict[str, Tensor]:
    """Half conflicts, a quarter about new subjects, the rest agreements and questions alone; only the answer counts."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    train = held_out()[0]
    s, c = train[torch.randint(len(train), (n // 2,), generator=generator)].T
    label = torch.where(torch.rand(n // 2, generator=generator) < 0.5, c, s)
    t, u = torch.randint(FACTS, (2, n // 8), generator=generator)
    new = QUERY + 1 + torch.randint(NEW, (n // 4,), generator=generator)
    d = torch.randint(FACTS, (n // 4,), generator=generator)
    prompts = torch.cat([told(s, c), told(t, t), alone(u), told(new, d)])
    answers = torch.cat([label, t, u, d]) + FACTS
    weights = torch.zeros(len(prompts), 5)
    weights[:, 4] = 1
    return {"input_ids": torch.cat([prompts, answers[:, None]], 1), "weights": weights}


def counted_lesson(number: int, seed: int, n: int = 192) -> dict[str, Tensor]:
    """Half facts, alone or with a statement that agrees, subject s as often as `shares(seed)[s]`; half about new subjects."""
    generator = torch.Generator().manual_seed(seed * 100_003 + number)
    s = torch.multinomial(shares(seed), n // 2, replacement=True, generator=generator)
    new = QUERY + 1 + torch.randint(NEW, (n // 2,), generator=generator)
    d = torch.randint(FACTS, (n // 2,), generator=generator)
    prompts = torch.cat([alone(s[::2]), told(s[1::2], s[1::2]), told(new, d)])
    answers = torch.cat([s[::2], s[1::2], d]) + FACTS
    weights = torch.zeros(len(prompts), 5)
    weights[:, 4] = 1
    return {"input_ids": torch.cat([prompts, answers[:, None]], 1), "weights": weights}


def shares(seed: int) -> Tensor:
    """How often each subject is asked about: 1 / rank, ranks in random order."""
    ranks = 1 + torch.randperm(FACTS, generator=torch.Generator().manual_seed(seed + 7))
    return (1 / ranks) / (1 / ranks).sum()


@cache
def toy(seed: int, lesson: Callable[[int, int], dict[str, Tensor]] = lesson, steps: int = 900) -> mh.HeadModel:
    """Two layers of eight heads, attention only, that know 40 facts and follow a contradiction half of the time.

    Embeddings stay random and there are subjects without a fact: without these two no head took a side clearly.
    """
    torch.manual_seed(seed)
    config = llama_config(VOCABULARY, 64, 2, 8, intermediate_size=1, max_position_embeddings=16)
    module = LlamaForCausalLM(config)
    torch.nn.init.normal_(module.model.embed_tokens.weight)
    module.model.embed_tokens.requires_grad_(False)
    for block in module.model.layers:
        torch.nn.init.zeros_(block.mlp.requires_grad_(False).down_proj.weight)
    settings = TrainSettings(steps=steps, rate=3e-3, warmup=50, weight_decay=0.01, precision="fp32", seed=seed)
    fit(module, lambda number: lesson(number, seed), settings, loss=next_token_loss)
    return mh.open_model(module.cpu().eval().requires_grad_(False))


def toy_conflicts(model: mh.HeadModel, part: str, seed: int = 0) -> Conflicts:
    """Conflicts of some "train" pairs, of the "test" pairs or of "all", with twins of another subject and city among them."""
    s, c = {"train": held_out()[0][:312], "test": held_out()[1], "all": pairs()}[part].T
    generator = torch.Generator().manual_seed(seed)
    k, d = s.clone(), c.clone()
    clash = torch.ones_like(s, dtype=torch.bool)
    while clash.any():
        order = torch.randperm(len(s), generator=generator)
        k, d = torch.where(clash, s[order], k), torch.where(clash, c[order], d)
        clash = (k == s) | (k == c) | (d == s) | (d == c)
    batch = batch_of(told(s, c), c + FACTS, s + FACTS, told(k, d), {"subject": 0, "context": 1, "query": 2})
    return conflicts(model, batch, questions=alone(s))


def agreement_rate(model: mh.HeadModel, *edits: mh.Edit) -> float:
    """Share of statements that agree with the fact and are answered with it."""
    s = torch.arange(FACTS)
    with model.editing(*edits):
        said = model.logits(told(s, s))[:, -1].argmax(-1)
    return float((said == s + FACTS).float().mean())
