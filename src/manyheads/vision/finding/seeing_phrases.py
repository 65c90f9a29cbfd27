"""What a phrase means in a picture of any size, with its box and mask drawn in: `look_for(model, picture, "the red square")`."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float
from PIL import ImageDraw
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.pictures import as_picture, letterbox
from manyheads.vision.core.predicting import Sight
from manyheads.vision.finding.grounding import CELL, WINDOW, Grounder


def look_for(model: Grounder, picture: Float[np.ndarray, "H W 3"], phrase: str, *, side: int = 64) -> Sight:
    """One row: the phrase, its box in the picture's pixels, the score, and the mask's share of the picture.

    The picture is put into a square of `side`, best the one that the model was trained on. Words it never read are remarked;
    `InputError` where it knows none of the phrase's.
    """
    if side < CELL * WINDOW or side % (CELL * WINDOW):
        raise InputError(f"side is {side}; give a multiple of {CELL * WINDOW}.")
    unknown = model.vocabulary.unknown(phrase)
    known = model.vocabulary.numbers([phrase]).shape[1] - len(unknown)
    if not known:
        raise InputError(f"the model was trained on none of the words of {phrase!r}; it knows {_some(model)}.")
    square = letterbox(picture, side)
    found = model.find(square.pixels[None], [phrase])
    height, width = picture.shape[:2]
    corners = square.back(found.boxes.view(2, 2).numpy()).clip(0, [width, height])
    mask = _mask_back(found.masks[0], square.shift, (height, width), square.scale)
    row = {
        "phrase": phrase,
        "box": [round(float(one), 1) for one in corners.flatten()],
        "score": round(float(found.scores[0]), 3),
        "mask": round(float(mask.float().mean()), 4),
    }
    notes = (f"It never read {', '.join(unknown)}.",) if unknown else ()
    return Sight([row], draw_found(picture, corners, mask), notes)


def draw_found(
    picture: Float[np.ndarray, "H W 3"], corners: Float[np.ndarray, "2 2"], mask: Bool[Tensor, "H W"]
) -> Float[np.ndarray, "H W 3"]:
    """The box in yellow, and all that is not in the mask darker."""
    shown = np.where(mask.numpy()[..., None], picture, 0.45 * picture)
    image = as_picture(shown)
    (left, top), (right, bottom) = corners
    width = max(1, round(max(picture.shape[:2]) / 100))
    # Pillow draws an outline onto the last pixel it is given, and a box ends before its last one
    last = (max(left, right - 1), max(top, bottom - 1))
    ImageDraw.Draw(image).rectangle((left, top, *last), outline=(255, 220, 0), width=width)
    return np.asarray(image, dtype=np.float64) / 255


def _mask_back(mask: Tensor, shift: tuple[float, float], size: tuple[int, int], scale: float) -> Bool[Tensor, "H W"]:
    """A square's mask as one of the picture that was put into it."""
    height, width = size
    left, top = round(shift[0]), round(shift[1])
    h, w = max(1, round(scale * height)), max(1, round(scale * width))
    inner = mask[top : top + h, left : left + w].float()[None, None]
    return F.interpolate(inner, size, mode="nearest")[0, 0] > 0.5


def _some(model: Grounder) -> str:
    words = model.vocabulary.words
    return ", ".join(words[:12]) + (" and others" if len(words) > 12 else "")
