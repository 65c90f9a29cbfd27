"""Trained toys of #11 and #17: heads that formed by themselves are found where they must be, and tell documents apart."""

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.retrieval_heads.influence import influence, retrieval_heads
from manyheads.lab.small_llama import llama_config
from manyheads.tasks import Example, TaskBatch

pytestmark = pytest.mark.slow

LAYER = [[(layer, h) for h in range(8)] for layer in range(2)]
KEYS, WORDS, NEEDLES, LENGTH, HAY = 8, 40, 3, 3, 16
STEPS, ROWS = 2500, 32


def toy(vocabulary, seed, initializer_range=0.02):
    torch.manual_seed(seed)
    config = llama_config(
        vocabulary,
        64,
        2,
        8,
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        initializer_range=initializer_range,
    )
    return LlamaForCausalLM(config)


def train(module, seed, rows, columns):
    """`rows(n, generator)` are token ids; the tokens after `columns` count."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=STEPS, pct_start=0.1)
    for _ in range(STEPS):
        ids = rows(ROWS, generator)
        logits = module(ids, use_cache=False).logits[:, columns]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, columns + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return mh.open_model(module.eval().requires_grad_(False))


def haystacks(n, generator, asked=NEEDLES):
    """`n` rows of 16 words and three needles `key a b c`, no token twice; then `asked` needles again. And where the first lay."""
    words = 8 + torch.rand(n, WORDS, generator=generator).argsort(1)[:, : HAY + NEEDLES * LENGTH]
    keys = torch.rand(n, KEYS, generator=generator).argsort(1)[:, :NEEDLES, None]
    needles = torch.cat([keys, words[:, HAY:].view(n, NEEDLES, LENGTH)], 2)
    slots = torch.rand(n, HAY + NEEDLES, generator=generator).argsort(1)[:, :NEEDLES].sort(1).values
    starts = slots + LENGTH * torch.arange(NEEDLES)
    where = (starts[..., None] + torch.arange(LENGTH + 1)).flatten(1)
    ids = torch.empty(n, HAY + where.shape[1], dtype=torch.long)
    ids[torch.ones_like(ids, dtype=torch.bool).scatter_(1, where, False)] = words[:, :HAY].flatten()
    ids.scatter_(1, where, needles.flatten(1))
    order, row = torch.rand(n, NEEDLES, generator=generator).argsort(1)[:, :asked], torch.arange(n)
    return torch.cat([ids, needles[row[:, None], order].flatten(1)], 1), starts[row, order[:, 0]] + 1


def needle_toy(seed):
    prompt = HAY + NEEDLES * (LENGTH + 1)
    columns = prompt + torch.tensor([i for i in range(NEEDLES * (LENGTH + 1) - 1) if i % (LENGTH + 1) < LENGTH])
    module = toy(KEYS + WORDS, seed, initializer_range=0.1)
    return train(module, seed, lambda n, generator: haystacks(n, generator)[0], columns)


def batch_of(prompt, answers, spans):
    """A TaskBatch without text or tokenizer."""
    none = torch.full((len(prompt),), -1)
    return TaskBatch(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        answer_ids=answers,
        foil_ids=none,
        corrupted_ids=None,
        corrupted_mask=None,
        corrupted_answer_ids=none,
        spans={"needle": spans},
        accepted_ids=[[int(i)] for i in answers],
        examples=[Example("", "")] * len(prompt),
        dropped={},
    )


def needle_tests(n=200):
    ids, start = haystacks(n, torch.Generator().manual_seed(99), asked=1)
    return batch_of(ids[:, :-LENGTH], ids[:, -LENGTH], torch.stack([start, start + LENGTH], 1)), ids


def accuracy(model, ids, heads=()):
    """Share of the needle's tokens foretold."""
    with model.editing(mh.Ablate(heads, "uniform")):
        best = model.logits(ids)[:, -LENGTH - 1 : -1].argmax(-1)
    return float((best == ids[:, -LENGTH:]).float().mean())


@pytest.mark.parametrize("seed", [0, 1])
def test_in_a_trained_toy_the_second_layer_retrieves_and_the_first_does_not(seed):
    """#11 (b): half of layer 1 or more scores at least 0.80, layer 0 at most 0.05; masking layer 1 leaves at most 0.10.

    Not every head of layer 1 reaches 0.80: some stay diffuse, since the others do their work, and masking any one costs little.
    """
    model = needle_toy(seed)
    batch, ids = needle_tests()
    scores = mh.atlas.retrieval(model, task=batch)
    alone = [[accuracy(model, ids, [head]) for head in layer] for layer in LAYER]
    print(seed, accuracy(model, ids), accuracy(model, ids, LAYER[1]), scores.values.round(2), np.round(alone, 2))
    assert scores.n >= 190 and accuracy(model, ids) >= 0.95
    assert np.median(scores.values[1]) >= 0.80
    assert scores.values[0].max() <= 0.05
    assert accuracy(model, ids, LAYER[1]) <= 0.10
    assert min(alone[1]) >= 0.90
    assert min(alone[0]) <= 0.75, "a head that scores 0 is needed by all that score high"


def documents(n, generator):
    """16 random tokens twice, in three documents of four in the same order; and which those are."""
    first = torch.randint(32, (n, 16), generator=generator)
    permuted = first.gather(1, torch.rand(n, 16, generator=generator).argsort(1))
    repeats = torch.rand(n, generator=generator) < 0.75
    return torch.cat([first, torch.where(repeats[:, None], first, permuted)], 1), repeats.numpy()


def auroc(score, positive):
    ranks = pd.Series(score).rank()
    n = int(positive.sum())
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (~positive).sum()))


@pytest.mark.parametrize("seed", [0, 1])
def test_masking_the_top_two_heads_tells_repeated_from_permuted_documents(seed):
    """#17 (b): AUROC at least 0.95 against a median of at most 0.70 for single heads of layer 0; mean score tenfold."""
    model = train(toy(32, seed), seed, lambda n, generator: documents(n, generator)[0], torch.arange(31))
    generator = torch.Generator().manual_seed(9)
    first = torch.rand(100, 32, generator=generator).argsort(1)[:, :16]
    batch = batch_of(torch.cat([first, first[:, :5]], 1), first[:, 5], torch.tensor([[5, 8]] * 100))
    heads = retrieval_heads(model, scores=mh.atlas.retrieval(model, task=batch), share=2 / 16)
    ids, repeats = documents(1000, generator)
    found = influence(model, ids, heads=heads).score
    single = [auroc(influence(model, ids, heads=[head]).score, repeats) for head in LAYER[0]]
    print(
        seed,
        heads,
        auroc(found, repeats),
        found[repeats].mean(),
        found[~repeats].mean(),
        np.round(single, 3),
        np.median(single),
    )
    assert len(heads) == 2
    assert auroc(found, repeats) >= 0.95
    assert np.median(single) <= 0.70
    assert found[repeats].mean() >= max(0.1, 10 * found[~repeats].mean())
