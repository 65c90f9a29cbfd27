"""Copying heads: which heads raise the logit of the token they attend to, by their weights alone (Elhage et al. 2021).

With X the tokens' embeddings and `M = X W_OV W_U` the OV circuit (tokens in, tokens out), copying means positive eigenvalues:

    score[l, h] = sum_i Re(lambda_i) / sum_i |lambda_i|,    lambda = eig(M)        in [-1, 1], dimensionless

1 copies everything, -1 suppresses everything it sees, 0 is neither: the copying statistic of "A Mathematical Framework for
Transformer Circuits", https://transformer-circuits.pub/2021/framework/index.html. Values and unembedding are centred over the
tokens, since what a head writes for every token alike copies nothing (the paper's models have no biases, so it need not).
M has rank head_dim, so its eigenvalues are those of a [Dh, Dh] matrix. Values are read through the model's own input norms.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import REPEATS
from manyheads.atlas.core.registry import by_weights, register
from manyheads.atlas.core.repeats import usable_ids
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import effective_embedding, embedding, ov_z, readout

Embedding = Literal["embed", "mlp", "sum"]
ABOUT = About(
    name="copying",
    title="Copying",
    what="Its OV circuit raises the logit of the very token it attends to (negative: lowers it), read off the weights alone.",
    formula="sum Re(eigenvalues) / sum |eigenvalues| of the OV circuit from tokens to tokens",
    unit="share",
    paper="Elhage et al. 2021, A Mathematical Framework for Transformer Circuits",
    threshold=0.8,
    kind="copying",
    low=-1.0,
)


def copying(model: HeadModel, *, embed: Embedding = "embed", max_tokens: int = 2048, seed: int = 0) -> HeadScores:
    """Score every head by the sign of its OV circuit (formula above); `n` is 0, since no example is run.

    `embed` is what stands for a token: the embedding, the first MLP's output (`E0` of arXiv:2312.09230), or their sum.
    Of vocabularies above `max_tokens` a seeded sample is taken.
    """
    ids = torch.tensor(usable_ids(model))
    if len(ids) > max_tokens:
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        ids = ids[order[:max_tokens]]
    ids = ids.to(model.device)
    z = ov_z(model, token_embedding(model, ids, embed))
    unembedding = readout(model, ids)
    unembedding = unembedding - unembedding.mean(0)
    values = np.stack([_signs(model, layer, z[layer], unembedding) for layer in range(model.n_layers)])
    meta = ABOUT.provenance(model, seed, embed=embed, tokens=len(ids))
    return HeadScores(ABOUT.name, values, np.zeros_like(values), 0, meta)


def token_embedding(model: HeadModel, ids: Tensor, kind: Embedding) -> Float[Tensor, "N D"]:
    """What stands for each token in a weights-only circuit."""
    if kind == "embed":
        return embedding(model, ids)
    first_mlp = effective_embedding(model, ids)
    return first_mlp if kind == "mlp" else first_mlp + embedding(model, ids)


def _signs(
    model: HeadModel, layer: int, z: Float[Tensor, "N H Dh"], unembedding: Float[Tensor, "N D"]
) -> Float[np.ndarray, "H"]:
    z = (z - z.mean(0)).double().cpu()
    W_O = model.W_O(layer).detach().double().cpu()
    back = torch.einsum("hde,ne->hdn", W_O, unembedding.double().cpu())
    eigenvalues = torch.linalg.eigvals(torch.einsum("hdn,nhc->hdc", back, z))
    total = eigenvalues.abs().sum(-1)
    return np.asarray(torch.where(total > 0, eigenvalues.real.sum(-1) / total, torch.zeros_like(total)))


register(ABOUT, score=by_weights(copying), judge=REPEATS, steps=lambda model, n: 1)
