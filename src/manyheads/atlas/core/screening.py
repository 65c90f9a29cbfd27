"""What ablating each head alone costs a judge, found with few ablations: heads that cannot matter are ablated in groups.

Exact effects of all L H heads need as many ablations. Here (group testing, Dorfman 1943, guided by gradients):

1. One backward pass estimates every head's effect by a first-order step (attribution patching, Nanda 2023),

       estimate[h] = - sum over positions of <mean_z[h] - z[h], d metric / d z[h]>

2. The `first` heads of largest |estimate| are ablated one by one.
3. The others of each layer whose estimates have the same sign are ablated together. A group *matters* if its effect is at least
   `SMALL` of the largest effect of one head so far, and at least `NOISE` of its standard errors. A group that matters is split in
   two, by rank of estimate, down to single heads; largest groups first, for as long as the budget lasts.

Every head ends up ablated alone, or in a group with a known effect. Redundant heads hide from single ablations, but not from
groups: several can only matter more together. What can be missed are heads of one group whose effects cancel, and those that are
smaller than the group's noise. `manyheads bench screening` counts both beside exact effects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from manyheads.atlas.core.judges import Judge
from manyheads.errors import UnsupportedError
from manyheads.heads import Head, HeadScores, mean_stderr
from manyheads.model.editing.edits import Ablate, Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.streaming import Stream
from manyheads.progress import Bar

SMALL = 0.02  # a group's effect below this share of the largest effect of one head says that its heads do not matter
NOISE = 1.28  # standard errors of a group's effect below which it is noise (two-sided p of .2)
FIRST = 0.1  # share of all heads that are ablated alone from the start


def estimated_effects(model: HeadModel, judge: Judge) -> Float[np.ndarray, "N L H"]:
    """The first-order estimate of what mean ablation of each head costs each example (formula above): one backward pass.

    `UnsupportedError` where layers cannot be run one at a time.
    """
    stream = Stream.of(model, judge.recording.inputs)
    estimates = np.full((judge.n, *model.shape), np.nan)
    for gradients in stream.gradients(judge.score, ["z"], keep=judge.keep):
        if "z" in gradients.inner:
            z = gradients.values["z"]
            change = judge.mean_z[gradients.layer].to(z) - z
            estimates[:, gradients.layer] = -(gradients.inner["z"] * change).sum((1, 3)).double().cpu().numpy()
    return estimates


@dataclass
class _Group:
    """Heads that were ablated together, in order of rank, with what that cost each example."""

    heads: tuple[Head, ...]
    effects: Float[np.ndarray, "N"] = field(default_factory=lambda: np.zeros(0))

    @property
    def size(self) -> float:
        return abs(float(self.effects.mean()))

    def matters(self, largest: float) -> bool:
        """Whether one of its heads can matter (see above)."""
        if self.size < SMALL * largest:
            return False
        mean, stderr = mean_stderr(self.effects)
        if not stderr > 0:
            return self.size > 0
        return bool(abs(mean) >= NOISE * stderr)

    def halves(self) -> list[_Group]:
        cut = (len(self.heads) + 1) // 2
        return [_Group(self.heads[:cut]), _Group(self.heads[cut:])]


def screened_effects(
    model: HeadModel,
    name: str,
    judge: Judge,
    *,
    first: int | None = None,
    most: int | None = None,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadScores:
    """What mean ablation of each head alone costs the judge, `clean - ablated` in its metric's unit, by screening (see above).

    `first` heads are ablated alone from the start (default: a tenth); there are at most `most` ablations. A head that was not
    ablated alone is NaN; `meta["screening"]` has the estimates, the groups that such heads are in with their effects, and how
    many ablations were made. `bar` counts ablations.
    """
    n_heads = len(model.heads)
    most = n_heads if most is None else most
    first = min(max(3, round(FIRST * n_heads)) if first is None else first, most)
    try:
        estimates = estimated_effects(model, judge).mean(0)
    except (
        UnsupportedError
    ):  # without an estimate groups are split as the heads stand, and no head is tried first for a reason
        estimates = np.zeros(model.shape)
    ranked = sorted(model.heads, key=lambda head: -abs(estimates[head]))
    clean = judge.clean

    def ablate(groups: Sequence[_Group]) -> None:
        edits: list[Edit] = [Ablate(group.heads, "mean", judge.mean_z) for group in groups]
        ablated = model.sweep(judge.recording, edits, judge.score, keep=judge.keep, bar=bar)
        for group, values in zip(groups, ablated, strict=True):
            group.effects = clean - values

    alone = [_Group((head,)) for head in ranked[:first]]
    ablate(alone)
    waiting = _by_layer_and_sign(ranked[first:], estimates)
    cleared: list[_Group] = []
    made = first
    if waiting and made + len(waiting) <= most:
        ablate(waiting)
        made += len(waiting)
        while waiting:
            largest = max(group.size for group in alone)
            alone += [group for group in waiting if len(group.heads) == 1]
            groups = sorted((g for g in waiting if len(g.heads) > 1), key=lambda group: -group.size)
            cleared += [group for group in groups if not group.matters(largest)]
            split = [group for group in groups if group.matters(largest)]
            able = split[: (most - made) // 2]
            cleared += split[len(able) :]
            waiting = [half for group in able for half in group.halves()]
            ablate(waiting)
            made += len(waiting)
    else:
        cleared = waiting
    return _scores(model, name, judge, seed, alone, cleared, estimates, made)


def _by_layer_and_sign(heads: Sequence[Head], estimates: Float[np.ndarray, "L H"]) -> list[_Group]:
    """Groups of heads of one layer whose estimates have one sign: in such a group effects rarely cancel."""
    parts: dict[tuple[int, bool], list[Head]] = {}
    for head in heads:
        parts.setdefault((head.layer, bool(estimates[head] > 0)), []).append(head)
    return [_Group(tuple(part)) for _, part in sorted(parts.items())]


def _scores(
    model: HeadModel,
    name: str,
    judge: Judge,
    seed: int,
    alone: list[_Group],
    groups: list[_Group],
    estimates: Float[np.ndarray, "L H"],
    made: int,
) -> HeadScores:
    effects = np.full((judge.n, *model.shape), np.nan)
    for group in alone:
        effects[(slice(None), *group.heads[0])] = group.effects
    largest = max(group.size for group in alone)
    screening = {
        "ablations": made,
        "alone": len(alone),
        "groups": [
            {
                "heads": [str(head) for head in group.heads],
                "effect": float(group.effects.mean()) if len(group.effects) else None,
                "cleared": bool(len(group.effects)) and not group.matters(largest),
            }
            for group in groups
        ],
        "estimates": [[round(float(value), 6) for value in row] for row in estimates],
    }
    meta = {"metric": judge.metric, "mode": "mean", "seed": seed, "screening": screening}
    return HeadScores.from_examples(f"effect on {name}", effects, meta)
