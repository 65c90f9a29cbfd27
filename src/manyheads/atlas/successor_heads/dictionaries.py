"""Ways to write embeddings as sums of directions, for asking which direction a head reads (#4).

    x[n] = sum_f activations[n, f] directions[f] + rest[n]        directions of length 1 (neurons: as long as they write)

Sparse autoencoders (arXiv:2309.08600), trained on all of x at once, `x` centred and scaled to mean length 1:

    a = relu((x - c) W_enc + b),    loss = mean_n |x - a W_dec - c|^2 + sparsity mean_n |a|_1,    |W_dec[f]| = 1

the neurons of the first MLP, and random directions, the baseline of both.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering
from manyheads.model.linear import projection_matrix
from manyheads.model.weights.ov import effective_embedding
from manyheads.progress import Bar
from manyheads.training import ADAM, fit

TRAINING = replace(ADAM, decay=0.25, floor=0.0)


@dataclass(frozen=True)
class Dictionary:
    """Directions, how much of each is in every embedding, and the share of the embeddings' variance that they explain."""

    name: str
    activations: Float[Tensor, "N F"]
    directions: Float[Tensor, "F D"]
    explained: float


def sparse_autoencoders(
    x: Float[Tensor, "N D"],
    *,
    n: int = 4,
    n_features: int = 32,
    sparsity: float = 0.05,
    steps: int = 600,
    learning_rate: float = 3e-3,
    seed: int = 0,
    bar: Bar = Bar(),
) -> list[Dictionary]:
    """`n` sparse autoencoders of `x`, alike but for their random start. `bar` counts steps.

    Keep `n_features` well below the number of rows: with as many, giving each row a feature of its own is the sparsest code.
    """
    if len(x) <= n_features or min(n, n_features, steps) < 1:
        raise InputError(f"{n} autoencoders of {n_features} features need more than {n_features} rows; got {len(x)}.")
    mean, length = x.mean(0), (x - x.mean(0)).norm(dim=1).mean()
    rows = ((x - mean) / length).expand(n, -1, -1)
    start = torch.randn(n, n_features, x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x)
    together = _Autoencoders(F.normalize(start, dim=-1), sparsity)
    fit(
        together,
        lambda _: rows,
        replace(TRAINING, steps=steps, rate=learning_rate),
        device=x.device,
        bar=bar,
    )
    with torch.no_grad():
        codes, directions = together.encode(rows) * length, F.normalize(together.decoder, dim=-1)
    error = together.error
    explained = 1 - error.square().sum((1, 2)) / rows.square().sum((1, 2))
    return [Dictionary("sparse autoencoder", codes[i], directions[i], float(explained[i])) for i in range(n)]


class _Autoencoders(nn.Module):
    """Several independent ones as one batch of matrices, whose losses add up. `error` is what the last loss left over."""

    def __init__(self, directions: Float[Tensor, "n F D"], sparsity: float) -> None:
        super().__init__()
        n, features, width = directions.shape
        self.decoder, self.encoder = nn.Parameter(directions), nn.Parameter(directions.clone())
        self.bias = nn.Parameter(directions.new_zeros(n, 1, features))
        self.centre = nn.Parameter(directions.new_zeros(n, 1, width))
        self.sparsity, self.error = sparsity, torch.zeros(0)

    def encode(self, rows: Float[Tensor, "n N D"]) -> Float[Tensor, "n N F"]:
        return F.relu(torch.baddbmm(self.bias, rows - self.centre, self.encoder.mT))

    def forward(self, rows: Float[Tensor, "n N D"]) -> Float[Tensor, ""]:
        codes = self.encode(rows)
        error = rows - self.centre - torch.bmm(codes, F.normalize(self.decoder, dim=-1))
        self.error = error.detach()
        return (error.square().sum(-1) + self.sparsity * codes.sum(-1)).mean(1).sum()


def mlp_neurons(model: HeadModel, ids: Int[Tensor, "N"]) -> Dictionary:
    """The first MLP's neurons: what each holds on token t alone, and what it writes. They sum to `E0[t]` less the bias.

    `UnsupportedError` where the first MLP does not end in one matrix (mixtures of experts, norms after the MLP).
    """
    block = model.layout.blocks[0]
    calls: list[tuple[nn.Module, Tensor]] = []

    def note(module: nn.Module, held: Tensor) -> None:
        calls.append((module, held))

    with contextlib.ExitStack() as stack:
        for module in block.mlp_write.modules():
            if isinstance(getattr(module, "weight", None), Tensor) and module.weight.ndim == 2:  # type: ignore[union-attr]
                stack.enter_context(entering(module, partial(note, module)))
        wanted = effective_embedding(model, ids)
    if calls:
        last, held = calls[-1]
        held, matrix = held.detach().reshape(len(ids), -1), projection_matrix(last).detach()
        bias = getattr(last, "bias", None)
        if held.shape[1] == len(matrix) and matrix.shape[1] == wanted.shape[1]:
            written = held @ matrix + (0 if bias is None else bias)
            # The last matrix called need not be the MLP's last: only what writes E0 itself is taken.
            if torch.allclose(written, wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max())):
                return Dictionary("MLP neurons", held.float(), matrix.float(), 1.0)
    raise UnsupportedError(
        f"the first MLP of {type(model.plain).__name__} does not end in one matrix of neurons; use "
        "sparse_autoencoders instead."
    )


def random_directions(x: Float[Tensor, "N D"], *, n_features: int = 32, seed: int = 0) -> Dictionary:
    """Random unit vectors, each as active as x points its way."""
    drawn = torch.randn(n_features, x.shape[1], generator=torch.Generator().manual_seed(seed)).to(x)
    directions = F.normalize(drawn, dim=-1)
    codes = F.relu((x - x.mean(0)) @ directions.T)
    rest = x - x.mean(0) - codes @ directions
    explained = 1 - rest.square().sum() / (x - x.mean(0)).square().sum()
    return Dictionary("random directions", codes, directions, float(explained))
