"""What a model and the work with its heads will take, from its config alone: no weight is read, and nothing is allocated.

For P weights of b bytes, L layers, H query heads and K key/value heads of width d, hidden size D, V tokens, B rows of T tokens:

    weights       P b, each once where they are shared; buffers such as rotary tables added
    logits        B T V b                                what a pass returns
    patterns      B H T^2 b                              of one layer: readers see one layer at a time
    recording     L B T (2 D + H d) b + logits           what a replay keeps: the stream, z, and what MLPs wrote
    cache         2 L K d B T b                          keys and values while text is generated
    full tuning   P (2 b + 8)                            weights, gradients, and two moments of Adam in float32

Activations inside a layer, and what libraries and the allocator keep, come on top; a tenth is left free for them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import infer_auto_device_map, init_empty_weights
from transformers import AutoConfig
from transformers.utils.hub import cached_file

from manyheads.errors import InputError
from manyheads.inputs import check_integer, clause
from manyheads.model.loading import checkpoints
from manyheads.model.loading.module import class_of
from manyheads.reference import ladon_path

FREE = 0.9  # of a device that the plan uses
MOST_LAYERS = 2000
_DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for (formulas above), and where weights go: bytes on each device, "cpu" and "disk".

    `heads` is (layers, query heads, key/value heads, width). `devices` are those that were given or found, in bytes.
    """

    name: str
    parameters: int
    heads: tuple[int, int, int, int]
    dtype: str
    rows: int
    tokens: int
    needs: Mapping[str, int]
    devices: Mapping[str, int]
    placed: Mapping[str, int]

    @property
    def says(self) -> str:
        """What to use, in a sentence or two."""
        used = [place for place, size in self.placed.items() if size]
        devices = [place for place in used if place not in ("cpu", "disk")]
        whole = "The weights do not fit here, even on the disk's cache" if not used else ""
        if used == ["cpu"]:
            whole = "It fits into the machine's memory: open it as it is"
        elif len(devices) == 1 and used == devices:
            name = f"cuda:{devices[0]}" if devices[0].isdigit() else devices[0]
            whole = f'It fits on device {devices[0]}: open it with device_map="{name}" (--device-map {name})'
        elif used == devices:
            whole = f'It needs {len(devices)} devices: open it with device_map="auto" (--device-map auto)'
        elif used:
            slow = "the disk" if "disk" in used else "the machine's memory"
            whole = f'Part of it lies in {slow}, which is slow: open it with device_map="auto" (--device-map auto)'
        if self.dtype == "float32" and used != ["cpu"] and len(used) > 1:
            whole += "; bfloat16 takes half (--dtype bfloat16)"
        least = min((size for place, size in self.devices.items() if place in used), default=0)
        if least and self.needs["recording"] > 0.1 * least:
            whole += "; give a replay fewer rows at a time, for what it keeps is more than a tenth of a device"
        return f"{whole}."


def plan_memory(
    source: str | Path,
    *,
    dtype: str = "float32",
    rows: int = 8,
    tokens: int = 512,
    devices: Mapping[str, int] | None = None,
) -> MemoryPlan:
    """Plan for a folder, a hub id (only its config is fetched), or a config.json. Without `devices` those of this machine.

    `devices` maps names such as "0" and "cpu" to bytes. `InputError` for a config that is none, names no heads, or describes
    more layers than there can be.
    """
    if dtype not in _DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose from {', '.join(_DTYPES)}.")
    check_integer(rows, "rows", 1, 1_000_000)
    check_integer(tokens, "tokens", 1, 100_000_000)
    config = _config(str(source))
    layers, heads, kv_heads, width, hidden, vocabulary = _sizes(config, str(source))
    found = dict(devices) if devices is not None else here()
    kind = getattr(torch, dtype)
    b = torch.empty(0, dtype=kind).element_size()
    try:
        with init_empty_weights(include_buffers=True):
            model = class_of(config)._from_config(config, dtype=kind)
    except Exception as error:  # whatever a foreign config raises
        raise InputError(f"no model can be made of the config of {source} ({clause(error)}).") from None
    parameters = sum(one.numel() for one in model.parameters())
    buffers = sum(one.numel() * one.element_size() for one in model.buffers())
    logits = rows * tokens * vocabulary * b
    needs = {
        "weights": parameters * b + buffers,
        "logits": logits,
        "patterns of a layer": rows * heads * tokens**2 * b,
        "recording": layers * rows * tokens * (2 * hidden + heads * width) * b + logits,
        "cache": 2 * layers * kv_heads * width * rows * tokens * b,
        "full tuning": parameters * (2 * b + 8),
    }
    placed = _placed(model, kind, {name: int(FREE * size) for name, size in found.items()})
    shape = (layers, heads, kv_heads, width)
    return MemoryPlan(str(source), parameters, shape, dtype, rows, tokens, needs, found, placed)


def here() -> dict[str, int]:
    """Free memory of this machine's accelerators, and of its own that is available, in bytes."""
    found = {str(i): torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    return found | {"cpu": _available()}


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text("utf-8").splitlines()
        told = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
        return told["MemAvailable"]
    except (OSError, KeyError, ValueError, IndexError):
        import psutil  # type: ignore[import-untyped]

        return int(psutil.virtual_memory().available)


def _config(source: str) -> Any:
    """The config alone, of a folder, a file or a hub model."""
    path = Path(ladon_path() if source == "ladon" and not Path(source).exists() else source)
    try:
        if path.is_file():
            given = json.loads(path.read_text("utf-8"))
            if not isinstance(given, dict) or "model_type" not in given:
                raise InputError(f"{path} is no config of a model: it names no model_type.")
            return AutoConfig.for_model(given.pop("model_type"), **given)
        if path.is_dir():
            checkpoints.read_config(path, trust=False)
            return AutoConfig.from_pretrained(str(path))
        if source.startswith((".", "/", "~")) or source.partition("@")[0].count("/") > 1:
            raise InputError(f"there is no model at {source}; give a folder, a config.json, or a hub id.")
        name, _, revision = source.partition("@")
        checkpoints.read_config(
            Path(str(cached_file(name, "config.json", revision=revision or None))).parent, trust=False
        )
        return AutoConfig.from_pretrained(name, revision=revision or None)
    except InputError:
        raise
    except Exception as error:  # whatever foreign code raises on a foreign config
        raise InputError(f"cannot read a config at {source} ({clause(error)}).") from None


def _sizes(config: Any, source: str) -> tuple[int, int, int, int, int, int]:
    """Layers, heads, key/value heads, width of a head, hidden size, and kinds of tokens (0 for a model without)."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config

    def read(*names: str) -> int:
        found = next((value for name in names if isinstance(value := getattr(text, name, None), int)), 0)
        return int(found)

    layers, heads = read("num_hidden_layers", "n_layer"), read("num_attention_heads", "n_head")
    hidden = read("hidden_size", "n_embd", "d_model")
    if not (layers and heads and hidden):
        raise InputError(f"the config of {source} names no layers of attention heads; a plan is for transformers.")
    if layers > MOST_LAYERS or heads > 100_000 or hidden > 10_000_000:
        raise InputError(
            f"the config of {source} says {layers} layers of {heads} heads and a width of {hidden}; mend it."
        )
    width = read("head_dim") or hidden // heads
    return layers, heads, read("num_key_value_heads") or heads, width, hidden, read("vocab_size")


def _placed(model: Any, dtype: torch.dtype, devices: Mapping[str, int]) -> dict[str, int]:
    """Bytes of weights on each device, as Accelerate's `device_map="auto"` spreads them; what fits nowhere is on the disk."""
    most: dict[Any, int] = {int(name) if name.isdigit() else name: size for name, size in devices.items()}
    with _quiet():
        spread = infer_auto_device_map(
            model, max_memory=most, no_split_module_classes=list(model._no_split_modules or ()), dtype=dtype
        )
    found = {**dict.fromkeys(devices, 0), "disk": 0}
    counted: set[int] = set()
    for name, device in spread.items():
        module = model.get_submodule(name) if name else model
        parts = module.parameters() if isinstance(module, torch.nn.Module) else [module]
        for one in parts:
            if id(one) not in counted:
                counted.add(id(one))
                found[str(device)] += one.numel() * torch.empty(0, dtype=dtype).element_size()
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Accelerate says of each device that is planned for and not here that it is not here."""
    logger = logging.getLogger("accelerate.utils.modeling")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
