"""Boxes in pictures, (left, top, right, bottom): how far they overlap, and which of several on one thing to keep.

    IoU = |a and b| / |a or b|
    GIoU = IoU - (|hull| - |a or b|) / |hull|                        hull: the smallest box around both
    CIoU = IoU - d^2 / diagonal(hull)^2 - alpha v                    d: distance of the middles
    v = 4/pi^2 (atan(w_b/h_b) - atan(w_a/h_a))^2,  alpha = v / (1 - IoU + v)

Rezatofighi et al., arXiv:1902.09630; Zheng et al., arXiv:1911.08287. alpha has no gradient, as in the paper.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

TINY = 1e-9


def box_iou(a: Float[Tensor, "N 4"], b: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """IoU of each with each."""
    inner, outer = _areas(a[:, None], b[None])
    return inner / outer.clamp(min=TINY)


def giou(a: Float[Tensor, "... 4"], b: Float[Tensor, "... 4"]) -> Float[Tensor, "..."]:
    """GIoU of pairs, -1 to 1."""
    inner, outer = _areas(a, b)
    hull = _hull(a, b).prod(-1).clamp(min=TINY)
    return inner / outer.clamp(min=TINY) - (hull - outer) / hull


def ciou(a: Float[Tensor, "... 4"], b: Float[Tensor, "... 4"]) -> Float[Tensor, "..."]:
    """CIoU of pairs."""
    inner, outer = _areas(a, b)
    iou = inner / outer.clamp(min=TINY)
    apart = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) ** 2).sum(-1) / 4
    (wa, ha), (wb, hb) = (a[..., 2:] - a[..., :2]).unbind(-1), (b[..., 2:] - b[..., :2]).unbind(-1)
    v = 4 / math.pi**2 * (torch.atan(wb / hb.clamp(min=TINY)) - torch.atan(wa / ha.clamp(min=TINY))) ** 2
    alpha = (v / (1 - iou + v).clamp(min=TINY)).detach()
    return iou - apart / (_hull(a, b) ** 2).sum(-1).clamp(min=TINY) - alpha * v


def nms(boxes: Float[Tensor, "N 4"], scores: Float[Tensor, "N"], most: float = 0.5) -> Int[Tensor, "K"]:
    """Which boxes stay, best first: none overlaps a better one that stays by more than `most` of IoU."""
    order = scores.argsort(descending=True, stable=True)
    overlap = box_iou(boxes[order], boxes[order]) > most
    gone = torch.zeros(len(order), dtype=torch.bool, device=boxes.device)
    kept = []
    for i in range(len(order)):
        if not gone[i]:
            kept.append(i)
            gone |= overlap[i]
    return order[kept]


def matched_boxes(
    found: Float[Tensor, "N 4"], scores: Float[Tensor, "N"], truth: Float[Tensor, "M 4"], least: float = 0.5
) -> list[tuple[int, int]]:
    """Pairs (found, true) with an IoU above `least`: from the best score on, each takes the box left that it overlaps most.

    So a true box is matched once; what else was found on it counts as wrong.
    """
    overlap = box_iou(found, truth)
    pairs = []
    for i in scores.argsort(descending=True, stable=True).tolist():
        if len(truth) and float(overlap[i].max()) > least:
            j = int(overlap[i].argmax())
            pairs.append((i, j))
            overlap[:, j] = -1
    return pairs


def _areas(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Of the intersection and of the union."""
    sides = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inner = sides.clamp(min=0).prod(-1)
    return inner, (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner


def _hull(a: Tensor, b: Tensor) -> Tensor:
    """Width and height of the smallest box around both."""
    return torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
