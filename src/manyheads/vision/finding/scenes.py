"""Pictures of several things with their boxes: users' own, plain shapes, or real written digits pasted on textures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.boxes import box_iou

SHAPES = ("square", "disc", "triangle")
DIGITS = tuple("0123456789")

Thing = Callable[[int, torch.Generator], tuple[Tensor, Tensor, int]]
"""Side in pixels -> how much it covers `[side, side]` in [0, 1], its colour `[3]`, its class."""


@dataclass(frozen=True)
class BoxScenes:
    """Pictures in [0, 1], and of each thing in them: its picture, its box (left, top, right, bottom) in pixels, its class.

    `InputError` for shapes that do not fit, classes without a name, boxes without an area or outside the picture.
    """

    pixels: Float[Tensor, "N 3 S S"]
    scene: Int[Tensor, "M"]
    boxes: Float[Tensor, "M 4"]
    classes: Int[Tensor, "M"]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        side = self.pixels.shape[-1]
        if self.pixels.ndim != 4 or self.pixels.shape[1:] != (3, side, side) or side % 8 or not len(self.pixels):
            raise InputError(
                f"pictures have shape {list(self.pixels.shape)}; give [N, 3, S, S] with an S that 8 divides."
            )
        if self.boxes.shape != (len(self.scene), 4) or self.classes.shape != self.scene.shape:
            raise InputError(
                f"boxes have shape {list(self.boxes.shape)}, classes {list(self.classes.shape)} and scene "
                f"{list(self.scene.shape)}; give [M, 4], [M] and [M]."
            )
        if not len(self.scene):
            return
        if not bool(self.boxes.isfinite().all()) or bool((self.boxes[:, 2:] <= self.boxes[:, :2]).any()):
            raise InputError("a box has no area; give (left, top, right, bottom) in pixels.")
        if float(self.boxes.min()) < 0 or float(self.boxes.max()) > side:
            raise InputError(f"a box leaves its picture of {side} x {side} pixels; cut it first.")
        if int(self.classes.min()) < 0 or int(self.classes.max()) >= len(self.names):
            raise InputError(f"classes go from 0 to {len(self.names) - 1}, one a name; got {int(self.classes.max())}.")
        if int(self.scene.min()) < 0 or int(self.scene.max()) >= len(self.pixels):
            raise InputError(f"scene says which of {len(self.pixels)} pictures; got {int(self.scene.max())}.")

    def take(self, rows: Int[Tensor, "R"]) -> BoxScenes:
        """These pictures, in this order, with their things."""
        parts = [(self.scene == int(row)).nonzero()[:, 0] for row in rows]
        things = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)
        scene = torch.cat([torch.full_like(part, i) for i, part in enumerate(parts)])
        return BoxScenes(self.pixels[rows], scene, self.boxes[things], self.classes[things], self.names)


def shape_scenes(n: int, seed: int, side: int = 64) -> BoxScenes:
    """Three to ten squares, discs and triangles of any colour on a noisy ground; the class is the form.

    What finds no free place is left out.
    """
    return _scenes(n, seed, side, _shape, SHAPES, (3, 10), (9, 17))


def digit_scenes(n: int, seed: int, part: str = "train", side: int = 64) -> BoxScenes:
    """Two to five written digits (scikit-learn's, 8 x 8, made larger) on coloured textures; the class is the digit.

    The digits of "train" (two thirds) and of "test" have nothing in common.
    """
    if part not in ("train", "test"):
        raise InputError(f"part is {part!r}; give train or test.")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("the digits need scikit-learn; install it: pip install scikit-learn.") from None
    given = load_digits()
    images, targets = torch.as_tensor(given.images / 16, dtype=torch.float32), torch.as_tensor(given.target)
    mine = (torch.arange(len(images)) % 3 == 2) == (part == "test")
    images, targets = images[mine], targets[mine]

    def digit(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
        i = int(torch.randint(len(images), (), generator=generator))
        big = F.interpolate(images[i][None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
        return big, 0.75 + 0.25 * torch.rand(3, generator=generator), int(targets[i])

    return _scenes(n, seed, side, digit, DIGITS, (2, 5), (14, 24))


def _scenes(
    n: int, seed: int, side: int, thing: Thing, names: tuple[str, ...], many: tuple[int, int], sizes: tuple[int, int]
) -> BoxScenes:
    if n < 1:
        raise InputError(f"n is {n}; give at least 1.")
    g = torch.Generator().manual_seed(seed)
    pixels, scene, boxes, classes = [], [], [], []
    for i in range(n):
        # Textures at three scales, so that no single frequency tells a thing from the ground.
        parts = [
            F.interpolate(torch.rand(1, 3, k, k, generator=g), (side, side), mode="bilinear", align_corners=False)[0]
            for k in (3, 9, side)
        ]
        ground = 0.35 * parts[0] + 0.15 * parts[1] + 0.1 * parts[2]
        mine: list[Tensor] = []
        for _ in range(int(torch.randint(many[0], many[1] + 1, (), generator=g))):
            for _try in range(20):  # a thing that finds no free place is left out
                size = int(torch.randint(sizes[0], sizes[1], (), generator=g))
                left, top = torch.randint(0, side - size + 1, (2,), generator=g).tolist()
                cover, colour, kind = thing(size, g)
                rows, columns = (cover > 0.1).any(1).nonzero()[:, 0], (cover > 0.1).any(0).nonzero()[:, 0]
                box = torch.stack(
                    [left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1]
                ).float()
                if mine and float(box_iou(box[None], torch.stack(mine)).max()) > 0.1:
                    continue
                at = ground[:, top : top + size, left : left + size]
                at.copy_(at * (1 - cover) + cover * colour[:, None, None])
                mine.append(box)
                scene.append(i)
                classes.append(kind)
                break
        boxes += mine
        pixels.append(ground)
    return BoxScenes(torch.stack(pixels), torch.tensor(scene), torch.stack(boxes), torch.tensor(classes), names)


def _shape(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, int]:
    kind = int(torch.randint(3, (), generator=generator))
    at = (torch.arange(size) + 0.5) / size
    across, down = at[None, :] - 0.5, at[:, None]
    inside = (
        torch.ones(size, size),
        (across**2 + (down - 0.5) ** 2 <= 0.25).float(),
        (across.abs() <= down / 2).float(),
    )[kind]
    return inside, 0.3 + 0.7 * torch.rand(3, generator=generator), kind
