"""Average precision: how good a detector's ranked list of boxes is.

Over all pictures, the boxes of a class are taken from the best score on. One is right if it is the first that takes a true
box of its picture with an IoU above `least`. With precision p and recall r after each, p made to fall only,

    AP = sum_k (r_k - r_{k-1}) max_{j >= k} p_j                          in [0, 1]: the area under the curve

and the mean over the classes that occur. COCO samples that curve at 101 recalls instead, and takes the true box that
overlaps most among those left, as here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.vision.core.boxes import matched_boxes


@dataclass(frozen=True)
class Boxes:
    """Boxes of one picture (left, top, right, bottom) with their classes, and their scores where they were found."""

    boxes: Float[Tensor, "N 4"]
    classes: Int[Tensor, "N"]
    scores: Float[Tensor, "S"]


def average_precision(found: Sequence[Boxes], truth: Sequence[Boxes], least: float = 0.5) -> float:
    """AP above, a list entry a picture; NaN where no picture holds anything. Scores of the truth are not read."""
    kinds = sorted({int(kind) for one in truth for kind in one.classes})
    areas = []
    for kind in kinds:
        scores, right, of = [torch.zeros(0)], [torch.zeros(0)], 0
        for mine, true in zip(found, truth, strict=True):
            some, real = mine.classes == kind, true.boxes[true.classes == kind]
            hit = torch.zeros(int(some.sum()))
            for i, _ in matched_boxes(mine.boxes[some], mine.scores[some], real, least):
                hit[i] = 1
            scores.append(mine.scores[some])
            right.append(hit)
            of += len(real)
        order = torch.cat(scores).argsort(descending=True, stable=True)
        hits = torch.cat(right)[order]
        precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)
        best = precision.flip(0).cummax(0).values.flip(0) if len(hits) else precision
        areas.append(float((best * hits).sum()) / of)  # recall rises by 1 / of at each hit
    return sum(areas) / len(areas) if areas else float("nan")
