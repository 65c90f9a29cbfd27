"""Maps of Prompt-CAM (#119): which patches each head of a class prompt attends to, and which heads the class needs.

Paul et al., CVPR 2025, arXiv:2501.09333. In the last layer, with c the class and j a patch,

    map[h, j] = pattern[L-1, h, c, j]      in [0, 1]; prompts, CLS and registers have the rest of the row

Heads are ranked by greedy blurring: a blurred head's row c gets attention logits 0, hence weight 1 / (C + T) on each column. Each
step blurs, for good, the head whose blurring leaves p_c highest; the last heads left are those the class needs. Blurring changes
nothing below the last block, so the H (H + 1) / 2 variants run one block each, those of a step in one batch.

A map does not prove that its patches are evidence for this class alone: other classes' prompts attend to the same ones (`rival`).
Departure. The released display sorts the remaining heads by scores of a step with one head more; here they keep their rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.model.editing.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.report import Reported
from manyheads.trace.prompts.prompt_cam import PAPER, PromptCAM
from manyheads.trace.prompts.prompting import LastCall, finish, last_call, prompt_grid

MAX_TOKENS = 8192  # of one batched call of the last block


@dataclass(frozen=True, eq=False)
class BlurRow(Edit):
    """In row b of the batch, query `queries[b]` of the heads `which[b]` gets the mean of all values: attention logits 0.

    `heads` must be all heads of one layer.
    """

    which: Bool[Tensor, "B H"] = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.bool))
    queries: Int[Tensor, "B"] = field(default_factory=lambda: torch.zeros(1, dtype=torch.long))

    @property
    def acts_in_attention(self) -> bool:
        """True: it needs the values."""
        return True

    def attend(self, call: AttentionCall, z: Float[Tensor, "B T H Dh"]) -> Float[Tensor, "B T H Dh"]:
        """`z` with the blurred rows replaced."""
        rows, queries = torch.arange(len(z), device=z.device), self.queries.to(z.device)
        flat = call.values_of(self.indices(call.layer)).mean(2).to(z)
        blurred = z.clone()
        blurred[rows, queries] = torch.where(self.which.to(z.device)[..., None], flat, z[rows, queries])
        return blurred


@dataclass(frozen=True)
class HeadRanking:
    """Heads of the last layer by greedy blurring, one row an image.

    `order` `[B, H]`, best first: the head blurred last is first. `p` `[B, H]` is p_c with this head and all later ones in `order`
    blurred; `clean` `[B]` is p_c with none blurred.
    """

    order: Int[np.ndarray, "B H"]
    p: Float[np.ndarray, "B H"]
    clean: Float[np.ndarray, "B"]


@dataclass(frozen=True, eq=False)
class PromptMaps(Reported):
    """One image's maps for class `target`, and for `rival`, the likeliest of the other classes.

    `values` and `rival_values` `[H, rows, columns]`; `order`, `p`, `clean` as in `HeadRanking`; `probabilities` of all classes.
    """

    pixels: Float[Tensor, "channels height width"]
    values: Float[np.ndarray, "H rows columns"]
    rival_values: Float[np.ndarray, "H rows columns"]
    order: Int[np.ndarray, "H"]
    p: Float[np.ndarray, "H"]
    clean: float
    probabilities: Float[np.ndarray, "C"]
    classes: tuple[str, ...]
    target: int
    rival: int
    layer: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def predicted(self) -> int:
        """The likeliest class."""
        return int(self.probabilities.argmax())

    def survivors(self, k: int = 4) -> list[Head]:
        """The `k` heads that were blurred last, best first."""
        return [Head(self.layer, int(h)) for h in self.order[:k]]

    def to_frame(self) -> pd.DataFrame:
        """One row a head, best first: p_c with it and all later ones blurred, its attention on patches, its peak."""
        rows = []
        for rank, (head, p) in enumerate(zip(self.order, self.p, strict=True), 1):
            map_, other = self.values[head], self.rival_values[head]
            row, column = divmod(int(map_.argmax()), map_.shape[1])
            rows.append(
                {
                    "rank": rank,
                    "head": str(Head(self.layer, int(head))),
                    "p_blurred": float(p),
                    "on_patches": float(map_.sum()),
                    "peak": float(map_.max()),
                    "peak_row": row,
                    "peak_column": column,
                    "rival_peaks_there": bool(other.argmax() == map_.argmax()),
                }
            )
        return pd.DataFrame(rows)


def prompt_attention(
    cam: PromptCAM, pixels: Float[Tensor, "B channels H W"], classes: Int[Tensor, "B"]
) -> Float[Tensor, "B heads rows columns"]:
    """The last layer's attention of each image's class prompt over its patches, per head."""
    grid, classes = prompt_grid(cam.trunk, pixels), _classes(cam, pixels, classes)
    with torch.no_grad():
        return _rows(cam.trunk, last_call(cam.trunk, pixels, cam.prompts), classes, grid)


def cls_attention(trunk: HeadModel, pixels: Float[Tensor, "B channels H W"]) -> Float[Tensor, "B heads rows columns"]:
    """The last layer's attention of CLS over the patches, without any prompt: the baseline of `prompt_attention`."""
    rows, columns = prompt_grid(trunk, pixels)
    seen: list[Tensor] = []
    reader = ReadAttention(lambda call: seen.append(call.pattern_rows(slice(0, 1))), layers=[trunk.n_layers - 1])
    trunk.look({"pixel_values": pixels}, reader)
    return seen[0][:, :, 0, -rows * columns :].unflatten(-1, (rows, columns)).float().cpu()


def rank_heads(
    cam: PromptCAM,
    pixels: Float[Tensor, "B channels H W"],
    classes: Int[Tensor, "B"],
    *,
    rows: int = 16,
    bar: Bar = Bar(),
) -> HeadRanking:
    """Rank the last layer's heads for each image separately, `rows` images at once; `bar` counts images."""
    classes = _classes(cam, pixels, classes)
    found = []
    with torch.no_grad():
        for some, wanted in zip(pixels.split(rows), classes.split(rows), strict=True):
            found.append(_ranked(cam, last_call(cam.trunk, some, cam.prompts), wanted))
            bar(len(some))
    order, p, clean = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return HeadRanking(order, p, clean)


def prompt_maps(
    cam: PromptCAM, image: Float[Tensor, "channels height width"], target: str | int | None = None
) -> PromptMaps:
    """Maps and ranking of one image for class `target`; by default for the predicted class."""
    pixels = image[None] if image.ndim == 3 else image
    if len(pixels) != 1:
        raise InputError(f"got {list(image.shape)}; give one image [channels, H, W].")
    grid = prompt_grid(cam.trunk, pixels)
    cam.eval()
    with torch.no_grad():
        call = last_call(cam.trunk, pixels, cam.prompts)
        p = cam.score(finish(cam.trunk, call)).float().softmax(-1)[0].cpu()
        wanted = int(p.argmax()) if target is None else cam.index(target)
        rival = int(p.index_fill(0, torch.tensor(wanted), -1.0).argmax())
        values, others = (_rows(cam.trunk, call, torch.tensor([c]), grid)[0].numpy() for c in (wanted, rival))
        order, blurred, clean = _ranked(cam, call, torch.tensor([wanted]))
    meta = cam.meta | Provenance.of(cam.trunk, "Prompt-CAM", PAPER).to_json()
    return PromptMaps(
        pixels[0].detach().cpu(),
        values,
        others,
        order[0],
        blurred[0],
        float(clean[0]),
        p.double().numpy(),
        cam.classes,
        wanted,
        rival,
        cam.trunk.n_layers - 1,
        meta,
    )


def _classes(cam: PromptCAM, pixels: Tensor, classes: Tensor) -> Int[Tensor, "B"]:
    """The class of each image, checked. `InputError` for another number of them, or unknown classes."""
    classes = torch.as_tensor(classes)
    if classes.shape != pixels.shape[:1] or classes.is_floating_point() or not len(classes):
        raise InputError(f"give a class for each image; got {list(classes.shape)} for pixels {list(pixels.shape)}.")
    if classes.min() < 0 or classes.max() >= cam.n_classes:
        raise InputError(f"classes are 0 to {cam.n_classes - 1}; got {int(classes.min())} to {int(classes.max())}.")
    return classes


def _rows(
    trunk: HeadModel, call: LastCall, classes: Int[Tensor, "B"], grid: tuple[int, int]
) -> Float[Tensor, "B heads rows columns"]:
    wanted, place = classes.unique(return_inverse=True)
    seen: list[Tensor] = []

    def keep(attention: AttentionCall) -> None:
        rows = attention.pattern_rows(wanted.to(attention.query.device)).float().cpu()
        seen.append(rows[torch.arange(len(rows)), :, place, -math.prod(grid) :])

    with trunk.reading(ReadAttention(keep, layers=[trunk.n_layers - 1])):
        finish(trunk, call)
    return seen[0].unflatten(-1, grid)


def _ranked(cam: PromptCAM, call: LastCall, classes: Int[Tensor, "B"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch, n_heads = len(classes), cam.trunk.n_heads
    images = torch.arange(batch)
    blurred = torch.zeros(batch, n_heads, dtype=torch.bool)
    clean = _p(cam, call, classes, blurred[None])[0]
    order, kept = [], []
    for _ in range(n_heads):
        left = (~blurred).nonzero()[:, 1].view(batch, -1)
        more = torch.nn.functional.one_hot(left, n_heads).bool().transpose(0, 1)
        p = _p(cam, call, classes, blurred | more)
        best = p.argmax(0)
        head = left[images, best]
        order.append(head)
        kept.append(p[best, images])
        blurred[images, head] = True
    return torch.stack(order, 1).flip(1).numpy(), torch.stack(kept, 1).flip(1).numpy(), clean.numpy()


def _p(cam: PromptCAM, call: LastCall, classes: Int[Tensor, "B"], which: Bool[Tensor, "V B H"]) -> Float[Tensor, "V B"]:
    """p_c of each image with the heads of each variant blurred."""
    last = cam.trunk.n_layers - 1
    heads = [(last, h) for h in range(cam.trunk.n_heads)]
    at_once = max(1, MAX_TOKENS // (call.hidden.shape[0] * call.hidden.shape[1]))
    found = []
    for some in which.split(at_once):
        n = len(some)
        with cam.trunk.editing(BlurRow(heads, which=some.flatten(0, 1), queries=classes.repeat(n))):
            p = cam.score(finish(cam.trunk, call, n)).double().softmax(-1).cpu()
        found.append(p[torch.arange(len(p)), classes.repeat(n)].view(n, -1))
    return torch.cat(found)
