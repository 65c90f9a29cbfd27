"""From a hub id (also one at a revision, NAME@REVISION), a folder or a GGUF file to a loaded module and its tokenizer."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

from manyheads.errors import InputError, ManyheadsError
from manyheads.inputs import check_text
from manyheads.model.loading import checkpoints
from manyheads.model.weights.converted import converted_class
from manyheads.model.weights.registering import PREFIX
from manyheads.reference import ladon_path

_SPREADS = ("auto", "balanced", "balanced_low_0", "sequential", "disk")


def load_module(
    source: str | Path | None, dtype: Any, device_map: Any, trust_remote_code: bool, tokenizer: Any = None
) -> tuple[nn.Module, Any]:
    """The module in eval mode and its tokenizer: the one given, or that of the files, None if they have none.

    `InputError` says what is not there or not right: in the files (a tensor that is missing, of another shape or not finite, a
    config that does not fit, a damaged tokenizer), or in the arguments. Nothing is printed.
    """
    _check_dtype(dtype)
    _check_devices(device_map)
    bundled = source is None or (str(source) == "ladon" and not Path("ladon").exists())
    path = check_text(str(ladon_path() if bundled else source), "the model's name")
    with _told(f"a model at {path}", path):
        folder, more = _files(path)
    gguf, where = "gguf_file" in more, path.partition("@")[0] if "revision" in more else path
    with _told(f"a model at {path}", path), _quiet(gguf):
        if not gguf:
            fetched = folder or Path(str(cached_file(where, "config.json", **more))).parent
            checkpoints.read_config(fetched, trust_remote_code)
        elif folder is not None:
            where = str(folder.resolve())
        config = AutoConfig.from_pretrained(where, trust_remote_code=trust_remote_code, **more)
        if device_map is not None:
            more["device_map"] = device_map
        module = _loaded(class_of(config), config, path, where, folder, dtype, trust_remote_code, more)
    if tokenizer is None:
        more.pop("device_map", None)
        tokenizer = _tokenizer(path, where, folder, trust_remote_code, more)
    return module.eval(), tokenizer


def _loaded(
    cls: Any, config: Any, path: str, where: str, folder: Path | None, dtype: Any, trust: bool, more: dict[str, Any]
) -> nn.Module:
    if folder is None:
        folder = _fetched(where, more.get("revision"))
    if folder is not None and "gguf_file" not in more and (sizes := checkpoints.tensor_sizes(folder)):
        checkpoints.refuse_larger(cls, config, sizes, path)

    def load(**others: Any) -> Any:
        return cls.from_pretrained(
            where,
            dtype=dtype,
            trust_remote_code=trust,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # and then refused, by name
            **more,
            **others,
        )

    module, info = load()
    if checkpoints.missing_pooler(info):
        module, info = load(add_pooling_layer=False)
    checkpoints.check_loaded(module, info, folder, path)
    return module


def _files(path: str) -> tuple[Path | None, dict[str, Any]]:
    """The folder at `path` (None: a hub id), and what names the GGUF file if there is one."""
    given = Path(path)
    if given.is_file() and given.suffix.lower() == ".gguf":
        return given.parent, _gguf(given)
    if given.is_file():
        raise InputError(f"{path} is a file; give the folder that holds the model's config.json, or a .gguf file.")
    if given.is_dir() and not (given / "config.json").is_file():
        found = sorted(given.glob("*.gguf"))
        if len(found) == 1:
            return given, _gguf(found[0])
        said = (
            f"there are {len(found)} .gguf files in it; give one of them" if found else "there is no config.json in it"
        )
        raise InputError(f"{path} is not a model: {said}; give the folder that has it.")
    if given.is_dir():
        return given, {}
    name, at, revision = path.partition("@")
    if path.startswith((".", "/", "~")) or name.count("/") > 1 or (at and not (name and revision)):
        raise InputError(f'there is no model at {path}: no such folder; give a folder, a hub id, or "ladon".')
    return None, {"revision": revision} if at else {}


def _gguf(file: Path) -> dict[str, Any]:
    if find_spec("gguf") is None:
        raise InputError(f"{file} is a GGUF file; to read it, install gguf: pip install 'manyheads[gguf]'.")
    return {"gguf_file": file.name}


def _fetched(name: str, revision: str | None) -> Path | None:
    """The folder in the cache that has a hub model's weights, which are fetched; None if it has no safetensors."""
    how: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    file = cached_file(name, "model.safetensors", **how)
    if file is None and (index := cached_file(name, "model.safetensors.index.json", **how)) is not None:
        file = get_checkpoint_shard_files(name, index, revision=revision)[0][0]
    return None if file is None else Path(file).parent


def class_of(config: Any) -> Any:
    """The model class a checkpoint was saved with, if Transformers has it; else the one its type is usually opened as."""
    is_converted = config.model_type.startswith(PREFIX)
    for name in config.architectures or []:
        cls = getattr(transformers, name.removeprefix("Manyheads") if is_converted else name, None)
        if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
            return converted_class(cast(Any, cls)) if is_converted else cls
    for mapping, auto in (
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
        (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
    ):
        if config.model_type.removeprefix(PREFIX) in mapping:
            return auto
    return transformers.AutoModel


def _tokenizer(path: str, where: str, folder: Path | None, trust: bool, more: dict[str, Any]) -> Any:
    """The tokenizer that came with the files; None where no file is one's. Transformers would invent one then."""
    advice = "repair its files, or pass tokenizer= to use another"
    with _told(f"the tokenizer of {path}", path, advice), _quiet("gguf_file" in more):
        if folder is None:  # of a hub model only what is asked for was fetched
            names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt", "vocab.json")
            how = {"_raise_exceptions_for_missing_entries": False, **more}
            if not any(cached_file(where, name, **how) for name in names):
                return None
        elif "gguf_file" not in more and not checkpoints.has_tokenizer(folder):
            return None
        return AutoTokenizer.from_pretrained(where, trust_remote_code=trust, **more)


def _check_dtype(dtype: Any) -> None:
    if dtype == "auto" or (getattr(torch, dtype, None) if isinstance(dtype, str) else dtype) in checkpoints.FLOATS:
        return
    raise InputError(f"dtype {str(dtype)!r} is none that a model is read in; give float32, bfloat16, float16 or auto.")


def _check_devices(device_map: Any) -> None:
    """`InputError` for a device that is not there."""
    for name in device_map.values() if isinstance(device_map, dict) else [device_map]:
        if name is None or name in _SPREADS:
            continue
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, TypeError, ValueError, ImportError) as error:
            raise InputError(f"there is no device {str(name)[:60]!r} here: {_first_line(error)}; try auto.") from None
        if device.type == "meta":
            raise InputError("a model on the meta device has no weights to read; give another device_map.")


@contextlib.contextmanager
def _told(what: str, path: str, advice: str = "") -> Iterator[None]:
    """What goes wrong in foreign code on foreign files is said in one sentence: the files are what it is about."""
    try:
        yield
    except (ManyheadsError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic in Rust is no Exception
        reason = _first_line(error)
        if not isinstance(error, (OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        if not os.path.exists(path):  # Path's own raises where a name is too long
            reason = f"there is no such folder, and the hub has nothing for us under that name: {reason}"
        raise InputError(f"cannot open {what}: {reason}{f'; {advice}.' if advice else ''}") from error


@contextlib.contextmanager
def _quiet(gguf: bool) -> Iterator[None]:
    """Without bars and reports of loading. A download still shows its bar; that of reading GGUF files heeds no setting."""
    bars, downloads = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    level = transformers_logging.get_verbosity()
    retries = hub_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(max(level, logging.ERROR))
    hub_logging.set_verbosity(max(retries, logging.ERROR))
    if downloads:
        enable_progress_bars()
    try:
        with contextlib.redirect_stderr(io.StringIO()) if gguf else contextlib.nullcontext():
            yield
    finally:
        transformers_logging.set_verbosity(level)
        hub_logging.set_verbosity(retries)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip()[:300] if lines else type(error).__name__
