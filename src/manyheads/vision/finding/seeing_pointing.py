"""What somebody points at, drawn: both lines, the best box of each network, and which of them the ensemble believes."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from PIL import ImageDraw

from manyheads.vision.core.pictures import as_picture
from manyheads.vision.finding.pointing import Agreement, PointingEnsemble
from manyheads.vision.finding.pointing_scenes import Pointed

LINE_COLOURS = ((80, 200, 255), (255, 120, 220))  # of the head's line, of the wrist's


def draw_pointing(
    ensemble: PointingEnsemble, pointed: Pointed, agree: Agreement, *, larger: int = 3
) -> list[Float[np.ndarray, "H W 3"]]:
    """Every picture, `larger` times as large: the head's line and box in blue, the wrist's in pink, and white around the one
    that is believed."""
    found = [one.best(pointed).boxes for one in (ensemble.head, ensemble.wrist)]
    which, _ = ensemble.choose(pointed, agree)
    drawn = []
    for i, pixels in enumerate(pointed.pixels):
        image = as_picture(pixels.permute(1, 2, 0).double().numpy().repeat(larger, 0).repeat(larger, 1))
        pen = ImageDraw.Draw(image)
        *origins, tip = (larger * pointed.points[i]).tolist()
        for line, (origin, colour) in enumerate(zip(origins, LINE_COLOURS, strict=True)):
            # Far enough to leave the picture; Pillow cuts it.
            reach = [t + 100 * (t - o) for t, o in zip(tip, origin, strict=True)]
            pen.line((*tip, *reach), fill=colour)
            box = (larger * found[line][i]).round().tolist()
            left, top, right, bottom = box[0], box[1], max(box[2] - 1, box[0]), max(box[3] - 1, box[1])
            if line == int(which[i]):
                pen.rectangle((left - 2, top - 2, right + 2, bottom + 2), outline=(255, 255, 255), width=2)
            pen.rectangle((left, top, right, bottom), outline=colour, width=2)
        drawn.append(np.asarray(image, dtype=np.float64) / 255)
    return drawn
