"""Circuit reuse (#34): do two tasks run on the same heads? (`repair` makes shared heads act in one task as in the other.)

Merullo et al., arXiv:2310.08744. A task's circuit is found by path patching backwards: first the logits receive, then the
queries, keys and values of the heads just found. With m = logit(answer) - logit(foil), of each stage R

    effect_R[s] = (m(s -> R) - m) / (m_twin - m)            share of the logit difference
    importance[s] = effect_R[s] of the stage R where |effect_R[s]| is largest
    circuit = union over stages of the top `share` of all heads by |effect_R|, those of at least `least`
    overlap(A, B) = |A and B| / max(|A|, |B|)               in [0, 1]

A null gives the overlap of two unrelated circuits: heads of B redrawn from all heads, and redrawn within their layers.
p is of the number of shared heads; circuits keep to certain layers anyway, and later work (arXiv:2605.08348) finds that unrelated
tasks share most of theirs.

Departures: the paper takes 2 % of 384 heads a stage, however small the effect, and picks the next receivers by hand; we take
those of at least `least`, and all of them. Receivers' inputs are replaced at all positions, in the released code at the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import ceil
from typing import Literal

import numpy as np
from jaxtyping import Float

from manyheads.atlas.circuits.ioi import path_effects
from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import Part
from manyheads.progress import Bar
from manyheads.tasks import Example, Task, TaskBatch
from manyheads.tasks.pairs import twinned

PARTS: tuple[Part, ...] = ("query", "key", "value")
ABOUT = About(
    name="circuit",
    title="Circuit importance",
    what="Carries the difference between a prompt and its twin to the answer, directly or through heads that do.",
    formula="share of the logit difference that one path from the head carries, of the path where it is largest",
    unit="share",
    paper="arXiv:2310.08744",
    threshold=0.02,
    kind="circuit",
    low=-1.0,
)


@dataclass(frozen=True)
class Stage:
    """One step backwards: what received ("logits", or a part of the heads found before), and the heads it added."""

    receiver: Literal["logits"] | Part
    of: HeadSet
    found: HeadSet


@dataclass(frozen=True)
class TaskCircuit:
    """The heads a task runs on, what each of them carries, and how they were found."""

    heads: HeadSet
    importance: HeadScores
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class Overlap:
    """How much two circuits share, what chance would share, and how rarely chance shares as much."""

    shared: HeadSet
    sizes: tuple[int, int]
    overlap: float
    chance: float
    p_value: float
    chance_by_layer: float
    p_by_layer: float


def task_circuit(
    model: HeadModel,
    task: Task | Sequence[Example] | TaskBatch,
    *,
    share: float = 0.02,
    least: float = 0.02,
    depth: int = 2,
    n: int = 24,
    seed: int = 0,
    bar: Bar = Bar(),
) -> TaskCircuit:
    """The circuit of a task whose examples have twins and foils (definition above), `depth` steps back from the logits' heads.

    Every stage takes at most the top `share` of all heads, at least one. Costs `1 + 3 depth` sweeps of path patching.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; give the part of all heads that a stage may add, in (0, 1].")
    batch = twinned(model, task, n, seed)
    most = ceil(share * len(model.heads))
    largest = effects = path_effects(model, batch)
    bar(len(batch))
    found = _top(model, effects.mean(0), most, least)
    stages = [Stage("logits", HeadSet(), found)]
    heads, frontier = found, found
    for _ in range(depth):
        new = HeadSet(shape=model.shape)
        for part in PARTS if frontier and max(h.layer for h in frontier) else ():
            effects = path_effects(model, batch, [(h, part) for h in frontier])
            bar(len(batch))
            larger = np.abs(effects.mean(0)) > np.abs(largest.mean(0))
            largest = np.where(larger, effects, largest)
            stages.append(Stage(part, frontier, _top(model, effects.mean(0), most, least)))
            new = new | stages[-1].found
        frontier = new - heads
        heads = heads | new
    name = task.name if isinstance(task, Task) else "examples"
    meta = ABOUT.provenance(model, seed, task=name, share=share, least=least, depth=depth, n=len(batch))
    meta["circuit"] = [str(h) for h in heads]
    return TaskCircuit(heads, HeadScores.from_examples(f"{ABOUT.name}/{name}", largest, meta), tuple(stages))


def overlap(a: HeadSet, b: HeadSet, *, draws: int = 1000, seed: int = 0) -> Overlap:
    """Shared heads of two circuits of one model against chance (definition above)."""
    shape = a.shape or b.shape
    if not a or not b:
        raise InputError("one of the circuits has no heads; lower least= or raise share=.")
    if shape is None:
        raise InputError("these HeadSets do not know their model; make them with model.head_set(...).")
    shared = a & b
    rng = np.random.default_rng(seed)
    mine = np.zeros(shape, dtype=bool)
    mine[tuple(np.array([*a]).T)] = True
    flat = np.array([mine.ravel()[rng.permutation(mine.size)[: len(b)]].sum() for _ in range(draws)])
    layers = b.by_layer()
    by_layer = np.array(
        [
            sum(mine[layer][rng.permutation(shape[1])[: len(i)]].sum() for layer, i in layers.items())
            for _ in range(draws)
        ]
    )
    larger = max(len(a), len(b))
    return Overlap(
        shared=shared,
        sizes=(len(a), len(b)),
        overlap=len(shared) / larger,
        chance=float(flat.mean() / larger),
        p_value=p_value(len(shared), flat),
        chance_by_layer=float(by_layer.mean() / larger),
        p_by_layer=p_value(len(shared), by_layer),
    )


def reuse(circuits: Mapping[str, TaskCircuit], *, draws: int = 1000, seed: int = 0) -> dict[tuple[str, str], Overlap]:
    """The overlap of every pair of circuits, by their names."""
    pairs = combinations(circuits, 2)
    return {(a, b): overlap(circuits[a].heads, circuits[b].heads, draws=draws, seed=seed) for a, b in pairs}


def _top(model: HeadModel, effects: Float[np.ndarray, "L H"], most: int, least: float) -> HeadSet:
    magnitude = np.abs(effects)
    order = np.argsort(-magnitude, axis=None, kind="stable")[:most]
    heads = [divmod(int(i), model.n_heads) for i in order if magnitude.flat[i] >= least]
    return model.head_set(heads)
