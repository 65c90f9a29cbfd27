"""CAPE (#2): what somebody points at and speaks of, by two networks, one for each line the arm may mean, and a judge of both.

arXiv:2507.21888. People aim along the line from their eyes, or along their forearm. A network sees the picture, the instruction
and a heat map of one line, the ray from an origin s (head or wrist) through the fingertip f, in pixels:

    u = (f - s) / |f - s|     a = (p - f) u     e = |(p - f) - a u|     h(p) = exp(-e^2 / (2 sigma^2)) for a >= 0, else 0

Two whole networks are trained apart ("head", "wrist"). The picture's tokens, after an encoder in which they meet the words, are
the queries: each has a score, and a box whose middle is its own place, moved. From the mean over the queries come the direction
v that is pointed in and, for training alone, the thing's middle c (the object-centre head, two sigmoids). The query whose box and
score cost least is to answer (as in DETR, for one true box b*, with its middle c*):

    L = 5 |b - b*|_1 + 2 (1 - GIoU) + sum over queries BCE(score) + |v - u|_1 + 5 |c - c*|_1

With the best box of each network m, its score c_m, and k_m, how well CLIP finds that crop and instruction agree, the ensemble
takes the box of

    argmax_m  z(c_m) + w_m z(k_m)            w_m = w, and w / 2 for a box under 1 % of the picture

where z subtracts the mean and divides by the deviation, of each network's scores and of all k, on scenes kept for that.

Where we depart, and where the paper leaves it open (no code is released): the ray begins at the fingertip and does not fade;
the weights of L, sigma and w are ours, and so is what the last two heads read. Trunks of three convolutions learned from nothing
instead of ResNets, word vectors instead of a text network, an encoder without a decoder (queries of a decoder had learned little
in the same time). The heat map's tokens are added to the picture's of the same cell. CLIP is any function of a crop and a phrase.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, drawn_rows, fit
from manyheads.vision.core.boxes import giou
from manyheads.vision.finding.detr import grid_places, to_corners
from manyheads.vision.finding.phrases import MOST_WORDS, PADDING, Vocabulary
from manyheads.vision.finding.pointing_scenes import Pointed

LINES = ("head", "wrist")
KIND = "cape"
SMALL = 0.01  # of the picture: of a smaller box's crop CLIP sees little
TRAINING = TrainSettings(steps=300, rows=32, rate=2e-3, warmup=50, weight_decay=1e-2, clip=1.0, precision="fp32")

Agreement = Callable[[Tensor, str], float]
"""A crop `[3, h, w]` and a phrase -> a number, higher where they agree."""


@dataclass(frozen=True)
class Best:
    """The best box of each picture (left, top, right, bottom; pixels) and its score in (0, 1)."""

    boxes: Float[Tensor, "B 4"]
    scores: Float[Tensor, "B"]


def ray_heat(
    origin: Float[Tensor, "B 2"], tip: Float[Tensor, "B 2"], side: int, sigma: float
) -> Float[Tensor, "B S S"]:
    """The heat map h above, at the pixels' middles, of pictures of `side` x `side`; all in pixels."""
    length = (tip - origin).norm(dim=-1, keepdim=True)
    if not sigma > 0 or bool((length < 1e-6).any()):
        raise InputError("a ray needs a sigma above 0, and a fingertip apart from its origin.")
    u = (tip - origin) / length
    at = torch.arange(side, dtype=tip.dtype) + 0.5
    here = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1) - tip[:, None, None]
    along = (here * u[:, None, None]).sum(-1)
    apart = (here - along[..., None] * u[:, None, None]).square().sum(-1)
    return torch.where(along >= 0, (-apart / (2 * sigma**2)).exp(), 0.0)


class Pointer(nn.Module):
    """One network, for one line. `words` are those it can tell apart; `centre=False` leaves the object-centre head away."""

    def __init__(
        self,
        line: str,
        words: Sequence[str],
        *,
        centre: bool = True,
        width: int = 64,
        depth: int = 3,
        sigma: float = 4.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice(line, "line", LINES)
        if width % 16 or depth < 1 or not sigma > 0:
            raise InputError(
                f"got width {width}, depth {depth} and sigma {sigma}; give a width that 16 divides, at least 1 layer, and a "
                "sigma above 0."
            )
        self.vocabulary, self.line, self.sigma = Vocabulary(words), line, sigma
        self.settings = {
            "line": line,
            "words": list(words),
            "centre": centre,
            "width": width,
            "depth": depth,
            "sigma": sigma,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.see, self.feel = _stem(3, width, width), _stem(1, width // 2, width)
            self.word = nn.Embedding(len(self.vocabulary), width, padding_idx=PADDING)
            self.order = nn.Parameter(0.1 * torch.randn(MOST_WORDS, width))
            self.encoder = nn.ModuleList(
                nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(depth)
            )
            self.norm = nn.LayerNorm(width)
            self.box, self.score, self.vector = _say(width, 4), nn.Linear(width, 1), _say(width, 2)
            self.score.bias.data.fill_(-4.0)  # one of many queries answers
            # Drawn last: with and without it, all other first weights are the same.
            self.centre = _say(width, 2) if centre else None

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], heat: Float[Tensor, "B S S"], words: Int[Tensor, "B W"]
    ) -> dict[str, Tensor]:
        """Of each query "boxes" (middle x, middle y, width, height; shares) and "scores" (logits); "vectors"; "centres"."""
        grid = self.see(2 * pixels - 1) + self.feel(heat[:, None])
        cells = grid.shape[-1]
        seen = grid.flatten(2).mT + grid_places(cells, grid.shape[1])
        none = torch.cat([torch.zeros(seen.shape[:2], dtype=torch.bool), words == PADDING], 1)
        x = torch.cat([seen, self.word(words) + self.order[: words.shape[1]]], 1)
        for layer in self.encoder:
            x = layer(x, src_key_padding_mask=none)
        q = self.norm(x[:, : cells**2])
        at = (torch.arange(cells) + 0.5) / cells
        own = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1).flatten(0, 1)
        said = self.box(q)
        # A middle up to two cells away from its query's.
        boxes = torch.cat([own + 2 * said[..., :2].tanh() / cells, (said[..., 2:] - 1.5).sigmoid()], -1)
        mean = q.mean(1)
        found = {"boxes": boxes, "scores": self.score(q)[..., 0], "vectors": self.vector(mean)}
        return found if self.centre is None else found | {"centres": self.centre(mean).sigmoid()}

    def heat(self, points: Float[Tensor, "B 3 2"], side: int) -> Float[Tensor, "B S S"]:
        """The heat map of this network's line."""
        return ray_heat(points[:, LINES.index(self.line)], points[:, 2], side, self.sigma)

    def loss(
        self,
        pixels: Float[Tensor, "B 3 S S"],
        words: Int[Tensor, "B W"],
        points: Float[Tensor, "B 3 2"],
        boxes: Float[Tensor, "B 4"],
    ) -> Float[Tensor, ""]:
        """L above; points and boxes in pixels."""
        side = pixels.shape[-1]
        found = self(pixels, self.heat(points, side), words)
        truth = boxes / side
        goal = torch.cat([(truth[:, :2] + truth[:, 2:]) / 2, truth[:, 2:] - truth[:, :2]], -1)
        boxed = 5 * (found["boxes"] - goal[:, None]).abs().sum(-1)
        boxed = boxed + 2 * (1 - giou(to_corners(found["boxes"]), truth[:, None].expand(-1, boxed.shape[1], -1)))
        with torch.no_grad():
            mine = (boxed - found["scores"].sigmoid()).argmin(1)
        row = torch.arange(len(mine))
        target = torch.zeros_like(boxed)
        target[row, mine] = 1
        scored = F.binary_cross_entropy_with_logits(found["scores"], target, reduction="none").sum(1)
        way = F.normalize(points[:, 2] - points[:, LINES.index(self.line)], dim=-1)
        total = boxed[row, mine] + scored + (found["vectors"] - way).abs().sum(-1)
        if "centres" in found:
            total = total + 5 * (found["centres"] - goal[:, :2]).abs().sum(-1)
        return total.mean()

    @torch.no_grad()
    def best(self, pointed: Pointed) -> Best:
        """The box with the highest score of each picture."""
        mode, side = self.training, pointed.pixels.shape[-1]
        self.eval()
        parts = []
        for i in range(0, len(pointed.phrases), 128):
            part = slice(i, i + 128)
            words = self.vocabulary.numbers(pointed.phrases[part])
            found = self(pointed.pixels[part], self.heat(pointed.points[part], side), words)
            score, which = found["scores"].sigmoid().max(1)
            boxes = found["boxes"][torch.arange(len(which)), which]
            parts.append((to_corners(boxes).clamp(0, 1) * side, score))
        self.train(mode)
        return Best(*(torch.cat(one) for one in zip(*parts, strict=True)))


@dataclass(frozen=True)
class PointingEnsemble:
    """Two networks and what z needs: means and deviations of their scores `[2]`, and of all agreements."""

    head: Pointer
    wrist: Pointer
    scores: tuple[tuple[float, float], tuple[float, float]]
    agreements: tuple[float, float]
    weight: float = 2.0

    @classmethod
    def fitted(
        cls, head: Pointer, wrist: Pointer, pointed: Pointed, agree: Agreement, weight: float = 2.0
    ) -> PointingEnsemble:
        """With means and deviations from scenes that were kept for this."""
        if (head.line, wrist.line) != LINES:
            raise InputError(f"the networks are for the lines of {head.line} and {wrist.line}; give head, then wrist.")
        if len(pointed.phrases) < 2:
            raise InputError("one scene has no deviation; give at least two.")
        found = [head.best(pointed), wrist.best(pointed)]
        agreed = torch.stack([agreements(one.boxes, pointed, agree) for one in found])
        spreads = [(float(one.scores.mean()), float(one.scores.std().clamp(min=1e-6))) for one in found]
        return cls(
            head, wrist, (spreads[0], spreads[1]), (float(agreed.mean()), float(agreed.std().clamp(min=1e-6))), weight
        )

    def choose(self, pointed: Pointed, agree: Agreement) -> tuple[Int[Tensor, "B"], Float[Tensor, "B 4"]]:
        """Which network is believed (0 head, 1 wrist) and its box, of each picture."""
        found = [self.head.best(pointed), self.wrist.best(pointed)]
        boxes = torch.stack([one.boxes for one in found])
        agreed = torch.stack([agreements(one, pointed, agree) for one in boxes])
        scores = torch.stack([one.scores for one in found])
        which = self.rule(scores, agreed, boxes, pointed.pixels.shape[-1])
        return which, boxes[which, torch.arange(boxes.shape[1])]

    def rule(
        self, scores: Float[Tensor, "2 B"], agreed: Float[Tensor, "2 B"], boxes: Float[Tensor, "2 B 4"], side: int
    ) -> Int[Tensor, "B"]:
        """The argmax above; a tie goes to the head's line."""
        mean, spread = torch.tensor(self.scores).unbind(1)
        area = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1) / side**2
        weight = torch.where(area < SMALL, self.weight / 2, self.weight)
        total = (scores - mean[:, None]) / spread[:, None] + weight * (agreed - self.agreements[0]) / self.agreements[1]
        return (total[1] > total[0]).long()


def agreements(boxes: Float[Tensor, "B 4"], pointed: Pointed, agree: Agreement) -> Float[Tensor, "B"]:
    """How well each box's crop and the instruction agree; of an empty box the pixel at its corner."""
    side, found = pointed.pixels.shape[-1], []
    for pixels, box, phrase in zip(pointed.pixels, boxes, pointed.phrases, strict=True):
        left, top = (int(one) for one in box[:2].floor().clamp(0, side - 1))
        right, bottom = (int(one) for one in box[2:].ceil())
        found.append(float(agree(pixels[:, top : max(bottom, top + 1), left : max(right, left + 1)], phrase)))
    return torch.tensor(found)


def train_pointer(
    pointed: Pointed,
    line: str,
    settings: TrainSettings = TRAINING,
    *,
    words: Sequence[str] | None = None,
    model: Pointer | None = None,
    centre: bool = True,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> Pointer:
    """Train the network of one line ("head" or "wrist") on pictures of your own, or made here.

    `words` are those it can tell apart, by default all of the instructions. `settings.seed` decides its first weights (where no
    `model` is given) and the batches. With a `folder` an interrupted run goes on there.
    """
    known = words if words is not None else Vocabulary.of(pointed.phrases).words
    pointer = model or Pointer(line, known, centre=centre, seed=settings.seed)
    if pointer.line != line:
        raise InputError(f"the model is for the line of the {pointer.line}, not of the {line}.")
    numbers = pointer.vocabulary.numbers(pointed.phrases)

    def batch(number: int) -> dict[str, Tensor]:
        rows = drawn_rows(len(numbers), settings.rows, number, settings.seed)
        return {
            "pixels": pointed.pixels[rows],
            "words": numbers[rows],
            "points": pointed.points[rows],
            "boxes": pointed.boxes[rows],
        }

    fit(pointer, batch, settings, folder, loss=lambda _, given: pointer.loss(**given), device="cpu", bar=bar)
    return pointer.eval()


def save_pointer(model: Pointer, folder: str | Path, about: dict[str, object], *, force: bool = False) -> Path:
    """Write one network and a card with its line and words into a folder. `about` is any JSON."""
    card = Card("CAPE", "2507.21888", settings=model.settings, kind=KIND, about=about)
    return save(folder, card, model, force=force)


def load_pointer(folder: str | Path) -> tuple[Pointer, Card]:
    """A network that `save_pointer` wrote, and its card."""
    card, tensors = load(folder, KIND, "network of a pointing line")
    try:
        model = Pointer(**card.settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"the card in {folder} has no settings of a pointing line ({error}).") from None
    fill(model, tensors, folder)
    return model.eval(), card


def _stem(channels: int, inner: int, width: int) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(channels, inner // 2, 3, 2, 1), nn.GroupNorm(4, inner // 2), nn.GELU()),
        *(nn.Conv2d(inner // 2, inner, 3, 2, 1), nn.GroupNorm(4, inner), nn.GELU()),
        nn.Conv2d(inner, width, 3, 2, 1),
    )


def _say(width: int, numbers: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, numbers))
