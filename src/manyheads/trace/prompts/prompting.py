"""Prompts: learned vectors before an image's tokens, different ones in each layer of a frozen trunk.

    x_{l+1} = block_l([P_l; x_l]) without its first C rows        P_l [C, D], x_l [B, T, D]
    outputs = norm(block_{L-1}([P_{L-1}; x_{L-1}]))[:, :C]        [B, C, D]

A pass has two halves. `last_call` runs the trunk's own forward up to the last block and stops there; `finish` runs that block
and the final norm. Changes in the last block only (a blurred head, say) need just the second half. Gradients reach the prompts,
not the trunk. Active readers and edits see `C + T` columns, the prompts first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, frozen, hidden_of, hooked, leaving, stoppable, with_hidden
from manyheads.model.replay.recording import no_cache, repeated

Image = Tensor | Mapping[str, Any]


@dataclass(frozen=True)
class LastCall:
    """The arguments of the last block: `hidden` `[B, C + T, D]`, prompts first, and the others."""

    n_prompts: int
    hidden: Float[Tensor, "B CT D"]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def check_promptable(model: HeadModel) -> None:
    """`UnsupportedError` for a trunk that reads no image or has no norm after its last block."""
    name = type(model.plain).__name__
    if getattr(model.plain, "main_input_name", None) != "pixel_values":
        raise UnsupportedError(f"{name} reads no image; prompts need a vision trunk such as ViT or DINOv2.")
    if model.layout.final_norm is None:
        raise UnsupportedError(f"{name} has no norm after its last block, which the prompts' outputs pass through.")


def last_call(model: HeadModel, image: Image, prompts: Float[Tensor, "L C D"]) -> LastCall:
    """The pass up to the last block, with each block's prompts before its tokens.

    `image` is pixels `[B, channels, H, W]`, or the inputs of the module's forward. `InputError` for prompts of another shape.
    """
    check_promptable(model)
    wanted = model.n_layers, model.layout.hidden_size
    if prompts.ndim != 3 or (prompts.shape[0], prompts.shape[2]) != wanted:
        raise InputError(
            f"prompts for this trunk are [{wanted[0]}, C, {wanted[1]}] (layers, prompts, width); got {list(prompts.shape)}."
        )
    calls: list[LastCall] = []
    n = prompts.shape[1]
    last = model.n_layers - 1

    def before(layer: int) -> Any:
        def prepend(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = hidden_of(args, kwargs)
            own = prompts[layer].to(hidden).expand(len(hidden), -1, -1)
            longer = torch.cat([own, hidden], 1)
            if layer == last:
                rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
                calls.append(LastCall(n, longer, args[1:], rest))
                stop()
            return with_hidden(args, kwargs, longer)

        return prepend

    with stoppable() as stop, frozen(model.plain), contextlib.ExitStack() as stack:
        for layer, block in enumerate(model.layout.blocks):
            stack.enter_context(hooked(block.module, before=before(layer)))
            stack.enter_context(leaving(block.module, lambda longer: longer[:, n:]))
        inputs = {"pixel_values": image} if isinstance(image, Tensor) else image
        model.plain(**model.inputs(inputs), **no_cache(model.plain))
    return calls[0]


def finish(model: HeadModel, call: LastCall, n: int = 1) -> Float[Tensor, "nB C D"]:
    """The prompts' outputs: the last block and the final norm over the call's rows, repeated `n` times for n variants."""
    norm = model.layout.final_norm
    assert norm is not None
    batch = len(call.hidden)
    args, kwargs = repeated(call.args, batch, n), {k: repeated(v, batch, n) for k, v in call.kwargs.items()}
    with frozen(model.plain):
        output = model.layout.blocks[-1].module(repeated(call.hidden, batch, n), *args, **kwargs)
        normed: Tensor = norm(first_tensor(output)[:, : call.n_prompts])
    return normed


def prompt_grid(model: HeadModel, pixels: Float[Tensor, "B channels H W"]) -> tuple[int, int]:
    """Rows and columns of patches; they are the last `rows * columns` tokens, after CLS and registers.

    `InputError` unless the pixels are a batch of images of at least one patch.
    """
    check_promptable(model)
    size = model.config.patch_size
    height, width = (size, size) if isinstance(size, int) else size
    if pixels.ndim != 4 or pixels.shape[2] < height or pixels.shape[3] < width:
        raise InputError(
            f"expected images [B, channels, H, W] in patches of {height} x {width} pixels; got {list(pixels.shape)}."
        )
    return pixels.shape[2] // height, pixels.shape[3] // width
