"""ComplexFormer (#116): each head learns how much the angle of the *content* counts beside the angle of the position.

arXiv:2505.10222 (May 2025). **The first author withdrew it in its second version**, and no code is known. The formula is the
abstract's; how it is parameterised follows the method that it descends from, EulerFormer (Tian et al., arXiv:2403.17729, SIGIR
2024). No result of the paper is repeated here. A pair of channels is a length lam and an angle th; with m the query's position,
n the key's,

    s = scale * sum_i  lam_q,i lam_k,i cos( delta_h,i (th_q,i - th_k,i) + b_h,i + (m - n) w_i )

which is RoPE at delta = 1 and b = 0. It factors, so any attention kernel serves: before RoPE each pair of q is turned by
(delta - 1) th_q + b, each pair of k by (delta - 1) th_k. Values stay as they are.

What is learned is delta - 1, `[Hkv, R/2]`, and b, `[H, R/2]`, in each layer: both begin at 0, where nothing changes, and weight
decay draws to RoPE. Keys are cached turned, in Transformers' own cache.

Departures. Under grouped-query attention delta is a KV head's, since one delta must turn query and key. Pairs of length 0 have
angle 0 and no gradient. EulerFormer's contrastive loss of phases, and its rates of 100 and 1000 for delta and b, are left out.
For a delta that is no integer the logit jumps where th passes from pi to -pi: that is so in the formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.converted import conversion, converted
from manyheads.shrink.positions.rotation import Frame, Turning

NAME = "complexformer"
_SHORTEST = 1e-6  # pairs shorter than this have no angle: the gradient of atan2 is 1 / length


@dataclass(frozen=True)
class ComplexFormer:
    """`ComplexFormer().convert(model)` is a model that attends as before, and can learn delta and b (formula above)."""

    def convert(self, model: HeadModel) -> HeadModel:
        """A copy with the new parameters, at RoPE. `UnsupportedError` for a model without RoPE, or one that is quantised."""
        return converted(model, NAME, {"frame": Frame.of(model, "ComplexFormer").to_json()})


class ContentAngles(Turning):
    """One layer's delta - 1 and b."""

    def __init__(self, frame: Frame) -> None:
        super().__init__(frame)
        pairs = frame.pairs.width // 2
        self.delta_less_one = nn.Parameter(torch.zeros(frame.groups, pairs))
        self.b = nn.Parameter(torch.zeros(frame.heads, pairs))

    @property
    def delta(self) -> Float[Tensor, "G R"]:
        """How much the angle of the content counts; RoPE has 1."""
        return 1 + self.delta_less_one

    def angle(self, x: Float[Tensor, "B T N Dh"], is_query: bool) -> Float[Tensor, "B T N R"]:
        """What a pair is turned by before RoPE."""
        more = self.delta_less_one.float()
        th = content_angle(*self.frame.pairs.split(x.float()))
        if not is_query:
            return more * th
        return more.repeat_interleave(self.frame.heads // self.frame.groups, 0) * th + self.b.float()


def content_angle(a: Float[Tensor, "*N"], b: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """atan2(b, a) in radians; 0, without a gradient, where both are 0."""
    long = a.square() + b.square() > _SHORTEST**2
    return torch.atan2(b.where(long, torch.zeros_like(b)), a.where(long, torch.ones_like(a)))


@conversion(NAME)
def install(module: Any, settings: Mapping[str, Any]) -> None:
    """Hang delta and b into every layer of `module`, in place, where they are RoPE."""
    frame = Frame.from_json(settings["frame"])
    for layer in frame.layers(module):
        weight = next(layer.parameters())
        layer.content_angles = ContentAngles(frame).to(weight.device, weight.dtype)
        layer.content_angles.attach(layer)
