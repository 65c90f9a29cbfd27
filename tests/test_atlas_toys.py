"""The trained toy of #4: a head that formed by itself is found where it must be."""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.successor_heads.scores import successor_of_set
from manyheads.lab.small_llama import llama_config

pytestmark = pytest.mark.slow


def toy(n_heads, vocabulary, n_layers=2, positions=64, seed=0):
    torch.manual_seed(seed)
    config = llama_config(vocabulary, 64, n_layers, n_heads, intermediate_size=256, max_position_embeddings=positions)
    return LlamaForCausalLM(config)


def train(model, batch, steps, lr):
    """`batch()` gives ids and the columns whose next token counts."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        ids, columns = batch()
        logits = model(ids).logits[:, columns]
        loss = cross_entropy(logits.flatten(0, 1), ids[:, columns + 1].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


CLASSES = {f"class {c}": list(range(12 * c, 12 * c + 12)) for c in range(4)}
MARKER, FILLERS = 48, range(49, 57)


def ordinals(n, generator):
    """`ordinal, 0-3 fillers, marker -> successor`, padded in front with fillers."""
    ordinal = 12 * torch.randint(4, (n,), generator=generator) + torch.randint(11, (n,), generator=generator)
    gap = int(torch.randint(4, (), generator=generator))
    fillers = torch.randint(FILLERS.start, FILLERS.stop, (n, gap), generator=generator)
    return torch.cat([ordinal[:, None], fillers, torch.full((n, 1), MARKER), ordinal[:, None] + 1], 1)


def successor_toy(n_heads, seed=0):
    model = toy(n_heads, 57, seed=seed)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.zero_()  # block 1 is attention alone
        model.model.layers[
            0
        ].self_attn.o_proj.weight.zero_()  # block 0 an MLP alone: its attention would learn it instead
    model.model.layers[1].mlp.requires_grad_(False)
    model.model.layers[0].self_attn.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)

    def batch():
        ids = ordinals(256, generator)
        return ids, torch.tensor([ids.shape[1] - 2])

    return mh.open_model(train(model, batch, 700, 5e-3))


def test_a_trained_successor_head_is_found_in_the_block_that_had_to_learn_it():
    """#4 (b): one head in block 1 scores at least 0.75, the best of block 0 at most 0.45."""
    model = successor_toy(1)
    scores = mh.atlas.successor(model, classes=CLASSES)
    assert scores.values[1].max() >= 0.75
    assert scores.values[0].max() <= 0.45


def test_succession_spread_over_four_heads_is_found_in_their_sum():
    """#4 (c): the summed circuit of block 1 reaches 0.70 and more than any single head."""
    model = successor_toy(4)
    scores = mh.atlas.successor(model, classes=CLASSES)
    summed = successor_of_set(model, [(1, h) for h in range(4)], classes=CLASSES)
    assert summed >= 0.70
    assert summed > scores.values[1].max()
