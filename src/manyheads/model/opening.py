"""open_model: from a hub id, a folder or a loaded model to a HeadModel whose layout has been proved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.layout import Part, find_layout, tower
from manyheads.model.loading.adapters import base_of_adapter, with_adapter
from manyheads.model.loading.module import load_module
from manyheads.reference.fetching import PACKAGED, fetched_path


def open_model(
    source: str | Path | PreTrainedModel | nn.Module | HeadModel | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
    part: Part | None = None,
) -> HeadModel:
    """Open a model by its heads.

    `source` is a hub id (or NAME@REVISION: a branch, tag or commit of it, such as a training step), a folder that
    `save_pretrained` wrote (also an adapter's, whose base is loaded with it), a GGUF file, or a loaded model (also one that
    `torch.compile` wrapped). Without it, or for "ladon", it is the bundled reference model; "smollm2" and "gemma3" are ones
    that `manyheads fetch` keeps. `tokenizer` is only needed where text is. `dtype`, `device_map` and `trust_remote_code` (off:
    nothing that came with the weights is run) apply when weights are loaded. `part` names one part of a model of several, such
    as "vision".

    Before returning, the layout is proved on a tiny input (`proving`); `model.proof` says what was measured. `InputError` if
    there is no model at `source`; `UnsupportedError`, with what was looked for, if its architecture cannot be read.
    """
    if isinstance(source, HeadModel):
        return source
    if isinstance(source, nn.Module):
        module = source
    else:
        if str(source) in PACKAGED and not Path(str(source)).exists():
            source = fetched_path(str(source))
        base = base_of_adapter(source)
        where = source if base is None else base
        module, tokenizer = load_module(where, dtype, device_map, trust_remote_code, tokenizer)
        module = module if base is None else with_adapter(module, str(source))
    plain = getattr(module, "_orig_mod", module)
    if not hasattr(plain, "config") or not hasattr(plain, "get_input_embeddings"):
        raise InputError(
            f"{type(plain).__name__} is not a Transformers model; give a PreTrainedModel, a folder or a hub id."
        )
    whole, plain = plain, tower(plain, part)
    layout = find_layout(plain, part)
    model = HeadModel(module if plain is whole else plain, tokenizer, layout)
    # Without added tokens: one of those that the model lacks is refused where it is used.
    size = getattr(tokenizer, "vocab_size", 0)
    if size and model.reads_tokens and size > model.vocab_size:
        raise InputError(
            f"the tokenizer makes {size} kinds of tokens and {type(plain).__name__} knows {model.vocab_size}: it is another "
            "model's."
        )
    return model
