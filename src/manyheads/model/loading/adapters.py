"""A folder that holds an adapter and no model: its base is loaded, and the adapter put around it by PEFT."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from manyheads.errors import InputError
from manyheads.inputs import read_json, read_tensors


def base_of_adapter(source: str | Path | None) -> str | None:
    """The hub id or folder of the model that the adapter at `source` belongs to; None if there is no adapter by itself.

    `InputError` if its files do not name one, if its weights are no safetensors, or without the package `peft`.
    """
    folder = Path(str(source))
    file = folder / "adapter_config.json"
    try:
        alone = file.is_file() and not (folder / "config.json").is_file()
    except (OSError, ValueError):  # no path at all: whoever loads it says what is wrong
        return None
    if not alone:
        return None
    if find_spec("peft") is None:
        raise InputError(f"{folder} is an adapter; to read it, install peft: pip install peft")
    if not (folder / "adapter_model.safetensors").is_file():
        raise InputError(f"{folder} is an adapter without adapter_model.safetensors; save it as safetensors.")
    read_tensors(folder / "adapter_model.safetensors")  # damaged ones are refused by name
    about = read_json(file)
    base = about.get("base_model_name_or_path") if isinstance(about, dict) else None
    if not isinstance(base, str) or not base:
        raise InputError(f"{file} does not name the model that it adapts (base_model_name_or_path); load it with PEFT.")
    return base


def with_adapter(module: nn.Module, folder: str | Path) -> nn.Module:
    """`module` with the adapter of `folder` around it, in eval mode. `InputError` if it does not fit."""
    import peft

    try:
        adapted: Any = peft.PeftModel.from_pretrained(module, str(folder), use_safetensors=True)
    except (ValueError, KeyError, RuntimeError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"the adapter at {folder} does not fit {type(module).__name__}: {reason}") from error
    return adapted.eval()  # type: ignore[no-any-return]
