"""A toy trained to refuse where a flagged token occurs: 2 layers of 4 heads, 32 dimensions, 24 tokens, attention alone (#113)."""

from functools import cache

import torch
from planted_gates import task_batch
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.lab.small_llama import llama_config
from manyheads.tasks.refusal_audit import Requests

VOCABULARY, FLAGS, END, REFUSE, COMPLY, LENGTH = 32, range(24, 28), 28, 29, 30, 24
SEEDS, STEPS, BATCH, RATE = 8, 300, 64, 5e-3


def asked(n, generator, share=0.5):
    """Random tokens and an end mark; in a share of the rows one token is a flagged one. Ids and what is to be said."""
    ids = torch.randint(FLAGS.start, (n, LENGTH), generator=generator)
    ids[:, -1] = END
    marked = torch.rand(n, generator=generator) < share
    place = torch.randint(LENGTH - 1, (n,), generator=generator)
    flags = torch.randint(FLAGS.start, FLAGS.stop, (n,), generator=generator)
    ids[torch.arange(n)[marked], place[marked]] = flags[marked]
    return ids, torch.where(marked, REFUSE, COMPLY)


@cache
def trained(seed):
    """The model, requests to audit it on, and refused requests to search on."""
    torch.manual_seed(seed)
    config = llama_config(VOCABULARY, 32, 2, 4, max_position_embeddings=LENGTH)
    module = LlamaForCausalLM(config)
    for block in module.model.layers:
        block.mlp.requires_grad_(False)
        block.mlp.down_proj.weight.zero_()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
    falling = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        ids, said = asked(BATCH, generator)
        loss = cross_entropy(module(ids, logits_to_keep=1).logits[:, -1], said)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
    model = mh.open_model(module.eval().requires_grad_(False))
    ids, said = asked(256, torch.Generator().manual_seed(1000 + seed))
    requests = Requests(ids, torch.ones_like(ids), said == REFUSE, torch.tensor([REFUSE]), torch.tensor([COMPLY]))
    return model, requests, task_batch(*asked(128, torch.Generator().manual_seed(2000 + seed), 1.0))
