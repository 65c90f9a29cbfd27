"""Regions (#93, LiMA): splitting an input into parts, and the input with only some of them shown.

    x(S): units (pixels, tokens) of the regions in S unchanged, all others hidden          S a subset of {0, ..., m - 1}

An image is split by a grid or by superpixels; hidden pixels become zero, the mean colour, a blurred copy, or any colour. A text
is split by tokens, words or given spans; hidden tokens are replaced by another token or masked from attention. `PartRegions`
passes the subsets themselves to a black box. Whatever replaces hidden units is a signal too, so every result reports the score of
the empty input.

Superpixels are SLIC's (Achanta et al. 2012) in its parameter-free form: each superpixel scales colour distances by its largest
one, so that there is no compactness to choose. Seeds are means of the cells of a grid, and a pixel may join the nine cells around
it. Colours are the image's own channels; the original uses Lab.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.report.figures import ColourScale
from manyheads.report.html import Html, el
from manyheads.report.images import png_uri
from manyheads.report.numbers import visible

Fill = Literal["zero", "mean", "blur"]
Split = Literal["words", "tokens"]
Hide = Literal["attention", "pad", "mask", "unk"]
_SHADES = ColourScale(0.0, 1.0)


class Regions(ABC):
    """An input in `m` regions. `units[i]` is the region of unit i (a pixel, a token), or -1 where it is always shown."""

    units: Int[np.ndarray, "U"]

    @property
    def m(self) -> int:
        """Number of regions."""
        return int(self.units.max()) + 1

    @cached_property
    def sizes(self) -> Float[np.ndarray, "m"]:
        """Each region's share of the units that can be hidden. They sum to 1."""
        counts = np.bincount(self.units[self.units >= 0], minlength=self.m)
        return np.asarray(counts / counts.sum())

    @property
    def names(self) -> list[str]:
        """The name of each region, for tables and pages."""
        return [str(i) for i in range(self.m)]

    @abstractmethod
    def reveal(self, subsets: Bool[Tensor, "N m"]) -> Any:
        """A batch of N inputs, each with only its subset's regions shown."""

    @abstractmethod
    def gridded(self, grid: int) -> Regions:
        """The same input, hidden in the same way, in at most `grid * grid` cells that do not depend on these regions."""

    def overlap(self, other: Regions) -> Float[np.ndarray, "cells m"]:
        """The share of units in both cell c of `other` (row) and region r (column)."""
        both = (self.units >= 0) & (other.units >= 0)
        counts = np.zeros((other.m, self.m))
        np.add.at(counts, (other.units[both], self.units[both]), 1.0)
        return np.asarray(counts / both.sum())

    def picture(self, values: Float[np.ndarray, "m"]) -> Html:
        """The input with each region in the shade of its value, 0 to 1."""
        cells = [el("span", name, class_=_SHADES.step(float(v))) for name, v in zip(self.names, values, strict=True)]
        return el("p", [[cell, " "] for cell in cells], class_="strip-tokens b0")

    def _check(self) -> None:
        if set(self.units[self.units >= 0].tolist()) != set(range(self.m)) or self.m < 1 or self.units.min() < -1:
            found = sorted(set(self.units.tolist()))
            raise InputError(f"got region numbers {found[:12]}; give 0, 1, ... without a gap (-1: always shown).")


@dataclass(frozen=True)
class PartRegions(Regions):
    """`n` parts that a black box can leave out itself: it gets the boolean subsets `[N, n]`."""

    n: int

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InputError(f"got {self.n} parts; give at least 1.")

    @property
    def units(self) -> Int[np.ndarray, "U"]:  # type: ignore[override]
        """Each part is one unit."""
        return np.arange(self.n)

    def reveal(self, subsets: Bool[Tensor, "N m"]) -> Bool[Tensor, "N m"]:
        """The subsets themselves."""
        return subsets

    def gridded(self, grid: int) -> PartRegions:
        """The parts themselves: there are no finer units."""
        return self


@dataclass(frozen=True, eq=False)
class ImageRegions(Regions):
    """An image as a model takes it, split by `labels`. Hidden pixels are zero, the mean colour, a blurred copy, or `fill` itself.

    Zero is black only where pixels were not normalised; otherwise give black as a tensor `[C, 1, 1]`.
    """

    image: Float[Tensor, "C H W"]
    labels: Int[Tensor, "H W"]
    fill: Fill | Float[Tensor, "C ..."] = "zero"

    def __post_init__(self) -> None:
        if self.image.ndim != 3 or self.image.shape[1:] != self.labels.shape:
            raise InputError(
                f"an image [C, H, W] and labels [H, W] belong together; got {list(self.image.shape)} and "
                f"{list(self.labels.shape)}."
            )
        if isinstance(self.fill, str) and self.fill not in ("zero", "mean", "blur"):
            raise InputError(f'got fill {self.fill!r}; give "zero", "mean", "blur" or a tensor.')
        self._check()

    @cached_property
    def units(self) -> Int[np.ndarray, "U"]:  # type: ignore[override]
        """The region of each pixel, row by row."""
        return np.asarray(self.labels.cpu().numpy().reshape(-1))

    @cached_property
    def baseline(self) -> Float[Tensor, "C H W"]:
        """The values of hidden pixels."""
        image = self.image
        if isinstance(self.fill, Tensor):
            return self.fill.to(image).expand_as(image)
        if self.fill == "blur":
            return _blurred(image)
        colour = image.mean((1, 2), keepdim=True) if self.fill == "mean" else torch.zeros_like(image[:, :1, :1])
        return colour.expand_as(image)

    def reveal(self, subsets: Bool[Tensor, "N m"]) -> Float[Tensor, "N C H W"]:
        """The image with only each subset's pixels shown."""
        shown = subsets.to(self.image.device)[:, self.labels.to(self.image.device)]
        return torch.where(shown[:, None], self.image, self.baseline)

    def gridded(self, grid: int) -> ImageRegions:
        """A grid of `grid` x `grid` rectangles, fewer where the image has fewer pixels."""
        height, width = self.labels.shape
        rows = torch.arange(height) * min(grid, height) // height
        columns = torch.arange(width) * min(grid, width) // width
        return ImageRegions(self.image, rows[:, None] * min(grid, width) + columns, self.fill)

    def picture(self, values: Float[np.ndarray, "m"]) -> Html:
        """The image, and beside it the image with each region shaded by its value."""
        height, width = self.labels.shape
        labels = self.labels.cpu().numpy()
        shades = [
            el("path", d=_outline(labels == i), class_=_SHADES.step(float(value)), data_tip=f"region {i}: {value:.2f}")
            for i, value in enumerate(values)
        ]
        size = {"viewBox": f"0 0 {width} {height}", "width": 300, "height": round(300 * height / width), "role": "img"}
        shown = el("image", href=png_uri(self.image), width=width, height=height)
        plain = el("svg", shown, aria_label="the input", **size)
        heat = el(
            "svg", shown, *shades, aria_label="regions, in a stronger colour where they come first", class_="b0", **size
        )
        return el("div", plain, heat, class_="regions")


@dataclass(frozen=True, eq=False)
class TextRegions(Regions):
    """Token ids split by `labels` (-1: always shown). Hidden tokens become `hidden`, or are masked from attention if it is None.

    With masking, the last token, which predicts the answer, is always shown, and all keep their positions (except in models
    that derive positions from the mask, such as BLOOM).
    """

    input_ids: Int[Tensor, "T"]
    labels: Int[Tensor, "T"]
    hidden: int | None
    tokens: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.input_ids.shape == self.labels.shape == (len(self.tokens),):
            raise InputError(
                f"got ids {list(self.input_ids.shape)}, labels {list(self.labels.shape)} and {len(self.tokens)} tokens; "
                "give as many of each."
            )
        self._check()
        if self.hidden is None and self.labels[-1] >= 0:
            raise InputError("the last token is masked and cannot ask for the answer; label it -1.")

    @cached_property
    def units(self) -> Int[np.ndarray, "U"]:  # type: ignore[override]
        """The region of each token."""
        return np.asarray(self.labels.cpu().numpy())

    @property
    def names(self) -> list[str]:
        """Each region's tokens, joined."""
        return [
            "".join(token for token, unit in zip(self.tokens, self.units, strict=True) if unit == i).strip()
            for i in range(self.m)
        ]

    def reveal(self, subsets: Bool[Tensor, "N m"]) -> dict[str, Tensor]:
        """Inputs of a language model, all rows as long as the text."""
        subsets = subsets.to(self.labels.device)
        shown = torch.cat([subsets, subsets.new_ones(len(subsets), 1)], 1)[:, self.labels]  # -1 is the last column
        ids = self.input_ids.expand(len(subsets), -1)
        if self.hidden is None:
            positions = torch.arange(len(self.labels), device=ids.device).expand_as(ids)
            return {"input_ids": ids, "attention_mask": shown.long(), "position_ids": positions}
        return {"input_ids": torch.where(shown, ids, self.hidden), "attention_mask": torch.ones_like(ids)}

    def gridded(self, grid: int) -> TextRegions:
        """Spans of equal length, or single tokens if there are no more than `grid * grid`."""
        free = self.labels >= 0
        n, cells = int(free.sum()), min(grid * grid, int(free.sum()))
        labels = self.labels.clone()
        labels[free] = (torch.arange(n) * cells // n).to(labels)
        return TextRegions(self.input_ids, labels, self.hidden, self.tokens)

    def picture(self, values: Float[np.ndarray, "m"]) -> Html:
        """The text, each token in the shade of its region's value."""
        spans = [
            el(
                "span",
                visible(token),
                class_=_SHADES.step(float(values[unit])) if unit >= 0 else None,
                data_tip=f"region {unit}: {values[unit]:.2f}" if unit >= 0 else "always shown",
            )
            for token, unit in zip(self.tokens, self.units, strict=True)
        ]
        return el("p", *spans, class_="strip-tokens b0")


def text_regions(
    tokenizer: Any,
    text: str,
    *,
    by: Split | Sequence[tuple[int, int]] = "words",
    always: Sequence[tuple[int, int]] = (),
    hide: Hide | int = "attention",
) -> TextRegions:
    """Split `text` into tokens, words (separated by spaces), or the given ranges of characters, one region each.

    Always shown are tokens of ranges in `always`, tokens in no region, special tokens and, if `hide` is "attention", the last
    token. `hide` is "attention", "pad", "mask", "unk" or a token's id. `InputError` for a slow tokenizer, for one without such a
    token, or if no token can be hidden.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"{type(tokenizer).__name__} gives no character offsets; regions of a text need a fast tokenizer."
        )
    hidden = None if hide == "attention" else hide if isinstance(hide, int) else _special(tokenizer, hide)
    encoding = tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True)
    offsets = [_trimmed(text, *offset) for offset in encoding["offset_mapping"]]
    special = encoding["special_tokens_mask"]
    if by == "tokens":
        ranges = offsets
    elif by == "words":
        ranges = [found.span() for found in re.finditer(r"\S+", text)]
    elif isinstance(by, str):
        raise InputError(f'got by={by!r}; give "words", "tokens" or ranges of characters.')
    else:
        ranges = [(int(start), int(stop)) for start, stop in by]
    last = len(offsets) - 1
    found = []
    for i, offset in enumerate(offsets):
        fixed = special[i] or _inside(offset, always) >= 0 or (hidden is None and i == last)
        found.append(-1 if fixed else i if by == "tokens" else _inside(offset, ranges))
    kept = sorted(set(found) - {-1})
    if not kept:
        raise InputError("no token of this text is left to hide; give a longer text, or fewer ranges to show always.")
    labels = torch.tensor([kept.index(i) if i >= 0 else -1 for i in found])
    ids, stops = encoding["input_ids"], [0, *(stop for _, stop in encoding["offset_mapping"])]
    tokens = [
        tokenizer.convert_ids_to_tokens(ids[i]) if special[i] else text[stops[i] : stops[i + 1]]
        for i in range(len(ids))
    ]
    return TextRegions(torch.tensor(ids), labels, hidden, tuple(tokens))


def grid_regions(height: int, width: int, patch: int) -> Int[Tensor, "H W"]:
    """Labels of square patches of `patch` pixels, row by row; the last of a row or column may be smaller."""
    if not 1 <= patch <= max(height, width):
        raise InputError(f"got a patch of {patch} pixels; give 1 to {max(height, width)} pixels a side.")
    rows, columns = torch.arange(height) // patch, torch.arange(width) // patch
    return rows[:, None] * (int(columns[-1]) + 1) + columns


def superpixels(image: Float[Tensor, "C H W"], *, size: int = 30, steps: int = 20) -> Int[Tensor, "H W"]:
    """Labels of connected superpixels, about `size` pixels across, that follow the image's edges (SLIC, parameter-free)."""
    pixels = np.moveaxis(image.detach().double().cpu().numpy(), 0, -1)
    if pixels.ndim != 3 or size < 1 or steps < 1:
        raise InputError(
            f"superpixels need an image [C, H, W], size and steps >= 1; got {list(image.shape)}, {size}, {steps}."
        )
    height, width, _ = pixels.shape
    n_rows, n_columns = max(1, round(height / size)), max(1, round(width / size))
    row, column = np.mgrid[:height, :width]
    home = row * n_rows // height, column * n_columns // width
    near = np.stack(
        [
            (home[0] + down).clip(0, n_rows - 1) * n_columns + (home[1] + right).clip(0, n_columns - 1)
            for down in (0, -1, 1)
            for right in (0, -1, 1)
        ]
    )
    places = np.stack([row * n_rows / height, column * n_columns / width], -1)  # in cells
    labels = near[0]
    for _ in range(steps):
        colours, centres = _means(labels, pixels, n_rows * n_columns), _means(labels, places, n_rows * n_columns)
        widest = np.full(n_rows * n_columns, 1e-12)
        np.maximum.at(widest, labels, ((pixels - colours[labels]) ** 2).sum(-1))
        apart = ((pixels - colours[near]) ** 2).sum(-1) / widest[near] + ((places - centres[near]) ** 2).sum(-1)
        new = np.take_along_axis(near, apart.argmin(0)[None], 0)[0]
        if (new == labels).all():
            break
        labels = new
    return torch.from_numpy(_joined(labels, height * width / (4 * n_rows * n_columns)))


def _means(labels: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The mean of `values` over each label's pixels; a distant value for a label without pixels."""
    flat, counts = labels.reshape(-1), np.bincount(labels.reshape(-1), minlength=n)
    sums = np.stack([np.bincount(flat, channel.reshape(-1), n) for channel in np.moveaxis(values, -1, 0)], -1)
    return np.where(counts[:, None] > 0, sums / counts.clip(1)[:, None], 1e6)


def _joined(labels: np.ndarray, smallest: float) -> np.ndarray:
    """Connected pieces of the labels; pieces below `smallest` pixels join the neighbour with the longest border."""
    pieces = np.arange(labels.size).reshape(labels.shape)
    while True:
        new = pieces.copy()
        for a, b in ((np.s_[1:, :], np.s_[:-1, :]), (np.s_[:, 1:], np.s_[:, :-1])):
            least = np.where(labels[a] == labels[b], np.minimum(new[a], new[b]), labels.size)
            new[a] = np.minimum(new[a], least)
            new[b] = np.minimum(new[b], least)
        new = new.reshape(-1)[new]
        if (new == pieces).all():
            break
        pieces = new
    _, pieces, counts = np.unique(pieces, return_inverse=True, return_counts=True)
    pieces = pieces.reshape(labels.shape)
    for piece in np.argsort(counts, kind="stable"):
        inside = pieces == piece
        if inside.sum() >= smallest or inside.all():
            continue
        edge = np.pad(inside, 1)
        beside = [pieces[np.roll(edge, step, axis)[1:-1, 1:-1] & ~inside] for step in (-1, 1) for axis in (0, 1)]
        pieces[inside] = np.bincount(np.concatenate(beside)).argmax()
    return np.asarray(np.unique(pieces, return_inverse=True)[1].reshape(labels.shape))


def _blurred(image: Float[Tensor, "C H W"]) -> Float[Tensor, "C H W"]:
    """The image under a Gaussian blur, whose width is an eighth of the image."""
    for axis in (1, 2):
        n = image.shape[axis]
        distance = torch.arange(n, device=image.device)[:, None] - torch.arange(n, device=image.device)
        weights = torch.softmax(-((distance * 8 / n) ** 2) / 2, -1).to(image)
        image = torch.movedim(torch.movedim(image, axis, -1) @ weights.T, -1, axis)
    return image


def _special(tokenizer: Any, kind: str) -> int:
    if kind not in ("pad", "mask", "unk"):
        raise InputError(f'got hide={kind!r}; give "attention", "pad", "mask", "unk" or an id.')
    found = getattr(tokenizer, f"{kind}_token_id")
    if found is None:
        raise InputError(f'this tokenizer has no {kind} token; give another token, or hide from "attention".')
    return int(found)


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    """The range without the spaces at its ends."""
    piece = text[start:stop]
    return start + len(piece) - len(piece.lstrip()), stop - len(piece) + len(piece.rstrip())


def _inside(offset: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> int:
    """The first range that shares a character with `offset`, or -1."""
    return next((i for i, (a, b) in enumerate(ranges) if offset[0] < b and a < offset[1]), -1)


def _outline(inside: Bool[np.ndarray, "H W"]) -> str:
    """The pixels as an SVG path, one rectangle for each run in a row."""
    strokes = []
    for y, row in enumerate(inside):
        x = 0
        for filled, run in groupby(row):
            width = len(list(run))
            strokes += [f"M{x} {y}h{width}v1h-{width}z"] if filled else []
            x += width
    return "".join(strokes)
