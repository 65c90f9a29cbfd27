"""Co-DETR (#67): heads that give each true box many positives, hung on a DETR's encoder while it trains and then taken away.

Zong et al., arXiv:2211.12860. Two dense heads read the encoder's tokens, each with its own rule which of its anchors (square
boxes, one or more a cell) are positive for which true box:

    ATSS      the 9 anchors of each level that are nearest to the box's middle are candidates; of these the ones with an IoU of at
              least mean + deviation of the candidates' IoUs and with their middle inside the box. Levels: strides 4 and 8
    overlap   IoU of .5 or more with the box, and for each box the anchor that overlaps it most. Three sizes, stride 4

The positives go into the decoder as further queries, each head's apart, in a pass of their own. With their boxes b and
features f,

    (place, q) = split(LN(W1 PE(b)));    q <- q + LN(W2 f);    place <- place + e

and each such query is to find, in every layer, the true box its anchor stands for, without a matching (L_aux). An image has at
most `most` (30) of these, and at least 9: the rest are negatives, to find nothing. With l over the L decoder layers and
i over the heads,

    L = sum_l [L_dec,l + lambda1 sum_i L_aux,i,l] + L lambda2 sum_i L_enc,i                lambda1 = 1, lambda2 = 2

The factor L stands there because the paper has L_enc inside the sum over layers, on which it does not depend. L_enc is focal (1)
+ GIoU (2) + centreness (1, ATSS alone) over the number of positives. What is left after training is a plain `SmallDETR`.

Where we depart: the second head assigns by overlap alone instead of Faster R-CNN's two steps; PE is of b, not of logit b; a
query's place is also that of its box, as for the detector's own queries; e is a vector (the released code has one number).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import Progress, TrainSettings, drawn_rows, fit
from manyheads.vision.core.boxes import box_iou, giou
from manyheads.vision.finding.detr import (
    STRIDE,
    SmallDETR,
    box_places,
    focal,
    matched_loss,
    set_loss,
    shares,
)
from manyheads.vision.finding.scenes import BoxScenes

HEADS = ("ATSS", "overlap")
SIZES = {"ATSS": ((12.0,), (20.0,)), "overlap": ((10.0, 14.0, 20.0),)}  # pixels, a tuple a level
LAMBDA1, LAMBDA2, SLOTS = 1.0, 2.0, 9
KIND = "co-detr"
TRAINING = TrainSettings(steps=1500, rows=8, rate=1e-3, warmup=50, weight_decay=1e-2, clip=1.0, precision="fp32")


class CoDETR(nn.Module):
    """A detector with auxiliary heads for its training. `heads=()` trains the detector alone, by the same numbers exactly."""

    def __init__(self, detector: SmallDETR, heads: Sequence[str] = HEADS, *, most: int = 30, seed: int = 0) -> None:
        super().__init__()
        unknown = [head for head in heads if head not in HEADS]
        if unknown or len(set(heads)) < len(heads):
            raise InputError(f"heads are {list(heads)}; give each of {', '.join(HEADS)} at most once.")
        if most < SLOTS:
            raise InputError(f"most is {most}; give at least {SLOTS}.")
        self.detector, self.most, self.layers = detector, most, len(detector.decoder)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.heads = nn.ModuleDict({name: _Dense(name, **detector.settings) for name in heads})

    def loss(self, scenes: BoxScenes) -> Float[Tensor, ""]:
        """L above."""
        tokens = self.detector.encode(scenes.pixels)
        total = matched_loss(self.detector.answers(tokens), scenes)
        for head in self.heads.values():
            assert isinstance(head, _Dense)
            aux, enc = head(self.detector, tokens, scenes, self.most)
            total = total + LAMBDA1 * aux + self.layers * LAMBDA2 * enc
        return total


class _Dense(nn.Module):
    """One head: its predictions at every anchor, and what makes decoder queries of its positives."""

    def __init__(self, name: str, classes: int, width: int, **_: Any) -> None:
        super().__init__()
        self.name, self.sizes = name, SIZES[name]
        each = len(self.sizes[0])
        self.down = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1) for _ in self.sizes[1:])
        self.tower = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(4, width), nn.GELU())
        self.say = nn.Conv2d(width, each * (classes + 5), 1)
        self.classes = classes
        assert self.say.bias is not None
        self.say.bias.data.view(each, classes + 5)[:, :classes] = -4.6
        self.first, self.second = nn.Linear(2 * width, 2 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(2 * width), nn.LayerNorm(width)
        self.mark = nn.Parameter(torch.zeros(width))

    def forward(self, detector: SmallDETR, tokens: Tensor, scenes: BoxScenes, most: int) -> tuple[Tensor, Tensor]:
        """L_aux, over the decoder's layers, and L_enc."""
        side = scenes.pixels.shape[-1]
        cells = side // STRIDE
        maps = [tokens.mT.unflatten(2, (cells, cells))]
        for down in self.down:
            maps.append(down(maps[-1]))
        each = len(self.sizes[0])
        said = [self.say(self.tower(x)).unflatten(1, (each, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for x in maps]
        logits, moves, centre = torch.cat(said, 1).split([self.classes, 4, 1], -1)
        features = torch.cat([x.flatten(2).mT.repeat_interleave(each, 1) for x in maps], 1)
        anchors, level = anchors_of(self.sizes, side)
        owners = torch.stack(
            [assign(self.name, anchors, level, scenes.boxes[scenes.scene == i]) for i in range(len(tokens))]
        )
        starts = torch.tensor([int((scenes.scene < i).sum()) for i in range(len(tokens))])
        order, last = scenes.scene.argsort(stable=True), len(scenes.scene) - 1
        thing = order[(owners + starts[:, None]).clamp(0, last)] if last >= 0 else torch.zeros_like(owners)
        enc = self._dense_loss(logits, moves, centre[..., 0], owners, thing, anchors, scenes)
        return self._query_loss(detector, tokens, features, owners, thing, anchors / side, scenes, most), enc

    def _dense_loss(
        self,
        logits: Tensor,
        moves: Tensor,
        centre: Tensor,
        owners: Tensor,
        thing: Tensor,
        anchors: Tensor,
        scenes: BoxScenes,
    ) -> Tensor:
        picture, anchor = (owners >= 0).nonzero().unbind(-1)
        mine = thing[picture, anchor]
        target = torch.zeros_like(logits)
        target[picture, anchor, scenes.classes[mine]] = 1
        base, move, truth = anchors[anchor], moves[picture, anchor], scenes.boxes[mine]
        sides = base[:, 2:] - base[:, :2]
        middle = (base[:, :2] + base[:, 2:]) / 2 + move[:, :2] * sides
        half = sides * move[:, 2:].clamp(max=4).exp() / 2
        total = focal(logits, target).sum() + 2 * (1 - giou(torch.cat([middle - half, middle + half], -1), truth)).sum()
        if self.name == "ATSS":
            at = (base[:, :2] + base[:, 2:]) / 2
            near, far = at - truth[:, :2], truth[:, 2:] - at
            share = (torch.minimum(near, far) / torch.maximum(near, far).clamp(min=1e-6)).clamp(0, 1).prod(-1).sqrt()
            total = total + nn.functional.binary_cross_entropy_with_logits(
                centre[picture, anchor], share, reduction="sum"
            )
        return total / max(len(picture), 1)

    def _query_loss(
        self,
        detector: SmallDETR,
        tokens: Tensor,
        features: Tensor,
        owners: Tensor,
        thing: Tensor,
        anchors: Tensor,
        scenes: BoxScenes,
        most: int,
    ) -> Tensor:
        chosen = [chosen_slots(one, most) for one in owners]
        slots = max(len(one) for one in chosen)
        at = torch.stack([nn.functional.pad(one, (0, slots - len(one))) for one in chosen])
        none = torch.stack([torch.arange(slots) >= len(one) for one in chosen])
        corners = anchors[at].clamp(0, 1)
        boxes = torch.cat([(corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]], -1)
        place, q = self.norm1(self.first(box_places(boxes, tokens.shape[-1]))).chunk(2, -1)
        f = features.gather(1, at[..., None].expand(-1, -1, features.shape[-1]))
        q = q + self.norm2(self.second(f))
        picture, query = ((owners.gather(1, at) >= 0) & ~none).nonzero().unbind(-1)
        mine = thing[picture, at[picture, query]]
        truth = shares(scenes)[mine]
        answers = detector.decode(tokens, boxes, q, place + self.mark, none)
        parts = [
            set_loss(logits, found, picture, query, truth, scenes.classes[mine], ~none) for logits, found in answers
        ]
        return torch.stack(parts).sum()


def anchors_of(sizes: Sequence[Sequence[float]], side: int) -> tuple[Float[Tensor, "A 4"], Int[Tensor, "A"]]:
    """Square anchors in pixels, level by level (strides 4, 8, ...), row by row, size by size; and the level of each."""
    parts, levels = [], []
    for level, mine in enumerate(sizes):
        stride = STRIDE * 2**level
        at = (torch.arange(side // stride) + 0.5) * stride
        down, across = torch.meshgrid(at, at, indexing="ij")
        middle = torch.stack([across, down], -1).flatten(0, 1)[:, None]
        half = torch.tensor(list(mine))[None, :, None] / 2
        parts.append(torch.cat([middle - half, middle + half], -1).flatten(0, 1))
        levels.append(torch.full((len(parts[-1]),), level))
    return torch.cat(parts), torch.cat(levels)


def assign(
    rule: str, anchors: Float[Tensor, "A 4"], level: Int[Tensor, "A"], boxes: Float[Tensor, "M 4"]
) -> Int[Tensor, "A"]:
    """Which true box each anchor is positive for (formulas above), -1 for none; of several, the one it overlaps most."""
    if not len(boxes):
        return torch.full((len(anchors),), -1)
    overlap = box_iou(anchors, boxes)
    if rule == "overlap":
        positive = overlap >= 0.5
        best = overlap.argmax(0)
        positive[best, torch.arange(len(boxes))] = True
    else:
        middle, goal = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
        apart = torch.cdist(middle, goal)
        near = []
        for one in level.unique():
            mine = (level == one).nonzero()[:, 0]
            near.append(mine[apart[mine].topk(min(9, len(mine)), 0, largest=False).indices])
        candidates = torch.cat(near)
        ious = overlap.gather(0, candidates)
        least = ious.mean(0) + ious.std(0)
        inside = ((middle[:, None] > boxes[None, :, :2]) & (middle[:, None] < boxes[None, :, 2:])).all(-1)
        good = (ious >= least) & inside.gather(0, candidates)
        positive = torch.zeros_like(inside).scatter(0, candidates, good)
    value, owner = overlap.masked_fill(~positive, -1).max(1)
    return torch.where(value >= 0, owner, -1)


def chosen_slots(owners: Int[Tensor, "A"], most: int) -> Int[Tensor, "K"]:
    """Anchors that become queries: at most `most` positives, by chance; below 9, with negatives by chance up to 9."""
    yes, no = (owners >= 0).nonzero()[:, 0], (owners < 0).nonzero()[:, 0]
    yes = yes[torch.randperm(len(yes))[:most]]
    return torch.cat([yes, no[torch.randperm(len(no))[: max(SLOTS - len(yes), 0)]]])


def train_co_detr(
    scenes: BoxScenes,
    settings: TrainSettings = TRAINING,
    *,
    heads: Sequence[str] = HEADS,
    model: SmallDETR | None = None,
    look: Callable[[int, SmallDETR], object] | None = None,
    every: int = 100,
    bar: Bar = Bar(),
) -> SmallDETR:
    """Train a detector on scenes of your own, with the auxiliary heads; give back the detector alone.

    The detector's first weights and the order of the pictures depend on `settings.seed` alone, and not on `heads`.
    `look(step, detector)` is called after every `every` steps.
    """
    if not len(scenes.boxes):
        raise InputError("the scenes have no boxes; give pictures with at least one thing.")
    detector = model or SmallDETR(len(scenes.names), seed=settings.seed)
    if detector.settings["classes"] != len(scenes.names):
        raise InputError(
            f"the model knows {detector.settings['classes']} classes, the scenes have {len(scenes.names)}."
        )
    wrapped = CoDETR(detector, heads, seed=settings.seed)

    def batch(number: int) -> BoxScenes:
        return scenes.take(drawn_rows(len(scenes.pixels), settings.rows, number, settings.seed))

    def after(progress: Progress, _: torch.optim.Optimizer) -> None:
        if look is not None and progress.step % every == 0:
            look(progress.step, detector)
            wrapped.train()

    fit(wrapped, batch, settings, loss=lambda _, given: wrapped.loss(given), after_step=after, device="cpu", bar=bar)
    return detector.eval()


def save_detector(
    model: SmallDETR, names: Sequence[str], folder: str | Path, about: dict[str, object], *, force: bool = False
) -> Path:
    """Write the detector, without auxiliary parts, and the names of its classes into a folder. `about` is any JSON besides."""
    card = Card("Co-DETR", "2211.12860", settings=model.settings, kind=KIND, about=about | {"names": list(names)})
    return save(folder, card, model, force=force)


def load_detector(folder: str | Path) -> tuple[SmallDETR, Card]:
    """A detector that `save_detector` wrote, and its card."""
    card, tensors = load(folder, KIND, "detector of boxes")
    try:
        model = SmallDETR(**card.settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"the card in {folder} has no settings of a detector ({error}).") from None
    fill(model, tensors, folder)
    return model.eval(), card
