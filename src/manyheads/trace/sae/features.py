"""Meaning of the features of an attention-output autoencoder (#10): cards, families, and polysemantic heads.

Kissane et al., arXiv:2406.17759, inspect features by hand; the automatic scores here are our reading of their criteria.

    short context   mean over a feature's top examples of (activation with only the last few tokens before it) / activation
                    at 0.7 or more "short context", at 0.3 or less "long context"                          about [0, 1]
    induction       mean over top examples of the share of positive direct attribution, over the first token, that comes from
                    tokens right after an earlier copy of the current token; 0.5 or more "induction"    [0, 1]

Two features share a concept if both are induction features, or if the current tokens, the most attributed source tokens or the
tokens they promote overlap by a third or more (sum over tokens of the smaller share). A head's concepts are the groups that
its top features, by share of decoder norm, form by sharing. With one group it may have a single meaning, with more it is
polysemantic. The baseline is as many random features of the same layer.

Cutting context shifts positions: with learned absolute positions "long context" may just mean another position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import output_rows
from manyheads.model.norms import FoldedNorm
from manyheads.model.weights.qkv import head_weights
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.trace.sae.attribution import source_terms
from manyheads.trace.sae.autoencoder import AttentionSae

SHORT, LONG, INDUCTION, OVERLAP = 0.7, 0.3, 0.5, 1 / 3
ROWS = 64  # prompts of one forward pass


@dataclass(frozen=True)
class FeatureExample:
    """A position where a feature is active, in its row of tokens; `sources` and `heads` are its direct attribution there."""

    ids: Int[np.ndarray, "T"]
    position: int
    activations: Float[np.ndarray, "T"]
    sources: Float[np.ndarray, "T"]
    heads: Float[np.ndarray, "H"]
    short: float
    induction: float

    @property
    def activation(self) -> float:
        """The feature's activation at `position`."""
        return float(self.activations[self.position])


@dataclass(frozen=True)
class FeatureCard:
    """One feature. `density`: share of tokens it is active on; `head_shares`: of its decoder norm; `top` and `bottom`: the
    tokens whose logits it raises and lowers most (effect on the centred logit, before the final norm's denominator)."""

    feature: int
    density: float
    head_shares: Real[np.ndarray, "H"]
    top: list[tuple[int, float]]
    bottom: list[tuple[int, float]]
    examples: list[FeatureExample] = field(repr=False)

    @property
    def short(self) -> float:
        """Short-context score (formula above); NaN for a feature that is never active."""
        return float(np.mean([e.short for e in self.examples])) if self.examples else float("nan")

    @property
    def induction(self) -> float:
        """Induction score (formula above); NaN for a feature that is never active."""
        return float(np.mean([e.induction for e in self.examples])) if self.examples else float("nan")

    @property
    def families(self) -> list[str]:
        """Those of "short context", "long context" and "induction" whose bounds it reaches."""
        found = ["short context"] * (self.short >= SHORT) + ["long context"] * (self.short <= LONG)
        return found + ["induction"] * (self.induction >= INDUCTION)

    def shares_concept(self, other: FeatureCard) -> bool:
        """Whether two features count as one concept (criterion above)."""
        if min(self.induction, other.induction) >= INDUCTION:
            return True
        return any(_overlap(a, b) >= OVERLAP for a, b in zip(self._tokens(), other._tokens(), strict=True))

    def _tokens(self) -> tuple[Counter[int], Counter[int], Counter[int]]:
        current = Counter(int(e.ids[e.position]) for e in self.examples)
        source = Counter(int(e.ids[e.sources.argmax()]) for e in self.examples)
        return current, source, Counter(token for token, _ in self.top)


@dataclass(frozen=True)
class FeatureReport(Reported):
    """Cards of some features with their autoencoder and model, and `polysemanticity` if measured; written as a page."""

    cards: Sequence[FeatureCard]
    sae: AttentionSae
    model: HeadModel
    heads: Polysemanticity | None = None


def feature_cards(
    model: HeadModel,
    sae: AttentionSae,
    batches: Iterable[Int[Tensor, "B T"]],
    features: Sequence[int] | None = None,
    *,
    examples: int = 10,
    tokens: int = 10,
    context: int = 4,
    bar: Bar = Bar(),
) -> list[FeatureCard]:
    """Cards of `features` (None: all active ones), from the rows of `batches` in which they are most active.

    A row gives a feature at most one example. For the short-context score `context` tokens remain, the current one included,
    after the row's first token. `bar` gets the number of features done. `InputError` for rows of different lengths.
    """
    sae.check(model, force=True)
    ids, best, places, density = _strongest(model, sae, batches, examples)
    wanted = (density > 0).nonzero()[:, 0].tolist() if features is None else list(features)
    if any(not 0 <= i < sae.n_features for i in wanted):
        raise InputError(
            f"got features from {min(wanted)} to {max(wanted)}; this autoencoder has 0 to {sae.n_features - 1}."
        )
    shares, effects = sae.head_shares(), logit_effects(model, sae, wanted)
    cards: list[FeatureCard] = []
    for feature, effect in zip(wanted, effects, strict=True):
        order = effect.argsort(descending=True).tolist()
        active = best[feature] > 0
        rows, positions = places[feature][active].unbind(-1)
        cards.append(
            FeatureCard(
                feature,
                float(density[feature]),
                shares[feature].numpy(),
                [(i, float(effect[i])) for i in order[:tokens]],
                [(i, float(effect[i])) for i in order[::-1][:tokens]],
                _examples(model, sae, ids[rows], positions, feature, context),
            )
        )
        bar(len(cards))
    return cards


def logit_effects(model: HeadModel, sae: AttentionSae, features: Sequence[int]) -> Float[Tensor, "N V"]:
    """The direct effect of one unit of each feature on all logits, centred over tokens, before the final norm's denominator."""
    layout = model.layout
    if layout.unembedding is None or layout.final_norm is None:
        raise UnsupportedError(
            f"{type(model.plain).__name__} lacks a final norm or an unembedding, which logit effects need; give a language model."
        )
    W_O = head_weights(model)[sae.layer].W_O.detach().double().flatten(0, 1).cpu() * layout.residual_scale
    norm = FoldedNorm.of(layout.final_norm, layout.hidden_size)
    written = norm.direction((sae.W_dec[list(features)].double() @ W_O).to(norm.gain.device))
    weight = output_rows(layout.unembedding, torch.arange(model.vocab_size)).detach()
    effects = (written.to(weight) @ weight.T).float().cpu()
    return effects - effects.mean(-1, keepdim=True)


@dataclass(frozen=True)
class Polysemanticity:
    """For each head its top `features`, and the number of `concepts` they form; `random`: the same number for random sets."""

    layer: int
    features: list[list[int]]
    concepts: Int[np.ndarray, "H"]
    random: Int[np.ndarray, "R"]

    @property
    def share(self) -> float:
        """The share of the layer's heads with more than one concept."""
        return float((self.concepts > 1).mean())

    @property
    def random_share(self) -> float:
        """The same share of the random sets of features: the baseline."""
        return float((self.random > 1).mean())


def polysemanticity(cards: Sequence[FeatureCard], layer: int, *, top: int = 10, seed: int = 0) -> Polysemanticity:
    """The number of concepts of each head's `top` features (criterion above), and of 20 random sets of features.

    `cards` should hold all active features of the layer's autoencoder. `InputError` for fewer than `top`.
    """
    active = [card for card in cards if card.examples]
    if len(active) < top:
        raise InputError(
            f"an estimate from {top} features a head needs as many active ones; got {len(active)}, so give a smaller `top`."
        )
    shares = np.stack([card.head_shares for card in active])
    chosen = [np.argsort(-shares[:, h], kind="stable")[:top] for h in range(shares.shape[1])]
    rng = np.random.default_rng(seed)
    drawn = [rng.choice(len(active), top, replace=False) for _ in range(20)]
    return Polysemanticity(
        layer,
        [[active[i].feature for i in members] for members in chosen],
        np.array([_groups([active[i] for i in members]) for members in chosen]),
        np.array([_groups([active[i] for i in members]) for members in drawn]),
    )


def _groups(cards: Sequence[FeatureCard]) -> int:
    """Number of connected components under sharing a concept."""
    same = np.array([[one.shares_concept(other) for other in cards] for one in cards])
    reach = np.linalg.matrix_power(same.astype(float), len(cards)) > 0
    return len(np.unique(reach, axis=0))


def _overlap(one: Counter[int], other: Counter[int]) -> float:
    if not one or not other:
        return 0.0
    return sum(min(one[i] / one.total(), other[i] / other.total()) for i in one)


def _strongest(
    model: HeadModel, sae: AttentionSae, batches: Iterable[Tensor], n: int
) -> tuple[Int[Tensor, "N T"], Float[Tensor, "F n"], Int[Tensor, "F n 2"], Float[Tensor, "F"]]:
    """All rows; each feature's `n` highest activations in different rows, where they are, and its density."""
    rows: list[Tensor] = []
    best, places = torch.zeros(sae.n_features, 0), torch.zeros(sae.n_features, 0, 2, dtype=torch.long)
    active, count, seen = torch.zeros(sae.n_features), 0, 0
    for ids in (part for batch in batches for part in batch.split(ROWS)):
        if rows and ids.shape[1] != rows[0].shape[1]:
            raise InputError(f"got rows of {rows[0].shape[1]} and of {ids.shape[1]} tokens; give rows of one length.")
        found = sae.read(model, ids).float().cpu()
        active, count = active + (found > 0).sum((0, 1)), count + ids.numel()
        value, position = found.max(1)
        here = torch.stack([torch.arange(seen, seen + len(ids))[:, None].expand_as(position), position], -1)
        best, places = torch.cat([best, value.T], 1), torch.cat([places, here.transpose(0, 1)], 1)
        order = best.argsort(dim=-1, descending=True, stable=True)[:, :n]
        best, places = best.gather(1, order), places.gather(1, order[..., None].expand(-1, -1, 2))
        rows.append(ids.cpu())
        seen += len(ids)
    if not rows:
        raise InputError("got no batches of tokens to find features on; give at least one.")
    return torch.cat(rows), best, places, active / count


def _examples(
    model: HeadModel,
    sae: AttentionSae,
    ids: Int[Tensor, "n T"],
    positions: Int[Tensor, "n"],
    feature: int,
    context: int,
) -> list[FeatureExample]:
    if not len(ids):
        return []
    activations = sae.read(model, ids)[..., feature].double().cpu()
    terms = source_terms(model, sae, ids, torch.full_like(positions, feature), positions).cpu()
    short = _short(model, sae, ids, positions, feature, context).double()
    return [
        FeatureExample(
            ids[i].numpy(),
            position,
            activations[i].numpy(),
            terms[i].sum(0).numpy(),
            terms[i].sum(1).numpy(),
            float(short[i] / activations[i, position]),
            _induction(ids[i], position, terms[i].sum(0)),
        )
        for i, position in enumerate(positions.tolist())
    ]


def _short(
    model: HeadModel,
    sae: AttentionSae,
    ids: Int[Tensor, "n T"],
    positions: Int[Tensor, "n"],
    feature: int,
    context: int,
) -> Float[Tensor, "n"]:
    """The feature's activation with only a row's first token and the last `context` ones up to its position."""
    cut = [torch.cat([row[:1], row[max(1, at + 1 - context) : at + 1]]) for row, at in zip(ids, positions, strict=True)]
    found = torch.zeros(len(cut))
    for length in {len(row) for row in cut}:
        same = [i for i, row in enumerate(cut) if len(row) == length]
        found[same] = sae.read(model, torch.stack([cut[i] for i in same]))[:, -1, feature].float().cpu()
    return found


def _induction(row: Int[Tensor, "T"], position: int, sources: Float[Tensor, "T"]) -> float:
    """The share of positive attribution from tokens right after earlier copies of the current token."""
    copies = [i + 1 for i in range(1, position) if row[i] == row[position]]
    positive = sources[1 : position + 1].clamp_min(0)
    total = float(positive.sum())
    return float(sources[copies].clamp_min(0).sum()) / total if total > 0 else 0.0
