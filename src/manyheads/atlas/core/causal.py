"""The causal check: does ablating a behaviour's heads hurt its task more than ablating random heads of the same layers?

For heads S and R random sets with as many heads in each layer as S (see `HeadSet.matched_random`), ablated by zero, by their mean
over the task or by uniform attention,

    effect(S) = mean over examples of metric(clean) - metric(S ablated)

in the metric's unit, with p as in `evaluation/controls.py`. Random sets are disjoint from S as long as its layers have enough
different ones; after that they may share heads with S, as in any permutation test, which makes them harder to beat. Where a layer
has few different sets of the size at all, p cannot fall below what they allow. Sets, not single heads: in a redundant model
ablating one of several heads changes nothing, and a head that scores low can be needed by all that score high (see the trap of
#11).
"""

from __future__ import annotations

from manyheads.atlas.core.judges import Judge
from manyheads.atlas.core.result import CausalCheck
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate, Edit, Mode
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar


def ablation_effects(
    model: HeadModel,
    name: str,
    judge: Judge,
    mode: Mode = "mean",
    *,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadScores:
    """What ablating each head alone costs the judge, `clean - ablated` in its metric's unit. Redundant heads cost nothing."""
    edits: list[Edit] = [Ablate([head], mode, judge.mean_z if mode == "mean" else None) for head in model.heads]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep, bar=bar)
    effects = (judge.clean[None] - values).T.reshape(judge.n, *model.shape)
    return HeadScores.from_examples(f"effect on {name}", effects, {"metric": judge.metric, "mode": mode, "seed": seed})


def causal_check(
    model: HeadModel,
    behaviour: str,
    heads: HeadSet,
    judge: Judge,
    mode: Mode = "zero",
    *,
    n_random: int = 20,
    seed: int = 0,
) -> CausalCheck:
    """Ablate `heads` and `n_random` >= 20 random sets matched by layer, and compare (formula above).

    Sets drawn twice count once, and the set itself not at all: `random_effects` are those of different sets.
    """
    if n_random < 20:
        raise InputError(f"a causal check needs at least 20 random sets, not {n_random}.")
    if not heads:
        raise InputError("a causal check needs at least one head; give some, such as scores.top(3).")
    # The set and its controls are variants of one sweep: the same prompts, the same clean run, so that only the heads differ.
    sets = [heads, *matched_sets(heads, n_random, seed, shape=model.shape)]
    edits: list[Edit] = [Ablate(s, mode, judge.mean_z if mode == "mean" else None) for s in sets]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep)  # [1 + R, n]
    return CausalCheck.of(behaviour, mode, heads, judge.metric, judge.clean, values)
