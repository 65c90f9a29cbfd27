"""Linear maps as models hold them: `nn.Linear`, GPT-2's `Conv1D`, an adapter around either, or weights in another number format.

    y = x W + b        W [F_in, F_out], whichever way round the module stores it

An adapter (such as PEFT's) wraps the module it adapts and keeps it as `base_layer`. Its matrix, like that of quantised weights,
is what the module makes of a basis, adapter and scales included.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.model.offloading import present

_AT_ONCE = 1024  # vectors of a basis: an unembedding makes a vocabulary of numbers of each
_PLAIN = (torch.float64, torch.float32, torch.float16, torch.bfloat16)  # eight-bit floats come with scales


def base_of(module: nn.Module) -> nn.Module:
    """The module that holds the weight: what adapters are wrapped around, or the module itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def features_of(module: nn.Module) -> tuple[int, int] | None:
    """How many features a linear map reads and makes; None for a module that is no linear map."""
    base: Any = base_of(module)
    for read, made in (("in_features", "out_features"), ("nx", "nf")):  # the second are Conv1D's
        counts = getattr(base, read, None), getattr(base, made, None)
        if all(isinstance(count, int) for count in counts):
            return counts  # type: ignore[return-value]
    return None


def output_dim(module: nn.Module) -> int:
    """The dimension of the weight that counts output features: `nn.Linear` and `Conv1D` store it each their way."""
    return 0 if hasattr(base_of(module), "out_features") else 1


def is_plain(module: nn.Module) -> bool:
    """Whether the module's own weight, a matrix in floating point, is all there is to it: no adapter, no number format."""
    weight: Any = getattr(module, "weight", None)
    counts = features_of(module)
    if base_of(module) is not module or counts is None:
        return False
    if type(weight) not in (Tensor, nn.Parameter):  # a kind of tensor of its own, such as torchao's
        return False
    return weight.dtype in _PLAIN and tuple(weight.shape) == (counts if output_dim(module) else counts[::-1])


def projection_matrix(module: nn.Module) -> Float[Tensor, "F D"]:
    """W. A view of the weight where that is plain, so that a change of it changes the module; measured or fetched otherwise."""
    if is_plain(module):
        with present(module):  # a weight that was away stays where it was fetched to, a copy
            weight: Tensor = module.weight  # type: ignore[assignment]
            return weight if output_dim(module) else weight.T
    counts = features_of(module)
    assert counts is not None
    return _measured(module, counts[0], slice(None))


def bias_of(module: nn.Module) -> Float[Tensor, "D"] | None:
    """b, if there is one; measured where the weight is."""
    if is_plain(module):
        with present(module):
            bias: Any = module.bias
            return bias if isinstance(bias, Tensor) else None
    counts = features_of(module)
    assert counts is not None
    measured = _made(module, torch.zeros(1, counts[0]))[0]
    return measured if bool(measured.any()) else None


def number_format(module: nn.Module) -> str:
    """What a linear map holds, in words: a number format, a tensor of another kind, or an adapter."""
    base = base_of(module)
    if base is not module:
        return "an adapter"
    weight: Any = getattr(base, "weight", None)
    if isinstance(weight, Tensor) and type(weight) in (Tensor, nn.Parameter):
        return str(weight.dtype).removeprefix("torch.") + " weights"
    return f"{type(weight if isinstance(weight, Tensor) else base).__name__} weights"


def output_rows(module: nn.Module, features: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
    """The weights that make these output features: of an unembedding, the rows of these tokens."""
    counts = features_of(module)
    if counts is None or is_plain(module):
        with present(module):
            weight: Tensor = module.weight  # type: ignore[assignment]
            return weight[features.to(weight.device)] if output_dim(module) == 0 else weight[:, features].T
    return _measured(module, counts[0], features).T


def _measured(module: nn.Module, width: int, features: Any) -> Float[Tensor, "F N"]:
    """What the module makes of each basis vector, less what it makes of zero; some of its features only."""
    zero = _made(module, torch.zeros(1, width))[:, features]
    return torch.cat([_made(module, rows)[:, features] - zero for rows in torch.eye(width).split(_AT_ONCE)])


def _made(module: nn.Module, x: Float[Tensor, "N F"]) -> Float[Tensor, "N D"]:
    some = next((t for t in (*module.parameters(), *module.buffers()) if t.dtype in _PLAIN), None)
    device = next((t.device for t in (*module.parameters(), *module.buffers()) if not t.is_meta), torch.device("cpu"))
    with torch.no_grad(), _without_dropout(module):
        # `forward`, not the call, for whose hooks this is no forward pass of the model.
        made: Tensor = module.forward(x.to(device, torch.float32 if some is None else some.dtype))
    return made


@contextlib.contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    were = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in were:
            part.training = training
