"""From a hub id or a folder to a loaded module and its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto import modeling_auto

from manyheads.errors import InputError
from manyheads.reference import ladon_path


def load_module(
    source: str | Path | None, dtype: Any, device_map: Any, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """The module in eval mode and its tokenizer, None if there is none. `InputError` says what is not there or not right."""
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
