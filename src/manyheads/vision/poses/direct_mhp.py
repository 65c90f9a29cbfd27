"""DirectMHP (#5): find all heads of a picture and the way each looks, over the full circle, in one pass of a detector.

Zhou et al., arXiv:2302.01110. The detector is YOLOv5's: in each cell of each level, three anchors (boxes of a set size) have nine
numbers: box `tx, ty, tw, th`, objectness, class, and three angles. With sig the logistic function and `grid` the cell's number

    xy = (2 sig(t_xy) - 0.5 + grid) * stride;   wh = (2 sig(t_wh))^2 * anchor
    pitch = 180 (sig - 0.5);   yaw = 360 (sig - 0.5);   roll = 180 (sig - 0.5)        degrees

An anchor is to find a head if no side differs from the head's by a factor of 4 or more; the head's cell and its two nearest
neighbours are positive. Over the levels, with nl their number and over their positives i

    L_box = sum mean_i(1 - CIoU);   L_obj = sum w_l BCE(objectness, CIoU of the positive, 0 elsewhere);   w = 4, 1
    L_ang = sum mean_{i: obj_i > tau} || sig(p_i) - p*_i ||_2;   p* in [0, 1]
    L = B (0.05 * 3/nl L_box + 0.7 * 3/nl (size/640)^2 L_obj + 0.1 * 3/nl L_ang);   tau = 0.4

`tau_on` says what tau is compared with: "logit" as in the released code (a probability of .599), or "probability" as it reads.
There is one class, so the class has no loss. Yaw ends at 180 degrees and begins again at -180 (paper and code): heads seen from
behind are measured apart. No flips and no rotations, which would need other angles.

Where we depart: a trunk of 0.3 million parameters with two levels (strides 8 and 16) instead of YOLOv5's, pictures of 128 pixels,
AdamW instead of SGD, several heads in a scene instead of mosaics; NMS keeps one box a head, and a true head is matched once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_number
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, drawn_rows, fit
from manyheads.vision.core.boxes import ciou, nms
from manyheads.vision.poses.scenes import HeadScenes

STRIDES = (8, 16)
ANCHORS = (((20.0, 22.0), (26.0, 29.0), (32.0, 36.0)), ((36.0, 40.0), (44.0, 48.0), (52.0, 56.0)))
LEVEL_WEIGHTS = (4.0, 1.0)
GAINS = {"box": 0.05, "objectness": 0.7, "angle": 0.1}
FULL = (180.0, 360.0, 180.0)  # degrees that pitch, yaw and roll span
KIND = "direct-mhp"
TRAINING = TrainSettings(
    steps=1500, rows=8, rate=2e-3, warmup=50, decay=0.6, betas=(0.9, 0.99), weight_decay=1e-3, clip=10.0
)


@dataclass(frozen=True)
class Heads:
    """The heads of one picture: boxes in its pixels, scores in [0, 1], and (pitch, yaw, roll) in degrees."""

    boxes: Float[Tensor, "N 4"]
    scores: Float[Tensor, "N"]
    angles: Float[Tensor, "N 3"]

    def above(self, score: float) -> Heads:
        """Those with at least this score."""
        keep = self.scores >= score
        return Heads(self.boxes[keep], self.scores[keep], self.angles[keep])


class DirectMHP(nn.Module):
    """The trunk, and one convolution of size 1 a level to `3 * 9` numbers a cell. It takes pictures whose sides 16 divides.

    `tau` and `tau_on` say from which objectness on a positive has an angle loss; `angle_gain=0` trains the detector alone.
    """

    def __init__(
        self,
        width: int = 16,
        *,
        tau: float = 0.4,
        tau_on: Literal["logit", "probability"] = "logit",
        angle_gain: float = GAINS["angle"],
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(tau_on, "tau_on", ("logit", "probability"))
        self.settings = {
            "width": width,
            "tau": tau,
            "tau_on": tau_on,
            "angle_gain": check_number(angle_gain, "angle_gain", 0),
        }
        self.tau, self.tau_on, self.angle_gain = tau, tau_on, angle_gain
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            w = width
            self.to8 = nn.Sequential(
                _conv(3, w, 2), _conv(w, 2 * w, 2), _Block(2 * w), _conv(2 * w, 4 * w, 2), _Block(4 * w)
            )
            self.to16 = nn.Sequential(_conv(4 * w, 6 * w, 2), _Block(6 * w), _Block(6 * w))
            self.around = nn.Conv2d(6 * w, 6 * w, 5, padding=2, groups=6 * w)  # a wide look at little cost
            self.mix8 = nn.Sequential(_conv(10 * w, 4 * w, 1, 1), _Block(4 * w))
            self.heads = nn.ModuleList([nn.Conv2d(4 * w, 27, 1), nn.Conv2d(6 * w, 27, 1)])
            for head in self.heads:
                assert isinstance(head, nn.Conv2d) and head.bias is not None
                head.bias.data.view(3, 9)[:, 4] = -4.0  # few cells hold a head

    def forward(self, pixels: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B 3 _ _ 9"]]:
        """The nine numbers of each anchor and cell, a tensor `[B, 3, H / stride, W / stride, 9]` a level."""
        fine = self.to8(2 * pixels - 1)
        coarse = self.to16(fine)
        coarse = coarse + self.around(coarse)
        fine = self.mix8(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], 1))
        found = (head(x) for head, x in zip(self.heads, (fine, coarse), strict=True))
        return [one.unflatten(1, (3, 9)).permute(0, 1, 3, 4, 2).float() for one in found]  # also under autocast

    def loss(
        self,
        pixels: Float[Tensor, "B 3 H W"],
        scene: Int[Tensor, "N"],
        boxes: Float[Tensor, "N 4"],
        angles: Float[Tensor, "N 3"],
    ) -> Float[Tensor, ""]:
        """L above, for the heads of a batch: the picture of each, its box, its angles in degrees."""
        total = pixels.new_zeros(())
        size = (pixels.shape[-1] / 640) ** 2
        wanted = angle_targets(angles)
        for level, raw in enumerate(self(pixels)):
            target = torch.zeros_like(raw[..., 4])
            head, anchor, row, column = positives(boxes, level, (raw.shape[2], raw.shape[3]))
            if len(head):
                at = raw[scene[head], anchor, row, column]
                overlap = ciou(_boxes_at(at[:, :4], level, anchor, row, column), boxes[head])
                target[scene[head], anchor, row, column] = overlap.detach().clamp(min=0)
                total = total + GAINS["box"] * (1 - overlap).mean()
                if self.angle_gain:
                    total = total + self.angle_gain * self.angle_loss(at[:, 4], at[:, 6:], wanted[head])
            objectness = F.binary_cross_entropy_with_logits(raw[..., 4], target)
            total = total + GAINS["objectness"] * size * LEVEL_WEIGHTS[level] * objectness
        return len(pixels) * 3 / len(STRIDES) * total

    def angle_loss(
        self, objectness: Float[Tensor, "P"], raw: Float[Tensor, "P 3"], wanted: Float[Tensor, "P 3"]
    ) -> Float[Tensor, ""]:
        """The mean length of `sig(raw) - wanted` over the positives that are sure enough; 0 where none is."""
        sure = (objectness if self.tau_on == "logit" else objectness.sigmoid()) > self.tau
        if not bool(sure.any()):
            return 0.0 * raw.sum()
        # a tiny constant keeps the gradient of a length finite at 0
        return ((raw[sure].sigmoid() - wanted[sure]).square().sum(-1) + 1e-12).sqrt().mean()

    @torch.no_grad()
    def detect(self, pixels: Float[Tensor, "B 3 H W"], *, least: float = 0.05, overlap: float = 0.45) -> list[Heads]:
        """The heads of each picture with a score of at least `least`, best first; of two boxes that overlap more, the better."""
        self.eval()
        parts = []
        for level, raw in enumerate(self(pixels)):
            b, a, h, w, _ = raw.shape
            anchor, row, column = (
                one.flatten()
                for one in torch.meshgrid(torch.arange(a), torch.arange(h), torch.arange(w), indexing="ij")
            )
            flat = raw.reshape(b, -1, 9)
            boxes = torch.stack([_boxes_at(one[:, :4], level, anchor, row, column) for one in flat])
            parts.append(torch.cat([boxes, flat[..., 4:5].sigmoid(), angles_of(flat[..., 6:])], -1))
        found = []
        for one in torch.cat(parts, 1):
            one = one[one[:, 4] >= least]
            one = one[nms(one[:, :4], one[:, 4], overlap)]
            found.append(Heads(one[:, :4], one[:, 4], one[:, 5:]))
        return found


def angle_targets(degrees: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """(pitch, yaw, roll) as numbers in [0, 1]: the inverse of how angles are read. What is beyond 90 degrees is cut to 1."""
    return (degrees / torch.tensor(FULL) + 0.5).clamp(0, 1)


def angles_of(raw: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
    """(pitch, yaw, roll) in degrees."""
    return (raw.sigmoid() - 0.5) * torch.tensor(FULL)


def positives(
    boxes: Float[Tensor, "N 4"], level: int, cells: tuple[int, int]
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "P"], Int[Tensor, "P"]]:
    """Which head, anchor, row and column are positive on a level: anchors of like size, the own cell and its nearest two."""
    sides, anchors = boxes[:, 2:] - boxes[:, :2], torch.tensor(ANCHORS[level])
    ratio = sides[:, None] / anchors[None]
    head, anchor = (torch.maximum(ratio, 1 / ratio).amax(-1) < 4).nonzero().unbind(-1)
    middle = (boxes[head, :2] + boxes[head, 2:]) / 2 / STRIDES[level]
    own = middle.floor()
    step = torch.where(
        middle - own < 0.5, -1.0, 1.0
    )  # to the neighbour that the middle is nearest to, a column and a row
    aside, down = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    cell = torch.cat([own, own + step * aside, own + step * down]).long()
    head, anchor = head.repeat(3), anchor.repeat(3)
    within = (cell >= 0).all(-1) & (cell[:, 0] < cells[1]) & (cell[:, 1] < cells[0])
    return head[within], anchor[within], cell[within, 1], cell[within, 0]


def yaw_error(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """The difference of two angles in degrees over the circle, `min(e, 360 - e)`: +179 and -179 differ by 2."""
    e = (a - b).abs() % 360
    return torch.minimum(e, 360 - e)


def train_direct_mhp(
    scenes: HeadScenes,
    settings: TrainSettings = TRAINING,
    *,
    model: DirectMHP | None = None,
    change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> DirectMHP:
    """Train a detector on scenes; `settings.seed` decides its first weights (where no `model` is given) and the batches.

    `change(pixels, generator)` may change the colours of a batch. With a `folder` an interrupted run goes on there.
    """
    if len(scenes.boxes) == 0:
        raise InputError("the scenes have no heads; give pictures with at least one.")
    detector = DirectMHP(seed=settings.seed) if model is None else model

    def batch(number: int) -> dict[str, Tensor]:
        rows = drawn_rows(len(scenes), settings.rows, number, settings.seed)
        place, head = (rows[:, None] == scenes.scene[None]).nonzero().unbind(-1)
        pixels = scenes.pixels[rows]
        if change is not None:
            pixels = change(pixels, torch.Generator().manual_seed(1_000_003 * settings.seed + number))
        return {"pixels": pixels, "scene": place, "boxes": scenes.boxes[head], "angles": scenes.angles[head]}

    fit(detector, batch, settings, folder, loss=lambda _, given: detector.loss(**given), device="cpu", bar=bar)
    return detector.eval()


def save_direct_mhp(model: DirectMHP, folder: str | Path, about: dict[str, object], *, force: bool = False) -> Path:
    """Write weights in half precision and a card into a folder. `about` is JSON: what it was trained on, how well it does."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    card = Card("DirectMHP", "2302.01110", settings=model.settings, kind=KIND, about=about)
    return save(folder, card, state, force=force)


def load_direct_mhp(folder: str | Path) -> tuple[DirectMHP, Card]:
    """A detector that `save_direct_mhp` wrote, and its card."""
    card, tensors = load(folder, KIND, "head-pose detector")
    try:
        model = DirectMHP(**card.settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"the card in {folder} has no settings of a head-pose detector ({error}).") from None
    fill(model, {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}, folder)
    return model.eval(), card


def _boxes_at(raw: Tensor, level: int, anchor: Tensor, row: Tensor, column: Tensor) -> Tensor:
    grid = torch.stack([column, row], -1)
    middle = (2 * raw[:, :2].sigmoid() - 0.5 + grid) * STRIDES[level]
    sides = (2 * raw[:, 2:4].sigmoid()) ** 2 * torch.tensor(ANCHORS[level])[anchor]
    return torch.cat([middle - sides / 2, middle + sides / 2], -1)


def _conv(inner: int, outer: int, stride: int = 1, kernel: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inner, outer, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outer), nn.SiLU(inplace=True)
    )


class _Block(nn.Module):
    """Two convolutions beside a short cut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_conv(width, width // 2, kernel=1), _conv(width // 2, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)
