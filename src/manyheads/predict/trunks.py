"""Small trunks for experiments on numbers: made by a seed, trained from nothing."""

from __future__ import annotations

import torch
from torch import nn


def mlp(inputs: int, *widths: int, seed: int = 0) -> nn.Sequential:
    """Linear layers of these widths, each with a ReLU behind it. Torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for before, width in zip((inputs, *widths), widths, strict=False):
            layers += [nn.Linear(before, width), nn.ReLU()]
        return nn.Sequential(*layers)
