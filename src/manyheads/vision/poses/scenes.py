"""Pictures of one to four heads whose boxes and rotations are known exactly: shaded balls with a face, or a real head's mesh.

A ball has a nose (a dot where +z of the head leaves it), eyes, two ears (at +x and -x) and hair on its back and top, so that
every rotation looks different. Behind the heads is a smooth coloured ground with plain discs and rectangles of the same sizes and
colours, so that a head is not found by colour alone; or a photograph that is given. Boxes are those of the pixels that show the
head, corners (left, top, right, bottom) in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.inputs import check_integer
from manyheads.vision.core.rotations import rotation_of_euler
from manyheads.vision.poses.head_mesh import HAIRS, SKINS, random_look, render_head

Kind = Literal["balls", "heads"]
RANGES = (40.0, 180.0, 30.0)  # degrees to each side: pitch, yaw (the full circle) and roll, each drawn uniformly


@dataclass(frozen=True)
class HeadScenes:
    """`B` pictures in [0, 1], and of all `N` heads together: which picture, the box, the rotation and its three angles."""

    pixels: Float[Tensor, "B 3 S S"]
    scene: Int[Tensor, "N"]
    boxes: Float[Tensor, "N 4"]
    rotations: Float[Tensor, "N 3 3"]
    angles: Float[Tensor, "N 3"]

    def __len__(self) -> int:
        return len(self.pixels)


def random_angles(n: int, generator: torch.Generator) -> Float[Tensor, "{n} 3"]:
    """(pitch, yaw, roll) in degrees over `RANGES`."""
    return (2 * torch.rand(n, 3, generator=generator) - 1) * torch.tensor(RANGES)


def render_ball(
    rotation: Float[Tensor, "3 3"], size: int, generator: torch.Generator
) -> Float[Tensor, "4 {size} {size}"]:
    """A ball of `.48 * size` pixels radius with a face and a red nose, colours (times opacity) and opacity."""
    look = random_look(generator)
    at = (torch.arange(size) + 0.5 - size / 2) / (0.48 * size)
    x, y = at[None, :].expand(size, size), -at[:, None].expand(size, size)
    rest = 1 - x**2 - y**2
    normal = torch.stack([x, y, rest.clamp(min=0).sqrt()], -1)
    u, v, w = (normal @ rotation).unbind(-1)  # R^T n: the same points in the head's own axes
    colour = look.skin.expand(size, size, 3)
    dark, ear, nose = 0.15 * look.skin, look.skin * torch.tensor([0.95, 0.5, 0.45]), torch.tensor([0.9, 0.15, 0.15])
    parts = (
        (v - 0.9 * w > 0.35, look.hair),
        ((u.abs() - 0.36) ** 2 + (v - 0.25) ** 2 + (w - 0.9) ** 2 < 0.018, dark),
        (u.abs() > 0.9, ear),
        (w > 0.95, nose),
    )
    for where, paint in parts:
        colour = torch.where(where[..., None], paint, colour)
    shade = look.ambient + (1 - look.ambient) * (normal @ look.light).clamp(min=0)
    opacity = (0.5 + rest * 0.24 * size).clamp(0, 1)  # about a pixel wide at the edge
    return torch.cat([(colour * shade[..., None]).permute(2, 0, 1).clamp(0, 1) * opacity, opacity[None]])


def head_scenes(
    n: int,
    seed: int,
    *,
    kind: Kind = "balls",
    size: int = 128,
    most: int = 4,
    sides: tuple[int, int] = (22, 52),
    photographs: Sequence[Float[Tensor, "3 _ _"]] = (),
) -> HeadScenes:
    """`n` pictures of 1 to `most` heads of `sides` pixels (least and most), which cover each other by a fifth at most.

    With `photographs` most grounds are random squares of them. The same seed gives the same pictures.
    """
    check_integer(n, "the number of pictures", 1)
    g = torch.Generator().manual_seed(seed)
    pixels, boxes, scene, angles = [], [], [], []
    for i in range(n):
        picture = _ground(size, g, photographs)
        _clutter(picture, sides, g)
        places = _places(int(torch.randint(1, most + 1, (), generator=g)), size, sides, g)
        for centre, side in places if kind == "heads" else ():
            _shoulders(picture, centre, side, g)  # all before the heads, which nothing covers
        for centre, side in places:
            degrees = random_angles(1, g)[0]
            rotation = rotation_of_euler(degrees)
            if kind == "balls":
                head = render_ball(rotation, side, g)
            else:
                drawn = round(side / 0.72)  # so that a head is `side` pixels high
                head = render_head(rotation, drawn, random_look(g))
            boxes.append(_paste(picture, head, centre))
            scene.append(i)
            angles.append(degrees)
        noise = 0.02 * torch.rand((), generator=g) * torch.randn(picture.shape, generator=g)
        pixels.append((picture + noise).clamp(0, 1))
    degrees = torch.stack(angles)
    return HeadScenes(torch.stack(pixels), torch.tensor(scene), torch.stack(boxes), rotation_of_euler(degrees), degrees)


def _uniform(low: float, high: float, g: torch.Generator) -> float:
    return low + (high - low) * float(torch.rand((), generator=g))


def _colour(g: torch.Generator) -> Tensor:
    """Any colour, or one of skin and hair."""
    known = SKINS + HAIRS
    if float(torch.rand((), generator=g)) < 0.5:
        return torch.tensor(known[int(torch.randint(len(known), (), generator=g))])
    return torch.rand(3, generator=g)


def _ground(size: int, g: torch.Generator, photographs: Sequence[Tensor]) -> Tensor:
    if photographs and float(torch.rand((), generator=g)) < 0.8:
        photo = photographs[int(torch.randint(len(photographs), (), generator=g))]
        side = int(_uniform(min(size, *photo.shape[1:]), min(photo.shape[1:]), g))
        top, left = (int(_uniform(0, length - side, g)) for length in photo.shape[1:])
        square = photo[None, :, top : top + side, left : left + side]
        return F.interpolate(square, (size, size), mode="bilinear", antialias=True)[0].clone()
    coarse = int(torch.randint(2, 9, (), generator=g))
    waves = _colour(g)[:, None, None] + 0.35 * (torch.rand(3, coarse, coarse, generator=g) - 0.5)
    return F.interpolate(waves[None], (size, size), mode="bicubic")[0].clamp(0, 1)


def _clutter(picture: Tensor, sides: tuple[int, int], g: torch.Generator) -> None:
    size = picture.shape[-1]
    rows, columns = torch.arange(size)[:, None], torch.arange(size)[None]
    for _ in range(int(torch.randint(0, 4, (), generator=g))):
        cy, cx, a, b = (_uniform(0, size, g), _uniform(0, size, g), _uniform(*sides, g) / 2, _uniform(*sides, g) / 2)
        dy, dx = (rows - cy) / a, (columns - cx) / b
        disc = float(torch.rand((), generator=g)) < 0.5
        where = dy**2 + dx**2 < 1 if disc else (dy.abs() < 1) & (dx.abs() < 1)
        shade = 1 - 0.4 * dy.clamp(-1, 1) * float(torch.rand((), generator=g))
        picture[:] = torch.where(where, (_colour(g)[:, None, None] * shade).clamp(0, 1), picture)


def _shoulders(picture: Tensor, centre: tuple[float, float], side: int, g: torch.Generator) -> None:
    """Clothes under a head: an ellipse from the chin down."""
    size = picture.shape[-1]
    dy = (torch.arange(size)[:, None] - centre[1] - 1.45 * side) / side
    dx = (torch.arange(size)[None] - centre[0]) / (_uniform(0.8, 1.2, g) * side)
    picture[:] = torch.where(dy**2 + dx**2 < 1, _colour(g)[:, None, None] * (1 - 0.3 * dx.abs().clamp(max=1)), picture)


def _places(n: int, size: int, sides: tuple[int, int], g: torch.Generator) -> list[tuple[tuple[float, float], int]]:
    found: list[tuple[tuple[float, float], int]] = []
    for _ in range(50 * n):
        side = int(_uniform(sides[0], sides[1] + 1, g))
        x, y = _uniform(side / 2, size - side / 2, g), _uniform(side / 2, size - side / 2, g)
        if all(((x - a) ** 2 + (y - b) ** 2) ** 0.5 > 0.45 * (side + other) for (a, b), other in found):
            found.append(((x, y), side))
        if len(found) == n:
            break
    return found


def _paste(picture: Tensor, head: Tensor, centre: tuple[float, float]) -> Tensor:
    """Put a head onto a picture, and say where its pixels are."""
    n, size = head.shape[-1], picture.shape[-1]
    left, top = round(centre[0] - n / 2), round(centre[1] - n / 2)
    shown = head[:, max(0, -top) : size - top, max(0, -left) : size - left]
    y, x = max(0, top), max(0, left)
    part = picture[:, y : y + shown.shape[1], x : x + shown.shape[2]]
    part[:] = shown[:3] + (1 - shown[3]) * part
    rows, columns = (shown[3] > 0.5).any(1).nonzero()[:, 0], (shown[3] > 0.5).any(0).nonzero()[:, 0]
    return torch.tensor([x + columns[0], y + rows[0], x + columns[-1] + 1, y + rows[-1] + 1]).float()
