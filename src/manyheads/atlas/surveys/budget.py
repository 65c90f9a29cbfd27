"""A survey in a given time: how many examples, random sets and ablations fit on this machine.

Nothing is assumed of a behaviour's cost. Every family of behaviours runs for the share `PILOT` of the time, and how far it came
says how long all of it takes; a judge is timed on one ablation.
Of the time that is left when they begin, scores get the share `SCORES` and checks `CHECKS`; single heads get what is left
then. Within the scores, families that need less than an equal share leave the rest to the others.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from manyheads.atlas.core.judges import Judge
from manyheads.atlas.core.registry import score_all, sharing_passes
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar, Deadline, TimeIsUp
from manyheads.tasks import Task

PILOT = 0.006  # share of the time for which each family is timed; one that is done by then is not run again
NULLS = 0.1  # share of the time in which nulls are scored, those of the cheaper behaviours first
SCORES, CHECKS = 0.35, 0.6  # shares of the time left when each begins; single heads get what is then left
LEAST = 8  # examples below which no score or check is made, whatever the time; but for
FEWEST = 4  # a family of which so many would take more than twice its share
MOST_SETS = 199  # random sets beyond which p falls no further than anybody asks (.005)


@dataclass
class Budget:
    """How much time a survey has: `minutes` from now on; None is as much as it takes."""

    minutes: float | None = None
    started: float = field(default_factory=time.monotonic)
    costs: dict[Judge, float] = field(default_factory=dict)

    @property
    def bounded(self) -> bool:
        return self.minutes is not None

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.minutes is None else 60 * self.minutes - (time.monotonic() - self.started)

    def examples(
        self,
        model: HeadModel,
        names: Sequence[str],
        most: int,
        *,
        share: float = SCORES,
        seed: int,
        tasks: Mapping[str, Task] = MappingProxyType({}),
        keep: Callable[[Mapping[str, HeadScores]], object] = lambda scores: None,
        bar: Bar = Bar(),
    ) -> dict[str, int]:
        """How many examples, `LEAST` to `most`, each family of behaviours gets, by the name of its first behaviour.

        Families that are done while they are timed are given to `keep`.
        """
        families = sharing_passes(names)
        if self.minutes is None or most <= LEAST:
            return {family[0].about.name: most for family in families}
        step = bar.step("timing", len(families))
        seconds: dict[str, float] = {}
        for family in families:
            name, watch = family[0].about.name, Deadline(60 * self.minutes * PILOT)
            with contextlib.suppress(TimeIsUp):
                members = [one.about.name for one in family]
                score_all(model, members, n=most, seed=seed, bar=watch, tasks=tasks, keep=keep)
            seconds[name] = watch.whole(family[0].steps(model, most))
            step(1)
        each_may_take = _level(list(seconds.values()), share * self.left)

        def fitting(whole: float) -> int:
            if whole <= each_may_take:
                return most
            least = FEWEST if whole * LEAST / most > 2 * each_may_take else LEAST
            return max(least, int(most * each_may_take / whole))

        return {name: fitting(whole) for name, whole in seconds.items()}

    def random_sets(self, model: HeadModel, checks: Sequence[tuple[HeadSet, Judge]], least: int) -> int:
        """How many random sets each of these checks can have: `least` at least, `MOST_SETS` at most."""
        return max(least, min(MOST_SETS, int(self._sets(model, checks)))) if self.bounded and checks else least

    def holds(self, model: HeadModel, checks: Sequence[tuple[HeadSet, Judge]], sets: int) -> bool:
        """Whether these checks can have `sets` random sets each in their share of the time."""
        return not self.bounded or not checks or self._sets(model, checks) >= sets

    def rows(self, model: HeadModel, checks: Sequence[tuple[HeadSet, Judge]], sets: int, rows: int) -> int:
        """How many of `rows` rows each judge can have for these checks to have `sets` random sets: `LEAST` at least."""
        if not self.bounded or not checks:
            return rows
        return max(min(LEAST, rows), min(rows, int(rows * self._sets(model, checks) / sets)))

    def _sets(self, model: HeadModel, checks: Sequence[tuple[HeadSet, Judge]]) -> float:
        """How many random sets each check can have in its share of the time."""
        each = [self.cost(model, judge) for _, judge in checks]
        # An ablation costs what is above its lowest layer; the mean over layers is half of the model.
        above = [2 * (1 - min(head.layer for head in heads) / model.n_layers) for heads, _ in checks]
        one = sum(part * seconds for part, seconds in zip(above, each, strict=True))
        return CHECKS * self.left / max(one, 1e-9) - 1

    def cost(self, model: HeadModel, judge: Judge) -> float:
        """Seconds an ablation takes; each judge is timed once, since its run has to be there for it."""
        if judge not in self.costs:
            self.costs[judge] = seconds_an_ablation(model, judge)
        return self.costs[judge]

    def ablations(self, model: HeadModel, judge: Judge, share: float) -> int:
        """How many ablations of one head fit in `share` of what is left: all heads at most, a few at least."""
        n_heads = len(model.heads)
        if not self.bounded:
            return n_heads
        return max(3, min(n_heads, int(share * self.left / seconds_an_ablation(model, judge))))


def _level(wanted: Sequence[float], total: float) -> float:
    """The largest share that each may take so that all together take `total`, where some want less."""
    left, open_ = total, sorted(wanted)
    for i, want in enumerate(open_):
        share = left / (len(open_) - i)
        if want > share:
            return max(share, 0.0)
        left -= want
    return float("inf")


def seconds_an_ablation(model: HeadModel, judge: Judge) -> float:
    """How long ablating one head of the middle layer takes, which is the mean over layers."""
    layer = model.layout.attention_layers[len(model.layout.attention_layers) // 2]
    edit = Ablate([Head(layer, 0)], "mean", judge.mean_z)
    recording = judge.recording
    before = time.monotonic()
    model.sweep(recording, [edit, edit], judge.score, keep=judge.keep)
    return (time.monotonic() - before) / 2
