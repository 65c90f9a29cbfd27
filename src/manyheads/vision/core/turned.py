"""Things seen turned in the plane, where the truth is known: patterns of dots, and handwritten digits.

The angle of each view is drawn evenly from [-span, span]; the action from view m to m + 1 is (cos, sin) of the difference of
their angles. Dots turn by the whole circle. Digits turn by a quarter to each side at most, so that a 6 does not become a 9.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.training import generator_of
from manyheads.vision.core.encoders import ViewBatches


@dataclass(frozen=True)
class TurnedThings:
    """N things with classes `y`, some to learn from and some to test on. `draw(which, angles)` shows them, angles in radians."""

    draw: Callable[[Int[Tensor, "B"], Float[Tensor, "B"]], Float[Tensor, "B 1 S S"]]
    y: Int[Tensor, "N"]
    train: Int[Tensor, "R"]
    test: Int[Tensor, "Q"]
    span: float

    def sample(
        self, part: Int[Tensor, "R"], n: int, views: int, draw: torch.Generator
    ) -> tuple[Float[Tensor, "n views 1 S S"], Float[Tensor, "n views-1 2"], Int[Tensor, "n"]]:
        """Views of `n` things of a part, the actions between them, and their classes."""
        which = part[torch.randint(len(part), (n,), generator=draw)]
        angles = self.span * (2 * torch.rand(n, views, generator=draw) - 1)
        seen = self.draw(which.repeat_interleave(views), angles.flatten())
        apart = angles[:, 1:] - angles[:, :-1]
        return seen.unflatten(0, (n, views)), torch.stack([apart.cos(), apart.sin()], -1), self.y[which]

    def batches(self, rows: int, views: int, seed: int) -> ViewBatches:
        """New views for every batch, of the things to learn from."""

        def batch(number: int) -> Mapping[str, Tensor]:
            seen, actions, _ = self.sample(self.train, rows, views, generator_of(seed, number))
            return {"views": seen, "actions": actions}

        return batch


def turned_dots(seed: int, things: int = 20, blobs: int = 6, side: int = 12) -> TurnedThings:
    """Random patterns of soft dots. All are seen in training; the test shows them at other angles."""
    draw = torch.Generator().manual_seed(seed)
    radius = 0.85 * torch.rand(things, blobs, generator=draw).sqrt()
    phase = 2 * math.pi * torch.rand(things, blobs, generator=draw)
    axis = torch.linspace(-1, 1, side)

    def show(which: Tensor, angles: Tensor) -> Tensor:
        at = phase[which] + angles[:, None]
        x, y = radius[which] * at.cos(), radius[which] * at.sin()  # exact at every angle: nothing is resampled
        far = (axis - x[..., None])[:, :, None, :] ** 2 + (axis - y[..., None])[:, :, :, None] ** 2
        return torch.exp(-far / (2 * 0.15**2)).sum(1)[:, None]

    every = torch.arange(things)
    return TurnedThings(show, every, every, every, math.pi)


def turned_digits(seed: int, share: float = 0.7) -> TurnedThings:
    """The 1,797 real digits of scikit-learn in 16 x 16 pixels. The test has other digits than those learned from."""
    data = digits()
    pictures = F.pad(F.interpolate(torch.tensor(data.x)[:, None], (12, 12), mode="bilinear"), (2, 2, 2, 2))
    return turned_pictures(pictures, torch.tensor(data.y), seed, share)


def turned_pictures(
    pictures: Float[Tensor, "N 1 S S"], y: Int[Tensor, "N"], seed: int, share: float = 0.7, span: float = math.pi / 2
) -> TurnedThings:
    """Square pictures turned about their middles, bilinearly; outside is 0."""

    def show(which: Tensor, angles: Tensor) -> Tensor:
        c, s, o = angles.cos(), angles.sin(), torch.zeros_like(angles)
        maps = torch.stack([torch.stack([c, -s, o], -1), torch.stack([s, c, o], -1)], 1)
        seen = pictures[which]
        return F.grid_sample(seen, F.affine_grid(maps, list(seen.shape), align_corners=False), align_corners=False)

    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))
    n = round(share * len(pictures))
    return TurnedThings(show, y.long(), order[:n], order[n:], span)


def view_mlp(pixels: int, width: int, seed: int, hidden: int = 256) -> nn.Module:
    """A small encoder for small pictures: two hidden layers with batch norms."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(pixels, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width),
        )
