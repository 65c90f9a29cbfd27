"""Pictures of several things with phrases for them: coloured shapes, or real written digits pasted on photographs.

A phrase says a thing by its name where only one thing has it ("the red square"); where two have it, by where it stands to a
third: "the red square left of the circle", "the seven above the three". Such a phrase is made only if it fits one thing alone:
of the things of that name one stands on the named side of the third, by at least 4 pixels between the middles, and all others
on the other side by as much. Things do not touch, so boxes and masks are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.boxes import box_iou
from manyheads.vision.finding.phrases import Phrased

COLOURS = {"red": (0.9, 0.2, 0.2), "green": (0.2, 0.8, 0.25), "blue": (0.25, 0.35, 0.95), "yellow": (0.9, 0.85, 0.2)}
FORMS = ("square", "circle", "triangle")
NUMERALS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, direction
MARGIN = 4.0  # pixels
EACH = 2  # phrases of each sort that a picture gives at most

Kind = tuple[str, ...]
"""What a thing may be called, the fullest name first: ("red square", "square")."""
Draw = Callable[[Kind, int, torch.Generator], tuple[Tensor, Tensor]]
"""Kind, side in pixels -> how much it covers `[side, side]` in [0, 1], its colour `[3]`."""


def phrased_shapes(n: int, seed: int, side: int = 64) -> Phrased:
    """Four to six squares, circles and triangles in four colours on a noisy ground; two of them have the same name."""
    kinds: list[Kind] = [(f"{colour} {form}", form) for colour in COLOURS for form in FORMS]
    return _phrased(n, seed, side, kinds, _shape, (10, 17), _noise(n, seed, side))


def phrased_digits(n: int, seed: int, part: str = "train", side: int = 64) -> Phrased:
    """Four to six written digits (scikit-learn's, 8 x 8, made larger) on two darkened photographs; two have the same name.

    The digits of "train" (two thirds) and of "test" have nothing in common, nor have the parts of the photographs.
    """
    if part not in ("train", "test"):
        raise InputError(f"part is {part!r}; give train or test.")
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError:
        raise InputError("the digits need scikit-learn; install it: pip install scikit-learn.") from None
    given = load_digits()
    images, targets = torch.as_tensor(given.images / 16, dtype=torch.float32), torch.as_tensor(given.target)
    mine = (torch.arange(len(images)) % 3 == 2) == (part == "test")
    images, targets = images[mine], targets[mine]
    of = {name: (targets == i).nonzero()[:, 0] for i, name in enumerate(NUMERALS)}

    def digit(kind: Kind, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = of[kind[0]]
        i = int(rows[int(torch.randint(len(rows), (), generator=generator))])
        big = F.interpolate(images[i][None, None], (size, size), mode="bilinear", align_corners=False)[0, 0]
        return big, 0.75 + 0.25 * torch.rand(3, generator=generator)

    photographs = [torch.tensor(one).permute(2, 0, 1) / 255 for one in load_sample_images().images]
    return _phrased(
        n,
        seed,
        side,
        [(name,) for name in NUMERALS],
        digit,
        (14, 21),
        photograph_grounds(photographs, n, seed, side, part),
    )


def unambiguous_phrases(
    kinds: Sequence[Kind], middles: Float[Tensor, "K 2"]
) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """Every phrase that means one thing alone, with the number of that thing: by its name, and by where it stands."""
    having = {name: [i for i, kind in enumerate(kinds) if name in kind] for name in {n for kind in kinds for n in kind}}
    named = [(f"the {name}", mine[0]) for name, mine in sorted(having.items()) if len(mine) == 1]
    placed = []
    for name, mine in sorted(having.items()):
        for other, theirs in sorted(having.items()):
            if len(mine) < 2 or len(theirs) != 1 or theirs[0] in mine:
                continue
            for words, (axis, direction) in SIDES.items():
                ahead = direction * (middles[mine, axis] - middles[theirs[0], axis])
                if int((ahead >= MARGIN).sum()) == 1 and int((ahead <= -MARGIN).sum()) == len(mine) - 1:
                    placed.append((f"the {name} {words} the {other}", mine[int(ahead.argmax())]))
    return named, placed


def _phrased(
    n: int,
    seed: int,
    side: int,
    kinds: Sequence[Kind],
    draw: Draw,
    sizes: tuple[int, int],
    grounds: Float[Tensor, "N 3 S S"],
) -> Phrased:
    g = torch.Generator().manual_seed(seed)

    def pick(many: int) -> int:
        return int(torch.randint(many, (), generator=g))

    scene, phrases, boxes, masks = [], [], [], []
    for i, ground in enumerate(grounds):
        here: list[Kind] = []
        mine: list[Tensor] = []
        shapes: list[Tensor] = []
        for k in range(4 + pick(3)):
            kind = here[0] if k == 1 else kinds[pick(len(kinds))]  # the second is called what the first is
            for _try in range(20):  # a thing that finds no free place is left out
                size = sizes[0] + pick(sizes[1] - sizes[0])
                left, top = pick(side - size + 1), pick(side - size + 1)
                cover, colour = draw(kind, size, g)
                rows, columns = (cover > 0.1).any(1).nonzero()[:, 0], (cover > 0.1).any(0).nonzero()[:, 0]
                box = torch.stack([left + columns[0], top + rows[0], left + columns[-1] + 1, top + rows[-1] + 1])
                if mine and float(box_iou(box[None].float(), torch.stack(mine)).max()) > 0:
                    continue
                at = ground[:, top : top + size, left : left + size]
                at.copy_(at * (1 - cover) + cover * colour[:, None, None])
                mask = torch.zeros(side, side, dtype=torch.bool)
                mask[top : top + size, left : left + size] = cover > 0.4
                here.append(kind)
                mine.append(box.float())
                shapes.append(mask)
                break
        corners = torch.stack(mine)
        for sort in unambiguous_phrases(here, (corners[:, :2] + corners[:, 2:]) / 2):
            for j in torch.randperm(len(sort), generator=g)[:EACH].tolist():
                phrase, thing = sort[j]
                scene.append(i)
                phrases.append(phrase)
                boxes.append(corners[thing])
                masks.append(shapes[thing])
    return Phrased(grounds, torch.tensor(scene), tuple(phrases), torch.stack(boxes), torch.stack(masks))


def _noise(n: int, seed: int, side: int) -> Float[Tensor, "N 3 S S"]:
    """Textures at three scales, so that no single frequency tells a thing from the ground."""
    if n < 1:
        raise InputError(f"n is {n}; give at least 1.")
    g = torch.Generator().manual_seed(seed + 500_000)
    parts = [
        F.interpolate(torch.rand(n, 3, k, k, generator=g), (side, side), mode="bilinear", align_corners=False)
        for k in (3, 9, side)
    ]
    return 0.3 * parts[0] + 0.15 * parts[1] + 0.1 * parts[2]


def photograph_grounds(
    photographs: Sequence[Tensor], n: int, seed: int, side: int, part: str
) -> Float[Tensor, "N 3 S S"]:
    """Squares of 64 to 200 pixels out of photographs, at half their light: "train" from the left 60 %, "test" from the rest."""
    if n < 1:
        raise InputError(f"n is {n}; give at least 1.")
    g = torch.Generator().manual_seed(seed + 500_000)
    found = []
    for _ in range(n):
        whole = photographs[int(torch.randint(len(photographs), (), generator=g))]
        cut = int(0.6 * whole.shape[2])
        whole = whole[:, :, :cut] if part == "train" else whole[:, :, cut:]
        size = int(torch.randint(64, 201, (), generator=g))
        top = int(torch.randint(whole.shape[1] - size + 1, (), generator=g))
        left = int(torch.randint(whole.shape[2] - size + 1, (), generator=g))
        crop = whole[None, :, top : top + size, left : left + size]
        found.append(F.interpolate(crop, (side, side), mode="bilinear", antialias=True, align_corners=False)[0])
    return 0.5 * torch.stack(found)


def _shape(kind: Kind, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    colour, form = kind[0].split()
    at = (torch.arange(size) + 0.5) / size
    across, down = at[None, :] - 0.5, at[:, None]
    inside = {
        "square": torch.ones(size, size),
        "circle": (across**2 + (down - 0.5) ** 2 <= 0.25).float(),
        "triangle": (across.abs() <= down / 2).float(),
    }[form]
    tint = torch.tensor(COLOURS[colour]) + 0.2 * (torch.rand(3, generator=generator) - 0.5)
    return inside, tint.clamp(0, 1)
