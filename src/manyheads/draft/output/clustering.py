"""Balanced spherical clustering: rows of a matrix in groups of equal size whose members have similar directions.

With unit rows u_i and K clusters that hold V/K rows each (rounded down or up: sizes differ by one row at most), seek labels a
that maximise

    cosine = mean_i <u_i, c_{a(i)}>,      c_k = normalised mean of cluster k's unit rows       in [-1, 1], dimensionless

In each round every row asks for its most similar centre, and a cluster takes the most similar of these rows until it is full. A
row that was refused asks for its next best centre with room. Then centres move to the mean. The best round is kept; the search
stops when a round gains less than `GAIN`. The authors of FlashHead (arXiv:2603.14591) do not publish their clustering; this is
the simplest of its kind.

Time grows as V K: a round compares V rows with K centres. Above `WIDE` clusters that is done in bfloat16 where the hardware has
it, four times as fast; centres are kept in float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.progress import Bar

WIDE = 512  # clusters from which on rows and centres are compared in bfloat16
GAIN = 1e-3  # least gain in cosine for another round
CHOICES = 8  # centres a row may ask for before similarities are computed again
CELLS = 1 << 22  # similarities held at a time


@dataclass(frozen=True)
class Clusters:
    """Row numbers by cluster, -1 where a cluster has one row less; `cosine` is the mean cosine of row and centre."""

    ids: Int[Tensor, "K cap"]
    cosine: float

    @property
    def labels(self) -> Int[Tensor, "V"]:
        """Each row's cluster."""
        taken = self.ids >= 0
        labels = torch.empty(int(taken.sum()), dtype=torch.long)
        labels[self.ids[taken]] = torch.arange(len(self.ids))[:, None].expand_as(self.ids)[taken]
        return labels


def balanced_clusters(
    rows: Float[Tensor, "V D"],
    clusters: int,
    *,
    rounds: int = 30,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Clusters:
    """Cut `rows` into `clusters` of equal size by direction (formula above); `bar` counts rounds, those not needed too.

    `InputError` unless `rows` is a matrix of at least `clusters` rows, and `clusters` and `rounds` are 1 or more.
    """
    if rows.ndim != 2 or not 1 <= clusters <= len(rows) or rounds < 1:
        raise InputError(
            f"{clusters} clusters of a {list(rows.shape)} tensor in {rounds} rounds: give a matrix, 1 to as many clusters as it "
            "has rows, and rounds >= 1."
        )
    unit = F.normalize(rows.detach().float(), dim=-1)
    generator = torch.Generator().manual_seed(seed)
    labels = _cluster(unit, _even(len(unit), clusters), rounds, generator, bar)
    return _gathered(unit, labels, clusters)


def scattered_clusters(rows: Float[Tensor, "V D"], clusters: int, *, seed: int = 0) -> Clusters:
    """Random clusters of the same sizes: the baseline."""
    labels = torch.arange(clusters).repeat_interleave(_even(len(rows), clusters))
    shuffled = labels[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    return _gathered(F.normalize(rows.detach().float(), dim=-1), shuffled.to(rows.device), clusters)


def _even(things: int, shares: int) -> Int[Tensor, "N"]:
    return torch.full((shares,), things // shares) + (torch.arange(shares) < things % shares)


def _cluster(
    unit: Float[Tensor, "V D"],
    sizes: Int[Tensor, "K"],
    rounds: int,
    generator: torch.Generator,
    bar: Bar,
) -> Int[Tensor, "V"]:
    sizes = sizes.to(unit.device)
    centres = unit[torch.randperm(len(unit), generator=generator)[: len(sizes)].to(unit.device)]
    seen = unit.bfloat16() if len(sizes) > WIDE and _fast_in_bfloat16(unit) else unit
    best, best_cosine = torch.zeros(len(unit), dtype=torch.long, device=unit.device), -2.0
    for number in range(rounds):
        labels = _assign(seen, centres.to(seen.dtype), sizes)
        centres = _centres(unit, labels, len(sizes))
        cosine = _cosine(unit, centres, labels)
        gain = cosine - best_cosine
        if gain > 0:
            best, best_cosine = labels, cosine
        if gain < GAIN:
            bar(rounds - number)
            break
        bar(1)
    return best


def _fast_in_bfloat16(unit: Tensor) -> bool:
    if unit.device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _assign(unit: Float[Tensor, "V D"], centres: Float[Tensor, "K D"], sizes: Int[Tensor, "K"]) -> Int[Tensor, "V"]:
    labels = torch.full((len(unit),), -1, device=unit.device)
    room = sizes.clone()
    while len(left := (labels < 0).nonzero()[:, 0]):
        free = room.nonzero()[:, 0]
        liking, wanted = _nearest(unit if len(left) == len(unit) else unit[left], centres[free])
        for liked, where in zip(liking.T, free[wanted].T, strict=True):
            asking = labels[left] < 0
            _admit(left[asking], where[asking], liked[asking], labels, room)
    return labels


def _nearest(
    unit: Float[Tensor, "N D"], centres: Float[Tensor, "K D"]
) -> tuple[Float[Tensor, "N C"], Int[Tensor, "N C"]]:
    """The most similar centres of each row, best first."""
    choices, size = min(CHOICES, len(centres)), max(1, CELLS // len(centres))
    found = [(part @ centres.T).topk(choices) for part in unit.split(size)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def _admit(
    who: Int[Tensor, "N"], where: Int[Tensor, "N"], liking: Float[Tensor, "N"], labels: Tensor, room: Tensor
) -> None:
    """Each cluster takes the most similar of the rows that ask, as many as it has room for."""
    # Sorted by cluster, then by similarity: a row's place within its cluster's block tells whether there is room.
    order = liking.argsort(descending=True, stable=True)
    order = order[where[order].argsort(stable=True)]
    asks = torch.bincount(where, minlength=len(room))
    place = torch.arange(len(who), device=who.device) - (asks.cumsum(0) - asks)[where[order]]
    taken = order[place < room[where[order]]]
    labels[who[taken]] = where[taken]
    room -= torch.bincount(where[taken], minlength=len(room))


def _centres(unit: Float[Tensor, "V D"], labels: Int[Tensor, "V"], clusters: int) -> Float[Tensor, "K D"]:
    return F.normalize(unit.new_zeros(clusters, unit.shape[1]).index_add_(0, labels, unit), dim=-1)


def _cosine(unit: Float[Tensor, "V D"], centres: Float[Tensor, "K D"], labels: Int[Tensor, "V"]) -> float:
    total = sum(float((u * centres[a]).sum()) for u, a in zip(unit.split(8192), labels.split(8192), strict=True))
    return total / len(unit)


def _gathered(unit: Float[Tensor, "V D"], labels: Int[Tensor, "V"], clusters: int) -> Clusters:
    sizes = torch.bincount(labels, minlength=clusters)
    order = labels.argsort(stable=True)
    place = torch.arange(len(labels), device=labels.device) - (sizes.cumsum(0) - sizes)[labels[order]]
    ids = torch.full((clusters, int(sizes.max())), -1, device=labels.device)
    ids[labels[order], place] = order
    return Clusters(ids.cpu(), _cosine(unit, _centres(unit, labels, clusters), labels))
