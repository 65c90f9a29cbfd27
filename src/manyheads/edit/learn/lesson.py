"""Learning an edit from examples and judging it on others: LoFiT (#30), injection (#57), tuning (#14).

    lofit     offsets of a few heads, chosen by learned scalings or given
    inject    what demonstrations make of heads, mixed in by a learned gate a head
    tune      the weights of a few heads, and of MLPs if any are named: a checkpoint, not an edit

The controls learn in the same way on random heads of the same layers, or (inject) have the learned gates shuffled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from manyheads.edit.effects import side_effects
from manyheads.edit.learn import lofit, selective_tuning, soft_injection
from manyheads.edit.learn.examples import Answered, Examples, Portions
from manyheads.edit.learn.preferences import Preferences, preferred
from manyheads.edit.learn.tuning import answer_accuracy, prompt_length
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets
from manyheads.heads import HeadSet
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Example
from manyheads.training import TrainSettings

Method = Literal["lofit", "inject", "tune"]
SETTINGS: dict[str, TrainSettings] = {
    "lofit": lofit.TUNING,
    "inject": soft_injection.SETTINGS,
    "tune": selective_tuning.SETTINGS,
}


@dataclass(frozen=True)
class EditOutcome:
    """An edit, or the model that tuning made, and what learned in it."""

    what: str
    model: HeadModel
    edit: HeadEdit | None = None


@dataclass(frozen=True)
class LearnedOutcome:
    """What was learned, its random controls, and `effect`: the shares of held-out prompts before, after and of the controls."""

    original: HeadModel
    outcome: EditOutcome
    controls: tuple[EditOutcome, ...]
    effect: dict[str, Any] = field(default_factory=dict)

    def measured(self, bar: Bar = Bar()) -> LearnedOutcome:
        """With its side effects on text, tasks and refusals in `effect`."""
        edit = self.outcome.edit
        if edit is None:
            found = selective_tuning.tuning_effects(self.original, self.outcome.model, bar=bar)
        else:
            found = side_effects(self.original, edit, n=64, bar=bar)
        return replace(self, effect={**self.effect, **found.as_effect()})

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write the edit's folder, or the tuned checkpoint, with `effect` in it."""
        if self.outcome.edit is not None:
            edit = self.outcome.edit
            return replace(edit, effect={**edit.effect, **self.effect}).save(folder, force=force)
        about = {"method": "precise tuning (#14)", "tuned": self.outcome.what, "effect": self.effect}
        return selective_tuning.save_tuned(self.original, self.outcome.model, folder, about, force=force)


def learn_edit(
    model: HeadModel,
    portions: Portions,
    method: Method,
    *,
    folder: Path,
    settings: TrainSettings | None = None,
    beta: float | None = None,
    heads: int | HeadSet | None = None,
    mlps: Sequence[int] = (),
    demonstrations: Sequence[str] = (),
    controls: int = 0,
    bar: Bar = Bar(),
) -> LearnedOutcome:
    """Learn from `portions.train`, stop early by `.dev`, judge on `.test`; the state of every run is kept in `folder`.

    `settings` default to the method's own. With a `beta` preferences of answers over foils are learned (DPO), else answers.
    `heads` are the heads themselves, or how many to choose by learned scalings (default: 3 % of all). Injection takes all heads;
    its `demonstrations` are prompts that follow examples. `InputError` for an unknown method, or injection without them.
    """
    if method not in get_args(Method):
        raise InputError(f"method is {method!r}; choose from {', '.join(get_args(Method))}.")
    if method == "inject" and not demonstrations:
        raise InputError("injection averages over prompts that follow examples; give demonstrations=.")
    lesson = _Lesson.of(model, portions, settings or SETTINGS[method], folder, beta, bar)
    if method == "lofit":
        outcome, others = lesson.offsets(heads, controls)
    elif method == "inject":
        outcome, others = lesson.injected(demonstrations, controls)
    else:
        outcome, others = lesson.tuned(heads, mlps, controls)
    return LearnedOutcome(model, outcome, tuple(others), lesson.judged(outcome, others))


@dataclass(frozen=True)
class _Lesson:
    """What is learned from, how, and where its state is kept."""

    model: HeadModel
    train: Examples
    dev: Examples
    test: Answered
    pairs: Preferences | None
    settings: TrainSettings
    folder: Path
    bar: Bar

    @classmethod
    def of(
        cls,
        model: HeadModel,
        portions: Portions,
        settings: TrainSettings,
        folder: Path,
        beta: float | None,
        bar: Bar,
    ) -> _Lesson:
        """Encode `portions`: answers, or (with a `beta`) preferences."""

        def answered(part: list[Example]) -> Answered:
            return Answered.of_texts(model, [e.prompt for e in part], [e.answer for e in part])

        def lesson(part: list[Example]) -> Examples:
            return answered(part) if beta is None else Preferences.of_examples(model, part, beta=beta)

        foils = all(example.foil is not None for example in portions.test)
        pairs = Preferences.of_examples(model, portions.test) if foils else None
        train, dev = lesson(portions.train), lesson(portions.dev)
        return cls(model, train, dev, answered(portions.test), pairs, settings, folder, bar)

    def judged(self, outcome: EditOutcome, others: list[EditOutcome]) -> dict[str, Any]:
        """Shares of held-out prompts before, after and of random choices."""
        length = prompt_length(self.test)

        def shares(measure: Callable[..., float], on: Any) -> dict[str, Any]:
            def of(one: EditOutcome) -> float:
                return measure(one.model, on, [] if one.edit is None else one.edit.edits(prompt_length=length))

            before = measure(self.model, on, [])
            return {"before": before, "after": of(outcome), "random": [of(one) for one in others], "n": len(self.test)}

        found = {"right": shares(answer_accuracy, self.test)}
        return found if self.pairs is None else found | {"preferred": shares(preferred, self.pairs)}

    def offsets(self, heads: int | HeadSet | None, controls: int) -> tuple[EditOutcome, list[EditOutcome]]:
        selection = replace(self.settings, rate=lofit.SELECTION.rate)

        def of(chosen: int | HeadSet | None, name: str) -> tuple[EditOutcome, HeadSet]:
            edit = lofit.lofit(
                self.model,
                self.train,
                heads=chosen,
                dev=self.dev,
                selection=selection,
                tuning=self.settings,
                folder=self.folder / name,
                bar=self.bar,
            )
            return EditOutcome(str(edit.heads), self.model, edit), edit.heads

        outcome, found = of(heads, "chosen")
        others = matched_sets(found, controls, self.settings.seed, shape=self.model.shape)
        return outcome, [of(other, f"random-{i}")[0] for i, other in enumerate(others)]

    def injected(self, demonstrations: Sequence[str], controls: int) -> tuple[EditOutcome, list[EditOutcome]]:
        embedding = soft_injection.task_embedding(self.model, list(demonstrations))
        found = soft_injection.soft_injection(
            self.model,
            embedding,
            self.train,
            dev=self.dev,
            settings=self.settings,
            folder=self.folder / "gates",
            bar=self.bar,
        )
        gates = torch.from_numpy(found.gates.values).float()
        generator = torch.Generator().manual_seed(self.settings.seed)
        others = []
        for _ in range(controls):
            shuffled = gates.flatten()[torch.randperm(gates.numel(), generator=generator)].view_as(gates)
            edit = soft_injection.injection_edit(self.model, shuffled, embedding)
            others.append(EditOutcome("gates shuffled", self.model, edit))
        return EditOutcome("all heads", self.model, found.edit), others

    def tuned(
        self, heads: int | HeadSet | None, mlps: Sequence[int], controls: int
    ) -> tuple[EditOutcome, list[EditOutcome]]:
        chosen = max(1, round(lofit.SHARE * len(self.model.heads))) if heads is None else heads
        if isinstance(chosen, int):
            where = self.folder / "selection"
            scores = lofit.select_heads(self.model, self.train, settings=lofit.SELECTION, folder=where, bar=self.bar)
            chosen = scores.top(chosen)

        def of(which: HeadSet, name: str) -> EditOutcome:
            tuned = selective_tuning.tune_heads(
                self.model,
                self.train,
                which,
                mlps=mlps,
                dev=self.dev,
                settings=self.settings,
                folder=self.folder / name,
                bar=self.bar,
            )
            also = f" and MLPs {', '.join(map(str, mlps))}" if mlps else ""
            return EditOutcome(f"{which}{also}", tuned)

        others = matched_sets(chosen, controls, self.settings.seed, shape=self.model.shape)
        return of(chosen, "chosen"), [of(other, f"random-{i}") for i, other in enumerate(others)]
