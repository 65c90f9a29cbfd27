"""A norm as the linear map it is once its denominator is known: what exact attribution folds.

    norm(x) = (x - c mean(x)) / sigma(x) * gain + bias,    c = 1 (LayerNorm) or 0 (RMSNorm)
    sigma(x) = sqrt(mean((x - c mean(x))^2) + eps)

The parameters are measured on the module itself. That covers every class of norm (with or without bias, gains stored as 1 + w),
and shows whether a module is such a norm at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.offloading import own_copy


@dataclass(frozen=True)
class FoldedNorm:
    """`gain` and `bias` `[D]`, `eps`, and whether the mean is removed."""

    gain: Float[Tensor, "D"]
    bias: Float[Tensor, "D"]
    eps: float
    centred: bool

    @classmethod
    def of(cls, norm: nn.Module, width: int) -> FoldedNorm:
        """Measure `norm`, a module on vectors of `width`. `UnsupportedError` if it is neither LayerNorm nor RMSNorm."""
        exact = own_copy(norm).double().requires_grad_(False)
        weight = getattr(exact, "weight", None)
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        x = torch.randn(4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device) + 0.5
        eps = next((float(getattr(norm, n)) for n in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, n)), 0.0)
        bias = exact(torch.zeros_like(x))[0].double()
        centred = bool(torch.allclose(exact(x), exact(x + 3.0), rtol=1e-3, atol=1e-4))
        unit = cls(torch.ones_like(bias), torch.zeros_like(bias), eps, centred)
        gain = ((exact(x).double() - bias) / unit.apply(x)).median(0).values
        folded = cls(gain, bias, eps, centred)
        if not torch.allclose(folded.apply(x), exact(x).double(), rtol=1e-3, atol=1e-4):
            raise UnsupportedError(
                f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm, so it cannot be folded."
            )
        return folded

    def sigma(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... 1"]:
        """The denominator of `x`."""
        x = x.to(self.gain.dtype)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return (x.square().mean(-1, keepdim=True) + self.eps).sqrt()

    def apply(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return self.direction(x) / self.sigma(x) + self.bias

    def direction(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The linear part without its denominator: centred and multiplied by the gain."""
        x = x.to(self.gain.dtype)
        x = x - x.mean(-1, keepdim=True) if self.centred else x
        return x * self.gain

    def pull(self, readout: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The adjoint of `direction`: `<pull(r), y> = <r, direction(y)>`."""
        r = readout.to(self.gain.dtype) * self.gain
        return r - r.mean(-1, keepdim=True) if self.centred else r

    def fold(self, readout: Float[Tensor, "... D"], x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The vector `r'` with `<r', y> = <readout, norm(y) - bias>` when the denominator is that of `x`."""
        return self.pull(readout) / self.sigma(x)
