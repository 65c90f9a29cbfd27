"""Attention strength over the patch grid (#40): how far across an image each head of a vision transformer looks.

Li et al., "How Does Attention Work in Vision Transformers?", arXiv:2303.13731 (details are our reading). For patches p and q of a
grid, k(p, q) = max(|dy|, |dx|) is their Chebyshev distance, in patches, and A the attention between patches:

    sum[h, k]    = mean over images and p of sum over {q: k(p, q) = k} of A[p, q]         share of attention, in [0, 1]
    mean[h, k]   = mean over images of the mean of A[p, q] over all pairs k apart         attention a pair
    distance[h]  = mean over images of sum_k k sum[h, k] / sum_k sum[h, k]                patches
    trend        = least-squares slope of a layer's mean distance over layers             patches a layer

Rings at the border have fewer patches, so `sum` falls with k even where attention is even; `mean` does not: it is flat for
uniform attention. CLS, registers and other tokens that are no patch stand apart: `special` is the share of attention that patches
give them, `cls` the map of what the first of them gives to each patch. Beside every distance stands that of uniform attention
on the same grid.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadScores, mean_stderr
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention, Reader
from manyheads.progress import Bar

MAX_TOKENS = 1024  # of one pass over images
PAPER = "arXiv:2303.13731"
DISTANCE = About(
    name="attention_distance",
    title="Attention distance",
    what="How far across the image a patch looks, in patches.",
    formula="attention-weighted mean of the Chebyshev distance between patches",
    unit="patches",
    paper=PAPER,
    threshold=0.0,
    high=float("nan"),
    kind="position",
)
SPECIAL = About(
    name="special_attention",
    title="Attention to CLS",
    what="What patches give to tokens that are no patch: CLS, registers.",
    formula="share of patches' attention that goes to tokens that are no patch",
    unit="share",
    paper=PAPER,
    threshold=0.5,
    kind="position",
)


@dataclass(frozen=True)
class PatchGrid:
    """`rows` x `columns` patches, row by row, after `special` tokens that are no patch (CLS, registers)."""

    rows: int
    columns: int
    special: int = 1

    @property
    def patches(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Length of the sequence."""
        return self.special + self.patches

    @property
    def displacement(self) -> Int[Tensor, "2 N N"]:
        """`(dy, dx)` from patch p to patch q."""
        places = torch.stack(torch.meshgrid(torch.arange(self.rows), torch.arange(self.columns), indexing="ij"))
        places = places.flatten(1)
        return places[:, None, :] - places[:, :, None]

    @property
    def distance(self) -> Int[Tensor, "N N"]:
        """Chebyshev distance between patches."""
        return self.displacement.abs().amax(0)

    def between_patches(self, call: AttentionCall) -> Float[Tensor, "B H N N"]:
        """The patch-to-patch part of a call's pattern. `UnsupportedError` if its tokens are not this grid's."""
        shape = call.query.shape[2], call.key.shape[2]
        if shape != (self.tokens, self.tokens):
            raise UnsupportedError(
                f"layer {call.layer} attends from {shape[0]} to {shape[1]} tokens, and a grid of {self.rows} x "
                f"{self.columns} patches with {self.special} special tokens has {self.tokens}; where attention stays in "
                "windows, give the window's own PatchGrid as grid=."
            )
        return call.pattern[:, :, self.special :, self.special :]


def patch_grid(model: HeadModel, images: Float[Tensor, "B C Y X"]) -> PatchGrid:
    """The grid that `model` cuts `images` into, from its patch size and the tokens that a pass really has.

    `InputError` for what is no batch of images, `UnsupportedError` for a model without a patch size or with fewer tokens than
    patches.
    """
    size = getattr(model.config, "patch_size", None)
    if size is None:
        raise UnsupportedError(f"the config of {type(model.plain).__name__} has no patch_size; is it a vision model?")
    check_images(images)
    high, wide = (size, size) if isinstance(size, int) else tuple(size)
    rows, columns = images.shape[-2] // high, images.shape[-1] // wide
    lengths: list[int] = []
    model.look({"pixel_values": images[:1]}, ReadAttention(lambda call: lengths.append(call.query.shape[2]), [0]))
    special = lengths[0] - rows * columns
    if special < 0 or rows * columns < 2:
        raise UnsupportedError(
            f"{rows} x {columns} patches do not fit the {lengths[0]} tokens of {type(model.plain).__name__}; give grid=."
        )
    return PatchGrid(rows, columns, special)


def check_images(images: object, labels: Tensor | None = None) -> None:
    """`InputError` unless `images` is `[N, C, Y, X]` with N >= 1, and `labels` one whole number an image."""
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"images are a tensor [N, C, Y, X] of pixel values with N >= 1, not {shape}.")
    if labels is not None and (labels.shape != images.shape[:1] or labels.is_floating_point()):
        raise InputError(
            f"labels are one whole number for each of the {len(images)} images, not {labels.dtype} of {list(labels.shape)}."
        )


def image_chunks(grid: PatchGrid, n: int) -> Iterator[slice]:
    """Rows of `n` images in pieces of about `MAX_TOKENS` tokens."""
    size = max(1, MAX_TOKENS // grid.tokens)
    yield from (slice(start, min(n, start + size)) for start in range(0, n, size))


class StrengthReader(Reader):
    """Adds up attention by distance while it reads; keeps `[L, B, H, K]` sums and `[L, H, N]` CLS maps, never a pattern."""

    site = "attention"

    def __init__(self, grid: PatchGrid) -> None:
        self.grid = grid
        apart = torch.nn.functional.one_hot(grid.distance)  # [N, N, K]
        self.pairs = apart.sum((0, 1))
        self._apart = apart.flatten(0, 1).float()
        self.sums: dict[int, list[Tensor]] = {}
        self.cls: dict[int, Tensor] = {}

    def read(self, call: AttentionCall) -> None:
        """Sum each head's attention over all pairs of patches that are k apart."""
        patches = self.grid.between_patches(call).float()
        self.sums.setdefault(call.layer, []).append((patches.flatten(2) @ self._apart.to(patches.device)).cpu())
        if self.grid.special:
            row = call.pattern[:, :, 0, self.grid.special :].sum(0).cpu()
            self.cls[call.layer] = self.cls.get(call.layer, torch.zeros_like(row)) + row

    def result(self, model: HeadModel) -> AttentionStrength:
        """The curves of what was read so far."""
        layers = sorted(self.sums)
        summed = torch.stack([torch.cat(self.sums[layer]) for layer in layers]).double().transpose(0, 1).numpy()
        n = len(summed)
        share = summed / self.grid.patches  # [B, L, H, K]
        apart = np.arange(share.shape[-1])
        whole = share.sum(-1)
        distance = (share @ apart) / np.maximum(whole, 1e-12)
        x = np.arange(len(layers)) - (len(layers) - 1) / 2
        slopes = (distance.mean(2) @ x) / max(float(x @ x), 1e-12)
        about = {"rows": self.grid.rows, "columns": self.grid.columns, "special": self.grid.special, "n": n}
        cls = None
        if self.grid.special:
            maps = torch.stack([self.cls[layer] for layer in layers]) / n
            cls = maps.unflatten(-1, (self.grid.rows, self.grid.columns)).double().numpy()
        return AttentionStrength(
            grid=self.grid,
            sum=share.mean(0),
            mean=summed.mean(0) / self.pairs.numpy(),
            distance=HeadScores.from_examples(DISTANCE.name, distance, DISTANCE.provenance(model, 0, **about)),
            special=HeadScores.from_examples(SPECIAL.name, 1 - whole, SPECIAL.provenance(model, 0, **about)),
            cls=cls,
            trend=float(slopes.mean()),
            trend_stderr=float(mean_stderr(slopes)[1]),
        )


@dataclass(frozen=True)
class AttentionStrength:
    """Curves over distance, mean distances and their trend (formulas above). `cls` is None without a special token."""

    grid: PatchGrid
    sum: Float[np.ndarray, "L H K"]
    mean: Float[np.ndarray, "L H K"]
    distance: HeadScores
    special: HeadScores
    cls: Float[np.ndarray, "L H rows columns"] | None
    trend: float
    trend_stderr: float

    @property
    def share(self) -> Float[np.ndarray, "L H K"]:
        """`sum` as a share of what patches give to patches: each curve adds up to 1."""
        whole: np.ndarray = self.sum.sum(-1, keepdims=True)
        return self.sum / np.maximum(whole, 1e-12)

    @property
    def uniform(self) -> Float[np.ndarray, "K"]:
        """The same share under uniform attention: what the grid alone makes of it."""
        pairs = np.bincount(self.grid.distance.flatten().numpy())
        return pairs / pairs.sum()

    @property
    def uniform_distance(self) -> float:
        """Mean distance under uniform attention, in patches."""
        return float(self.uniform @ np.arange(len(self.uniform)))

    def to_frame(self) -> pd.DataFrame:
        """A row a head and distance: layer, index, head, distance, sum, mean, share, uniform."""
        n_layers, n_heads, far = self.sum.shape
        layer, index, k = (axis.ravel() for axis in np.indices((n_layers, n_heads, far)))
        return pd.DataFrame(
            {
                "layer": layer,
                "index": index,
                "head": [str(Head(int(a), int(b))) for a, b in zip(layer, index, strict=True)],
                "distance": k,
                "sum": self.sum.ravel(),
                "mean": self.mean.ravel(),
                "share": self.share.ravel(),
                "uniform": self.uniform[k],
            }
        )

    def layers(self) -> pd.DataFrame:
        """A row a layer: mean, least and largest mean distance of its heads, and their spread, in patches."""
        values = self.distance.values
        return pd.DataFrame(
            {
                "layer": np.arange(len(values)),
                "distance": values.mean(1),
                "spread": values.std(1),
                "least": values.min(1),
                "most": values.max(1),
            }
        )


def attention_strength(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    *,
    grid: PatchGrid | None = None,
    bar: Bar = Bar(),
) -> AttentionStrength:
    """How strongly each head attends over each distance (formulas above), from one pass over `images` (`pixel_values`).

    `grid` is found where it is not given; a model that attends in windows needs the window's. `bar` counts images.
    """
    check_images(images)
    grid = grid or patch_grid(model, images)
    reader = StrengthReader(grid)
    for rows in image_chunks(grid, len(images)):
        model.look({"pixel_values": images[rows]}, reader)
        bar(rows.stop - rows.start)
    return reader.result(model)
