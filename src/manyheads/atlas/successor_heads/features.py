"""Mod-10 features (#4): the directions in E0 that a successor head reads, and whether they mean "index modulo 10".

Gould et al., arXiv:2312.09230. A feature f (see `dictionaries`) with activation a_f(t) is taken out of an ordinal's embedding;
the one that costs the head's successor logit most is the feature of t, and a feature is labelled by its tokens:

    drop[t, f] = c(E0[t]) - c(E0[t] - a_f(t) d_f),    c = successor's logit - mean logit of its domain       logits
    winner[t] = argmax_f drop[t, f],    label[f] = mode of index(t) mod 10 over the t that f wins
    coverage[r] = max over f with label r of  |{t of residue r won by f}| / |{t of residue r}|               in [0, 1]

The paper takes the plain successor logit; its directions of a whole domain would then count, though they move all logits of the
domain alike and leave the head's choice as it is. A feature has one label, so a feature that wins everywhere covers one residue.
Cross-checks: a linear probe of the residue (cosine with the features), the same question put to the first MLP's neurons and to
random directions, and shuffled residues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.successor_heads.dictionaries import Dictionary, mlp_neurons, random_directions, sparse_autoencoders
from manyheads.atlas.successor_heads.ordinals import MODULUS, OrdinalCircuit, Ordinals
from manyheads.errors import InputError
from manyheads.progress import Bar

STRONGEST = 64  # features tried a token, those that write most: neurons are many, and most write next to nothing
ABOUT = About(
    name="successor_features",
    title="Mod-10 features",
    what="The directions that the successor head reads stand for the index modulo 10, whatever the kind of ordinal.",
    formula="share of a residue's ordinals whose decisive feature is that residue's",
    unit="share",
    paper="arXiv:2312.09230",
    threshold=0.5,
    kind="succession",
)


@dataclass(frozen=True)
class Features:
    """The feature that decides each ordinal: `winner[n]` (-1: none, or no successor) and what taking it out costs."""

    dictionary: Dictionary
    tokens: Ordinals
    winner: Int[Tensor, "N"]
    drop: Float[Tensor, "N"]

    def won(
        self, where: Bool[Tensor, "N"] | None = None, residue: Int[Tensor, "N"] | None = None
    ) -> Int[Tensor, "F R"]:
        """How many ordinals of each residue each feature decides."""
        counted = self.winner >= 0 if where is None else (self.winner >= 0) & where
        residue = self.tokens.residue if residue is None else residue
        table = torch.zeros(self.dictionary.directions.shape[0], MODULUS, dtype=torch.long)
        one = torch.ones(int(counted.sum()), dtype=torch.long)
        return table.index_put_((self.winner[counted], residue[counted]), one, accumulate=True)

    @cached_property
    def modal(self) -> Int[Tensor, "R"]:
        """The feature that covers each residue; -1 where none is labelled with it."""
        return _modal(self.won())

    @cached_property
    def coverage(self) -> Float[Tensor, "R"]:
        """Share of each residue's ordinals decided by its feature (formula above)."""
        return self._coverage(self.tokens.residue)

    def shuffled_coverage(self, n: int = 20, seed: int = 0) -> float:
        """The mean coverage if the ordinals had their residues in another order: what labels by majority get for nothing."""
        generator = torch.Generator().manual_seed(seed)
        orders = [torch.randperm(len(self.tokens), generator=generator) for _ in range(n)]
        return float(torch.stack([self._coverage(self.tokens.residue[order]).mean() for order in orders]).mean())

    def reads(self, fit: Bool[Tensor, "N"]) -> float:
        """Share of the ordinals outside `fit` whose decisive feature, labelled on `fit` alone, has their residue."""
        table = self.won(fit)
        label = torch.where(table.sum(1) > 0, table.argmax(1), -1)
        test = ~fit & self.tokens.has_successor
        if not test.any() or not (fit & self.tokens.has_successor).any():
            return float("nan")
        decided = self.winner[test] >= 0
        right = label[self.winner[test].clamp(min=0)] == self.tokens.residue[test]
        return float((right & decided).double().mean())

    @property
    def directions(self) -> Float[Tensor, "R D"]:
        """Each residue's feature; NaN where it has none."""
        found = self.dictionary.directions[self.modal.clamp(min=0)]
        return torch.where((self.modal >= 0)[:, None].to(found.device), F.normalize(found, dim=-1), torch.nan)

    def _coverage(self, residue: Int[Tensor, "N"]) -> Float[Tensor, "R"]:
        table = self.won(residue=residue)
        modal = _modal(table)
        share = table[modal.clamp(min=0), torch.arange(MODULUS)].double()
        asked = torch.bincount(residue[self.tokens.has_successor], minlength=MODULUS).clamp(min=1)
        return torch.where(modal >= 0, share / asked, 0.0)


def decisive_features(circuit: OrdinalCircuit, dictionary: Dictionary) -> Features:
    """Which feature of `dictionary` decides each ordinal for the heads of `circuit` (formula above)."""
    tokens, x = circuit.tokens, circuit.embeddings
    strength = dictionary.activations.abs() * dictionary.directions.norm(dim=-1)
    winner = torch.full((len(tokens),), -1)
    drop = torch.zeros(len(tokens))
    for row in tokens.has_successor.nonzero()[:, 0].tolist():
        features = strength[row].topk(min(STRONGEST, strength.shape[1])).indices
        features = features[strength[row, features] > 0]
        taken = dictionary.activations[row, features, None] * dictionary.directions[features]
        tried = torch.cat([x[row : row + 1], x[row] - taken])
        values = circuit.contrast(tried, torch.full((len(tried),), row))
        cost = values[0] - values[1:]
        if len(cost) and cost.max() > 0:
            drop[row], winner[row] = cost.max(), features[cost.argmax()].cpu()
    return Features(dictionary, tokens, winner, drop)


def linear_probe(x: Float[Tensor, "N D"], residue: Int[Tensor, "N"], *, decay: float = 1e-2) -> Float[Tensor, "R D"]:
    """A ten-way softmax probe of the residue: the gradient of each residue's score against the mean of all, of length 1."""
    inputs = (x - x.mean(0)) / (x - x.mean(0)).norm(dim=1).mean()
    weight = torch.zeros(MODULUS, x.shape[1], device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
    target = residue.to(x.device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(inputs @ weight.T, target) + decay * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return F.normalize((weight - weight.mean(0)).detach(), dim=-1)


def residue_means(x: Float[Tensor, "N D"], residue: Int[Tensor, "N"]) -> Float[Tensor, "R D"]:
    """The simplest features: each residue's mean embedding less the mean of all, of length 1. NaN for absent residues."""
    means = torch.stack([x[(residue == r).to(x.device)].mean(0) for r in range(MODULUS)])
    return F.normalize(means - x.mean(0), dim=-1)


@dataclass(frozen=True)
class Mod10:
    """How well a head's (or a summed circuit's) features stand for the index. Shares in [0, 1]; lists by autoencoder.

    explained         share of the variance of E0 that the autoencoder rebuilds
    coverage          mean over residues of the share of its ordinals that its feature decides
    shuffled          the same with residues shuffled over the ordinals
    transfer          share of non-digit items whose feature, labelled on the digits, has their index modulo 10 (NaN: no others)
    probe_cosine      mean cosine of a residue's feature and its probe direction; `probe_mismatch`: of the other residues' probes
    probe_accuracy    of the probe, on the fifth of the ordinals that it was not fitted on; `probe_shuffled`: residues shuffled
    neuron_coverage   coverage by single neurons of the first MLP; `random_coverage`: by as many random directions as features
    """

    features: list[Features]
    explained: list[float]
    coverage: list[float]
    shuffled: list[float]
    transfer: list[float]
    probe_cosine: list[float]
    probe_mismatch: float
    probe_accuracy: float
    probe_shuffled: float
    neuron_coverage: float
    random_coverage: float
    score: float
    meta: dict[str, Any]

    @property
    def best(self) -> Features:
        """The features of the autoencoder with the highest coverage."""
        return self.features[max(range(len(self.features)), key=lambda i: self.coverage[i])]


def successor_features(
    circuit: OrdinalCircuit,
    *,
    digits: Sequence[str] | None = None,
    n: int = 4,
    n_features: int = 32,
    sparsity: float = 0.05,
    steps: int = 600,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Mod10:
    """Find the mod-10 features of a circuit by `n` sparse autoencoders, with the cross-checks and baselines of `Mod10`.

    `digits` names the classes that label features for `transfer`; by default the longest, and those at least half as long.
    `bar` counts training steps. `UnsupportedError` where the first MLP has no neurons to ablate.
    """
    tokens, x = circuit.tokens, circuit.embeddings
    if circuit.embed == "embed":
        raise InputError("features are read off E0; give an OrdinalCircuit with embed='mlp' or 'sum'.")
    trained = sparse_autoencoders(x, n=n, n_features=n_features, sparsity=sparsity, steps=steps, seed=seed, bar=bar)
    found = [decisive_features(circuit, one) for one in trained]
    neurons = decisive_features(circuit, mlp_neurons(circuit.model, tokens.ids.to(x.device)))
    chance = decisive_features(circuit, random_directions(x, n_features=n_features, seed=seed))
    sizes = torch.bincount(tokens.domain)
    long = [i for i, size in enumerate(sizes) if 2 * size >= sizes.max()]
    chosen = [tokens.of(name) for name in digits] if digits is not None else [tokens.domain == i for i in long]
    fit = torch.stack(chosen).any(0)
    cosines = [one.directions @ linear_probe(x, tokens.residue).T for one in found]
    off = ~torch.eye(MODULUS, dtype=torch.bool, device=x.device)
    shuffled = tokens.residue[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    heads = [str(h) for h in circuit.heads]
    settings = {"heads": heads, "n": n, "n_features": n_features, "sparsity": sparsity, "steps": steps}
    return Mod10(
        features=found,
        explained=[one.dictionary.explained for one in found],
        coverage=[float(one.coverage.mean()) for one in found],
        shuffled=[one.shuffled_coverage(seed=seed) for one in found],
        transfer=[one.reads(fit) for one in found],
        probe_cosine=[float(table.diagonal().nanmean()) for table in cosines],
        probe_mismatch=float(torch.stack([table[off].nanmean() for table in cosines]).mean()),
        probe_accuracy=_probe_accuracy(x, tokens.residue, seed),
        probe_shuffled=_probe_accuracy(x, shuffled, seed),
        neuron_coverage=float(neurons.coverage.mean()),
        random_coverage=float(chance.coverage.mean()),
        score=circuit.score(),
        meta=ABOUT.provenance(circuit.model, seed, embed=circuit.embed, **settings),
    )


def _modal(table: Int[Tensor, "F R"]) -> Int[Tensor, "R"]:
    label = torch.where(table.sum(1) > 0, table.argmax(1), -1)
    own = torch.where(label[:, None] == torch.arange(MODULUS), table, 0)
    return torch.where(own.max(0).values > 0, own.argmax(0), -1)


def _probe_accuracy(x: Float[Tensor, "N D"], residue: Int[Tensor, "N"], seed: int) -> float:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    test, fit = order[: len(x) // 5], order[len(x) // 5 :]
    guess = ((x[test] - x[fit].mean(0)) @ linear_probe(x[fit], residue[fit]).T).argmax(-1).cpu()
    return float((guess == residue[test]).double().mean())
