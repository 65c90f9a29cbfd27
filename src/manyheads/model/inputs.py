"""What a model's forward takes: from text, token ids or ready-made inputs, with the positions of padded rows.

Padding must not move a row's tokens. Architectures count positions each in their way: from 0, from `padding_idx + 1` (RoBERTa),
three at once for pictures (M-RoPE). Which way is right is tried when a model is opened (`proving`), not listed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError

Text = str | Sequence[str]
_TEXT = {
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "inputs_embeds",
    "decoder_input_ids",
    "decoder_attention_mask",
}


def unwrapped(module: Any) -> Any:
    """The Transformers model inside an adapter's wrapper, which hides what the model's forward takes."""
    inner = module.get_base_model() if hasattr(module, "get_base_model") else module
    return inner if isinstance(inner, nn.Module) else module


def forward_takes(module: Any) -> tuple[str, ...]:
    """The names of what the model's forward takes."""
    return tuple(inspect.signature(unwrapped(module).forward).parameters)


def takes(module: Any, name: str) -> bool:
    """Whether the model's forward has an argument of this name."""
    return name in forward_takes(module)


def first_positions(module: nn.Module) -> list[int | None]:
    """Where a row's first token may stand, the likeliest first; None leaves positions to the model."""
    if not takes(module, "position_ids"):
        return [None]
    learned = [
        part.padding_idx + 1
        for name, part in module.named_modules()
        if isinstance(part, nn.Embedding) and part.padding_idx is not None and "position" in name.rpartition(".")[2]
    ]
    return [*learned[:1], 0, None]


def positions_of(mask: Int[Tensor, "B T"], first: int) -> Int[Tensor, "B T"]:
    """Each token's position, if a row's first token stands at `first`; padding before it stands just before, or at 0."""
    return (mask.long().cumsum(-1) - 1 + first).clamp(min=max(first - 1, 0))


def with_positions(module: Any, batch: Mapping[str, Any], first: int | None) -> dict[str, Any]:
    """`batch`, with `position_ids` where it has padding and the model would count that too."""
    mask = batch.get("attention_mask")
    if first is None or "position_ids" in batch or not _padded(mask) or not takes(module, "position_ids"):
        return dict(batch)
    if hasattr(getattr(unwrapped(module), "model", None), "get_rope_index") and not set(batch) <= _TEXT:
        return dict(batch)  # pictures have positions in three dimensions, which the model makes of the mask itself
    assert isinstance(mask, Tensor)
    return {**batch, "position_ids": positions_of(mask, first)}


def _padded(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.ndim == 2 and not bool(mask.all())


def padded_sides(mask: Any) -> set[str]:
    """On which sides rows of a two-dimensional mask are padded. `InputError` for a row that is padding alone."""
    if not _padded(mask):
        return set()
    here = mask.bool()
    if not bool(here.any(1).all()):
        row = int((~here.any(1)).nonzero()[0])
        raise InputError(f"row {row} of the attention mask has no token, only padding; leave the row out.")
    return {side for side, column in (("left", 0), ("right", -1)) if not bool(here[:, column].all())}


def kept_tokens(batch: Mapping[str, Any]) -> Tensor | None:
    """`[B, T]`: which positions hold tokens and not padding; None for all. Of a mask `[B, 1, T, T]`: which see themselves."""
    mask = batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim == 2:
        return mask
    own = mask[:, 0].diagonal(dim1=-2, dim2=-1)
    return own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2


def left_padded(tokenizer: Any, texts: Sequence[str]) -> dict[str, Tensor]:
    """Texts as left-padded token ids and their mask. `InputError` for an empty one."""
    if tokenizer is None:
        raise InputError("this model was opened without a tokenizer; give token ids, or open it with tokenizer=.")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(
            "expected a text or a list of texts, with at least one of them; got " + repr(list(texts))[:60] + "."
        )
    rows = tokenizer(list(texts))["input_ids"]
    if not all(rows):
        raise InputError("a prompt is empty; give at least one token.")
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    pad = (tokenizer.eos_token_id or 0) if pad is None else pad
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def check_ids(ids: Any, vocab_size: int) -> None:
    """`InputError` unless `ids` are whole numbers `[B, T]`, at least one, each below `vocab_size`."""
    if not isinstance(ids, Tensor):
        raise InputError(f"input_ids must be a tensor [B, T], not {type(ids).__name__}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise InputError(f"token ids are whole numbers, and these are {ids.dtype}.")
    if ids.ndim != 2 or not ids.numel():
        raise InputError(
            f"token ids have shape [B, T] with at least one row and one token, and these have {list(ids.shape)}."
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise InputError(
            f"token id {low if low < 0 else high} is out of range: the model knows ids from 0 to {vocab_size - 1}; "
            "give it its own tokenizer."
        )


def check_mask(batch: Mapping[str, Any]) -> None:
    """`InputError` if a two-dimensional attention mask does not fit the token ids."""
    mask, ids = batch.get("attention_mask"), batch.get("input_ids")
    if isinstance(mask, Tensor) and isinstance(ids, Tensor) and mask.ndim == 2 and mask.shape[0] != ids.shape[0]:
        raise InputError(f"the attention mask has {mask.shape[0]} rows, and the token ids have {ids.shape[0]}.")


def as_batch(inputs: Any, tokenizer: Any) -> dict[str, Any]:
    """Text, token ids or ready-made inputs as a mapping of what the model's forward takes."""
    if isinstance(inputs, Tensor):
        return {"input_ids": torch.atleast_2d(inputs)}
    if isinstance(inputs, Mapping):
        return dict(inputs)
    if isinstance(inputs, str):
        return dict(left_padded(tokenizer, [inputs]))
    if isinstance(inputs, Sequence):
        return dict(left_padded(tokenizer, inputs))
    raise InputError(f"expected text, token ids or a mapping of inputs, got {type(inputs).__name__}.")


def repeated_inputs(inputs: Mapping[str, Any], batch: int, n: int) -> dict[str, Any]:
    """The inputs of `n` copies of a batch, one after another.

    Pictures and sounds are often not one row a prompt: patches of all pictures in one list, several pictures a prompt. They
    repeat whole. `UnsupportedError` for an input that fits neither way.
    """
    return {name: _repeated(name, value, batch, n) for name, value in inputs.items()}


_LISTS = ("pixel", "image", "video", "audio", "feature", "grid", "patch", "crop", "second_per")


def _repeated(name: str, value: Any, batch: int, n: int) -> Any:
    if not isinstance(value, Tensor) or not value.ndim or n == 1 or name == "cache_position":
        return value
    if name == "position_ids" and value.ndim == 3:  # M-RoPE: [3, B, T]
        return value.repeat(1, n, 1)
    if value.shape[0] == batch or any(part in name for part in _LISTS):
        return value.repeat(n, *[1] * (value.ndim - 1))
    if value.shape[0] == 1:
        return value
    raise UnsupportedError(
        f"do not know which rows of {name} {list(value.shape)} belong to which of the {batch} prompts, so that they cannot be "
        "repeated for several edits at once; apply the edits one by one."
    )
