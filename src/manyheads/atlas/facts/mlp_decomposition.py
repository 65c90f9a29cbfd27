"""What an MLP makes of its layer's heads (#75, step 2): it strengthens some, takes back others, and adds a direction of its own.

Lv et al., arXiv:2403.19521. At the last position, over N prompts, the write m of layer l's MLP is fitted on the writes o_h of the
same layer's heads, by one number a head and one vector for all (our reading: ridge, the intercept free),

    m_n = sum_h w_h o_{n,h} + c + rest,       w = argmin sum_n |m_n - m - sum_h w_h (o_{n,h} - o_h)|^2 + ridge tr(G)/H |w|^2

G the Gram matrix of the centred writes. w_h > 0: what head h wrote is amplified, w_h < 0: erased (dimensionless). On prompts
that were held out,

    R2 = 1 - sum |m_n - fit_n|^2 / sum |m_n - mean of the fitted prompts|^2             at most 1; 0 explains nothing

beside the same with the heads' writes of other prompts, since such a fit always "explains" something. Head writes are
collinear: `condition` is the ratio of G's largest to its smallest eigenvalue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.answered import AnyTask, answered_rows, encoded
from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.last_position import last_writes
from manyheads.atlas.facts.recall import PAPER, rank
from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value
from manyheads.heads import HeadScores
from manyheads.model.editing.edits import derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import readout
from manyheads.progress import Bar
from manyheads.tasks import Facts, TaskBatch

FOLDS = 10
ABOUT = About(
    name="mlp_gain",
    title="Gain in its layer's MLP",
    what="The MLP of its layer amplifies what it writes (positive) or erases it (negative).",
    formula="ridge coefficient of the head's write in the write of its layer's MLP",
    unit="times",
    paper=PAPER,
    threshold=0.25,
    low=-1.0,
)


@dataclass(frozen=True)
class Decomposition:
    """One layer's fit. `stderr` is a jackknife's over ten parts of the fitted prompts; `shuffled` the R2 of each shuffle."""

    weights: Float[np.ndarray, "H"]
    stderr: Float[np.ndarray, "H"]
    intercept: Float[Tensor, "D"]
    r2: float
    shuffled: Float[np.ndarray, "S"]
    condition: float

    @property
    def p_value(self) -> float:
        """How rarely a shuffle explains as much."""
        return p_value(self.r2, self.shuffled)


def decompose(
    heads: Float[Tensor, "N H D"],
    mlp: Float[Tensor, "N D"],
    *,
    ridge: float = 1e-3,
    held_out: float = 0.5,
    shuffles: int = 20,
    seed: int = 0,
) -> Decomposition:
    """Fit one MLP's writes on its heads' (formula above), on `1 - held_out` of the prompts drawn by `seed`.

    `InputError` unless both parts have at least four prompts and the shapes agree.
    """
    n, n_fit = len(mlp), round((1 - held_out) * len(mlp))
    if heads.ndim != 3 or (heads.shape[0], heads.shape[2]) != tuple(mlp.shape):
        raise InputError(
            f"head writes are [N, H, D] and MLP writes [N, D]; got {list(heads.shape)}, {list(mlp.shape)}."
        )
    if min(n_fit, n - n_fit) < 4:
        raise InputError(
            f"{n} prompts leave {n_fit} to fit on and {n - n_fit} held out; give more, at least four each."
        )
    heads, mlp = heads.double(), mlp.double()
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).to(mlp.device)
    fit, test = order[:n_fit], order[n_fit:]
    weights, intercept, condition = _fit(heads[fit], mlp[fit], ridge)
    parts = [torch.cat([p for j, p in enumerate(fit.chunk(FOLDS)) if j != i]) for i in range(len(fit.chunk(FOLDS)))]
    refits = torch.stack([_fit(heads[part], mlp[part], ridge)[0] for part in parts])
    spread = ((refits - refits.mean(0)).square().sum(0) * (len(parts) - 1) / len(parts)).sqrt()
    shuffled = []
    # Fitted anew on other prompts' heads: what such a fit explains without any relation is the number to beat.
    for i in range(shuffles):
        other_fit, other_test = (part[derangement(len(part), seed + 1 + i).to(part.device)] for part in (fit, test))
        w, c, _ = _fit(heads[other_fit], mlp[fit], ridge)
        shuffled.append(_r2(heads[other_test], mlp[test], w, c, mlp[fit].mean(0)))
    return Decomposition(
        weights=np.asarray(weights.cpu()),
        stderr=np.asarray(spread.cpu()),
        intercept=intercept,
        r2=_r2(heads[test], mlp[test], weights, intercept, mlp[fit].mean(0)),
        shuffled=np.array(shuffled),
        condition=condition,
    )


@dataclass(frozen=True)
class MlpDecomposition:
    """Every layer's fit, the gains as scores, and where the intercepts point.

    `answers[l]` is the mean rank of the task's answers in `intercept_l @ W_U`, `mean_write[l]` the same for the MLP's mean write
    instead of the intercept, `prompt_words[l]` the rank of the prompts' own tokens; 1 at the top, 0.5 by chance.
    """

    gains: HeadScores
    layers: tuple[Decomposition, ...]
    answers: Float[np.ndarray, "L"]
    mean_write: Float[np.ndarray, "L"]
    prompt_words: Float[np.ndarray, "L"]

    def to_frame(self) -> pd.DataFrame:
        """A row a layer."""
        return pd.DataFrame(
            {
                "layer": range(len(self.layers)),
                "r2": [one.r2 for one in self.layers],
                "shuffled_r2": [one.shuffled.mean() for one in self.layers],
                "p_value": [one.p_value for one in self.layers],
                "condition": [one.condition for one in self.layers],
                "answers": self.answers,
                "mean_write": self.mean_write,
                "prompt_words": self.prompt_words,
            }
        )


def mlp_decomposition(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    n: int = 128,
    ridge: float = 1e-3,
    shuffles: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> MlpDecomposition:
    """Decompose every layer's MLP over the prompts of `task` (Facts) that the model answers rightly.

    One relation at a time (`Facts("capital")`) gives an intercept whose direction can be read. `InputError` with fewer than eight
    such prompts.
    """
    task = Facts() if task is None else task
    answered, asked = answered_rows(model, encoded(model, task, n, seed), task, n, seed)
    heads: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    mlps: list[list[Tensor]] = [[] for _ in range(model.n_layers)]
    for rows in answered.chunks():
        for layer, writes in last_writes(model, rows.inputs).items():
            heads[layer].append(writes.heads.cpu())
            mlps[layer].append(writes.mlp.cpu())
        bar(len(rows))
    if len(answered) < 8:
        raise InputError(f"the model answers {len(answered)} of {asked} prompts; a decomposition needs eight.")
    fits = [
        decompose(torch.cat(h), torch.cat(m), ridge=ridge, shuffles=shuffles, seed=seed)
        for h, m in zip(heads, mlps, strict=True)
    ]
    gains = HeadScores(
        ABOUT.name,
        np.stack([one.weights for one in fits]),
        np.stack([one.stderr for one in fits]),
        len(answered) - len(answered) // 2,
        ABOUT.provenance(model, seed, ridge=ridge, n=n) | {"r2": [one.r2 for one in fits]},
    )
    return MlpDecomposition(
        gains=gains,
        layers=tuple(fits),
        answers=np.array([_towards(model, one.intercept, answered.answer_ids) for one in fits]),
        mean_write=np.array([_towards(model, torch.cat(m).mean(0), answered.answer_ids) for m in mlps]),
        prompt_words=np.array([_towards(model, one.intercept, _words(answered)) for one in fits]),
    )


def _fit(heads: Tensor, mlp: Tensor, ridge: float) -> tuple[Tensor, Tensor, float]:
    """Weights, intercept and the Gram matrix's condition."""
    centred = heads - heads.mean(0)
    gram = torch.einsum("nhd,nkd->hk", centred, centred)
    target = torch.einsum("nhd,nd->h", centred, mlp - mlp.mean(0))
    size = gram.diagonal().mean().clamp_min(1e-300)
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weights = torch.linalg.solve(gram + max(ridge, 1e-12) * size * eye, target)
    eigenvalues = torch.linalg.eigvalsh(gram)
    condition = float(eigenvalues[-1] / eigenvalues[0].clamp_min(1e-300))
    return weights, mlp.mean(0) - torch.einsum("h,hd->d", weights, heads.mean(0)), condition


def _r2(heads: Tensor, mlp: Tensor, weights: Tensor, intercept: Tensor, mean: Tensor) -> float:
    residue = mlp - intercept - torch.einsum("h,nhd->nd", weights, heads)
    return float(1 - residue.square().sum() / (mlp - mean).square().sum().clamp_min(1e-300))


def _towards(model: HeadModel, direction: Float[Tensor, "D"], ids: Tensor) -> float:
    """The mean rank of the distinct tokens `ids` in a direction's logits."""
    vocabulary = readout(model, torch.arange(model.vocab_size, device=model.device)).float()
    distinct = ids.unique()
    logits = (vocabulary @ direction.to(vocabulary))[None, None].expand(len(distinct), 1, -1)
    return float(rank(logits, distinct).mean())


def _words(batch: TaskBatch) -> Any:
    return batch.input_ids[batch.attention_mask.bool()]
