"""Circuits by contextual decomposition (#9, CD-T): the heads that cause an answer, searched backwards from the logits.

Hsu et al., arXiv:2407.00886. With the effects of `manyheads.trace.contextual.effects`, and {logits} as the first targets:

  1. score the heads below each target: |mean b_logit[answer] - b_logit[foil]| for the logits, R(s, T) for a head
  2. divide by the mean over the source's layer, which makes layers comparable; heads at or above the percentile join
  3. drop the head whose removal improves the circuit most, while any does; heads that joined and stayed are the next targets
  4. stop within `eps` of the full model, after two rounds without gain, or when no head is left below

A circuit C is scored by F(C), the mean logit difference with every head outside of it at its mean z (per position, over the
corrupted set), in logits. MLPs and embeddings are never ablated.

    faithfulness(C) = (F(C) - F(no heads)) / (F(all heads) - F(no heads))        1: all of it; may exceed 1

Departures. R of all pairs comes from one sweep; the paper runs again for each target. A head may be useless until the heads it
reads have joined (an induction head without its previous-token head). So one round may bring no gain, and during the search only
heads are dropped that hurt by more than 1 % of F(all heads) - F(no heads). Heads that add less than this go at the end, one by
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate, Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.recording import Recording
from manyheads.progress import Bar
from manyheads.trace.contextual.effects import Column, HeadEffects, head_effects
from manyheads.trace.contextual.splitting import Pattern

LOGITS = "logits"
WORTH = 0.01  # of the difference between all heads and none


@dataclass(frozen=True)
class ContextualCircuit:
    """The heads found, their effect on the logits, and the edges by which they joined, with their scores after step 2.

    `full`, `empty` and `value` are F of all heads, of none and of the circuit, in logits. `history` has one row a round: the
    targets, the heads that joined, those dropped, and F afterwards.
    """

    heads: HeadSet
    scores: HeadScores
    edges: dict[tuple[str, str], float]
    full: float
    empty: float
    value: float
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def faithfulness(self) -> float:
        """Faithfulness of the circuit (formula above)."""
        return (self.value - self.empty) / (self.full - self.empty)


def contextual_circuit(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    answers: Int[Tensor, "B"],
    foils: Int[Tensor, "B"],
    *,
    percentile: float = 90.0,
    eps: float = 0.1,
    column: Column = -1,
    attention: Pattern = "total",
    signs: bool = False,
    effects: HeadEffects | None = None,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> ContextualCircuit:
    """Search the circuit that favours `answers` over `foils` on the prompts `clean`, of one template.

    `corrupted` are prompts of the same template, any number, for the means. `eps` is a share of the difference between all
    heads and none. Give `effects` if the sweep was done before; `bar` counts its heads times examples. `InputError` if the
    mean logit difference with all heads is no larger than with none.
    """
    if not 0 <= percentile <= 100 or not 0 <= eps < 1:
        raise InputError(
            f"got percentile {percentile} and eps {eps}; give a percentile from 0 to 100 and eps from 0 to below 1."
        )
    mean = model.mean_z(corrupted, by_position=True)
    if effects is None:
        effects = head_effects(
            model, clean, mean, answers, foils, column=column, attention=attention, signs=signs,
            max_tokens=max_tokens, bar=bar,
        )  # fmt: skip
    trial = _Trial(model, model.record(clean), mean, answers, foils, column)
    full, empty = trial(model.heads), trial(model.head_set([]))
    if full <= empty:
        raise InputError(
            f"the logit difference is {full:.3g} with all heads and {empty:.3g} with none, so there is no circuit to find; "
            "give prompts on which heads favour the answers."
        )
    heads, best, edges = model.head_set([]), (model.head_set([]), empty), dict[tuple[str, str], float]()
    targets: list[Head | None] = [None]
    history: list[dict[str, Any]] = []
    no_gain = 0
    while targets and no_gain < 2 and best[1] < full - eps * (full - empty):
        joined = _candidates(effects, targets, percentile)
        larger = model.head_set(heads | {head for head, _ in joined})
        pruned, value = _pruned(trial, larger, WORTH * (full - empty))
        history.append(_row(targets, larger - heads, larger - pruned, value))
        edges |= {(str(s), _name(t)): score for (s, t), score in joined.items()}
        targets = [head for head in pruned - heads if head.layer > 0]
        heads, no_gain = pruned, 0 if value > best[1] else no_gain + 1
        best = max(best, (heads, value), key=lambda found: found[1])
    # A negative bound: now heads go whose removal costs less than their worth.
    heads, value = _pruned(trial, best[0], -WORTH * (full - empty)) if best[0] else best
    names = {LOGITS, *map(str, heads)}
    edges = {edge: score for edge, score in edges.items() if names.issuperset(edge)}
    return ContextualCircuit(heads, effects.scores(), edges, full, empty, value, history)


@dataclass(frozen=True)
class _Trial:
    """F of circuits: the mean logit difference with all other heads at their mean."""

    model: HeadModel
    recording: Recording
    mean: Tensor
    answers: Tensor
    foils: Tensor
    column: Column

    def __call__(self, *circuits: HeadSet) -> Any:
        edits: list[Edit] = [Ablate(self.model.heads - c, "mean", self.mean) for c in circuits]
        last = isinstance(self.column, int) and self.column == -1
        values = self.model.sweep(self.recording, edits, self._difference, keep=1 if last else None).mean(1)
        return float(values[0]) if len(values) == 1 else values

    def _difference(self, logits: Tensor) -> Float[Tensor, "B"]:
        rows = torch.arange(len(logits), device=logits.device)
        at = logits if logits.ndim == 2 else logits[rows, self.column]
        return at[rows, self.answers.to(at.device)] - at[rows, self.foils.to(at.device)]


def _candidates(
    effects: HeadEffects, targets: list[Head | None], percentile: float
) -> dict[tuple[Head, Head | None], float]:
    """Each target's heads at or above the percentile of its scores, and the score: steps 1 and 2."""
    edges = {}
    for target in targets:
        scores = normalised(effects.on(target))
        bar = np.nanpercentile(scores, percentile)
        for layer, index in np.argwhere(scores >= bar):
            edges[Head(int(layer), int(index)), target] = float(scores[layer, index])
    return edges


def normalised(scores: Float[np.ndarray, "L H"]) -> Float[np.ndarray, "L H"]:
    """Scores over the mean magnitude of their layer; NaN stays NaN, a layer of zeros stays zero."""
    sizes = np.abs(scores)
    known = ~np.isnan(sizes)
    mean = np.where(known, sizes, 0).sum(1, keepdims=True) / known.sum(1, keepdims=True).clip(1)
    return np.where(known, scores / np.where(mean > 0, mean, 1), np.nan)


def _pruned(trial: _Trial, heads: HeadSet, by_more: float) -> tuple[HeadSet, float]:
    """Drop the head whose removal raises F most, while F rises by more than `by_more` (negative: falls by less)."""
    value = trial(heads)
    while len(heads) > 1:
        without = [heads - HeadSet([head]) for head in heads]
        values = np.atleast_1d(trial(*without))
        best = int(values.argmax())
        if values[best] <= value + by_more:
            break
        heads, value = without[best], float(values[best])
    return heads, value


def _row(targets: list[Head | None], joined: HeadSet, dropped: HeadSet, value: float) -> dict[str, Any]:
    return {"targets": [_name(t) for t in targets], "joined": str(joined), "dropped": str(dropped), "value": value}


def _name(target: Head | None) -> str:
    return LOGITS if target is None else str(target)
