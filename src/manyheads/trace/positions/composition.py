"""Composition: how much of a head's output another head's query, key or value reads, from the weights alone.

With W_OV = W_V W_O and W_QK = W_Q W_K^T of each head (for row vectors; `[D, D]`, of rank Dh), a in a lower layer than b,

    Q    ||W_OV[a] W_QK[b]|| / (||W_OV[a]|| ||W_QK[b]||)            Frobenius norms, in [0, 1], dimensionless
    K    ||W_OV[a] W_QK[b]^T|| / (||W_OV[a]|| ||W_QK[b]||)
    V    ||W_OV[a] W_OV[b]|| / (||W_OV[a]|| ||W_OV[b]||)

(Elhage et al., "A Mathematical Framework for Transformer Circuits", 2021). Unrelated matrices score about 1/sqrt(D), not 0.
So the baseline is the mean over Gaussian matrices of the same shapes; `excess` is the score minus this baseline.

No `[D, D]` matrix is made: with A = QR, ||A M|| = ||R M||, so W_V and W_K reduce to their triangles `[Dh, Dh]`, and a pair of
layers is one product `[H Dh, D] [D, H Dh]`.

Norms' gains are folded in by default (see `manyheads.model.weights.qkv`). Their denominators, biases, and MLPs in between are
ignored. So is position: a rotary embedding rotates q and k by their distance, and the score is that of distance 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.qkv import HeadWeights, head_weights
from manyheads.progress import Bar
from manyheads.provenance import Provenance

Kind = Literal["Q", "K", "V"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class CompositionScores:
    """`values[kind][la, ha, lb, hb]`: how much head (lb, hb) reads of head (la, ha); NaN unless la < lb.

    `baseline[kind]` are mean and standard deviation over pairs of random matrices of the same shapes.
    """

    values: dict[Kind, Float[np.ndarray, "L H L H"]]
    baseline: dict[Kind, tuple[float, float]]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def excess(self) -> dict[Kind, Float[np.ndarray, "L H L H"]]:
        """Scores minus the mean of random matrices."""
        return {kind: values - self.baseline[kind][0] for kind, values in self.values.items()}

    def __getitem__(self, pair: tuple[Kind, HeadLike, HeadLike]) -> float:
        """The score of `kind, writer, reader`."""
        kind, writer, reader = pair
        return float(self.values[kind][(*Head.of(writer), *Head.of(reader))])

    def to_frame(self) -> pd.DataFrame:
        """One row a pair and kind, largest excess first: kind, writer, reader, score, excess, z (excess in random deviations)."""
        parts = []
        for kind, values in self.values.items():
            mean, deviation = self.baseline[kind]
            where = np.argwhere(np.isfinite(values))
            score = values[tuple(where.T)]
            parts.append(
                pd.DataFrame(
                    {
                        "kind": kind,
                        "writer": [str(Head(int(a), int(b))) for a, b, _, _ in where],
                        "reader": [str(Head(int(c), int(d))) for _, _, c, d in where],
                        "score": score,
                        "excess": score - mean,
                        "z": (score - mean) / deviation,
                    }
                )
            )
        frame = pd.concat(parts, ignore_index=True)
        return frame.sort_values("excess", ascending=False, kind="stable", ignore_index=True)


def composition_scores(
    model: HeadModel,
    *,
    fold: bool = True,
    draws: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> CompositionScores:
    """Every pair's Q-, K- and V-composition (formulas above). `fold`: with the norms' gains.

    The baseline pairs `draws` random writers with `draws` random readers, Gaussian, of these shapes. `bar` gets the number
    of writing layers done. `InputError` for fewer than 2 layers or draws.
    """
    if model.n_layers < 2:
        raise InputError("heads compose across layers, and this model has one; give a model with 2 or more.")
    if draws < 2:
        raise InputError(f"draws is {draws}; give at least 2 random heads.")
    layers = [_Factors.of(weights) for weights in head_weights(model, fold=fold)]
    shape = (*model.shape, *model.shape)
    values: dict[Kind, np.ndarray] = {kind: np.full(shape, np.nan) for kind in KINDS}
    for a in range(model.n_layers - 1):
        for b in range(a + 1, model.n_layers):
            for kind in KINDS:
                values[kind][a, :, b] = layers[a].into(layers[b], kind)
        bar(1)
    paper = "A Mathematical Framework for Transformer Circuits (2021)"
    meta = Provenance.of(model, "composition", paper, seed, fold=fold, draws=draws).to_json()
    return CompositionScores(values, _baseline(model, draws, seed), meta)


@dataclass(frozen=True)
class _Factors:
    """One layer's heads in reduced form, scaled to norm 1: `writes` for W_OV of writers, `reads[kind]` for the matrices of
    readers."""

    writes: Float[Tensor, "H Dh D"]
    reads: dict[Kind, Float[Tensor, "H D Dh"]]

    @classmethod
    def of(cls, weights: HeadWeights) -> _Factors:
        q, k, v = (_triangle(w) for w in (weights.W_Q, weights.W_K, weights.W_V))
        out = _triangle(weights.W_O.transpose(1, 2))
        reads: dict[Kind, Tensor] = {
            "Q": weights.W_Q.float() @ k.transpose(1, 2),
            "K": weights.W_K.float() @ q.transpose(1, 2),
            "V": weights.W_V.float() @ out.transpose(1, 2),
        }
        return cls(_unit(v @ weights.W_O.float()), {kind: _unit(read) for kind, read in reads.items()})

    def into(self, above: _Factors, kind: Kind) -> Float[np.ndarray, "H H"]:
        """Scores of this layer's heads (rows) into those of a layer above (columns)."""
        read = above.reads[kind]
        n, dim = len(self.writes), self.writes.shape[1]
        product = self.writes.flatten(0, 1) @ read.transpose(0, 1).flatten(1).to(self.writes)
        blocks = product.reshape(n, dim, len(read), -1)
        return np.asarray(blocks.square().sum((1, 3)).double().sqrt().cpu())


def _triangle(matrix: Float[Tensor, "H D Dh"]) -> Float[Tensor, "H Dh Dh"]:
    """R of A = QR: ||A M|| = ||R M||."""
    return torch.linalg.qr(matrix.float(), mode="r").R


def _unit(matrix: Float[Tensor, "H A B"]) -> Float[Tensor, "H A B"]:
    return matrix / matrix.norm(dim=(1, 2), keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)


def _baseline(model: HeadModel, draws: int, seed: int) -> dict[Kind, tuple[float, float]]:
    generator = torch.Generator().manual_seed(seed)
    width, dim = model.layout.hidden_size, model.head_dim

    def layer() -> _Factors:
        q, k, v, o = torch.randn(4, draws, width, dim, generator=generator)
        return _Factors.of(HeadWeights(q, k, v, o.transpose(1, 2)))

    below, above = layer(), layer()
    found = {kind: below.into(above, kind) for kind in KINDS}
    return {kind: (float(values.mean()), float(values.std(ddof=1))) for kind, values in found.items()}
