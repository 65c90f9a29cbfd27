"""Silent heads: they write next to nothing (heads baked to zero, for instance), so wherever they look, they do nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from manyheads.atlas.core.repeats import repeats
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Activation, Reader

SILENT = 1e-3  # of the median head's write: a head that writes less does nothing


class _WriteNorms(Reader):
    """Keeps the mean length of what each head adds to the residual stream: `norms[l]` `[H]`."""

    site = "z"

    def __init__(self, model: HeadModel) -> None:
        self.model = model
        self.norms: dict[int, np.ndarray] = {}

    def read(self, call: Activation) -> None:
        W = self.model.W_O(call.layer).detach().to(call.value)
        z = call.value.float()
        squares = torch.einsum("bthd,hde,bthe->bth", z, (W @ W.mT).float(), z)
        self.norms[call.layer] = squares.clamp(min=0).sqrt().mean((0, 1)).cpu().numpy()


def write_norms(model: HeadModel, *, n: int = 4, seed: int = 0) -> HeadScores:
    """The length of each head's write `|z_h W_O[h]|` on random repeated tokens, mean over positions, in the stream's unit."""
    reader = _WriteNorms(model)
    model.look(repeats(model, n, 32, seed)[0], reader)
    values = np.full(model.shape, np.nan)
    for layer, norms in reader.norms.items():
        values[layer] = norms
    return HeadScores("write_norm", values, np.full(model.shape, np.nan), n, {"seed": seed})


def silent_heads(norms: HeadScores) -> HeadSet:
    """Heads whose write is less than `SILENT` of the median head's: wherever they look, they do nothing."""
    quiet = np.argwhere(norms.values < SILENT * np.nanmedian(norms.values))
    return HeadSet([Head(int(layer), int(index)) for layer, index in quiet], norms.shape)


def loud(scores: HeadScores, silent: HeadSet) -> HeadScores:
    """The scores without those of silent heads, which count as the lowest."""
    values = scores.values.copy()
    for head in silent:
        values[head] = min(0.0, float(np.nanmin(values)))
    return replace(scores, values=values)
