"""The norm between the residual stream and a layer's attention, found by what it does: wherever an architecture keeps it."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.layout import tiny_inputs
from manyheads.model.norms import FoldedNorm
from manyheads.model.replay.dispatch import first_tensor
from manyheads.model.replay.streaming import hidden_of


def input_norm(model: HeadModel, layer: int) -> FoldedNorm | None:
    """What layer `layer` does to the stream before its attention reads it; None if nothing (OLMo 2 norms behind it).

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
    seen: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []

    def note_read(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        read.append(hidden_of(args, kwargs).detach())

    with contextlib.ExitStack() as stack:
        for norm in norms:
            hook = norm.register_forward_hook(lambda m, _, out: seen.__setitem__(m, first_tensor(out).detach()))
            stack.callback(hook.remove)
        for module in (block.module, block.attention):
            stack.callback(module.register_forward_pre_hook(note_read, with_kwargs=True).remove)
        model.logits(tiny_inputs(model.plain))
    stream, normed = read
    if torch.equal(stream, normed):
        return None
    for norm, output in seen.items():
        if torch.equal(output, normed):
            return FoldedNorm.of(norm, width)
    raise UnsupportedError(
        f"layer {layer} of {type(model.plain).__name__} attends to something else than its stream, or one norm of it."
    )
