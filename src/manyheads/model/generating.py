"""`HeadModel.generate`: the module's own `generate`, with text in and text out, and edits that follow their rows.

Transformers runs every prompt in `max(num_beams, num_return_sequences)` rows, those of one prompt next to each other:

    row of a pass  =  (row of the prompt) * copies + copy

Beams change places within the rows of their prompt only. So an edit that names rows, or holds values for each, is
spread in the same way. One that cannot be spread is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.editing.edits import Ablate, Affine, Edit, Mask, Offset, Patch, Scale
from manyheads.model.editing.rows import Rows

# Which dimension of an edit's values counts rows, where they have so many dimensions.
_ROWS_OF = {"positions": (0, 2), "keys": (0, 2), "weights": (0, 2), "source": (1, 5), "reference": (1, 5)}
_SPREADABLE = (Scale, Ablate, Patch, Offset, Affine, Mask, Rows)


def generated(model: Any, inputs: Any, **kwargs: Any) -> Any:
    """The answer of `OpenedModel.generate`, where it is described, of this opened model."""
    module = model.plain
    if not hasattr(module, "generate"):
        raise UnsupportedError(f"{type(module).__name__} generates no text; give a causal language model.")
    _check_numbers(kwargs)
    told = isinstance(inputs, Sequence)  # a text is one too
    batch = model.inputs(inputs)
    if not (isinstance(inputs, Mapping) and "position_ids" in inputs):
        batch.pop("position_ids", None)  # of the prompt only: `generate` makes them for every step from the mask
    if not (isinstance(inputs, Mapping) and "decoder_input_ids" in inputs):
        batch.pop("decoder_input_ids", None)  # `generate` begins with the start token alone
    reads_on = not getattr(model.config, "is_encoder_decoder", False)
    rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1), 1)
    if "input_ids" in batch:
        batch.setdefault("attention_mask", torch.ones_like(batch["input_ids"]))
        if reads_on:
            check_padding(batch["attention_mask"])
    settings = _settings(model, kwargs)
    copies = max(settings["num_beams"], settings["num_return_sequences"])
    edits = model._dispatch.edits
    spread = edits if copies == 1 else [_spread(edit, rows, copies) for edit in edits]
    with model._dispatch.instead(spread):
        try:
            out = module.generate(**batch, **_helped(model, kwargs, settings))
        except IndexError as error:  # of a table of positions; rotary models go on
            known = getattr(model.config, "max_position_embeddings", None)
            if known is None or "out of range" not in str(error):
                raise
            raise InputError(
                f"the prompt and the new tokens go beyond the model's {known} positions; ask for fewer tokens."
            ) from error
    if not told:
        return out
    sequences = out if isinstance(out, Tensor) else out.sequences
    new = sequences[:, batch["input_ids"].shape[1] :] if reads_on else sequences
    texts = model.tokenizer.batch_decode(new, skip_special_tokens=True)
    if not isinstance(out, Tensor):
        out.texts = texts
        return out
    return texts[0] if isinstance(inputs, str) and len(texts) == 1 else texts


def check_padding(mask: Tensor, *, gaps: bool = True) -> None:
    """`InputError` if a row of an attention mask `[B, T]` ends in padding or, without `gaps`, has some between its tokens."""
    if mask.ndim != 2:
        raise InputError(f"a prompt's attention mask has shape [B, T], not {list(mask.shape)}.")
    seen = mask.bool()
    wrong = ~seen[:, -1] if gaps else ~seen[:, -1] | (seen[:, :-1] & ~seen[:, 1:]).any(1)
    if bool(wrong.any()):
        raise InputError(
            f"row {int(wrong.int().argmax())} of the prompt is padded after or between its tokens, and text goes on from the "
            "last column; pad on the left."
        )


def _check_numbers(kwargs: Mapping[str, Any]) -> None:
    for name, value in kwargs.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}; give a finite number.")


def _settings(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What decides on rows and on stopping, wherever it was said: to this call, in its config, or in the model's own."""
    configs = [kwargs.get("generation_config"), getattr(model.plain, "generation_config", None)]
    found: dict[str, Any] = {}
    for name in ("num_beams", "num_return_sequences", "stop_strings"):
        values = [kwargs.get(name), *(getattr(config, name, None) for config in configs)]
        found[name] = next((value for value in values if value is not None), None if name == "stop_strings" else 1)
    return found


def _helped(model: Any, kwargs: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as Transformers wants them: its own model as assistant, and the tokenizer where strings end the text."""
    given = dict(kwargs)
    if (assistant := getattr(given.get("assistant_model"), "plain", None)) is not None:
        given["assistant_model"] = assistant
    if settings["stop_strings"] is not None and model.tokenizer is not None:
        given.setdefault("tokenizer", model.tokenizer)
    return given


def _spread(edit: Edit, rows: int, copies: int) -> Edit:
    """The edit for passes in which each of `rows` prompts has `copies` rows."""
    if type(edit) not in _SPREADABLE and (rows > 1 or edit.rows is not None):
        raise UnsupportedError(
            f"{type(edit).__name__} cannot follow its rows where each prompt has {copies} (beams or returned sequences); "
            "give one prompt at a time, or one sequence a prompt."
        )
    if isinstance(edit, Ablate) and edit.mode == "resample" and edit.reference is None:
        raise UnsupportedError(
            f"a resample ablation takes another row, and here each prompt has {copies} rows (beams or returned sequences); "
            "give reference=."
        )
    changes: dict[str, Any] = {}
    if edit.rows is not None:
        changes["rows"] = [row % rows * copies + copy for row in _whole(edit.rows, rows) for copy in range(copies)]
    for name, (dim, ndim) in _ROWS_OF.items():
        value = getattr(edit, name, None)
        if value is None or isinstance(value, int):
            continue
        values: Int[Tensor, "..."] = torch.as_tensor(value)
        if values.ndim == ndim and values.shape[dim] > 1:
            changes[name] = values.repeat_interleave(copies, dim)
    return replace(edit, **changes) if changes else edit


def _whole(rows: Sequence[int], batch: int) -> list[int]:
    if any(not -batch <= row < batch for row in rows):
        raise InputError(f"rows {list(rows)} do not fit a batch of {batch}.")
    return list(rows)
