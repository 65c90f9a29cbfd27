"""Pictures of somebody who points at one of six things, and a stand-in for CLIP that knows colours but often errs.

A head, a wrist and a fingertip are drawn; the line from the head through the fingertip and the one from the wrist through it
part by 20 to 45 degrees. The thing that is meant stands on the first in 60 % of the pictures, on the second in the others, about
12 to 40 pixels behind the fingertip. In half of the pictures another thing of the same form stands on the other line: there the
pointing alone does not say which, and only the colour in the instruction ("the red square") does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.vision.finding.phrased_scenes import COLOURS, FORMS, photograph_grounds
from manyheads.vision.finding.phrases import words_of
from manyheads.vision.finding.scenes import BoxScenes

ON_HEAD_LINE, CONFLICT, THINGS = 0.6, 0.5, 6
SKIN = (0.95, 0.75, 0.6)


@dataclass(frozen=True)
class Pointed:
    """Pictures in [0, 1], an instruction each, where head, wrist and fingertip are (x, y in pixels), and the box that is meant.

    `InputError` for shapes that do not fit, a box outside its picture, or a fingertip that lies on the head or the wrist.
    """

    pixels: Float[Tensor, "N 3 S S"]
    phrases: tuple[str, ...]
    points: Float[Tensor, "N 3 2"]
    boxes: Float[Tensor, "N 4"]

    def __post_init__(self) -> None:
        many = len(self.pixels)
        if len(self.phrases) != many or self.points.shape != (many, 3, 2) or self.boxes.shape != (many, 4):
            raise InputError(
                f"there are {many} pictures, {len(self.phrases)} phrases, points {list(self.points.shape)} and boxes "
                f"{list(self.boxes.shape)}; give N of each, [N, 3, 2] and [N, 4]."
            )
        order = torch.arange(many)
        BoxScenes(self.pixels, order, self.boxes, torch.zeros_like(order), ("thing",))  # refuses what is wrong
        for phrase in self.phrases:
            words_of(phrase)
        if bool(((self.points[:, :2] - self.points[:, 2:]).norm(dim=-1) < 1).any()):
            raise InputError("a fingertip lies within a pixel of the head or the wrist; leave that picture away.")


def pointed_shapes(n: int, seed: int, part: str = "train", side: int = 64) -> Pointed:
    """Six coloured shapes and somebody who points, on darkened photographs ("train" and "test" have other parts of them)."""
    if n < 1 or part not in ("train", "test"):
        raise InputError(f"n is {n} and part is {part!r}; give at least 1, and train or test.")
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise InputError("the photographs need scikit-learn; install it: pip install scikit-learn.") from None
    photographs = [torch.tensor(one).permute(2, 0, 1) / 255 for one in load_sample_images().images]
    grounds = photograph_grounds(photographs, n, seed, side, part)
    g = torch.Generator().manual_seed(seed)
    phrases, points, boxes = [], [], []
    for ground in grounds:
        # Drawn once, so that pictures in which things find no place do not change the shares.
        chances = torch.rand(2, generator=g)
        meant, conflict = int(chances[0] >= ON_HEAD_LINE), bool(chances[1] < CONFLICT)
        while (placed := _placed(side, meant, conflict, g)) is None:
            pass
        three, things = placed
        for box, colour, form in things:
            _paint(ground, box, colour, form)
        _person(ground, three)
        points.append(three)
        boxes.append(things[0][0])
        phrases.append(f"the {things[0][1]} {things[0][2]}")
    return Pointed(grounds, tuple(phrases), torch.stack(points), torch.stack(boxes))


class ColourJudge:
    """Stands for CLIP: 1 where the colour it sees in a crop is the one the phrase says, else 0.

    It looks at the middle of the crop, and with a chance of 1 - `accuracy` sees another colour. A real one is any function of
    a crop `[3, h, w]` and a phrase that gives a number, higher where they agree.
    """

    def __init__(self, accuracy: float = 0.75, seed: int = 0) -> None:
        self.accuracy, self._generator = accuracy, torch.Generator().manual_seed(seed)

    def __call__(self, crop: Float[Tensor, "3 H W"], phrase: str) -> float:
        """How well crop and phrase agree."""
        h, w = crop.shape[1:]
        middle = crop[:, h // 3 : h - h // 3, w // 3 : w - w // 3].mean((1, 2))
        seen = int((torch.tensor(list(COLOURS.values())) - middle).norm(dim=1).argmin())
        if float(torch.rand((), generator=self._generator)) > self.accuracy:
            seen = (seen + 1 + int(torch.randint(len(COLOURS) - 1, (), generator=self._generator))) % len(COLOURS)
        return float(list(COLOURS)[seen] in words_of(phrase))


def _placed(
    side: int, meant: int, conflict: bool, g: torch.Generator
) -> tuple[Tensor, list[tuple[Tensor, str, str]]] | None:
    """Head, wrist and fingertip, and the things, that on line `meant` first; None where they found no place."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=g))

    def draw(names: tuple[str, ...]) -> str:
        return names[int(torch.randint(len(names), (), generator=g))]

    tip = torch.tensor([uniform(16, side - 16), uniform(16, side - 16)])
    angle = uniform(0, 2 * math.pi)
    turned = angle + math.radians(uniform(20, 45)) * (1 if uniform(0, 1) < 0.5 else -1)
    lines = [torch.tensor([math.cos(one), math.sin(one)]) for one in (angle, turned)]  # of the head, of the wrist
    three = torch.stack([tip - 16 * lines[0], tip - 8 * lines[1], tip])
    if float(three.min()) < 4 or float(three.max()) > side - 4:
        return None
    low, high = three.min(0).values - 4, three.max(0).values + 4
    taken = [torch.cat([low, high])]
    form, kept = draw(FORMS), list[tuple[Tensor, str, str]]()
    for k in range(THINGS):
        on = {0: meant, 1: 1 - meant if conflict else None}.get(k)
        for _try in range(20):
            size = 10 + int(torch.randint(7, (), generator=g))
            if on is None:
                middle = torch.tensor([uniform(size / 2, side - size / 2), uniform(size / 2, side - size / 2)])
            else:
                across = torch.stack([-lines[on][1], lines[on][0]])
                middle = tip + uniform(12, 40) * lines[on] + uniform(-2, 2) * across
            corner = (middle - size / 2).round()
            box = torch.cat([corner, corner + size])
            if float(box.min()) >= 0 and float(box.max()) <= side and all(_apart(box, one) for one in taken):
                break
        else:
            return None
        taken.append(box)
        if on is not None:
            # The other thing on a line has the form that is asked for, and another colour.
            others = tuple(name for name in COLOURS if not kept or name != kept[0][1])
            kept.append((box, draw(others), form))
        else:
            kept.append((box, draw(tuple(COLOURS)), draw(FORMS)))
    return three, kept


def _apart(a: Tensor, b: Tensor) -> bool:
    return bool((torch.minimum(a[2:], b[2:]) <= torch.maximum(a[:2], b[:2])).any())


def _paint(ground: Tensor, box: Tensor, colour: str, form: str) -> None:
    left, top, right, bottom = (int(one) for one in box)
    at = (torch.arange(right - left) + 0.5) / (right - left)
    across, down = at[None, :] - 0.5, at[:, None]
    inside = {
        "square": torch.ones(len(at), len(at), dtype=torch.bool),
        "circle": across**2 + (down - 0.5) ** 2 <= 0.25,
        "triangle": across.abs() <= down / 2,
    }[form]
    ground[:, top:bottom, left:right][:, inside] = torch.tensor(COLOURS[colour])[:, None]


def _person(ground: Tensor, three: Tensor) -> None:
    """A disc for the head, a smaller one for the wrist, a line from there to the fingertip."""
    side = ground.shape[-1]
    at = torch.arange(side) + 0.5
    here = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
    head, wrist, tip = three
    arm = tip - wrist
    share = ((here - wrist) @ arm / arm.square().sum()).clamp(0, 1)
    near = (here - wrist - share[..., None] * arm).norm(dim=-1) < 1.2
    body = near | ((here - head).norm(dim=-1) < 3.5) | ((here - wrist).norm(dim=-1) < 2)
    ground[:, body] = torch.tensor(SKIN)[:, None]
