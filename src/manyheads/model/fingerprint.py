"""A model's fingerprint: what a saved score or edit is checked against."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.model.offloading import present

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache")


def fingerprint(module: Any) -> str:
    """First 16 hex digits of SHA-256 over config and every parameter's name, shape, dtype and bytes.

    Where the weights came from, how they were loaded and where they lie now does not count; any change of a weight does.
    """
    digest = hashlib.sha256()
    digest.update(_config(module).encode())
    for name, at_rest in _parameters(module):
        digest.update(f"{name} {tuple(at_rest.shape)} {at_rest.dtype}".encode())
        with _fetched(module, name) as parameter:
            digest.update(_bytes(parameter))
    return digest.hexdigest()[:16]


def _parameters(module: nn.Module) -> list[tuple[str, Tensor]]:
    """By name, each weight once: one that is tied to another has two names, and away it looks like two weights."""
    tied: Collection[str] = getattr(module, "all_tied_weights_keys", ())
    return sorted((name, p) for name, p in module.named_parameters() if not (p.is_meta and name in tied))


def _config(module: Any) -> str:
    whole = module.config.to_dict() if hasattr(module, "config") else {"class": type(module).__name__}
    return json.dumps({k: v for k, v in whole.items() if k not in _VOLATILE}, sort_keys=True, default=str)


@contextlib.contextmanager
def _fetched(module: nn.Module, name: str) -> Iterator[Tensor]:
    """A parameter with its numbers, also where Accelerate has moved them away."""
    owner, _, own = name.rpartition(".")
    holder = module.get_submodule(owner)
    with present(holder) if getattr(holder, own).is_meta else contextlib.nullcontext():
        yield getattr(holder, own).detach()


def _bytes(parameter: Tensor) -> bytes:
    """The numbers; of a tensor of another kind (torchao's) those of its parts, and what it does with them."""
    if hasattr(parameter, "__tensor_flatten__"):
        names, how = parameter.__tensor_flatten__()
        return b"".join(_bytes(getattr(parameter, name)) for name in names) + str(how).encode()
    return parameter.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


@dataclass
class Fingerprint:
    """The fingerprint of a module as it is now, hashed again only after a parameter changed.

    In between, each parameter's name, shape, type and version are compared; PyTorch counts the version up with every operation
    in place. Writes through `.data` do not count it up, so sums over the contents are compared too. They cost about a fifth of
    a hash, and any single change and any exchange of rows or columns changes them. The config is compared whole.
    """

    module: Any
    _hash: str = ""
    _state: list[Any] | None = None

    def current(self) -> str:
        """The 16 hex digits for the weights as they are now."""
        parameters = _parameters(self.module)
        state: list[Any] = [_config(self.module), *((name, p.shape, p.dtype, _version(p)) for name, p in parameters)]
        state += _contents([p for _, p in parameters if not p.is_meta])
        for name in (name for name, p in parameters if p.is_meta):
            with _fetched(self.module, name) as parameter:
                state += _contents([parameter])
        if state != self._state:
            self._hash, self._state = fingerprint(self.module), state
        return self._hash


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version  # inference tensors count nothing


def _contents(parameters: list[Tensor]) -> list[int]:
    """Two numbers a parameter: sums over its bytes, weighted by row and by column, modulo 2^64."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        for part in _plain_parts(parameter.detach()):
            by_device.setdefault(part.device, []).extend(_sums(part))
    return [number for sums in by_device.values() for number in torch.stack(sums).tolist()]  # one transfer a device


def _plain_parts(parameter: Tensor) -> list[Tensor]:
    if hasattr(parameter, "__tensor_flatten__"):
        names, _ = parameter.__tensor_flatten__()
        return [part for name in names for part in _plain_parts(getattr(parameter, name))]
    return [parameter] if parameter.numel() else []


def _sums(weight: Tensor) -> tuple[Tensor, ...]:
    rows = weight.contiguous().reshape(-1, weight.shape[-1] if weight.ndim else 1)
    bits = rows.view(torch.uint8)
    apart, start = bits.shape[1], bits.storage_offset()
    widths = (torch.int64, torch.int32, torch.int16, torch.uint8)
    bits = bits.view(next(t for t in widths if apart % t.itemsize == start % t.itemsize == 0))
    by_row, by_column = bits.sum(1, dtype=torch.int64), bits.sum(0, dtype=torch.int64)
    return tuple((sums * _weights(len(sums), sums.device)).sum() for sums in (by_row, by_column))


@cache
def _weights(n: int, device: torch.device) -> Tensor:
    """An odd number for each place, all different: an odd factor loses nothing modulo 2^64."""
    return torch.arange(n, device=device) * 0x3C6EF372FE94F82A + 1
