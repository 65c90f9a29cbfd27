"""What can be read off a representation: a linear classifier's accuracy, and R2 of numbers by a small network.

    R2 = 1 - sum (y - f(x))^2 / sum (y - mean y)^2          the mean over columns of y; 1 is perfect, 0 what the mean is worth

Both are fitted on one part and judged on another, on features that are scaled to mean 0 and deviation 1 by the first.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.training import ADAM, fit, row_batches


def linear_accuracy(
    x: Float[Tensor, "N D"], y: Int[Tensor, "N"], test_x: Float[Tensor, "R D"], test_y: Int[Tensor, "R"], seed: int = 0
) -> float:
    """The share of the test rows whose class a linear classifier knows."""
    probe = _fitted(x, y, (), int(y.max()) + 1, seed)
    return float((probe(_scaled(test_x, x)).argmax(1) == test_y).float().mean())


def network_r2(
    x: Float[Tensor, "N D"],
    y: Float[Tensor, "N C"],
    test_x: Float[Tensor, "R D"],
    test_y: Float[Tensor, "R C"],
    seed: int = 0,
    hidden: tuple[int, ...] = (128, 128),
) -> float:
    """R2 of numbers on the test rows, by a network with hidden layers of these widths (none: linear)."""
    probe = _fitted(x, y, hidden, y.shape[1], seed)
    error = (probe(_scaled(test_x, x)) - test_y).square().sum(0)
    return float((1 - error / (test_y - test_y.mean(0)).square().sum(0)).mean())


def _fitted(x: Tensor, y: Tensor, hidden: tuple[int, ...], outputs: int, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        widths = [x.shape[1], *hidden]
        parts = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
        probe = nn.Sequential(*parts, nn.Linear(widths[-1], outputs))
    loss = F.cross_entropy if y.dtype == torch.long else F.mse_loss
    settings = replace(ADAM, steps=800, rate=1e-3 if hidden else 1e-2, decay=0.5, seed=seed)
    batches = row_batches({"x": _scaled(x, x), "y": y}, 256, seed)
    fit(probe, batches, settings, loss=lambda net, batch: loss(net(batch["x"]), batch["y"]), device=x.device)
    return probe.eval().requires_grad_(False)


def _scaled(x: Tensor, by: Tensor) -> Tensor:
    return (x - by.mean(0)) / by.std(0).clamp_min(1e-6)
