"""How few dimensions the multiple-choice circuit's heads (#12) need: q, k and v held to a subspace.

Lieberum et al., arXiv:2307.09458. q at the last token, and k and v at the labels, of the heads at hand:

    x -> mean + P_r (x - mean),    P_r the first r directions of a centred SVD over questions

Departure: q and k are compressed as attention uses them, after the rotary embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.multiple_choice.questions import Questions, measured
from manyheads.errors import InputError
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Edit, PartEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall, Part
from manyheads.model.reading.readers import ReadAttention
from manyheads.progress import Bar

PARTS: tuple[Part, ...] = ("query", "key", "value")


@dataclass(frozen=True)
class Compressed:
    """Heads whose q, k and v keep `rank` dimensions (None: all): margin in logits, its share of the full one, loss in nats,
    accuracy, and the share that a random subspace of that rank keeps."""

    rank: int | None
    margin: float
    kept: float
    loss: float
    accuracy: float
    random_kept: float


@dataclass(frozen=True, eq=False)
class Subspace(PartEdit):
    """x -> mean + P (x - mean) for the heads' query, key or value; `means` `[h, Dh]` and `bases` `[h, r, Dh]` by layer."""

    means: dict[int, Tensor] = field(default_factory=dict)
    bases: dict[int, Tensor] = field(default_factory=dict)

    def changed(self, layer: int, heads: list[int], x: Float[Tensor, "B T h Dh"]) -> Float[Tensor, "B T h Dh"]:
        mean, basis = (table[layer].to(x) for table in (self.means, self.bases))
        return mean + torch.einsum("bthr,hrd->bthd", torch.einsum("bthd,hrd->bthr", x - mean, basis), basis)


def subspaces(
    model: HeadModel,
    asked: Questions,
    heads: HeadSet,
    rank: int,
    *,
    parts: Sequence[Part] = PARTS,
    centred: bool = True,
    where: Questions | None = None,
    random_seed: int | None = None,
) -> list[Edit]:
    """Edits that hold the heads' q at the last token, and k and v at the labels, to `rank` dimensions fitted on `asked`.

    They act on `where` (None: on the same questions). `random_seed` draws random dimensions instead; without `centred` the SVD is
    that of the plain vectors, which wastes a dimension on the mean.
    """
    if not 0 <= rank <= model.head_dim:
        raise InputError(f"rank is {rank}; give 0 to {model.head_dim}, the width of a head.")
    where = asked if where is None else where
    last = where.batch.input_ids.shape[1] - 1
    edits: list[Edit] = []
    vectors = _vectors(model, asked, heads)
    rng = torch.Generator().manual_seed(random_seed or 0)
    for part in parts:
        means, bases = {}, {}
        for layer, indices in heads.by_layer().items():
            x = vectors[part][layer].double()  # [h, samples, Dh]
            mean = x.mean(1) if centred else torch.zeros_like(x[:, 0])
            basis = torch.linalg.svd(x - mean[:, None], full_matrices=True).Vh
            if random_seed is not None:
                basis = torch.linalg.qr(torch.randn(len(indices), *basis.shape[1:], generator=rng).double()).Q
            means[layer], bases[layer] = mean, basis[:, :rank]
        positions = [last] if part == "query" else where.label_columns
        edits.append(Subspace(heads, part=part, means=means, bases=bases, positions=positions))
    return edits


def compress(
    model: HeadModel,
    asked: Questions,
    heads: HeadSet,
    *,
    ranks: Sequence[int] = (0, 1, 2, 3, 4),
    parts: Sequence[Part] = PARTS,
    centred: bool = True,
    n_random: int = 5,
    seed: int = 0,
    bar: Bar = Bar(),
) -> list[Compressed]:
    """Margin, loss and accuracy with the heads' q, k and v held to each rank; the first entry is the model as it is."""
    full = measured(model, asked)
    results = [Compressed(None, full[0], 1.0, full[1], full[2], 1.0)]
    for rank in ranks:
        value = measured(model, asked, subspaces(model, asked, heads, rank, parts=parts, centred=centred))
        chance = [
            measured(model, asked, subspaces(model, asked, heads, rank, parts=parts, random_seed=seed + i))[0]
            for i in range(n_random)
        ]
        results.append(Compressed(rank, value[0], value[0] / full[0], *value[1:], float(np.mean(chance)) / full[0]))
        bar(1)
    return results


def _vectors(model: HeadModel, asked: Questions, heads: HeadSet) -> dict[Part, dict[int, Float[Tensor, "h S Dh"]]]:
    """The heads' queries at the last token, and keys and values at the labels, one row a sample."""
    kept: dict[Part, dict[int, Tensor]] = {part: {} for part in PARTS}
    rows, columns = torch.arange(len(asked))[:, None], asked.label_columns
    by_layer = heads.by_layer()

    def note(call: AttentionCall) -> None:
        indices = by_layer[call.layer]
        group = call.query.shape[1] // call.key.shape[1]
        kept["query"][call.layer] = call.query[:, indices, -1].transpose(0, 1).cpu()
        for part, tensor in (("key", call.key[:, [h // group for h in indices]]), ("value", call.values_of(indices))):
            at_labels = tensor.transpose(1, 2)[rows, columns]  # [N, K, h, Dh]
            kept[part][call.layer] = at_labels.flatten(0, 1).transpose(0, 1).cpu()  # type: ignore[index]

    model.read(asked.inputs, ReadAttention(note, layers=set(by_layer)), keep=1)
    return kept
