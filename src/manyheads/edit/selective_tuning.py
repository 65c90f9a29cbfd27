"""Precise tuning (#14): train the weights of chosen heads, and of chosen MLPs, and nothing else.

Zhang et al., arXiv:2409.01659 (ICML 2024). Of each chosen head the slices of W_Q, W_K, W_V and W_O learn, with gradients times
H / h where h of a layer's H heads are chosen; every other number stays bit for bit what it was, under weight decay too, since
the slices alone are parameters (`manyheads.training.head_slices`).

Unlike offsets and scalings this changes weights by what they are, so the result is a model, not a head edit. In toys, tuning
chosen heads, random heads or everything learned the same and kept the same; compare before believing that choosing helped.

The paper's settings: 32 heads, rate 2e-5, batches of 128, 2 epochs.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from manyheads.edit.examples import Answered
from manyheads.edit.tuning import Learning
from manyheads.errors import InputError
from manyheads.heads import HeadLike
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.model.replay import first_logits, no_cache
from manyheads.training import TrainSettings, WarmupStableDecay, fit, only_heads
from manyheads.training.loop import Batch

HOW = Learning(rate=2e-5, epochs=2, rows=32)


def tune_heads(
    model: HeadModel,
    examples: Answered,
    heads: Iterable[HeadLike],
    *,
    mlps: Iterable[int] = (),
    how: Learning = HOW,
    weight_decay: float = 0.0,
    folder: str | Path | None = None,
) -> HeadModel:
    """A copy of `model` in which the slices of `heads`, and the MLPs of layers `mlps`, have learned the answers of `examples`.

    Of an MLP the module learns through which it writes: all of it, or its last projection where attention runs beside it
    (GPT-NeoX, Falcon). `how.every` and `how.patience` play no part. With a `folder` an interrupted call goes on. `InputError`
    without examples or heads, or for a layer that is not there; `UnsupportedError` where q, k, v cannot be told apart.
    """
    layers = sorted(set(mlps))
    if not len(examples):
        raise InputError("there are no examples to learn from.")
    if any(not 0 <= layer < model.n_layers for layer in layers):
        raise InputError(f"MLPs {layers} do not all exist; this model has layers 0-{model.n_layers - 1}.")
    tuned = open_model(copy.deepcopy(model.plain), tokenizer=model.tokenizer)
    each = max(1, len(examples) // how.rows)

    def batch_at(number: int) -> Batch:
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(how.seed + number // each))
        some = examples.rows(order[number % each * how.rows :][: how.rows])
        return {"input_ids": some.input_ids, "attention_mask": some.attention_mask, "said": some.said}

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        some = Answered(batch["input_ids"], batch["attention_mask"], batch["said"].bool())
        return -some.log_p(first_logits(module(**some.inputs(tuned), **no_cache(tuned.plain)))).mean()

    settings = TrainSettings(
        steps=how.epochs * each if how.steps is None else how.steps,
        schedule=WarmupStableDecay(peak=how.rate, warmup=1, decay=0.0),
        weight_decay=weight_decay,
        betas=(0.9, 0.999),
        precision="fp32",
        seed=how.seed,
    )
    with only_heads(tuned, heads), tempfile.TemporaryDirectory() as scratch:
        for layer in layers:
            for parameter in tuned.layout.blocks[layer].mlp_write.parameters():
                parameter.requires_grad_(True)
        fit(tuned.plain, batch_at, Path(scratch if folder is None else folder), settings, loss=loss)
    module = tuned.plain.to(model.device).eval()
    return open_model(module, tokenizer=model.tokenizer)
