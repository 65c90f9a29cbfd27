"""Before heads are looked for: how each task is put to the model, and whether the model does it at all.

A task is put in the way that the model answers (`tasks/phrasing.py`), picked on the training split. The verdict is of the test
split (`tasks/verdicts.py`). Where the model is no better than chance the family is blind: nothing of it is scored or checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import nan
from typing import Any

from manyheads.atlas.core.registry import behaviours
from manyheads.atlas.core.repeats import Reduction
from manyheads.atlas.surveys.state import SurveyState
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Task
from manyheads.tasks.phrasing import suited, ways_to_put
from manyheads.tasks.verdicts import TaskVerdict, task_verdict

TRIALS = 8  # prompts by which a way to put a task is picked; the verdict on it has more


@dataclass(frozen=True)
class AskedTask:
    """A judge's task in the way `how` in which it is put, and the verdict on it."""

    task: Task
    how: str
    verdict: TaskVerdict

    def to_json(self) -> dict[str, Any]:
        """As the atlas stores it: what is not known (NaN) is None."""
        known = {key: None if value != value else value for key, value in asdict(self.verdict).items()}
        return {"how": self.how, **known}


def asked_tasks(
    model: HeadModel, names: Sequence[str], *, seed: int, state: SurveyState, bar: Bar = Bar()
) -> dict[str, AskedTask]:
    """The tasks that judge these behaviours, by name; none where a model cannot be asked."""
    if not model.is_causal or model.tokenizer is None:
        return {}
    judges = {behaviours()[name].judge for name in names}
    tasks = {judge.name: task for judge in judges if (task := judge.task_of(model)) is not None}
    step = bar.step("what the model can do", len(tasks))
    asked: dict[str, AskedTask] = {}
    for name, task in sorted(tasks.items()):
        saved = state.note(f"asked-{name}")
        if saved is not None:
            how = str(saved.pop("how"))
            known: dict[str, Any] = {key: nan if value is None else value for key, value in saved.items()}
            asked[name] = AskedTask(ways_to_put(task, model.tokenizer)[how], how, TaskVerdict(**known))
        else:
            best = suited(model, task, n=TRIALS, seed=seed)
            asked[name] = AskedTask(best.task, best.how, task_verdict(model, best.task, seed=seed))
            state.keep_note(f"asked-{name}", asked[name].to_json())
        step(1)
    return asked


def blind_behaviours(names: Sequence[str], asked: dict[str, AskedTask]) -> dict[str, str]:
    """Behaviours that are scored on a task which the model does no better than chance, with the reason."""
    blind = {}
    for name in names:
        one = behaviours()[name]
        on_prompts = not getattr(one.score, "by_weights", False) and not isinstance(one.score, Reduction)
        if on_prompts and one.judge.name in asked and asked[one.judge.name].verdict.blind:
            blind[name] = f"blind: this model does its task no better than chance ({asked[one.judge.name].verdict})."
    return blind
