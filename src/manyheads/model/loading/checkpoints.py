"""What the files of a model say, before memory is given to it, and whether what was loaded is what they say.

A config is data from a stranger: it may name code, or sizes that no file has. The headers of the safetensors files say how
large the weights are without reading them; a model that would be larger is refused before anything is allocated.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from manyheads.errors import InputError
from manyheads.inputs import clause, read_object

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
ROOM = 1 << 28  # numbers that a model may hold beside its weights: masks, tables of positions
OPTIONAL = ("masked_spec_embed",)  # parameters that act in training only; old checkpoints lack them
# The counts of a config: as many modules are made one after the other, whatever their size.
_COUNT = re.compile(r"layer|expert|block|stage|depth|codebook|heads")
_TOKENIZER = re.compile(r"(tokenizer|vocab|merges|bpe|tekken|spiece|source|target).*|.*\.(model|spm|tiktoken|codes)")


def read_config(folder: Path, trust: bool) -> dict[str, Any]:
    """The config.json of a folder. `InputError` if it is damaged, or names foreign kernels and `trust` is not set."""
    file = folder / "config.json"
    config = read_object(file)
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type is not None and not isinstance(model_type, str):
        raise InputError(f"model_type in {file} is {model_type!r}; the name of a model type was expected.")
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise InputError(f"architectures in {file} is {str(architectures)[:60]}; a list of names was expected.")
    foreign = next(_foreign_kernels(config), None)
    if foreign is not None and not trust:
        raise InputError(
            f"{file} asks for the kernel {foreign!r}, which is code from elsewhere; take that line out, or pass "
            "trust_remote_code (--trust-remote-code) if you trust it."
        )
    return config


def tensor_sizes(folder: Path) -> dict[str, int]:
    """How many numbers each tensor of a folder's safetensors files has, from their headers."""
    sizes: dict[str, int] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                sizes |= {name: math.prod(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is no whole safetensors file ({clause(error)}); copy it again.") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / "model.safetensors").is_file():
        named = read_object(index).get("weight_map")
        if not isinstance(named, dict) or not all(isinstance(shard, str) for shard in named.values()):
            raise InputError(f"{index} has no weight_map of names; copy it again.")
        for shard in sorted(set(named.values())):
            if Path(shard).name != shard or not (folder / shard).is_file():
                raise InputError(f"{index} names {shard!r}, which is not in {folder}; copy all the files.")
    return sizes


def refuse_larger(cls: Any, config: Any, sizes: Mapping[str, int], path: str) -> None:
    """`InputError` if the model of `config` would be larger than what its files hold (`sizes`)."""
    most, total = max(len(sizes), *sizes.values()), sum(sizes.values())
    for name, value in _numbers(config.to_dict()):
        if _COUNT.search(name) and value > most:
            raise InputError(f"{name} in the config of {path} is {value:.3g}; the files hold {len(sizes)} tensors.")
    try:
        with torch.device("meta"):
            made = cls(config)
    except Exception:  # what is wrong with it is said where it is loaded, which does the same once more
        return
    weights = sum(parameter.numel() for parameter in made.parameters())
    buffers = sum(buffer.numel() for buffer in made.buffers())
    packed = 32 if getattr(config, "quantization_config", None) else 2  # quantised files hold many weights a number
    if weights > packed * total + ROOM // 256 or buffers > 4 * total + ROOM:
        raise InputError(
            f"the config of {path} describes {weights + buffers:.3g} numbers and its files hold {total:.3g}; give the config "
            "that belongs to these weights."
        )


def missing_pooler(info: Mapping[str, Any]) -> bool:
    """Whether all that a checkpoint lacks is a pooler, which many are saved without and no head needs."""
    missing = info["missing_keys"]
    return bool(missing) and all("pooler" in name.split(".") for name in missing)


def check_loaded(module: nn.Module, info: Mapping[str, Any], folder: Path | None, path: str) -> None:
    """`InputError` that names a tensor which the files lack, have in another shape, have for nothing, or which is not finite.

    `info` is what Transformers says of loading. What acts in training only, and is missing, becomes zero.
    """
    for name, *shapes in sorted(info["mismatched_keys"]):
        given, expected = (list(shape) for shape in shapes)
        raise InputError(
            f"{name} in {path} has shape {given}; its config makes it {expected}; they do not belong together."
        )
    parameters = dict(module.named_parameters())
    shared = getattr(module, "all_tied_weights_keys", {})
    missing = sorted(info["missing_keys"], key=lambda name: (name in shared, name))
    for name in missing:
        if name.rpartition(".")[2] not in OPTIONAL:
            more = f", and {len(missing) - 1} more," if len(missing) > 1 else ""
            raise InputError(
                f"{path} has no tensor {name}{more} which {type(module).__name__} needs; Transformers would make it up at "
                "random. Copy the checkpoint again, or correct architectures in its config."
            )
        nn.init.zeros_(parameters[name])
    modules = dict(module.named_modules())
    owners = {name.rpartition(".")[0] for name in parameters}
    for name in sorted(info["unexpected_keys"]):
        owner, _, last = name.rpartition(".")
        if (owner in owners and last in ("weight", "bias")) or _beyond(name, modules):
            raise InputError(
                f"{path} holds {name}, which {type(module).__name__} would leave out under this config; give the config that "
                "belongs to these weights."
            )
    for name, tensor in parameters.items():
        if not _finite(tensor.detach()):
            as_what = f" as {str(tensor.dtype).removeprefix('torch.')}"
            raise InputError(f"{name} in {path} holds NaN or infinity{as_what}; copy it again, or load it as float32.")
    if folder is not None and any(tensor.is_meta for tensor in parameters.values()):
        _check_files(folder)


def has_tokenizer(folder: Path) -> bool:
    """Whether one of the files in `folder` is a tokenizer's."""
    return any(_TOKENIZER.fullmatch(file.name) and file.suffix != ".safetensors" for file in folder.iterdir())


def _foreign_kernels(value: Any, asked: bool = False) -> Iterator[str]:
    """Names such as "owner/kernel" under a key that chooses an implementation."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _foreign_kernels(inner, asked or "implementation" in name or name.startswith("kernel"))
    elif isinstance(value, list):
        for inner in value:
            yield from _foreign_kernels(inner, asked)
    elif asked and isinstance(value, str) and "/" in value:
        yield value


def _beyond(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a parameter is of a module beyond the end of a list of the model: a layer that the config does not count."""
    parts = name.split(".")
    lists = [i for i in range(len(parts)) if isinstance(modules.get(".".join(parts[:i])), nn.ModuleList)]
    return any(".".join(parts[: i + 1]) not in modules for i in lists)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, str(key))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield name, value


def _check_files(folder: Path) -> None:
    """What was moved away (meta) is read once from where it lies, a tensor at a time."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                if not _finite(opened.get_tensor(name)):
                    raise InputError(f"{name} in {file} holds NaN or infinity; copy it again.")


def _finite(tensor: torch.Tensor) -> bool:
    """One pass without a copy: the least and the largest are NaN if anything is. What is packed or elsewhere counts as finite."""
    if tensor.is_meta or tensor.dtype not in FLOATS or type(tensor) is not torch.Tensor or not tensor.numel():
        return True
    least, largest = torch.aminmax(tensor)
    return bool(least.isfinite() and largest.isfinite())
