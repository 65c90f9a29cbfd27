"""A real head as a mesh, and a small z-buffer renderer: pictures of heads whose rotation is known exactly.

The mesh is MakeHuman's (CC0), cut out by recipes/head_mesh.py: eight people with 4,299 vertices each. It is seen from far away
(orthographic), so a rotation of the head and the picture of it determine each other wherever the head stands in the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

MESH = Path(__file__).parent / "head_mesh.safetensors"
PEOPLE = 8
SKINS = ((0.96, 0.80, 0.69), (0.88, 0.67, 0.53), (0.75, 0.54, 0.38), (0.55, 0.37, 0.26), (0.36, 0.24, 0.17))
HAIRS = ((0.09, 0.07, 0.06), (0.23, 0.15, 0.10), (0.45, 0.30, 0.16), (0.78, 0.62, 0.38), (0.62, 0.60, 0.58))


@dataclass(frozen=True)
class Look:
    """What a head looks like besides its rotation: one of eight people, colours, and where the light comes from."""

    person: int
    skin: Float[Tensor, "3"]
    hair: Float[Tensor, "3"]
    light: Float[Tensor, "3"]
    ambient: float


def random_look(generator: torch.Generator) -> Look:
    """Any person, skin, hair and light."""

    def pick(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    def vary(colours: tuple[tuple[float, ...], ...], much: float) -> Tensor:
        light_or_dark = 1 + much * torch.randn((), generator=generator)
        return torch.tensor(colours[pick(len(colours))]) * light_or_dark + 0.015 * torch.randn(3, generator=generator)

    skin, hair = vary(SKINS, 0.08), vary(HAIRS, 0.2)
    light = F.normalize(torch.randn(3, generator=generator) * 0.7 + torch.tensor([0.0, 0.5, 1.0]), dim=0)
    ambient = 0.35 + 0.35 * float(torch.rand((), generator=generator))
    return Look(pick(PEOPLE), skin.clamp(0, 1), hair.clamp(0, 1), light, ambient)


def render_head(
    rotation: Float[Tensor, "3 3"], size: int, look: Look, *, fine: int = 2
) -> Float[Tensor, "4 {size} {size}"]:
    """A picture of the head, colours and opacity in [0, 1]; half of a head's height is `.36 * size` pixels.

    So any rotation fits into the square. It is drawn `fine` times as large and averaged, which smooths its edges.
    """
    vertices, triangles, materials, normals = _mesh(look.person)
    points, normal = vertices @ rotation.T, normals @ rotation.T
    n = size * fine
    xy = points[:, :2] * torch.tensor([1.0, -1.0]) * (0.36 * n) + n / 2  # rows count downwards
    which, _ = z_buffer(torch.cat([xy, points[:, 2:]], 1), triangles, n)
    seen = which >= 0
    face = which[seen]
    lit = F.normalize(normal[triangles[face]].mean(1), dim=-1) @ look.light
    palette = torch.stack([look.skin, torch.tensor([0.93, 0.92, 0.9]), torch.tensor([0.15, 0.1, 0.08])])
    lips, brow = look.skin * torch.tensor([0.85, 0.55, 0.55]), 0.5 * look.hair + 0.2 * look.skin
    palette = torch.cat([palette, torch.stack([lips, look.hair, brow])])
    shade = look.ambient + (1 - look.ambient) * lit.clamp(min=0)
    picture = torch.zeros(4, n, n)
    picture[:3, seen] = (palette[materials[face]] * shade[:, None]).T.clamp(0, 1)
    picture[3, seen] = 1
    return F.avg_pool2d(picture, fine)  # colours are times the opacity: to be added to (1 - opacity) * what is behind


def z_buffer(
    points: Float[Tensor, "V 3"], triangles: Int[Tensor, "T 3"], size: int
) -> tuple[Int[Tensor, "{size} {size}"], Float[Tensor, "{size} {size}"]]:
    """For each pixel of a square the nearest triangle whose area holds its middle (-1: none), and the depth z there.

    Points are x and y in pixels, y downwards, and z, the nearer the larger. Corners stand
    anticlockwise where the outside is seen, and only such triangles count. Every pixel of a triangle's rectangle is tried.
    """
    corners = points[triangles]  # [T, 3, 3]
    ab, ac = (corners[:, 1:, :2] - corners[:, :1, :2]).unbind(1)
    twice = ab[:, 0] * ac[:, 1] - ab[:, 1] * ac[:, 0]
    faces = (twice < 0).nonzero()[:, 0]  # those that show their outside; y counts downwards
    corners, twice = corners[faces], twice[faces]
    low = (corners[..., :2].amin(1) - 0.5).ceil().clamp(0, size).long()
    high = (corners[..., :2].amax(1) - 0.5).floor().clamp(-1, size - 1).long()
    wide = (high - low + 1).clamp(min=0)
    count = wide[:, 0] * wide[:, 1]
    triangle = torch.repeat_interleave(torch.arange(len(faces)), count)
    within = torch.arange(len(triangle)) - torch.repeat_interleave(count.cumsum(0) - count, count)
    x = low[triangle, 0] + within % wide[triangle, 0].clamp(min=1)
    y = low[triangle, 1] + within // wide[triangle, 0].clamp(min=1)
    a, b, c = corners[triangle].unbind(1)
    px, py = x + 0.5, y + 0.5
    twice = twice[triangle]
    wb = ((px - a[:, 0]) * (c[:, 1] - a[:, 1]) - (py - a[:, 1]) * (c[:, 0] - a[:, 0])) / twice
    wc = ((b[:, 0] - a[:, 0]) * (py - a[:, 1]) - (b[:, 1] - a[:, 1]) * (px - a[:, 0])) / twice
    inside = (wb >= 0) & (wc >= 0) & (wb + wc <= 1)
    depth = (a[:, 2] + wb * (b[:, 2] - a[:, 2]) + wc * (c[:, 2] - a[:, 2]))[inside]
    pixel, triangle = (y * size + x)[inside], faces[triangle[inside]]
    nearest = torch.full((size * size,), -torch.inf).scatter_reduce(0, pixel, depth, "amax")
    first = depth == nearest[pixel]
    which = torch.full((size * size,), -1).scatter_reduce(0, pixel[first], triangle[first], "amax")
    return which.view(size, size), nearest.view(size, size)


@cache
def _mesh(person: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = load_file(MESH)
    vertices, triangles = kept["vertices"][person].float(), kept["triangles"].long()
    a, b, c = vertices[triangles].unbind(1)
    across = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices).index_add(0, triangles.flatten(), across.repeat_interleave(3, 0))
    return vertices, triangles, kept["materials"].long(), F.normalize(normals, dim=-1)
