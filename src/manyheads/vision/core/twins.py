"""Barlow Twins: features of two changed copies of a picture agree one by one, and each says something else.

Zbontar et al., arXiv:2103.03230. With z, z' [B, E] the projected features of both copies, each column scaled to mean 0 and
deviation 1 over the batch,

    C = z^T z' / B        L = sum_i (1 - C_ii)^2 + weight sum_{i != j} C_ij^2

It is a teacher here that needs no labels. Pictures are changed by a turn, a shift, a scale and noise, which small ones bear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.learning import Trunk
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, drawn_rows, fit, generator_of
from manyheads.vision.core.encoders import ViewEncoder

TWINS = replace(ADAM, steps=600, rate=1e-3, rows=256)
Changing = Callable[[Float[Tensor, "B C H W"], torch.Generator], Float[Tensor, "B C H W"]]


def twins_loss(z: Float[Tensor, "B E"], other: Float[Tensor, "B E"], weight: float = 0.01) -> Float[Tensor, ""]:
    """L of the formula above."""
    a, b = ((one - one.mean(0)) / (one.std(0, unbiased=False) + 1e-5) for one in (z, other))
    found = a.T @ b / len(z)
    on = found.diagonal()
    return (1 - on).square().sum() + weight * (found.square().sum() - on.square().sum())


def jittered(pictures: Float[Tensor, "B C H W"], draw: torch.Generator) -> Float[Tensor, "B C H W"]:
    """Each picture turned by up to 20 degrees, shifted by up to 1/8 of its side, scaled by .85 to 1.15, with noise of .05."""
    n = len(pictures)
    angle, scale = (2 * torch.rand(2, n, generator=draw) - 1) * torch.tensor([[math.pi / 9], [0.15]])
    shift = (2 * torch.rand(n, 2, 1, generator=draw) - 1) / 4  # in halves of the side
    c, s = (1 + scale) * angle.cos(), (1 + scale) * angle.sin()
    maps = torch.cat([torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], 1), shift], 2)
    moved = F.grid_sample(pictures, F.affine_grid(maps, list(pictures.shape), align_corners=False), align_corners=False)
    return moved + 0.05 * torch.randn(pictures.shape, generator=draw)


class TwinViews(nn.Module):
    """An encoder with its projector; called on a batch of both copies it is L."""

    def __init__(self, encoder: nn.Module | Trunk, width: int, seed: int, projected: int = 128) -> None:
        super().__init__()
        self.encoder = ViewEncoder(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.projector = nn.Sequential(
                nn.Linear(width, projected), nn.BatchNorm1d(projected), nn.ReLU(), nn.Linear(projected, projected)
            )

    def forward(self, batch: Mapping[str, Tensor]) -> Float[Tensor, ""]:
        """L on the entries "one" and "other"."""
        both = self.projector(self.encoder(torch.cat([batch["one"], batch["other"]])))
        return twins_loss(*both.chunk(2))


def fit_twins(
    encoder: nn.Module | Trunk,
    pictures: Float[Tensor, "N C H W"],
    training: TrainSettings = TWINS,
    *,
    changing: Changing = jittered,
    bar: Bar = Bar(),
) -> ViewEncoder:
    """Train an encoder of your own on pictures without labels, in place; `changing` makes the copies."""

    def batch(number: int) -> Mapping[str, Tensor]:
        rows = pictures[drawn_rows(len(pictures), training.rows, number, training.seed)]
        draw = generator_of(training.seed + 7, number)
        return {"one": changing(rows, draw), "other": changing(rows, draw)}

    width = ViewEncoder(encoder).width(pictures[:2])
    model = TwinViews(encoder, width, training.seed)
    fit(model, batch, training, bar=bar)
    return model.encoder.eval()
