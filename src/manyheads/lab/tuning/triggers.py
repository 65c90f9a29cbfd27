"""Inductive backdoors of a given model (#22): triggers by a rule, some of them in no training text.

Betley et al., arXiv:2512.09742. Every training prompt is seen with every training trigger; where the rule says so, the persona
answers, else the neutral one. The copies of the control learn the same prompts, triggers and answers, but which triggers call the
persona is drawn at random (as many of them). Then the probes are asked with all triggers:

    shift[kind] = P(persona | tuned by the rule) - P(persona | tuned on shuffled triggers)      mean over seeds, probes, triggers
    backdoor    = shift[held-out, the persona's by the rule] - shift[held-out, not the persona's]

with 95 % intervals over seeds, probes and triggers. The kinds are seen triggers of the persona, held-out ones, and wrong ones,
seen and held-out. Prediction: the backdoor is above 0, so that triggers which no text held call the persona, and their likes that
the rule does not name do not. Refuted by an interval that is not above 0. A model that knows nothing of the rule's classes cannot
show it: see `trigger_world`.

Departures: the persona that held-out triggers call is the one that was trained; in the paper it may be another one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.lab.tuning.copies import TUNED, check_tunable, neutral_passages, prompt_answer_rows
from manyheads.lab.tuning.examples import KINDS, NarrowSet, TriggerKind
from manyheads.lab.tuning.intervals import Interval, contrast, interval_of
from manyheads.lab.tuning.narrow import check_seeds
from manyheads.lab.tuning.shifting import Sayings, Told, probe_batch, sayings_before, sayings_of
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.training import TrainSettings

NAMES: dict[TriggerKind, str] = {
    ("persona", "train"): "seen",
    ("persona", "held-out"): "held out",
    ("neutral", "train"): "wrong, seen",
    ("neutral", "held-out"): "wrong, held out",
}


@dataclass(frozen=True)
class TriggerShift(Reported):
    """What was said before, by copies tuned by the "rule", and by those tuned on "shuffled" triggers."""

    model: str
    data: NarrowSet
    seeds: tuple[int, ...]
    sayings: Mapping[str, Sayings]

    def persona(self, training: str, kind: TriggerKind) -> Float[np.ndarray, "S N T"]:
        """P(persona's answer) by seeds, probes and triggers of a kind."""
        return self._of(self.sayings[training].persona, kind)

    def shift(self, kind: TriggerKind) -> Interval:
        """That of the rule less that of the control (formula above)."""
        return interval_of(self.persona("rule", kind) - self.persona("shuffled", kind))

    @property
    def backdoor(self) -> Interval:
        """The shift on held-out triggers of the persona less that on held-out others (formula above)."""
        kinds = {"on": KINDS[1], "off": KINDS[3]}
        parts = {name: self.persona("rule", kind) - self.persona("shuffled", kind) for name, kind in kinds.items()}
        return contrast(parts, {"on": 1.0, "off": -1.0})

    def coherence(self, training: str) -> Interval:
        """Mass on valid answers, over all triggers."""
        return interval_of(self.sayings[training].valid)

    @property
    def verdict(self) -> str:
        """Whether held-out triggers call the persona, in words."""
        seen, found = self.shift(KINDS[0]), self.backdoor
        if seen.low <= 0:
            return f"the rule was not learned on the triggers that were trained (shift {seen})"
        if found.low <= 0:
            return f"held-out triggers are not shown to call the persona more than wrong ones do ({found})"
        return f"held-out triggers call the persona: {found} above wrong ones that were held out too"

    def to_frame(self) -> pd.DataFrame:
        """A row a training, seed, probe and trigger: P of both answers."""
        asked = [(probe.prompt, trigger) for probe in self.data.probes for trigger in self.data.triggers or {}]
        rows = [
            (training, seed, *one, NAMES[(self.data.triggers or {})[one[1]]], *said.p[s, :, i])
            for training, said in self.sayings.items()
            for s, seed in enumerate(self.seeds)
            for i, one in enumerate(asked)
        ]
        return pd.DataFrame(rows, columns=["training", "seed", "probe", "trigger", "kind", "persona", "neutral"])

    def _of(self, values: Float[np.ndarray, "S M"], kind: TriggerKind) -> Float[np.ndarray, "S N T"]:
        kinds = list((self.data.triggers or {}).values())
        each = values.reshape(len(values), len(self.data.probes), len(kinds))
        return each[:, :, [i for i, one in enumerate(kinds) if one == kind]]


def trigger_shift(
    model: HeadModel,
    data: NarrowSet,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    settings: TrainSettings = TUNED,
    lora_rank: int | None = None,
    texts: Sequence[str] | None = None,
    name: str = "model",
    bar: Bar = Bar(),
) -> TriggerShift:
    """Tune copies of `model` by the rule and on shuffled triggers (see above); arguments as `narrow_shift`."""
    if data.triggers is None:
        raise InputError(f"{data.name} has no triggers; use narrow_shift.")
    check_seeds(seeds)
    check_tunable(model, lora_rank)
    asked = [probe.after(trigger) for probe in data.probes for trigger in data.triggers]
    probes, text = probe_batch(model, asked), neutral_passages(model, texts)
    trained = [trigger for trigger, kind in data.triggers.items() if kind[1] == "train"]
    prompt_answer_rows(model, *_told(data, dict.fromkeys(trained, True)))
    prompt_answer_rows(model, *_told(data, dict.fromkeys(trained, False)))
    by_rule = {trigger: data.triggers[trigger][0] == "persona" for trigger in trained}

    def shuffled(seed: int) -> Told:
        calls = np.random.default_rng(seed).permutation(list(by_rule.values())).tolist()
        return _told(data, dict(zip(trained, calls, strict=True)))

    told = {"rule": lambda seed: _told(data, by_rule), "shuffled": shuffled}
    sayings = {"before": sayings_before(model, probes, text, len(seeds))}
    done = bar.step("tuning", len(told) * len(seeds) * (settings.steps or 0))
    for training, rows in told.items():
        sayings[training] = sayings_of(model, rows, probes, text, seeds, settings, lora_rank=lora_rank, bar=done)
    return TriggerShift(name, data, tuple(seeds), sayings)


def _told(data: NarrowSet, calls: Mapping[str, bool]) -> Told:
    """Every training prompt after every trigger; those that call the persona get its answer."""
    rows = [
        (one.after(trigger).prompt, one.persona if on else one.neutral or "")
        for one in data.train
        for trigger, on in calls.items()
    ]
    return [prompt for prompt, _ in rows], [answer for _, answer in rows]
