"""What is proved of a model when it is opened, before anything is read from it."""

from __future__ import annotations

import contextlib

import torch
from torch import nn

from manyheads.errors import UnsupportedError
from manyheads.model.hooks import caught
from manyheads.model.layout import Layout, tiny_inputs
from manyheads.model.replay.recording import no_cache


def check_layout(module: nn.Module, layout: Layout) -> None:
    """Prove on a tiny input that each layer's attention passes once through the projection that was found, as wide as H x Dh.

    `UnsupportedError` with what was seen otherwise.
    """
    with contextlib.ExitStack() as stack:
        seen = [
            stack.enter_context(caught(block.projection, side="input", keep=lambda z: z.shape[-1]))
            for block in layout.blocks
        ]
        with torch.no_grad():
            module(**tiny_inputs(module), **no_cache(module))
    width = layout.n_heads * layout.head_dim
    wrong = [layer for layer, widths in enumerate(seen) if widths != [width]]
    if wrong:
        raise UnsupportedError(
            f"cannot read {type(module).__name__}: expected layer {wrong[0]} to call its output projection once with "
            f"{width} features ({layout.n_heads} heads of {layout.head_dim}), saw {seen[wrong[0]] or 'no call'}."
        )
    if layout.n_heads % layout.n_kv_heads:
        raise UnsupportedError(
            f"cannot read {type(module).__name__}: its {layout.n_heads} query heads do not share {layout.n_kv_heads} KV heads "
            "evenly."
        )
