"""Linear layers packed for the processor: the same products in float32, read from a copy of the weights in oneDNN's order.

PyTorch's `F.linear` multiplies float32 by the BLAS it was built with, which packs the weights anew in every call. For a few
rows (a token, a drafted tree) that is most of the work, and on processors that this BLAS is not tuned for it is slow for many
rows too. oneDNN, which comes with PyTorch, can keep the weights packed. Sums are taken in another order: results differ by
rounding.

A copy needs the memory of the weights again. Whether it is faster is measured on the model's own matrices, once a process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

MOST_BYTES = 4 * 2**30
"""Of all copies of one model: beyond it, nothing is packed unless asked for."""


@dataclass(frozen=True)
class _Copy:
    """A packed weight, and the weight it was made from, by address and version: any change in place counts the version up."""

    packed: Tensor
    address: int
    version: int


_COPIES: WeakKeyDictionary[nn.Module, _Copy] = WeakKeyDictionary()


class Packed:
    """A context in which the linear layers of `modules` run on packed copies, where no gradient is asked for.

    Enter it as often as you like, also nested; `on` tells whether anything is packed.

    `wanted=None`: where it is measured to be faster and the copies are no larger than `MOST_BYTES`. Copies are kept with their
    layers and made anew when weights have changed. Only plain float32 `nn.Linear` layers on the processor are packed; hooks on
    them run.
    """

    def __init__(self, *modules: nn.Module, wanted: bool | None = None) -> None:
        layers = [
            layer for module in modules for layer in module.modules() if isinstance(layer, nn.Linear) and _packs(layer)
        ]
        size = sum(layer.weight.nbytes for layer in layers)
        largest = max((tuple(layer.weight.shape) for layer in layers), key=lambda s: s[0] * s[1], default=(0, 0))
        if wanted is None:
            wanted = size <= MOST_BYTES and bool(layers) and _pays(largest)
        self._layers = [(layer, _forward(layer, _copy(layer))) for layer in layers] if wanted else []
        self._depth = 0
        self.on = bool(self._layers)

    def __enter__(self) -> Packed:
        self._depth += 1
        if self._depth == 1:
            for layer, forward in self._layers:
                layer.forward = forward  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            for layer, _forward in self._layers:
                vars(layer).pop("forward", None)


def _packs(layer: nn.Linear) -> bool:
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    fits = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.layout == torch.strided
    return fits and not weight.is_inference() and torch.backends.mkldnn.is_available()


def _copy(layer: nn.Linear) -> Tensor:
    kept, weight = _COPIES.get(layer), layer.weight
    if kept is None or (kept.address, kept.version) != (weight.data_ptr(), weight._version):
        with torch.inference_mode(False), torch.no_grad():
            kept = _Copy(_reordered(weight.detach()), weight.data_ptr(), weight._version)
        _COPIES[layer] = kept
    return kept.packed


def _reordered(weight: Float[Tensor, "o i"]) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return made


def _product(x: Float[Tensor, "... i"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "... o"]:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _forward(layer: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
    bias = layer.bias

    def forward(input: Tensor) -> Tensor:
        plain = torch.is_grad_enabled() or input.dtype != torch.float32 or input.ndim < 2 or not input.numel()
        if plain or torch.is_autocast_enabled("cpu"):
            return F.linear(input, layer.weight, bias)
        return _product(input, weight, bias)

    return forward


@cache
def _pays(shape: tuple[int, int]) -> bool:
    """Whether both one and eight rows are multiplied at least as fast, by processor time."""
    weight = torch.randn(shape)
    try:
        made = _reordered(weight)
        with torch.inference_mode():
            rows = [torch.randn(n, shape[1]) for n in (1, 8)]
            plain = [_seconds(partial(F.linear, x, weight)) for x in rows]
            ours = [_seconds(partial(_product, x, made, None)) for x in rows]
    except (RuntimeError, NotImplementedError, AttributeError):  # a build of PyTorch without these operators
        return False
    return all(o <= p for o, p in zip(ours, plain, strict=True))


def _seconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(5):
        begun = time.process_time()
        call()
        taken.append(time.process_time() - begun)
    return statistics.median(taken)
