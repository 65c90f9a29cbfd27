"""The norm between the residual stream and a layer's attention, found by what it does: wherever an architecture keeps it."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.layout import tiny_inputs
from manyheads.model.norms import FoldedNorm


def input_norm(model: HeadModel, layer: int) -> FoldedNorm | None:
    """What layer `layer` does to the stream before its attention reads it; None if nothing (OLMo 2 has its norms after it).

    `UnsupportedError` if attention reads something else than the stream or one norm of it.
    """
    block, width = model.layout.blocks[layer], model.layout.hidden_size
    inside = set(block.attention.modules())
    norms = [
        module
        for module in block.module.modules()
        if module not in inside
        and isinstance(w := getattr(module, "weight", None), Tensor)
        and list(w.shape) == [width]
    ]
    with contextlib.ExitStack() as stack:
        seen = [(norm, stack.enter_context(caught(norm))) for norm in norms]
        read = stack.enter_context(caught(block.module, block.attention, side="input"))
        model.logits(tiny_inputs(model.plain))
    stream, normed = read
    if torch.equal(stream, normed):
        return None
    for norm, outputs in seen:
        if outputs and torch.equal(outputs[-1], normed):
            return FoldedNorm.of(norm, width)
    raise UnsupportedError(
        f"layer {layer} of {type(model.plain).__name__} reads something other than its residual stream or one norm of it."
    )
