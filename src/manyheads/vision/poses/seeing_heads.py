"""Heads in pictures of users: `manyheads vision predict head-pose photo.jpg --weights FOLDER --out DIR` draws boxes and axes.

The folder is one that `save_direct_mhp` wrote. None comes with the package: what recipes/head_pose.py learns from renders in two
minutes takes much in a photograph for a head (docs/methods/direct-mhp.md). A picture is looked at in several sizes, since the
detector finds heads of about 20 to 80 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import ImageDraw
from torch import Tensor

from manyheads.errors import InputError
from manyheads.vision.core.boxes import nms
from manyheads.vision.core.pictures import as_picture, letterbox
from manyheads.vision.core.predicting import Predictor, Sight, predicts
from manyheads.vision.core.rotations import rotation_of_euler
from manyheads.vision.poses.direct_mhp import DirectMHP, Heads, load_direct_mhp

SIZES = (128, 192, 256, 384, 512)  # of the square that a picture is put into


def heads_in(model: DirectMHP, picture: Float[np.ndarray, "H W 3"], least: float) -> Heads:
    """The heads of a picture of any size, best first, with boxes in its own pixels."""
    found: list[Heads] = []
    for size in SIZES:
        if size > 1.5 * max(picture.shape[:2]) and found:
            break  # larger than it is, a picture shows nothing more
        square = letterbox(picture, size)
        heads = model.detect(square.pixels[None], least=least)[0]
        corners = square.back(heads.boxes.view(-1, 2, 2).numpy())
        found.append(Heads(torch.from_numpy(corners).float().view(-1, 4), heads.scores, heads.angles))
    boxes, scores = torch.cat([one.boxes for one in found]), torch.cat([one.scores for one in found])
    kept = nms(boxes, scores, 0.3)
    return Heads(boxes[kept], scores[kept], torch.cat([one.angles for one in found])[kept])


def draw_heads(picture: Float[np.ndarray, "H W 3"], heads: Heads) -> Float[np.ndarray, "H W 3"]:
    """Each head's box, and from its middle the head's axes: to its side red, down green, and out of the nose blue."""
    image = as_picture(picture)
    pen, width = ImageDraw.Draw(image), max(1, round(max(picture.shape[:2]) / 250))
    for box, angles in zip(heads.boxes, heads.angles, strict=True):
        left, top, right, bottom = box.tolist()
        pen.rectangle((left, top, right, bottom), outline=(255, 220, 0), width=width)
        x, y, length = (left + right) / 2, (top + bottom) / 2, 0.6 * (bottom - top)
        axes: Tensor = rotation_of_euler(angles) * torch.tensor([1.0, -1.0, 1.0])  # the second one downwards
        for axis, colour in zip(axes.T.tolist(), ((230, 30, 30), (30, 200, 30), (40, 80, 255)), strict=True):
            pen.line((x, y, x + length * axis[0], y - length * axis[1]), fill=colour, width=2 * width)
    return np.asarray(image, dtype=np.float64) / 255


@predicts("head-pose")
def _load(folder: Path | None) -> Predictor:
    if folder is None:
        raise InputError(
            "no weights come with head-pose; train them (recipes/head_pose.py) and give their folder as --weights."
        )
    model, card = load_direct_mhp(folder)
    score = float(card.about.get("score", 0.5))

    def see(picture: Float[np.ndarray, "H W 3"]) -> Sight:
        heads = heads_in(model, picture, score)
        rows = [
            {
                "box": [round(one, 1) for one in box.tolist()],
                "score": round(float(sure), 3),
                **{name: round(float(a), 1) for name, a in zip(("pitch", "yaw", "roll"), angles, strict=True)},
            }
            for box, sure, angles in zip(heads.boxes, heads.scores, heads.angles, strict=True)
        ]
        notes = () if rows else ("No head was found.",)
        return Sight(rows, draw_heads(picture, heads), notes)

    return see
