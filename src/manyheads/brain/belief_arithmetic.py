"""The few functions that belief updates need, once for Python's floats and once for tensors.

One series without gradients runs on floats: an operation of torch takes some microseconds whatever its size, one on floats some
ten nanoseconds. Many series, or gradients, run on tensors `[B]`.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

LARGEST = 709.0  # exp of more is infinite in float64


class BeliefArithmetic(Protocol):
    """What both kinds of numbers can do."""

    def exp(self, x: Any) -> Any: ...
    def log(self, x: Any) -> Any: ...
    def sigmoid(self, x: Any) -> Any: ...
    def tanh(self, x: Any) -> Any: ...
    def least(self, x: Any, most: float) -> Any: ...
    def most(self, x: Any, least: float) -> Any: ...
    def where(self, condition: Any, yes: Any, no: Any) -> Any: ...
    def lambert(self, log_x: Any) -> Any: ...


class FloatArithmetic:
    """On floats. Raises `ArithmeticError` or `ValueError` where a tensor would hold infinity or NaN."""

    exp = staticmethod(math.exp)
    log = staticmethod(math.log)
    tanh = staticmethod(math.tanh)
    least = staticmethod(min)
    most = staticmethod(max)

    @staticmethod
    def sigmoid(x: float) -> float:
        """1 / (1 + exp(-x)), without overflow."""
        return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))

    @staticmethod
    def where(condition: bool, yes: float, no: float) -> float:
        """`yes` where the condition holds."""
        return yes if condition else no

    @staticmethod
    def lambert(log_x: float) -> float:
        """The w with w exp(w) = exp(log_x), by Newton's method on w + log(w) = log_x."""
        w = _first_guess(log_x)
        for _ in range(8):
            w = w * (1.0 + log_x - math.log(w)) / (1.0 + w)
        return w


class TensorArithmetic:
    """On tensors of float64."""

    exp = staticmethod(torch.exp)
    log = staticmethod(torch.log)
    sigmoid = staticmethod(torch.sigmoid)
    tanh = staticmethod(torch.tanh)

    @staticmethod
    def where(condition: Any, yes: Any, no: Any) -> torch.Tensor:
        """`yes` where the condition holds."""
        return torch.where(condition, yes, no)

    @staticmethod
    def least(x: torch.Tensor, most: float) -> torch.Tensor:
        """The smaller of both."""
        return torch.clamp(x, max=most)

    @staticmethod
    def most(x: torch.Tensor, least: float) -> torch.Tensor:
        """The larger of both."""
        return torch.clamp(x, min=least)

    @staticmethod
    def lambert(log_x: torch.Tensor) -> torch.Tensor:
        """As on floats. Only the last step of Newton's method carries the gradient, and it is exact: dw/dlog x = w / (1 + w)."""
        with torch.no_grad():
            w = torch.where(
                log_x > 1, log_x - torch.log(log_x.clamp_min(1.0)), torch.exp(log_x.clamp(-LARGEST, 1)) * 0.5
            )
            w = w.clamp_min(1e-300)
            for _ in range(8):
                w = w * (1.0 + log_x - torch.log(w)) / (1.0 + w)
        return w * (1.0 + log_x - torch.log(w)) / (1.0 + w)


def _first_guess(log_x: float) -> float:
    return log_x - math.log(log_x) if log_x > 1 else max(0.5 * math.exp(max(log_x, -LARGEST)), 1e-300)
