"""Modular sums with written steps, and a small Llama that learns to write them: "2 0 1 =" "2 0 .." "." "0".

Of n digits below m the chain holds the running sums modulo m from the second digit on, and a full stop; the answer is the last of
them. A problem in five is held out, the same ones always.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
import torch
from transformers import LlamaForCausalLM

from manyheads.draft.hidden_cot.data import Worked, drawn
from manyheads.lab.small_llama import llama_config
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.training import TrainSettings, fit, next_token_loss


def sums(n: int, *, split: str, digits: int = 6, modulus: int = 5, seed: int = 0) -> Worked:
    rng = np.random.default_rng(seed)
    several = rng.integers(modulus, size=(8 * n + 100, digits))
    held_out = np.array([crc32(row.tobytes()) % 5 == 0 for row in several])
    rows = several[held_out == (split == "test")][:n]
    steps = rows.cumsum(1) % modulus
    equals, stop = modulus, modulus + 1
    return Worked(
        [[*row, equals] for row in rows.tolist()],
        [[*row, stop] for row in steps[:, 1:].tolist()],
        [[row[-1]] for row in steps.tolist()],
    )


def tiny_llama(*, modulus: int = 5, layers: int = 2, width: int = 64, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = llama_config(modulus + 2, width, layers, 4, intermediate_size=4 * width, initializer_range=0.1)
    return LlamaForCausalLM(config)


def settings(steps: int, seed: int = 0, peak: float = 2e-3, rows: int = 128) -> TrainSettings:
    return TrainSettings(steps=steps, rows=rows, rate=peak, warmup=50, weight_decay=0.01, precision="fp32", seed=seed)


def taught(model, data: Worked, steps: int, *, chains: bool, rows: int = 128, seed: int = 0) -> HeadModel:
    make = Worked.written_out if chains else Worked.without_steps
    fit(model, drawn(data, rows, seed, make), settings(steps, seed), loss=next_token_loss)
    return open_model(model.eval())


def answered_by(model: HeadModel, data: Worked, *, chains: bool) -> float:
    ids = torch.tensor(data.prefixes)
    new = len(data.chains[0]) + 1 if chains else 1
    out = model.plain.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return (out[:, -1] == torch.tensor(data.answers)[:, 0]).float().mean().item()
