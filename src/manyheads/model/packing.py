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

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

MOST_BYTES = 4 * 2**30
"""Of all copies of one model: beyond it, nothing is packed unless asked for."""


@dataclass(frozen=True)
class _Copy:
    """A packed weight, and the weight it was made from, by address and version: any change in place counts the version up."""

    packed: Tensor
    address: int
    version: int


_COPIES = WeakIdKeyDictionary()  # of weights, by identity


class Matrices(nn.Module):
    """A module that multiplies by matrices that are no `nn.Linear`: in a `Packed` block, `product` runs on packed copies."""

    _packed: dict[int, Tensor] | None = None

    def matrices(self) -> list[Tensor]:
        """The matrices, `[o, i]` each."""
        raise TypeError(f"{type(self).__name__} names no matrices.")

    def product(
        self, x: Float[Tensor, "... i"], weight: Float[Tensor, "o i"], bias: Tensor | None
    ) -> Float[Tensor, "... o"]:
        """`x W^T + b`, W one of `matrices`."""
        if self._packed is None or _plain(x):
            return F.linear(x, weight, bias)
        return _product(x, self._packed[id(weight)], bias)


class Packed:
    """A context in which the linear layers of `modules` run on packed copies, where no gradient is asked for.

    Enter it as often as you like, also nested; `on` tells whether anything is packed.

    `wanted=None`: where it is measured to be faster and the copies are no larger than `MOST_BYTES`. Copies are kept with their
    weights and made anew when these have changed. Only plain float32 `nn.Linear` layers on the processor are packed, hooks on
    them run; and `Matrices`.
    """

    def __init__(self, *modules: nn.Module, wanted: bool | None = None) -> None:
        parts = [part for module in modules for part in module.modules()]
        layers = [part for part in parts if isinstance(part, nn.Linear) and _packs(part)]
        others = [part for part in parts if isinstance(part, Matrices) and all(map(_fits, part.matrices()))]
        weights = [*(layer.weight for layer in layers), *(weight for part in others for weight in part.matrices())]
        if wanted is None:
            small = 0 < sum(weight.nbytes for weight in weights) <= MOST_BYTES
            wanted = small and _pays(max((tuple(weight.shape) for weight in weights), key=lambda s: s[0] * s[1]))
        self._layers = [(layer, _forward(layer, _copy(layer.weight))) for layer in layers] if wanted else []
        self._others = [(part, {id(w): _copy(w) for w in part.matrices()}) for part in others] if wanted else []
        self._depth = 0
        self.on = bool(self._layers or self._others)

    def __enter__(self) -> Packed:
        self._depth += 1
        if self._depth == 1:
            for layer, forward in self._layers:
                layer.forward = forward  # type: ignore[method-assign, assignment]
            for part, copies in self._others:
                part._packed = copies
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            for layer, _forward in self._layers:
                vars(layer).pop("forward", None)
            for part, _copies in self._others:
                part._packed = None


def _packs(layer: nn.Linear) -> bool:
    return type(layer) is nn.Linear and "forward" not in vars(layer) and _fits(layer.weight)


def _fits(weight: Tensor) -> bool:
    plain = weight.dtype == torch.float32 and weight.device.type == "cpu" and weight.layout == torch.strided
    return plain and not weight.is_inference() and torch.backends.mkldnn.is_available()


def _copy(weight: Tensor) -> Tensor:
    kept: _Copy | None = _COPIES.get(weight)
    if kept is None or (kept.address, kept.version) != (weight.data_ptr(), weight._version):
        with torch.inference_mode(False), torch.no_grad():
            kept = _Copy(_reordered(weight.detach()), weight.data_ptr(), weight._version)
        _COPIES[weight] = kept
    return kept.packed


def _plain(x: Tensor) -> bool:
    """Whether the product must be the layer's own: packed copies have no gradients, and only one number format."""
    wrong = torch.is_grad_enabled() or x.dtype != torch.float32 or x.ndim < 2 or not x.numel()
    return wrong or torch.is_autocast_enabled("cpu")


def _reordered(weight: Float[Tensor, "o i"]) -> Tensor:
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    return made


def _product(x: Float[Tensor, "... i"], weight: Tensor, bias: Tensor | None) -> Float[Tensor, "... o"]:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _forward(layer: nn.Linear, weight: Tensor) -> Callable[[Tensor], Tensor]:
    bias = layer.bias

    def forward(input: Tensor) -> Tensor:
        return F.linear(input, layer.weight, bias) if _plain(input) else _product(input, weight, bias)

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
