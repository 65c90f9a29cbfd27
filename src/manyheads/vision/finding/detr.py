"""A small DETR: a set of boxes from one pass, each true box matched with one query.

Carion et al., arXiv:2005.12872; queries that are boxes as in Liu et al., arXiv:2201.12329. Tokens of stride 4 go through an
encoder; in a decoder layer a query has content `q` and a box b, looks with `q + place(PE(b))`, and moves its box,

    b <- sig(logit b + delta(q))                               (middle x, middle y, width, height) in shares of the picture

A layer's loss, over the matching that costs least (2 focal + 5 L1 + 2 GIoU), with N true boxes in the batch:

    L_dec = (2 focal(all queries) + 5 sum |b - b*| + 2 sum (1 - GIoU)) / N,      summed over the layers

The focal loss has alpha = .25 and gamma = 2. Where we depart: a trunk of two convolutions, learned with the rest; layer norms
before the parts, none after the encoder, whose tokens the decoder norms for itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.boxes import giou
from manyheads.vision.core.precision import Boxes
from manyheads.vision.finding.scenes import BoxScenes

STRIDE = 4


class SmallDETR(nn.Module):
    """The trunk, `depth` encoder and decoder layers of `width`, and `queries` queries. Sides of pictures: multiples of 8."""

    def __init__(self, classes: int, *, width: int = 64, depth: int = 2, queries: int = 30, seed: int = 0) -> None:
        super().__init__()
        if classes < 1 or queries < 1 or depth < 1 or width % 8:
            raise InputError(
                f"got {classes} classes, {queries} queries, depth {depth}, width {width}; "
                "give at least 1 of each, and a width that 8 divides."
            )
        self.settings = {"classes": classes, "width": width, "depth": depth, "queries": queries}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.stem = nn.Sequential(
                nn.Conv2d(3, width // 2, 3, 2, 1),
                nn.GroupNorm(4, width // 2),
                nn.GELU(),
                nn.Conv2d(width // 2, width, 3, 2, 1),
                nn.GroupNorm(4, width),
                nn.GELU(),
                nn.Conv2d(width, width, 3, 1, 1),
            )
            self.encoder = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
            self.decoder = nn.ModuleList(_Decoding(width) for _ in range(depth))
            self.anchors = nn.Parameter(
                torch.cat([torch.rand(queries, 2).logit(0.05), torch.full((queries, 2), 0.25).logit()], -1)
            )
            self.content = nn.Parameter(torch.randn(queries, width) * 0.02)
            self.place = nn.Linear(2 * width, width)
            self.norm, self.out = nn.LayerNorm(width), nn.LayerNorm(width)
            self.kind, self.move = nn.Linear(width, classes), nn.Linear(width, 4)
            self.kind.bias.data.fill_(-math.log(99.0))  # few queries hold a thing
            self.move.weight.data.zero_()
            self.move.bias.data.zero_()

    def encode(self, pixels: Float[Tensor, "B 3 S S"]) -> Float[Tensor, "B T D"]:
        """The encoder's tokens, row by row."""
        found = self.stem(2 * pixels - 1)
        x: Tensor = found.flatten(2).mT + grid_places(found.shape[-1], found.shape[1])
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(
        self,
        tokens: Float[Tensor, "B T D"],
        boxes: Float[Tensor, "B Q 4"],
        content: Float[Tensor, "B Q D"],
        more: Float[Tensor, "B Q D"] | None = None,
        none: Bool[Tensor, "B Q"] | None = None,
    ) -> list[tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q 4"]]]:
        """Logits of classes and boxes after each layer. `more` is added to the queries' places; `none` marks slots to ignore."""
        memory = self.norm(tokens)
        keys = memory + grid_places(math.isqrt(tokens.shape[1]), tokens.shape[2])
        found, q = [], content
        for layer in self.decoder:
            place = self.place(box_places(boxes, q.shape[-1]))
            q = layer(q, place if more is None else place + more, memory, keys, none)
            normed = self.out(q)
            after = (boxes.logit(1e-4) + self.move(normed)).sigmoid()
            found.append((self.kind(normed), after))
            boxes = after.detach()  # each layer answers for its own move
        return found

    def forward(self, pixels: Float[Tensor, "B 3 S S"]) -> list[tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q 4"]]]:
        """Logits and boxes of the queries after each layer; the last is the answer."""
        return self.answers(self.encode(pixels))

    def answers(self, tokens: Float[Tensor, "B T D"]) -> list[tuple[Float[Tensor, "B Q C"], Float[Tensor, "B Q 4"]]]:
        """What its own queries find in encoded pictures."""
        n = len(tokens)
        return self.decode(tokens, self.anchors.sigmoid().expand(n, -1, -1), self.content.expand(n, -1, -1))

    def loss(self, scenes: BoxScenes) -> Float[Tensor, ""]:
        """L_dec, summed over the layers."""
        return matched_loss(self(scenes.pixels), scenes)

    @torch.no_grad()
    def detect(self, pixels: Float[Tensor, "B 3 S S"], *, least: float = 0.0) -> list[Boxes]:
        """The things of each picture in its pixels, best first: a class a query, with a score of at least `least`."""
        mode = self.training
        self.eval()
        found = []
        for part in pixels.split(64):
            logits, boxes = self(part)[-1]
            scores, classes = logits.sigmoid().max(-1)
            corners = to_corners(boxes) * pixels.shape[-1]
            for s, c, b in zip(scores, classes, corners, strict=True):
                order = s.argsort(descending=True, stable=True)
                order = order[s[order] >= least]
                found.append(Boxes(b[order], c[order], s[order]))
        self.train(mode)
        return found


class _Decoding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(width, 4, batch_first=True)
        self.look = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))

    def forward(self, q: Tensor, place: Tensor, memory: Tensor, keys: Tensor, none: Tensor | None) -> Tensor:
        x = self.norms[0](q)
        q = q + self.among(x + place, x + place, x, key_padding_mask=none, need_weights=False)[0]
        q = q + self.look(self.norms[1](q) + place, keys, memory, need_weights=False)[0]
        out: Tensor = q + self.think(self.norms[2](q))
        return out


def matched_loss(answers: Sequence[tuple[Tensor, Tensor]], scenes: BoxScenes) -> Float[Tensor, ""]:
    """L_dec of the module's docstring for each layer's own best matching, summed."""
    truth, size = shares(scenes), len(scenes.pixels)
    total = scenes.pixels.new_zeros(())
    for logits, boxes in answers:
        at = [
            matching(logits[i], boxes[i], truth[scenes.scene == i], scenes.classes[scenes.scene == i])
            for i in range(size)
        ]
        things = [(scenes.scene == i).nonzero()[:, 0] for i in range(size)]
        picture = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(at)])
        query = torch.cat([query for query, _ in at])
        thing = torch.cat([mine[j] for mine, (_, j) in zip(things, at, strict=True)])
        total = total + set_loss(logits, boxes, picture, query, truth[thing], scenes.classes[thing])
    return total


def set_loss(
    logits: Float[Tensor, "B Q C"],
    boxes: Float[Tensor, "B Q 4"],
    picture: Int[Tensor, "P"],
    query: Int[Tensor, "P"],
    truth: Float[Tensor, "P 4"],
    classes: Int[Tensor, "P"],
    counted: Bool[Tensor, "B Q"] | None = None,
) -> Float[Tensor, ""]:
    """L_dec for a given assignment: (picture, query) is to find `truth`, of its class; the other queries nothing."""
    target = torch.zeros_like(logits)
    target[picture, query, classes] = 1
    each = focal(logits, target)
    kinds = (each if counted is None else each * counted[..., None]).sum()
    mine = boxes[picture, query]
    apart = (mine - truth).abs().sum() * 5 + 2 * (1 - giou(to_corners(mine), to_corners(truth))).sum()
    return (2 * kinds + apart) / max(len(truth), 1)


@torch.no_grad()
def matching(
    logits: Float[Tensor, "Q C"], boxes: Float[Tensor, "Q 4"], truth: Float[Tensor, "M 4"], classes: Int[Tensor, "M"]
) -> tuple[Int[Tensor, "P"], Int[Tensor, "P"]]:
    """(query, true box) pairs of the least total cost, P the smaller of Q and M."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError:
        raise InputError("matching boxes needs SciPy; install it: pip install scipy.") from None
    p = logits.sigmoid().clamp(1e-6, 1 - 1e-6)
    gain = 0.25 * (1 - p) ** 2 * -p.log() - 0.75 * p**2 * -(1 - p).log()
    overlap = giou(to_corners(boxes)[:, None], to_corners(truth)[None])
    cost = 2 * gain[:, classes] + 5 * torch.cdist(boxes, truth, p=1) - 2 * overlap
    rows, columns = linear_sum_assignment(cost.float().cpu().numpy())
    return torch.as_tensor(rows, device=boxes.device), torch.as_tensor(columns, device=boxes.device)


def focal(logits: Float[Tensor, "*N"], target: Float[Tensor, "*N"]) -> Float[Tensor, "*N"]:
    """alpha_t (1 - p_t)^2 times cross-entropy, each."""
    p = logits.sigmoid()
    right = p * target + (1 - p) * (1 - target)
    weight = 0.25 * target + 0.75 * (1 - target)
    return weight * (1 - right) ** 2 * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


def shares(scenes: BoxScenes) -> Float[Tensor, "M 4"]:
    """The scenes' boxes as (middle x, middle y, width, height) in shares of the picture."""
    b = scenes.boxes / scenes.pixels.shape[-1]
    return torch.cat([(b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]], -1)


def to_corners(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """(middle x, middle y, width, height) as (left, top, right, bottom)."""
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def box_places(boxes: Float[Tensor, "*N K"], width: int) -> Float[Tensor, "*N E"]:
    """PE(b): sines and cosines of K numbers, `width / 2` for each (E = K width / 2), wave lengths 1 to 1/16 and longer."""
    waves = 2 * math.pi * 2.0 ** torch.linspace(-1, 4, width // 4)
    angles = boxes[..., None] * waves
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


def grid_places(cells: int, width: int) -> Float[Tensor, "T D"]:
    """PE of the cells' middles, row by row: half of `width` for x, half for y."""
    at = (torch.arange(cells) + 0.5) / cells
    down, across = torch.meshgrid(at, at, indexing="ij")
    middles = torch.stack([across, down], -1).flatten(0, 1)
    return box_places(middles, width)
