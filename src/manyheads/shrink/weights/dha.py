"""DHA (#53): fewer key heads and fewer value heads, each with its own grouping in each layer, fused out of those of a checkpoint.

Chen et al., arXiv:2406.06567 (NeurIPS 2024). Of layer l's KV heads, groups of g share a key, and other groups share a value:

    z_h = softmax(q_h k_{dK(h)}^T / sqrt(Dh)) v_{dV(h)}                           dK, dV: KV head -> fused head, [Hkv] each

    plan       groups of equal size whose weights are alike. Their cost is sum_h ||W_h - mean W||^2 / sum_h ||W_h||^2, a share of
               the weight; layers and kinds (K, V) where it would be higher get more heads of the common budget
    fusion     head h uses  W~_h = sum_j w_hj W_j  over its group, w_hj [Dh], and w_hj = 1 if h = j else 0 at first: the same
               function. Trained with the model's own weights until the members of a group coincide,

               max_lam min_{W, w}  L_lm + lam max(F - t, 0),    t = max(0, 1 - s / k) at step s
               F = sum_h,j ||w_hj - mean_h w_hj||^2 / (its value at first),   from 1 to 0, dimensionless

    collapse   W~ = sum_j (mean_h w_hj) W_j, one for each group; training goes on with it

w acts on keys before their rotation, where each channel may have its own: after it, both channels of a rotary pair would have to
share theirs. `mean_pooled` is the usual way to grouped queries, w = 1/g at once (mean pooling), the baseline of the paper.

The paper's settings: 25 % of heads, 240 steps of search, up to 1000 of fusion, rates 1e-4 for the weights, 1e-2 for w and lam.

Departures. Groups are made by weights (the paper's first form) and not by w, which says nothing before it drifts; `search` steps
let it. The paper's L_fusion sums over pairs of heads, which is F up to a constant; divided by its value at first it starts where
t does, and lam grows faster for it. t has no factor b^s, whose b is not published. The paper's annealing accepts losses and not
gains; ours minimises, and ends with the best swap until none helps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_number
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.shrink.shrinking import shrinks
from manyheads.shrink.weights.fusion import FUSION, blended, fused, fusion_batches
from manyheads.shrink.weights.shared_heads import KINDS, Grouping, Groups, Kind, Source
from manyheads.tasks.texts import passages
from manyheads.training import TrainSettings, fit, next_token_loss


def redundancy(model: HeadModel) -> dict[Kind, Float[np.ndarray, "L"]]:
    """How alike the KV heads of each layer are: linear CKA of their weights, the mean over pairs.

    ||W_i^T W_j||_F^2 / (||W_i^T W_i||_F ||W_j^T W_j||_F), in [0, 1].
    """
    found: dict[Kind, np.ndarray] = {kind: np.full(model.n_layers, np.nan) for kind in KINDS}
    for layer, kind, part in Source.of(model).slices():
        W = part.matrices().detach().float()
        products = torch.einsum("hda,gdb->hgab", W, W).square().sum((-2, -1))
        own = products.diagonal().sqrt()
        cka = products / (own[:, None] * own)
        found[kind][layer] = float(cka[~torch.eye(len(W), dtype=torch.bool)].mean())
    return found


def grouped(distance: Float[np.ndarray, "H H"], n: int, seed: int = 0) -> Groups:
    """`n` groups of equal size with small distances inside, by annealed swaps and then by the best swap until none helps."""
    H = len(distance)
    D = (distance + distance.T) / max(float(distance.sum()) * 2 / (H * max(1, H - 1)), 1e-30)
    np.fill_diagonal(D, 0)
    rng = np.random.default_rng(seed)
    of = rng.permutation(np.arange(H) // (H // n))
    to = D @ np.eye(n)[of]  # [H, n]: the summed distance from a head to a group

    def swap(a: int, b: int) -> None:
        moved = D[:, b] - D[:, a]
        to[:, of[a]] += moved
        to[:, of[b]] -= moved
        of[a], of[b] = of[b], of[a]

    temperature = 1.0 if 1 < n < H else 0.0  # the mean distance; the paper's 100 would be a random walk
    while temperature > 1e-3:
        for a, b, u in zip(*rng.integers(H, size=(2, 8 * H)), rng.random(8 * H), strict=True):
            A, B = of[a], of[b]
            worse = to[b, A] + to[a, B] - to[a, A] - to[b, B] - 2 * D[a, b]
            if A != B and (worse <= 0 or u < math.exp(-worse / temperature)):
                swap(a, b)
        temperature *= 0.9
    while True:
        own, cross = to[np.arange(H), of], to[:, of]
        worse = cross + cross.T - own[:, None] - own - 2 * D
        worse[of[:, None] == of] = 0
        a, b = np.unravel_index(worse.argmin(), worse.shape)
        if worse[a, b] > -1e-9:
            break
        swap(int(a), int(b))
    return tuple(sorted(tuple(np.flatnonzero(of == c).tolist()) for c in range(n)))


def allotted(costs: Mapping[Any, Mapping[int, float]], budget: int) -> dict[Any, int]:
    """How many heads each place gets of a common budget: at first the least, then more where a head saves most of the cost."""
    counts = {place: min(each) for place, each in costs.items()}
    while True:
        left = budget - sum(counts.values())
        steps = [
            ((each[counts[place]] - cost) / (n - counts[place]), place, n)
            for place, each in costs.items()
            for n, cost in each.items()
            if 0 < n - counts[place] <= left
        ]
        gain, place, n = max(steps, key=lambda step: step[0], default=(0.0, None, 0))
        if gain <= 0:
            return counts
        counts[place] = n


def _cost(W: Float[Tensor, "H F"], groups: Groups) -> float:
    """The share of the weights' squares that is lost when each group has its mean."""
    inside = sum(float((W[list(group)] - W[list(group)].mean(0)).square().sum()) for group in groups)
    return inside / max(float(W.square().sum()), 1e-30)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@dataclass(frozen=True)
class DHA:
    """Make a model with fewer KV heads: `DHA(share=0.25).convert(model)`.

    `share` is the part of the KV cache that stays, over all layers. `plain` gives every layer as many heads and keys and values
    the same groups: less free, and an ordinary grouped-query checkpoint. It learns from passages of `length` tokens of `texts`
    (None: prose that ships with Python), or from token ids; `search` are steps of training before the plan, `fusion` fuses,
    `tuning` trains the result on.
    """

    share: float = 0.25
    plain: bool = False
    texts: Sequence[str] | Int[Tensor, "N T"] | None = None
    n: int = 256
    length: int = 256
    search: TrainSettings | None = None
    fusion: TrainSettings = FUSION
    tuning: TrainSettings | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.share, "share", 0, 1, above=True)

    def plan(self, model: HeadModel) -> Grouping:
        """The groups of every layer (formula above)."""
        source = Source.of(model)
        heads = self._heads(model, source)
        H = model.n_kv_heads
        if round(self.share * H) < 1:
            raise InputError(
                f"share {self.share:g} of {H} KV heads is less than one a layer; give {1 / H:.3g} or more."
            )
        if self.plain:
            n = max(d for d in _divisors(H) if d <= self.share * H + 1e-9)
            both = [torch.cat([_unit(heads[layer, kind]) for kind in KINDS], 1) for layer in source.maps]
            groups = tuple(grouped(_distances(W), n, self.seed) for W in both)
            return Grouping(groups, groups)
        choices = {place: {n: grouped(_distances(W), n, self.seed) for n in _divisors(H)} for place, W in heads.items()}
        costs = {place: {n: _cost(heads[place], g) for n, g in each.items()} for place, each in choices.items()}
        counts = allotted(costs, round(self.share * H * len(heads)))
        key, value = (tuple(choices[layer, kind][counts[layer, kind]] for layer in source.maps) for kind in KINDS)
        return Grouping(key, value)

    def convert(self, model: HeadModel, *, folder: str | Path | None = None, bar: Bar = Bar()) -> HeadModel:
        """A smaller copy of `model`, which stays as it is. With a `folder` an interrupted call goes on.

        `UnsupportedError` where keys and values have no weights of their own, share them over layers, or are normed over heads.
        """
        grouping = self.plan(model)
        ids = self._ids(model)
        fusion, tuning = (None if folder is None else Path(folder) / name for name in ("fusion", "tuning"))
        made, _ = fused(model, grouping, ids, self.fusion, folder=fusion, bar=bar)
        if self.tuning is not None:
            made.plain.requires_grad_(True)
            fit(made.plain, fusion_batches(ids, self.tuning), self.tuning, tuning, loss=next_token_loss, bar=bar)
            made.plain.to(model.device).eval()
        return made

    def _ids(self, model: HeadModel) -> Int[Tensor, "N T"]:
        if isinstance(self.texts, Tensor):
            return self.texts
        return passages(model, self.texts, n=self.n, length=self.length, seed=self.seed)

    def _heads(self, model: HeadModel, source: Source) -> dict[tuple[int, Kind], Float[Tensor, "H F"]]:
        """The weights of every KV head, after `search` steps of blending all heads of a layer."""
        if self.search is None:
            return {(layer, kind): part.matrices().detach().float().flatten(1) for layer, kind, part in source.slices()}
        everyone = Grouping(*((((tuple(range(source.model.n_kv_heads)),),) * source.model.n_layers,) * 2))
        module, blends = blended(source, everyone)
        fit(module, fusion_batches(self._ids(model), self.search), self.search, loss=next_token_loss)
        return {(layer, kind): blends[source.path(part)].heads().cpu() for layer, kind, part in source.slices()}


def _distances(W: Float[Tensor, "H F"]) -> Float[np.ndarray, "H H"]:
    """||W_h - W_h'||^2."""
    return torch.cdist(W.double(), W.double()).square().cpu().numpy()  # type: ignore[no-any-return]


def _unit(W: Float[Tensor, "H F"]) -> Float[Tensor, "H F"]:
    return W / W.norm().clamp(min=1e-30)


@shrinks("dha", "weights", "key heads and value heads are fused by training, so that the cache keeps fewer of them")
def _make(ratio: float) -> DHA:
    return DHA(share=1 - ratio)
