"""CARoPE (#115): RoPE whose steps depend on the token and the head. A token says how far it moves those that follow it.

Veisi, Fartoot and Amirzadeh, arXiv:2507.23083 (2025); no code is known. RoPE's angle of pair i at position m is m theta^i, a sum
of equal steps. Here, with x_t the token's embedding `[D]`, W `[D, H]` and a bias b of each head,

    f_h(x) = 1 / (softplus(x W_h + b_h) + 1)      in (0, 1)
    phi_h,i(m) = sum_{t <= m} f_h(x_t)^i          radians, i = 0 .. R/2 - 1, summed in float32

so that the angle between positions n < m is a distance measured in content. Pair 0 has f^0 = 1, a step that no content can
change. The paper begins "as RoPE" and does not say how: with W = 0 and b* = ln(exp(1/theta - 1) - 1), f is theta.

A pair is turned before the model's own RoPE by what is *added*, sum_{t <= m} w_i ((f/theta)^i - 1), with w_i the model's
frequencies. That is f^i - theta^i for plain RoPE, exactly 0 at the start, and keeps scaled frequencies (Llama 3). The angles are
the same in all layers. A cache keeps turned keys, and in its first layer the sums, `[B, T, Hkv, R/2]`.

Departures. Under grouped-query attention a step is a KV head's. b is learned as its difference to b*, so that half precision
begins at RoPE too; weight decay of W draws to RoPE. Steps of padding count: they move all tokens of a row alike, which changes
no relative angle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.converted import conversion, converted
from manyheads.shrink.positions.following import FollowingLayer
from manyheads.shrink.positions.rotation import Frame, Turning, rotary_in

NAME = "carope"


@dataclass(frozen=True)
class CARoPE:
    """`CARoPE().convert(model)` is a model that attends as before, and can learn the steps of its angles (formula above)."""

    def convert(self, model: HeadModel) -> HeadModel:
        """A copy with the new parameters, at RoPE. `UnsupportedError` for a model without RoPE, or one that is quantised."""
        name = type(model.plain).__name__
        frame = Frame.of(model, "CARoPE")
        frequencies = rotary_in(model.plain).inv_freq.double()
        if len(frequencies) < 2:
            raise UnsupportedError(f"{name} turns one pair of channels, whose step CARoPE cannot change.")
        if type(DynamicCache(config=model.config).layers[0]) is not DynamicLayer:
            raise UnsupportedError(
                f"the first layer of {name} keeps a sliding cache or none, and CARoPE keeps its sums beside a whole one."
            )
        theta = float(frequencies[1] / frequencies[0])
        return converted(model, NAME, {"frame": frame.to_json(), "theta": theta})


class ContextSteps(Turning):
    """W and b, and the sums of the pass that runs."""

    def __init__(self, frame: Frame, theta: float) -> None:
        super().__init__(frame)
        self.theta = theta
        self.W = nn.Parameter(torch.zeros(frame.hidden, frame.groups))
        self.b_more = nn.Parameter(torch.zeros(frame.groups))
        self.now = _Pass()

    @property
    def b(self) -> Float[Tensor, "G"]:
        """The bias."""
        return self.b_more + start_bias(self.theta)

    def log_f(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T G"]:
        """The logarithm of f, of each token and KV head."""
        kind = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # an error of f grows with every token
            z = x.to(kind) @ self.W.to(kind) + self.b_more.to(kind) + start_bias(self.theta)
        return -torch.log1p(F.softplus(z))

    def added_steps(self, x: Float[Tensor, "B T D"], frequencies: Float[Tensor, "R"]) -> Float[Tensor, "B T G R"]:
        """What each token adds to RoPE's steps, radians."""
        ratio = self.log_f(x)[..., None] - math.log(self.theta)
        return frequencies.to(ratio) * torch.expm1(torch.arange(len(frequencies), device=x.device) * ratio)

    def angle(self, x: Float[Tensor, "B T N Dh"], is_query: bool) -> Float[Tensor, "B T N R"]:
        """The sums, for each head."""
        sums = cast(Tensor, self.now.sums)
        return sums.repeat_interleave(x.shape[2] // sums.shape[2], 2)

    def read_tokens(self, rotary: Any, args: tuple[Any, ...], output: Any) -> None:
        """A hook on the rotary embedding, which the model gives its embeddings."""
        self.now.sums = self.added_steps(args[0], rotary.inv_freq).cumsum(1)

    def go_on(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook on the first layer's attention, which the model gives the cache: its sums go on where that ends."""
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        kept: PhaseLayer | None = PhaseLayer.of(cache, layer.layer_idx, "CARoPE")
        if kept is not None:
            self.now.sums = kept.continued(cast(Tensor, self.now.sums))


class _Pass:
    """Tensors of the pass that runs: no part of a copy of the model."""

    def __init__(self) -> None:
        self.sums: Float[Tensor, "B T G R"] | None = None

    def __deepcopy__(self, memo: Any) -> _Pass:
        return _Pass()


class PhaseLayer(FollowingLayer):
    """The first layer's cache, with the `sums` of every token beside its keys."""

    def continued(self, new: Float[Tensor, "B T G R"]) -> Float[Tensor, "B T G R"]:
        """`new` sums, counted on from the last token's."""
        if "sums" in self.beside:
            new = new + self.beside["sums"][:, -1:]
            self.beside["sums"] = torch.cat([self.beside["sums"], new], 1)
        else:
            self.beside["sums"] = new
        return new

    def crop(self, tokens_to_remove: int) -> None:
        """Shorter by so many tokens."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and "sums" in self.beside:
            self.beside["sums"] = self.beside["sums"][:, : -abs(tokens_to_remove)]


def start_bias(theta: float) -> float:
    """b*, at which f is theta."""
    return math.log(math.expm1(1 / theta - 1))


@conversion(NAME)
def install(module: Any, settings: Mapping[str, Any]) -> None:
    """Hang W and b into the rotary embedding of `module`, in place, where they are RoPE."""
    frame = Frame.from_json(settings["frame"])
    layers, rotary = frame.layers(module), rotary_in(module)
    weight = next(module.parameters())
    rotary.context_steps = steps = ContextSteps(frame, settings["theta"]).to(weight.device, weight.dtype)
    rotary.register_forward_hook(steps.read_tokens)
    layers[0].register_forward_pre_hook(steps.go_on, with_kwargs=True)
    for layer in layers:
        steps.attach(layer)
