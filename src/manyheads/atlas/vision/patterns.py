"""Attention patterns of vision heads (#40): a learned map of what heads' patch-to-patch attention looks like, with names on it.

Li et al., "How Does Attention Work in Vision Transformers?", arXiv:2303.13731 (details are our reading). For every image and
head, the attention A[p, q] between N patches is reduced while it is read to how it looks from its queries,

    profile[0, d] = mean over patches p of A[p, p + d]        d = (dy, dx), over the p for which p + d is in the image
    profile[1, d] = root mean square over p of R[p, p + d]    what position leaves unexplained

where R is what the best fit base[p] + follows[p] ideal[d] leaves of A: queries may follow a pattern more or less. Do they
agree on keys beyond that?

    agreement = max(0, 1 - 1 / s),   s = N sum over p != p' of G[p, p']^2 / trace(G)^2,   G = R R^T        in [0, 1)

is 0 for independent queries (s = 1). An autoencoder with two latent numbers learns to restore both profiles, scaled to unit
length, and the agreement, the three with equal variance; k-means finds clusters on its map. With w(d) the share of attention
above its mean that goes to d, and T_name(d) the ideal, a map fits a name by

    fit(name) = sum over d of sqrt(w(d) T_name(d))            in [0, 1]

for self (d = 0), ring (distance k), row (dy = 0), column (dx = 0), shift (one d other than 0), near (distance up to k, half the
grid at most) and global (farther). It is `content` instead if queries agree by 0.4 or more and `explained`, the share of variance
that R leaves to position, is below 0.7: a head that looks at what is alike looks at itself too, so fits do not decide. Attention
that position moves by less than 5% from even is global. A cluster bears the name that most of its members bear; several may have
one name, since rings of different sizes lie apart.

`shift` and `near` are our additions: a head that looks at one fixed neighbour, or at all of them and itself, is none of the six
that the method names. The autoencoder sees no names; beside the share of variance that it restores stands that of two principal
components. Maps are reduced because clusters of raw ones depend on which patches a pattern shows at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.vision.strength import PAPER, PatchGrid, check_images, image_chunks, patch_grid
from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike, HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit

NAMES = ("self", "ring", "row", "column", "global", "content", "shift", "near")
AGREE, EXPLAINED = 0.4, 0.7
FARTHEST_SHIFT = 2
EVEN = 0.05  # of the attention, above what even attention gives: less is no pattern
ROUNDING = 0.02  # of a map's variance: where less is unexplained, there is nothing to agree on
ROUNDS = 3  # of the fit of what position explains
RESTARTS = 3  # of the autoencoder; the one that restores most is kept
AUTOENCODER = TrainSettings(
    rows=128,
    rate=3e-3,
    warmup=1,
    decay=1.0,
    floor=0.01,
    betas=(0.9, 0.999),
    weight_decay=0.01,
    decayed="all",
    clip=None,
    precision="fp32",
)
ABOUTS = {
    name: About(
        name=f"pattern_{name}",
        title=f"{name.capitalize()} pattern",
        what=f"The head's attention between patches falls into a cluster named {name}.",
        formula=f"share of images whose map lies in a cluster named {name}",
        unit="share of images",
        paper=PAPER,
        threshold=0.5,
        kind="position" if name not in ("global", "content") else name,
    )
    for name in NAMES
}


@dataclass(frozen=True)
class Profiles:
    """M maps as they look from their queries: `values` `[M, 2, 2 rows - 1, 2 columns - 1]`, and two shares (formulas above)."""

    values: Float[Tensor, "*M 2 Y X"]
    agreement: Float[Tensor, "*M"]
    explained: Float[Tensor, "*M"]

    def __len__(self) -> int:
        return len(self.values)


class Profiler:
    """Reduces maps of one grid to profiles."""

    def __init__(self, grid: PatchGrid) -> None:
        self.shape = 2 * grid.rows - 1, 2 * grid.columns - 1
        dy, dx = grid.displacement
        self.where = ((dy + grid.rows - 1) * self.shape[1] + dx + grid.columns - 1).flatten()

    def __call__(self, maps: Float[Tensor, "M N N"]) -> Profiles:
        maps = maps.float()
        whole = torch.ones_like(maps[:1])
        mean = self._by_displacement(maps, whole)
        rest = self._unexplained(maps, mean)
        spread = self._by_displacement(rest.square(), whole).sqrt()
        gram = rest @ rest.transpose(1, 2)
        trace = gram.diagonal(dim1=1, dim2=2)
        off = gram.square().sum((1, 2)) - trace.square().sum(1)
        varies = (maps - maps.mean(-1, keepdim=True)).square().sum((1, 2))
        varies = varies.maximum(1e-6 * maps.square().sum((1, 2)))  # of even attention: rounding, which nothing explains
        shared = maps.shape[1] * off / (trace.sum(1) + ROUNDING * varies).square()  # 1 if queries are independent
        explained = 1 - rest.square().sum((1, 2)) / varies
        values = torch.stack([mean, spread], 1).unflatten(-1, self.shape)
        return Profiles(values.cpu(), (1 - 1 / shared.clamp(min=1)).cpu(), explained.cpu())

    def _by_displacement(self, maps: Float[Tensor, "M N N"], weight: Float[Tensor, "W N N"]) -> Float[Tensor, "M D"]:
        """The weighted mean of `maps` over the pairs that lie d apart."""
        where, size = self.where.to(maps.device), self.shape[0] * self.shape[1]

        def added(values: Tensor) -> Tensor:
            return torch.zeros(len(values), size, device=maps.device).index_add_(1, where, values.flatten(1))

        return added(maps * weight) / added(weight).clamp(min=1e-20)

    def _unexplained(self, maps: Float[Tensor, "M N N"], ideal: Float[Tensor, "M D"]) -> Float[Tensor, "M N N"]:
        """R: what the best `base[p] + follows[p] ideal[q - p]` leaves of the maps, by alternating least squares."""
        for _ in range(ROUNDS):
            shifted = ideal[:, self.where.to(maps.device)].view_as(maps)
            centre, middle = maps.mean(-1, keepdim=True), shifted.mean(-1, keepdim=True)
            varies = (shifted - middle).square().sum(-1, keepdim=True).clamp(min=1e-20)
            follows = ((maps - centre) * (shifted - middle)).sum(-1, keepdim=True) / varies
            base = centre - follows * middle
            weight = follows.square().expand_as(maps) + 1e-12
            ideal = self._by_displacement((maps - base) / (follows + 1e-12), weight)
        return maps - base - follows * shifted


class ProfileReader(Reader):
    """Keeps the profile of every head's map, image by image."""

    site = "attention"

    def __init__(self, grid: PatchGrid) -> None:
        self.grid, self.profiler = grid, Profiler(grid)
        self.kept: dict[int, list[Profiles]] = {}

    def read(self, call: AttentionCall) -> None:
        """Reduce the maps of one layer."""
        maps = self.grid.between_patches(call)
        found = self.profiler(maps.flatten(0, 1))
        by_head = (part.unflatten(0, maps.shape[:2]) for part in vars(found).values())
        self.kept.setdefault(call.layer, []).append(Profiles(*by_head))

    def result(self) -> Profiles:
        """All maps' profiles, by image, layer and head."""

        def stacked(name: str) -> Tensor:
            layers = [torch.cat([getattr(part, name) for part in self.kept[layer]]) for layer in sorted(self.kept)]
            return torch.stack(layers, 1).flatten(0, 2)

        return Profiles(stacked("values"), stacked("agreement"), stacked("explained"))


@dataclass(frozen=True)
class PatternMap:
    """Where M maps lie: `latent` `[M, 2]` (each axis scaled to spread 1), the `cluster` of each, and a name for each cluster.

    `pictures[c]` is the mean profile of cluster c. `restored` is the share of the profiles' variance that the autoencoder
    restores, `restored_linearly` what two principal components do.
    """

    latent: Float[np.ndarray, "M 2"]
    cluster: Int[np.ndarray, "M"]
    names: tuple[str, ...]
    pictures: Float[np.ndarray, "C Y X"]
    restored: float
    restored_linearly: float

    @property
    def name(self) -> np.ndarray:
        """The name of each map's cluster, `[M]` strings."""
        return np.array(self.names)[self.cluster]


@dataclass(frozen=True)
class AttentionPatterns:
    """The map of all heads and images (by image, layer, head), how often each head's maps bear each name, and mean profiles."""

    map: PatternMap
    scores: dict[str, HeadScores]
    profiles: Float[np.ndarray, "L H Y X"]

    def __getitem__(self, name: str) -> HeadScores:
        return self.scores[name]

    def of(self, head: HeadLike) -> str:
        """The name that most of a head's maps bear."""
        return max(NAMES, key=lambda name: self.scores[name][Head.of(head)])

    def to_frame(self) -> pd.DataFrame:
        """A row a head: layer, index, head, pattern (the commonest name), and the share of images with each name."""
        frame = self.scores[NAMES[0]].to_frame()[["layer", "index", "head"]].copy()
        frame["pattern"] = [self.of(head) for head in frame["head"]]
        for name in NAMES:
            frame[name] = self.scores[name].values.ravel()
        return frame


def attention_patterns(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    *,
    clusters: int = 12,
    steps: int = 600,
    grid: PatchGrid | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> AttentionPatterns:
    """What every head's attention between patches looks like on `images` (see above); `bar` counts images.

    The autoencoder takes `steps` of training on the N x L x H profiles, and k-means finds `clusters`.
    """
    check_images(images)
    grid = grid or patch_grid(model, images)
    reader = ProfileReader(grid)
    for rows in image_chunks(grid, len(images)):
        model.look({"pixel_values": images[rows]}, reader)
        bar(rows.stop - rows.start)
    return patterns_of(model, reader.result(), grid, clusters=clusters, steps=steps, seed=seed)


def patterns_of(
    model: HeadModel, profiles: Profiles, grid: PatchGrid, *, clusters: int = 12, steps: int = 600, seed: int = 0
) -> AttentionPatterns:
    """The patterns of profiles that were read already, by image, layer and head."""
    found = pattern_map(profiles, grid, clusters=clusters, steps=steps, seed=seed)
    named = found.name.reshape(-1, *model.shape)
    scores = {}
    for name in NAMES:
        meta = ABOUTS[name].provenance(model, seed, n=len(named), clusters=clusters, steps=steps)
        scores[name] = HeadScores.from_examples(f"pattern_{name}", named == name, meta)
    mean = profiles.values[:, 0].unflatten(0, (-1, *model.shape)).mean(0).double().numpy()
    return AttentionPatterns(found, scores, mean)


def pattern_map(
    profiles: Profiles, grid: PatchGrid, *, clusters: int = 12, steps: int = 600, seed: int = 0
) -> PatternMap:
    """Learn the map of `profiles`, cluster it, and name the clusters (see above). `InputError` for fewer maps than clusters."""
    if not 1 <= clusters <= len(profiles) or steps < 1:
        raise InputError(
            f"{clusters} clusters of {len(profiles)} maps in {steps} steps: give 1 step or more, and 1 cluster to as many as "
            "there are maps."
        )
    inputs = _inputs(profiles)
    latent, restored = _autoencode(inputs, steps, seed)
    cluster = _k_means(latent, clusters, np.random.default_rng(seed))
    members = [np.flatnonzero(cluster == c) for c in np.unique(cluster)]
    pictures = np.stack([profiles.values[m, 0].mean(0).double().numpy() for m in members])
    each = np.array(names_of(profiles, grid))
    names = tuple(max(NAMES, key=lambda name: (each[m] == name).sum()) for m in members)
    values = torch.linalg.svdvals(inputs).square()
    linear = float(values[:2].sum() / values.sum().clamp(min=1e-12))
    return PatternMap(latent, np.unique(cluster, return_inverse=True)[1], names, pictures, restored, linear)


def names_of(profiles: Profiles, grid: PatchGrid) -> list[str]:
    """The name of each map by itself (formulas above)."""
    names = []
    for profile, agreement, explained in zip(*vars(profiles).values(), strict=True):
        fits = pattern_fits(profile[0].double().numpy(), grid)
        content = agreement >= AGREE and explained < EXPLAINED
        names.append("content" if content else max(fits, key=lambda name: fits[name]))
    return names


def pattern_fits(profile: Float[np.ndarray, "Y X"], grid: PatchGrid) -> dict[str, float]:
    """How well each name of a position fits a mean profile, in [0, 1]."""
    dy, dx = np.mgrid[1 - grid.rows : grid.rows, 1 - grid.columns : grid.columns]
    far, pairs = np.maximum(abs(dy), abs(dx)), (grid.rows - abs(dy)) * (grid.columns - abs(dx)) / grid.patches**2
    mean = (pairs * profile).sum()
    above = pairs * np.maximum(0, profile - mean)
    if above.sum() < EVEN * mean:
        return {name: float(name == "global") for name in NAMES if name != "content"}
    weight = np.sqrt(above / above.sum())

    def fit(where: np.ndarray) -> float:
        ideal = pairs * where
        return float((weight * np.sqrt(ideal / ideal.sum())).sum())

    ks = range(1, int(far.max()) + 1)
    discs, half = [fit(far <= k) for k in ks], len(ks) // 2
    close = (far > 0) & (far <= FARTHEST_SHIFT)
    return {
        "self": fit(far == 0),
        "ring": max(fit(far == k) for k in ks),
        "row": fit(dy == 0),
        "column": fit(dx == 0),
        "global": max(discs[half:]),
        "shift": max(fit((dy == y) & (dx == x)) for y, x in zip(dy[close].tolist(), dx[close].tolist(), strict=True)),
        "near": max(discs[:half], default=0.0),
    }


def _inputs(profiles: Profiles) -> Float[Tensor, "M F"]:
    """What the autoencoder sees: both channels and the agreement, each with the same share of the variance."""
    units = nn.functional.normalize(profiles.values.flatten(2), dim=-1)
    blocks = [units[:, 0], units[:, 1], profiles.agreement[:, None]]
    centred = [block - block.mean(0) for block in blocks]
    scaled = [block / block.square().sum(1).mean().sqrt().clamp(min=1e-9) for block in centred]
    whole = torch.cat(scaled, 1)
    return whole * (whole.shape[1] / len(scaled)) ** 0.5


class _Autoencoder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = (width, 128, 32, 2)
        self.encode = _layers(sizes)
        self.decode = _layers(sizes[::-1])

    def forward(self, batch: Float[Tensor, "B F"]) -> Float[Tensor, ""]:
        return (self.decode(self.encode(batch)) - batch).square().mean()


def _layers(sizes: tuple[int, ...]) -> nn.Sequential:
    steps: list[nn.Module] = []
    for before, after in pairwise(sizes):
        steps += [nn.Linear(before, after), nn.GELU()]
    return nn.Sequential(*steps[:-1])


def _autoencode(inputs: Float[Tensor, "M F"], steps: int, seed: int) -> tuple[Float[np.ndarray, "M 2"], float]:
    """Latents, each axis with mean 0 and spread 1, and the share of variance restored."""
    return max((_train(inputs, steps, seed + i) for i in range(RESTARTS)), key=lambda found: found[1])


def _train(inputs: Float[Tensor, "M F"], steps: int, seed: int) -> tuple[Float[np.ndarray, "M 2"], float]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = _Autoencoder(inputs.shape[1])
    fit(
        network,
        lambda _: inputs[torch.randint(len(inputs), (AUTOENCODER.rows,), generator=generator)],
        replace(AUTOENCODER, steps=steps, seed=seed),
        device=inputs.device,
    )
    with torch.no_grad():
        latent = network.encode(inputs)
        lost = (network.decode(latent) - inputs).square().sum() / inputs.square().sum().clamp(min=1e-12)
    places = latent.double().numpy()
    return (places - places.mean(0)) / np.maximum(places.std(0), 1e-12), 1 - float(lost)


def _k_means(
    points: Float[np.ndarray, "M D"], k: int, rng: np.random.Generator, restarts: int = 10, rounds: int = 100
) -> Int[np.ndarray, "M"]:
    """The best of some runs of Lloyd's algorithm from k-means++ seeds."""
    best, least = np.zeros(len(points), dtype=int), np.inf
    for _ in range(restarts):
        centres = _seeds(points, k, rng)
        for _ in range(rounds):
            apart = ((points[:, None] - centres) ** 2).sum(-1)
            cluster = apart.argmin(1)
            moved = np.stack([points[cluster == c].mean(0) if (cluster == c).any() else centres[c] for c in range(k)])
            if np.allclose(moved, centres):
                break
            centres = moved
        if (total := float(apart.min(1).sum())) < least:
            best, least = cluster, total
    return best


def _seeds(points: Float[np.ndarray, "M D"], k: int, rng: np.random.Generator) -> Float[np.ndarray, "k D"]:
    """k-means++: each next centre a point drawn by its squared distance from those before."""
    centres = points[rng.integers(len(points), size=1)]
    while len(centres) < k:
        apart = ((points[:, None] - centres) ** 2).sum(-1).min(1) + 1e-12
        centres = np.concatenate([centres, points[rng.choice(len(points), p=apart / apart.sum())][None]])
    return centres
