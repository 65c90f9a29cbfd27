"""PLVL (#37): the box and the mask of the one thing in a picture that a phrase means ("the red square left of the circle").

arXiv:2504.16145. The words are let into chosen blocks of the picture's own trunk, and box and mask come from one head whose
first convolution is shared. With trunk tokens x `[B, T, D]` and words t `[B, W, D]`, block by block,

    x <- x + attention among x (within windows; over all of the picture in every second block)
    x <- x + attention of x to adapt(t)                                           in every second block only
    x <- x + MLP(x)

Then a decoder with the picture's tokens as queries and the words as memory gives a map of C channels. The first half goes
through the shared 3 x 3 convolution; from it come the centre map c (a number in (0, 1) for each cell) and, by a 1 x 1
convolution, pixel shuffle and a 5 x 5 convolution, the mask m in (0, 1). The other half gives offset o (two numbers a cell, of
any sign) and size s (two in (0, 1)). With the cell k = argmax c at (column, row) of G x G cells, the box is

    middle = ((column, row) + o_k) / G        width and height = s_k                          in shares of the picture

    L = 0.1 (L_GIoU + L_L1 + L_centre) + L_focal(m) + L_dice(m)

L_centre is CenterNet's focal loss (arXiv:1904.07850: exponents 2 and 4) against a Gaussian around the true middle, rounded to a
cell, with CenterNet's radius for a least overlap of .7. L_focal has alpha .25 and gamma 2, and is a mean over pixels.

Where we depart: a trunk of three convolutions and four blocks with cells of 8 pixels, and a text encoder of one layer, both
learned from nothing, instead of ViTDet-B and BERT; one learning rate; two decoder layers, not three. While it trains the box is
read at the true cell (`read_at="truth"`), not where the centre map is highest ("maximum", as in the paper): a wrong thing's
cell then learns nothing of the right thing's box. The released code gives the mask's focal loss values that went through a
sigmoid already; `double_sigmoid=True` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, drawn_rows, fit
from manyheads.vision.core.boxes import giou
from manyheads.vision.finding.detr import focal, grid_places, to_corners
from manyheads.vision.finding.phrases import MOST_WORDS, PADDING, Phrased, Vocabulary

CELL, WINDOW = 8, 4  # pixels of a cell's side, cells of a window's side
LEAST = 1e-4  # the centre map is kept this far from 0 and 1
KIND = "plvl"
TRAINING = TrainSettings(steps=600, rows=32, rate=2e-3, warmup=100, weight_decay=1e-2, clip=1.0, precision="fp32")
ReadAt = Literal["truth", "maximum"]


@dataclass(frozen=True)
class Found:
    """What phrases mean: boxes (left, top, right, bottom) and masks in pixels, and the centre map's highest value as score."""

    boxes: Float[Tensor, "B 4"]
    masks: Bool[Tensor, "B S S"]
    scores: Float[Tensor, "B"]


class GroundingMaps(nn.Module):
    """The multi-task head: a map of C channels -> centre map, mask, offset and size. `shared`: one first convolution for two."""

    def __init__(self, channels: int, *, shared: bool = True) -> None:
        super().__init__()
        half = channels // 2
        self.cut = half
        self.first = nn.ModuleList(_conv3(half) for _ in range(1 if shared else 2))
        self.centre = nn.Conv2d(half, 1, 3, padding=1)
        self.spread = nn.Conv2d(half, CELL**2, 1)
        self.smooth = nn.Conv2d(1, 1, 5, padding=2)
        self.offset = nn.Sequential(_conv3(half), nn.Conv2d(half, 2, 1))
        self.size = nn.Sequential(_conv3(half), nn.Conv2d(half, 2, 1))
        assert self.centre.bias is not None
        self.centre.bias.data.fill_(-math.log(99.0))  # few cells hold a middle

    def forward(
        self, x: Float[Tensor, "B C G G"]
    ) -> tuple[Float[Tensor, "B G G"], Float[Tensor, "B S S"], Float[Tensor, "B 2 G G"], Float[Tensor, "B 2 G G"]]:
        """Centre map in [1e-4, 1 - 1e-4], the mask's logits, offset, size in (0, 1)."""
        words, rest = x[:, : self.cut], x[:, self.cut :]
        looked = [one(words) for one in self.first]
        centre = self.centre(looked[0])[:, 0].float().sigmoid().clamp(LEAST, 1 - LEAST)
        mask = self.smooth(F.pixel_shuffle(self.spread(looked[-1]), CELL))[:, 0]
        return centre, mask.float(), self.offset(rest).float(), self.size(rest).float().sigmoid()


class Grounder(nn.Module):
    """Trunk, text encoder, decoder and head. Pictures are square, with sides that 32 divides."""

    def __init__(
        self, words: Sequence[str], *, width: int = 64, depth: int = 4, shared: bool = True, seed: int = 0
    ) -> None:
        super().__init__()
        if width % 16 or depth < 2:
            raise InputError(
                f"got width {width} and depth {depth}; give a width that 16 divides and at least 2 blocks."
            )
        self.vocabulary = Vocabulary(words)
        self.settings = {"words": list(words), "width": width, "depth": depth, "shared": shared}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            w = width
            self.stem = nn.Sequential(
                *(nn.Conv2d(3, w // 2, 3, 2, 1), nn.GroupNorm(4, w // 2), nn.GELU()),
                *(nn.Conv2d(w // 2, w, 3, 2, 1), nn.GroupNorm(4, w), nn.GELU()),
                nn.Conv2d(w, w, 3, 2, 1),
            )
            self.blocks = nn.ModuleList(_Seeing(w, everywhere=i % 2 == 1) for i in range(depth))
            self.word = nn.Embedding(len(self.vocabulary), w, padding_idx=PADDING)
            self.order = nn.Parameter(0.1 * torch.randn(MOST_WORDS, w))
            self.reading = nn.TransformerEncoderLayer(w, 4, 2 * w, 0.0, "gelu", batch_first=True, norm_first=True)
            self.decoder = nn.ModuleList(
                nn.TransformerDecoderLayer(w, 4, 2 * w, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(2)
            )
            self.out = nn.Sequential(nn.LayerNorm(w), nn.Linear(w, 2 * w))
            self.maps = GroundingMaps(2 * w, shared=shared)

    def forward(
        self, pixels: Float[Tensor, "B 3 S S"], words: Int[Tensor, "B W"]
    ) -> tuple[Float[Tensor, "B G G"], Float[Tensor, "B S S"], Float[Tensor, "B 2 G G"], Float[Tensor, "B 2 G G"]]:
        """The head's maps (`GroundingMaps`) of each picture for its phrase, given as `vocabulary.numbers`."""
        if pixels.shape[-1] != pixels.shape[-2] or pixels.shape[-1] % (CELL * WINDOW):
            raise InputError(
                f"pictures have {pixels.shape[-1]} x {pixels.shape[-2]} pixels; give squares, with sides that 32 divides."
            )
        none = words == PADDING
        text = self.reading(self.word(words) + self.order[: words.shape[1]], src_key_padding_mask=none)
        grid = self.stem(2 * pixels - 1)
        cells = grid.shape[-1]
        x = grid.flatten(2).mT + grid_places(cells, grid.shape[1])
        for block in self.blocks:
            x = block(x, text, none)
        for layer in self.decoder:
            x = layer(x, text, memory_key_padding_mask=none)
        found: tuple[Tensor, Tensor, Tensor, Tensor] = self.maps(self.out(x).mT.unflatten(2, (cells, cells)))
        return found

    def loss(
        self,
        pixels: Float[Tensor, "B 3 S S"],
        words: Int[Tensor, "B W"],
        boxes: Float[Tensor, "B 4"],
        masks: Bool[Tensor, "B S S"],
        *,
        read_at: ReadAt = "truth",
        double_sigmoid: bool = False,
    ) -> Float[Tensor, ""]:
        """L above, of phrases each with its own picture; boxes in pixels."""
        side = pixels.shape[-1]
        centre, mask, offset, size = self(pixels, words)
        cells = centre.shape[-1]
        wanted, cell = centre_targets(boxes / side, cells)
        found = to_corners(boxes_at(offset, size, cell if read_at == "truth" else centre.flatten(1).argmax(1)))
        boxed = (1 - giou(found, boxes / side)).mean() + (found - boxes / side).abs().mean()
        target = masks.float()
        shown = mask.sigmoid()
        filled = focal(shown if double_sigmoid else mask, target).mean()
        return 0.1 * (boxed + centre_focal(centre, wanted)) + filled + dice(shown, target)

    @torch.no_grad()
    def find(self, pixels: Float[Tensor, "B 3 S S"], phrases: Sequence[str]) -> Found:
        """What each phrase means in its picture, in the picture's pixels."""
        if len(pixels) != len(phrases):
            raise InputError(f"there are {len(pixels)} pictures and {len(phrases)} phrases; give a phrase a picture.")
        mode, side = self.training, pixels.shape[-1]
        self.eval()
        parts = []
        for i in range(0, len(phrases), 128):
            maps = self(pixels[i : i + 128], self.vocabulary.numbers(phrases[i : i + 128]))
            centre, mask, offset, size = maps
            score, cell = centre.flatten(1).max(1)
            corners = to_corners(boxes_at(offset, size, cell)).clamp(0, 1) * side
            parts.append((corners, mask > 0, score))
        self.train(mode)
        return Found(*(torch.cat(one) for one in zip(*parts, strict=True)))


def centre_targets(
    boxes: Float[Tensor, "B 4"], cells: int
) -> tuple[Float[Tensor, "B {cells} {cells}"], Int[Tensor, "B"]]:
    """The Gaussian around each box's middle, 1 at the cell the middle is rounded to, and the number of that cell."""
    sides = (boxes[:, 2:] - boxes[:, :2]) * cells
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 * cells).round().clamp(max=cells - 1)
    sigma = (2 * gaussian_radius(sides[:, 1], sides[:, 0]).floor().clamp(min=0) + 1) / 6
    at = torch.arange(cells, dtype=boxes.dtype)
    across, down = (at - middle[:, :1]) ** 2, (at - middle[:, 1:]) ** 2
    wide = (-(down[:, :, None] + across[:, None]) / (2 * sigma[:, None, None] ** 2)).exp()
    return wide, (middle[:, 1] * cells + middle[:, 0]).long()


def gaussian_radius(height: Float[Tensor, "B"], width: Float[Tensor, "B"], overlap: float = 0.7) -> Float[Tensor, "B"]:
    """CenterNet's radius in cells, as released: r = -o H + sqrt(o^2 H^2 + 4 o (1 - o) A), with H = h + w and A = h w.

    It is the least of the three that are computed there. A box whose corners all move outwards by r / (4 o) has the IoU
    `overlap` with the first one; the released code leaves that division away.
    """
    both = height + width
    return -overlap * both + (overlap**2 * both**2 + 4 * overlap * (1 - overlap) * height * width).sqrt()


def centre_focal(found: Float[Tensor, "B H W"], wanted: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """CenterNet's focal loss over the number of middles."""
    peak = wanted == 1
    yes = ((1 - found) ** 2 * found.log())[peak].sum()
    no = ((1 - wanted) ** 4 * found**2 * (1 - found).log())[~peak].sum()
    return -(yes + no) / peak.sum().clamp(min=1)


def dice(found: Float[Tensor, "B H W"], wanted: Float[Tensor, "B H W"]) -> Float[Tensor, ""]:
    """1 - (2 sum m m* + 1) / (sum m + sum m* + 1), the mean over masks."""
    both = (found * wanted).sum((1, 2))
    return (1 - (2 * both + 1) / (found.sum((1, 2)) + wanted.sum((1, 2)) + 1)).mean()


def boxes_at(
    offset: Float[Tensor, "B 2 G G"], size: Float[Tensor, "B 2 G G"], cell: Int[Tensor, "B"]
) -> Float[Tensor, "B 4"]:
    """(middle x, middle y, width, height) in shares of the picture, read at one cell each."""
    cells = offset.shape[-1]
    at = cell[:, None, None].expand(-1, 2, 1)
    start = torch.stack([cell % cells, cell // cells], -1)
    middle = (start + offset.flatten(2).gather(2, at)[..., 0]) / cells
    return torch.cat([middle, size.flatten(2).gather(2, at)[..., 0]], -1)


def train_grounder(
    phrased: Phrased,
    settings: TrainSettings = TRAINING,
    *,
    model: Grounder | None = None,
    shared: bool = True,
    read_at: ReadAt = "truth",
    double_sigmoid: bool = False,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> Grounder:
    """Learn what phrases mean in pictures of your own, or made here. Its words are those of the phrases.

    `settings.seed` decides the first weights (where no `model` is given) and the batches. With a `folder` an interrupted run
    goes on there.
    """
    check_choice(read_at, "read_at", ("truth", "maximum"))
    grounder = model or Grounder(Vocabulary.of(phrased.phrases).words, shared=shared, seed=settings.seed)
    numbers = grounder.vocabulary.numbers(phrased.phrases)

    def batch(number: int) -> dict[str, Tensor]:
        rows = drawn_rows(len(phrased.phrases), settings.rows, number, settings.seed)
        words = numbers[rows]
        longest = int((words != PADDING).sum(1).max())
        return {
            "pixels": phrased.pixels[phrased.scene[rows]],
            "words": words[:, :longest],
            "boxes": phrased.boxes[rows],
            "masks": phrased.masks[rows],
        }

    def loss(_: nn.Module, given: dict[str, Tensor]) -> Tensor:
        return grounder.loss(**given, read_at=read_at, double_sigmoid=double_sigmoid)

    fit(grounder, batch, settings, folder, loss=loss, device="cpu", bar=bar)
    return grounder.eval()


def save_grounder(model: Grounder, folder: str | Path, about: dict[str, object], *, force: bool = False) -> Path:
    """Write weights and a card with the words into a folder. `about` is JSON: what it was trained on, how well it does."""
    card = Card("PLVL", "2504.16145", settings=model.settings, kind=KIND, about=about)
    return save(folder, card, model, force=force)


def load_grounder(folder: str | Path) -> tuple[Grounder, Card]:
    """A model that `save_grounder` wrote, and its card."""
    card, tensors = load(folder, KIND, "model of phrases")
    try:
        model = Grounder(**card.settings)
    except (TypeError, ValueError) as error:
        raise InputError(f"the card in {folder} has no settings of a model of phrases ({error}).") from None
    fill(model, tensors, folder)
    return model.eval(), card


class _Seeing(nn.Module):
    """A block of the trunk: within windows, or over all of the picture and with the words."""

    def __init__(self, width: int, everywhere: bool) -> None:
        super().__init__()
        self.everywhere = everywhere
        self.among = nn.MultiheadAttention(width, 4, batch_first=True)
        self.think = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3 if everywhere else 2))
        if everywhere:
            self.adapt = nn.Linear(width, width)
            self.read = nn.MultiheadAttention(width, 4, batch_first=True)

    def forward(self, x: Tensor, text: Tensor, none: Tensor) -> Tensor:
        y = self.norms[0](x)
        if self.everywhere:
            x = x + self.among(y, y, y, need_weights=False)[0]
            words = self.adapt(text)
            x = x + self.read(self.norms[2](x), words, words, key_padding_mask=none, need_weights=False)[0]
        else:
            cut = to_windows(y, WINDOW)
            x = x + from_windows(self.among(cut, cut, cut, need_weights=False)[0], len(x), WINDOW)
        out: Tensor = x + self.think(self.norms[1](x))
        return out


def to_windows(x: Float[Tensor, "B T D"], window: int) -> Float[Tensor, "V U D"]:
    """A square grid's tokens, row by row, as those of each window of `window` x `window` cells: V = B T / U, U = window^2."""
    many = math.isqrt(x.shape[1]) // window
    parts = x.unflatten(1, (many, window, many, window)).transpose(2, 3)
    return parts.reshape(-1, window * window, x.shape[2])


def from_windows(x: Float[Tensor, "V U D"], pictures: int, window: int) -> Float[Tensor, "B T D"]:
    """The inverse of `to_windows`."""
    many = math.isqrt(len(x) // pictures)
    parts = x.reshape(pictures, many, many, window, window, x.shape[2]).transpose(2, 3)
    return parts.reshape(pictures, -1, x.shape[2])


def _conv3(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(4, width), nn.GELU())
