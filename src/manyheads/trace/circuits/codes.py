"""Circuits from discrete sparse autoencoders (#6): heads with codes on solvable prompts that never occur on others.

O'Neill and Bui, arXiv:2405.12522. Positive prompts can be solved; negative ones look alike but break the task. With
r = z W_O[l,h] `[D]`, averaged over positions (or at the last), one small autoencoder for all heads learns on a few prompts

    c = relu(W_e (r - b) + b_e)    r' = W_d c + b    loss = ||r' - r||^2 / D + lam * mean ||c||_1        F features

and each output becomes one integer, k = argmax_f c_f. Then

    node score[h]      = |codes on positives - codes on negatives|          normalised: / |codes on either|      counts; [0, 1]
    pair score[h1, h2] = number of pairs (k1, k2) that occur on some positive prompt and on no negative one
    softmax[h]         = exp(score[h]) / sum over heads of exp(score); heads above a threshold are the circuit         in [0, 1]
    edge score[h]      = how often h is named in the first (LH)^2 / 2 places of the list of pairs, best pairs first

The counting does most of the work: an untrained autoencoder does as well or better, and so does a plain difference of means. The
count also rises with the number of codes that a head has at all, whatever they tell: training multiplies these. So every result
includes three baselines: the untrained autoencoder, the difference of means, and the count where each pair's labels (positive i,
negative i) are swapped at random. Scores are hints, not proofs, and depend on the negatives.

As in the released code, rows of W_e and of W_d `[D, F]` have unit length (for W_d that is not a unit dictionary), gradients
along them are removed, b starts at 0. Departures: where no feature is active the output has a code of its own; the released
arg-max gives it feature 0. Pairs that tie for the last places share them; in the released code the order of heads decides.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Integer, Real
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Activation, Reader
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.trace.circuits.circuit import Circuit
from manyheads.training import ADAM, Progress, fit

Position = Literal["mean", "last"]
ROWS = 64  # prompts of one forward pass


@dataclass(frozen=True)
class Codes:
    """Scores by codes, with three baselines. Scores have no standard error: they are sizes of sets.

    `scores`, `normalised` and `edge_scores` are of the trained autoencoder, `untrained` are node scores of the same one before
    training, `mean_difference` is ||mean r on positives - mean r on negatives||, `swapped` is the mean of node scores over 20
    random swaps of labels within pairs. Where `scores` rank heads as `swapped` does, they tell how many codes a head has, and
    nothing of the task. `codes` are the integers, positives first, -1
    where no feature was active; `pairs[h1, h2]` are pair scores, heads in order of layer and index.
    """

    scores: HeadScores
    normalised: HeadScores
    edge_scores: HeadScores
    untrained: HeadScores
    mean_difference: HeadScores
    swapped: HeadScores
    codes: Int[np.ndarray, "N LH"]
    pairs: Int[np.ndarray, "LH LH"]
    losses: list[float] = field(repr=False)

    def circuit(self, n: int) -> Circuit:
        """The `n` heads with the highest node scores."""
        return Circuit.of_heads(self.scores, n)

    @property
    def softmax(self) -> HeadScores:
        """Node scores as shares of 1 over all heads (formula above): the paper's sixth step."""
        values = torch.from_numpy(self.scores.values.copy())
        return replace(
            self.scores, name="sae_codes_softmax", values=values.flatten().softmax(0).view_as(values).numpy()
        )

    def above(self, threshold: float) -> HeadSet:
        """The heads whose softmax is at least `threshold`. `InputError` unless it is in [0, 1]."""
        if not 0 <= threshold <= 1:
            raise InputError(f"threshold={threshold}: give a share of 1, from 0 to 1.")
        return HeadSet(
            [(int(i), int(h)) for i, h in np.argwhere(self.softmax.values >= threshold)], self.scores.values.shape
        )


def sae_codes(
    model: HeadModel,
    positive: Any,
    negative: Any,
    *,
    features: int = 200,
    examples: int = 10,
    sparsity: float = 0.02,
    steps: int = 500,
    position: Position = "mean",
    seed: int = 0,
    bar: Bar = Bar(),
) -> Codes:
    """Score every head by its codes on `positive` against `negative` prompts (anything that `HeadModel.inputs` takes).

    The autoencoder learns on `examples` prompts of both kinds. `bar` gets the number of training steps done. `InputError`
    for fewer prompts than `examples`, or an unknown position.
    """
    settings = dict(features=features, examples=examples, sparsity=sparsity, steps=steps, position=position)
    meta = Provenance.of(model, "SAE codes", "arXiv:2405.12522", seed, **settings).to_json()
    return codes_of(
        mean_head_outputs(model, positive, position=position),
        mean_head_outputs(model, negative, position=position),
        model.shape,
        features=features,
        examples=examples,
        sparsity=sparsity,
        steps=steps,
        seed=seed,
        meta=meta,
        bar=bar,
    )


def codes_of(
    positive: Float[Tensor, "P LH D"],
    negative: Float[Tensor, "N LH D"],
    shape: tuple[int, int],
    *,
    features: int = 200,
    examples: int = 10,
    sparsity: float = 0.02,
    steps: int = 500,
    seed: int = 0,
    meta: dict[str, Any] | None = None,
    bar: Bar = Bar(),
) -> Codes:
    """`sae_codes` on given head outputs (`mean_head_outputs`)."""
    both = torch.cat([positive, negative]).float()
    if not 2 <= examples <= len(both):
        raise InputError(f"the autoencoder is to learn on {examples} of {len(both)} prompts; give 2 to {len(both)}.")
    generator = torch.Generator().manual_seed(seed)
    sae = CodeSae(both.shape[-1], features, generator)
    untrained = sae.codes(both)
    chosen = torch.randperm(len(both), generator=generator)[:examples]
    losses = train_code_sae(sae, both[chosen].flatten(0, 1), sparsity, steps, bar)
    codes = sae.codes(both)
    n = len(positive)
    pairs = pair_scores(codes[:n], codes[n:])
    apart = (positive.float().mean(0) - negative.float().mean(0)).norm(dim=-1)

    def scores(name: str, values: np.ndarray) -> HeadScores:
        table = np.asarray(values, dtype=np.float64).reshape(shape)
        return HeadScores(name, table, np.full(shape, np.nan), len(both), meta or {})

    return Codes(
        scores=scores("sae_codes", node_scores(codes[:n], codes[n:])),
        normalised=scores("sae_codes_normalised", node_scores(codes[:n], codes[n:], normalised=True)),
        edge_scores=scores("sae_codes_edges", edge_scores(pairs)),
        untrained=scores("sae_codes_untrained", node_scores(untrained[:n], untrained[n:])),
        mean_difference=scores("mean_difference", apart.cpu().numpy()),
        swapped=scores("sae_codes_swapped", _swapped_scores(codes[:n], codes[n:], seed)),
        codes=codes,
        pairs=pairs,
        losses=losses,
    )


def mean_head_outputs(model: HeadModel, inputs: Any, *, position: Position = "mean") -> Float[Tensor, "N LH D"]:
    """Every head's write `z W_O` for each prompt, averaged over its positions or at the last one; on the CPU."""
    if position not in ("mean", "last"):
        raise InputError(f'position is {position!r}; choose "mean" or "last".')
    batch = model.inputs(inputs)
    n = next(len(v) for v in batch.values() if isinstance(v, Tensor))
    pieces = []
    for start in range(0, n, ROWS):
        some = {k: v[start : start + ROWS] if isinstance(v, Tensor) else v for k, v in batch.items()}
        reader = _Outputs(some.get("attention_mask"), position)
        model.look(some, reader)
        writes = [
            torch.einsum("bhe,hed->bhd", reader.z[i], model.W_O(i).detach().to(reader.z[i])).cpu()
            for i in range(model.n_layers)
        ]
        pieces.append(torch.cat(writes, 1))
    return torch.cat(pieces)


@dataclass
class _Outputs(Reader):
    """Each head's z, averaged over the positions of its prompt or at the last, `z[layer]` `[B, H, Dh]`."""

    mask: Tensor | None
    position: Position
    z: dict[int, Tensor] = field(default_factory=dict)
    site = "z"

    def read(self, call: Activation) -> None:
        value = call.value.detach()
        if self.position == "last":
            self.z[call.layer] = value[:, -1]
        elif self.mask is None:
            self.z[call.layer] = value.mean(1)
        else:
            weight = self.mask.to(value)[:, :, None, None]
            self.z[call.layer] = (value * weight).sum(1) / weight.sum(1)


class CodeSae(nn.Module):
    """The autoencoder of all heads (formula above)."""

    def __init__(self, width: int, features: int, generator: torch.Generator) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.randn(features, width, generator=generator))
        self.decoder = nn.Parameter(torch.randn(width, features, generator=generator))
        self.centre = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter((2 * torch.rand(features, generator=generator) - 1) / width**0.5)
        self.unit_rows()

    @torch.no_grad()
    def unit_rows(self) -> None:
        """Give every row of the two matrices unit length."""
        for matrix in (self.encoder, self.decoder):
            matrix.copy_(F.normalize(matrix, dim=-1))

    @torch.no_grad()
    def turn_gradients(self) -> None:
        """Remove the component of each gradient along its row, which `unit_rows` would undo."""
        for matrix in (self.encoder, self.decoder):
            assert matrix.grad is not None
            matrix.grad -= (matrix.grad * matrix).sum(-1, keepdim=True) * matrix

    def encode(self, r: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
        """Feature activations c (formula above)."""
        return torch.relu((r - self.centre) @ self.encoder.T + self.bias)

    def forward(self, r: Float[Tensor, "... D"]) -> tuple[Float[Tensor, "... D"], Float[Tensor, "... F"]]:
        """The reconstruction r' and the activations c."""
        c = self.encode(r)
        return c @ self.decoder.T + self.centre, c

    @torch.no_grad()
    def codes(self, r: Float[Tensor, "N LH D"]) -> Int[np.ndarray, "N LH"]:
        """The strongest feature of every output, -1 where none is active."""
        best = [self.encode(row).max(-1) for row in r]
        codes = torch.stack([torch.where(found.values > 0, found.indices, -1) for found in best])
        return codes.numpy()


def train_code_sae(
    sae: CodeSae,
    data: Float[Tensor, "R D"],
    sparsity: float,
    steps: int,
    bar: Bar = Bar(),
) -> list[float]:
    """Train on all of `data` at every step; returns the loss of each step."""
    losses = []

    def loss(module: nn.Module, given: Tensor) -> Tensor:
        again, c = module(given)
        return F.mse_loss(again, given) + sparsity * c.abs().sum(-1).mean()

    def after_step(progress: Progress, _: torch.optim.Optimizer) -> None:
        sae.unit_rows()
        losses.append(progress.last)

    fit(
        sae,
        lambda _: data,
        replace(ADAM, steps=steps, rate=1e-3),
        loss=loss,
        after_backward=lambda *_: sae.turn_gradients(),
        after_step=after_step,
        device=data.device,
        bar=bar,
    )
    return losses


def node_scores(
    positive: Int[np.ndarray, "P LH"], negative: Int[np.ndarray, "N LH"], *, normalised: bool = False
) -> Float[np.ndarray, "LH"]:
    """Number of codes of each head that occur on positives only; `normalised`: as a share of all its codes."""
    yes, no = _shown(positive, negative)
    only = (yes & ~no).sum(1).astype(float)
    return only / (yes | no).sum(1) if normalised else only


def _swapped_scores(
    positive: Int[np.ndarray, "P LH"], negative: Int[np.ndarray, "N LH"], seed: int, draws: int = 20
) -> Float[np.ndarray, "LH"]:
    """The mean node score when positive i and negative i change places in half of the cases."""
    rng, n = np.random.default_rng(seed), min(len(positive), len(negative))
    total = np.zeros(positive.shape[1])
    for _ in range(draws):
        swap = (rng.random(n) < 0.5)[:, None]
        yes, no = positive.copy(), negative.copy()
        yes[:n], no[:n] = np.where(swap, negative[:n], positive[:n]), np.where(swap, positive[:n], negative[:n])
        total += node_scores(yes, no)
    return np.asarray(total / draws)


def pair_scores(positive: Int[np.ndarray, "P LH"], negative: Int[np.ndarray, "N LH"]) -> Int[np.ndarray, "LH LH"]:
    """Number of pairs of codes of each two heads that occur together on positive prompts only; 0 with itself."""
    both = np.concatenate(_dense(positive, negative)).T
    size = int(both.max()) + 1
    both = both.astype(np.min_scalar_type(size * size))  # small integers sort fastest
    scores = np.zeros((len(both), len(both)), dtype=np.int64)
    for h, codes in enumerate(both):
        pairs = codes * both.dtype.type(size) + both
        scores[h] = _distinct(pairs) - _distinct(pairs[:, len(positive) :])
    np.fill_diagonal(scores, 0)
    return scores


def edge_scores(pairs: Real[np.ndarray, "LH LH"]) -> Float[np.ndarray, "LH"]:
    """How often each head is named in the first (LH)^2 / 2 places of the ranked pairs, written out as a list of heads.

    Pairs that tie for the last places share them.
    """
    others, places = ~np.eye(len(pairs), dtype=bool), len(pairs) ** 2 // 2 / 2
    if not places:
        return np.zeros(len(pairs))  # a single head makes no pair
    last = np.sort(pairs[others])[-int(np.ceil(places))]
    above, level = (pairs > last) & others, (pairs == last) & others
    named = above + level * (places - above.sum()) / level.sum()
    return np.asarray(named.sum(0) + named.sum(1))


def _distinct(values: Integer[np.ndarray, "LH N"]) -> Int[np.ndarray, "LH"]:
    """Number of different values in each row."""
    return np.asarray(1 + (np.diff(np.sort(values, axis=1), axis=1) != 0).sum(1))


def _dense(
    positive: Int[np.ndarray, "P LH"], negative: Int[np.ndarray, "N LH"]
) -> tuple[Int[np.ndarray, "P LH"], Int[np.ndarray, "N LH"]]:
    """The codes, numbered from 0 without gaps for each head."""
    both = np.concatenate([positive, negative])
    dense = np.stack([np.unique(column, return_inverse=True)[1].reshape(-1) for column in both.T], 1)
    return dense[: len(positive)], dense[len(positive) :]


def _shown(positive: np.ndarray, negative: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which codes each head has on positives and on negatives, `[LH, K]` each."""
    yes, no = _dense(positive, negative)
    size = int(max(yes.max(), no.max())) + 1
    tables = np.zeros((2, yes.shape[1], size), dtype=bool)
    for table, codes in zip(tables, (yes, no), strict=True):
        table[np.arange(codes.shape[1]), codes] = True
    return tables[0], tables[1]
