"""open_model: from a hub id, a folder or a loaded model to a HeadModel whose layout has been proved."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.layout import Layout, find_layout, tiny_inputs
from manyheads.model.replay.recording import no_cache
from manyheads.reference import ladon_path


def open_model(
    source: str | Path | PreTrainedModel | nn.Module | HeadModel | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype = "float32",
    device_map: str | dict[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> HeadModel:
    """Open a model by its heads.

    `source` is a hub id, a folder that `save_pretrained` wrote, or a loaded model (also one that `torch.compile` wrapped);
    without it, or for "ladon", the bundled reference model. `tokenizer` is only needed where text is. `dtype`, `device_map` and
    `trust_remote_code` (off: nothing that came with the weights is run) apply when weights are loaded.

    Before returning, the layout is proved on a tiny input. `InputError` if there is no model at `source`;
    `UnsupportedError`, with what was looked for, if its architecture cannot be read.
    """
    if isinstance(source, HeadModel):
        return source
    if isinstance(source, nn.Module):
        module = source
    else:
        module, loaded = _load(source, dtype, device_map, trust_remote_code)
        tokenizer = loaded if tokenizer is None else tokenizer
    plain = getattr(module, "_orig_mod", module)
    if not hasattr(plain, "config") or not hasattr(plain, "get_input_embeddings"):
        raise InputError(
            f"{type(plain).__name__} is not a Transformers model; give a PreTrainedModel, a folder or a hub id."
        )
    layout = find_layout(plain)
    check_layout(plain, layout)
    return HeadModel(module, tokenizer, layout)


def _load(source: str | Path | None, dtype: Any, device_map: Any, trust_remote_code: bool) -> tuple[nn.Module, Any]:
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"{dtype!r} is no dtype; give float32, bfloat16, float16 or auto.")
    bundled = source is None or (str(source) == "ladon" and not Path("ladon").exists())
    path = str(ladon_path() if bundled else source)
    folder = Path(path)
    if folder.is_file():
        raise InputError(f"{path} is a file; give the folder that holds the model's config.json.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise InputError(f"{path} is not a model: there is no config.json in it; give the folder that has it.")
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f'there is no model at {path}: no such folder; give a folder, a hub id, or "ladon".')
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        kwargs: dict[str, Any] = {"device_map": device_map} if device_map is not None else {}
        module = _class_of(config).from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, **kwargs
        )
    except (OSError, ValueError, KeyError, ImportError, json.JSONDecodeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"cannot open a model at {path}: {reason}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError):
        tokenizer = None
    return module.eval(), tokenizer


def _class_of(config: Any) -> Any:
    """The model class a checkpoint was saved with, if Transformers has it; else the one its type is usually opened as."""
    for name in config.architectures or []:
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    for mapping, auto in (
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
        (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    ):
        if config.model_type in mapping:
            return auto
    return transformers.AutoModel


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
