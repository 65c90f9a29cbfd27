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
    inputs = tiny_inputs(module)
    with contextlib.ExitStack() as stack:
        seen = [
            stack.enter_context(caught(layout.blocks[layer].projection, side="input", keep=lambda z: z.shape[-1]))
            for layer in layout.attention_layers
        ]
        with torch.no_grad():
            module(**inputs, **no_cache(module))
    for layer, widths in zip(layout.attention_layers, seen, strict=True):
        if len(widths) != 1 or widths[0] % layout.n_heads:
            raise UnsupportedError(
                f"cannot read {type(module).__name__}: expected layer {layer} to call its output projection once with a "
                f"multiple of {layout.n_heads} features, its heads, saw {widths or 'no call'}."
            )
    if layout.n_heads % layout.n_kv_heads:
        raise UnsupportedError(
            f"cannot read {type(module).__name__}: its {layout.n_heads} query heads do not share {layout.n_kv_heads} KV heads "
            "evenly."
        )
