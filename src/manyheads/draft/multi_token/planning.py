"""Planning the next actions, with scarce annotations reused for auxiliary tasks: VideoPlan (#1) apart from its heads.

Zhang et al., arXiv:2507.15130. An annotated episode has four fields: a video of the progress, a goal, the actions done and the
T actions to come, all actions from a closed list. Training data are the main task (video, goal) -> future and other tasks on
the same fields: (video) -> goal, (video, goal) -> past, (video) -> future. Of predicted and true actions a, b of one episode

    success = [a_i = b_i for all i]     accuracy = mean_i [a_i = b_i]     IoU = |{a} & {b}| / |{a} | {b}|, of sets       in [0, 1]

and SR, mAcc and mIoU are their means over episodes. In the prompt a video is a string: the placeholder of a multimodal model's
processor, or a description.

Only goal prediction is named in the paper's abstract; the other two auxiliary tasks, the even mix, and mapping an unknown
name to the nearest action are our reading.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from manyheads.errors import InputError
from manyheads.evaluation.metrics import jaccard
from manyheads.heads import mean_stderr
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar

Field = Literal["video", "goal", "past", "future"]
SEPARATOR = ";"


@dataclass(frozen=True)
class Episode:
    """One annotated episode: its four fields (see above)."""

    video: str
    goal: str
    past: tuple[str, ...]
    future: tuple[str, ...]

    def text(self, field: Field) -> str:
        """The field as it is written in prompts and answers. `InputError` if an action's name holds the separator."""
        value: str | tuple[str, ...] = getattr(self, field)
        if isinstance(value, str):
            return value
        if any(SEPARATOR in action for action in value):
            raise InputError(f'actions are separated by "{SEPARATOR}"; rename those that hold it: {", ".join(value)}.')
        return f"{SEPARATOR} ".join(value)


@dataclass(frozen=True)
class Exercise:
    """A prompt, its answer, and the task's name."""

    prompt: str
    answer: str
    task: str


@dataclass(frozen=True)
class FieldTask:
    """Which fields are shown and which one is asked for. `InputError` for a task that shows what it asks for, or nothing."""

    name: str
    given: tuple[Field, ...]
    asked: Field
    instruction: str

    def __post_init__(self) -> None:
        if not self.given or self.asked in self.given:
            raise InputError(f"task {self.name!r} shows {self.given} and asks for {self.asked!r}; show other fields.")

    def exercise(self, episode: Episode) -> Exercise:
        """The task on one episode. The prompt holds nothing of the fields that are not given, not even their length."""
        shown = [f"{field}: {episode.text(field)}" for field in self.given]
        return Exercise("\n".join([self.instruction, *shown, "answer:"]), " " + episode.text(self.asked), self.name)


PLAN = FieldTask("plan", ("video", "goal"), "future", "Plan the next actions towards the goal.")
AUXILIARY = (
    FieldTask("goal", ("video",), "goal", "Name the goal."),
    FieldTask("past", ("video", "goal"), "past", "List the actions done so far."),
    FieldTask("plan_without_goal", ("video",), "future", "Guess the next actions."),
)


def exercises(
    episodes: Sequence[Episode],
    n: int,
    *,
    tasks: Sequence[FieldTask] = (PLAN, *AUXILIARY),
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> list[Exercise]:
    """`n` exercises: a random task (evenly, or by `weights`) on a random episode each. With one seed, runs with other
    tasks draw the same episodes."""
    if not episodes or not tasks:
        raise InputError(f"got {len(episodes)} episodes and {len(tasks)} tasks; give at least one of each.")
    about, kind = random.Random(f"episodes/{seed}"), random.Random(f"tasks/{seed}")
    chosen = kind.choices(tasks, weights, k=n)
    return [task.exercise(about.choice(episodes)) for task in chosen]


def encode_exercises(tokenizer: Any, given: Sequence[Exercise]) -> dict[str, Tensor]:
    """A batch for `MultiToken`, padded on the right: tokens, mask, and where the answers are, their end token included."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    rows = []
    for exercise in given:
        prompt = list(tokenizer(exercise.prompt)["input_ids"])
        answer = [*tokenizer(exercise.answer, add_special_tokens=False)["input_ids"], *end]
        rows.append((prompt, answer))
    length = max(len(prompt) + len(answer) for prompt, answer in rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0

    def padded(parts: list[list[int]], fill: int) -> Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in parts])

    return {
        "input_ids": padded([prompt + answer for prompt, answer in rows], pad),
        "attention_mask": padded([[1] * len(prompt + answer) for prompt, answer in rows], 0),
        "answers": padded([[0] * len(prompt) + [1] * len(answer) for prompt, answer in rows], 0).bool(),
    }


def parse_plan(text: str, actions: Sequence[str], horizon: int | None = None) -> tuple[str, ...]:
    """The first `horizon` actions that a text names (all by default); an unknown name becomes the nearest action.

    Nearest is by matching characters in order (`difflib`), case aside; of equals the first in `actions`.
    """
    if not actions:
        raise InputError("got no actions to choose from; give the closed list.")
    pieces = [piece.strip() for piece in text.replace("\n", SEPARATOR).split(SEPARATOR)]
    named = {action.lower(): action for action in reversed(actions)}

    def nearest(piece: str) -> str:
        found = named.get(piece.lower())
        return found or max(actions, key=lambda a: SequenceMatcher(None, a.lower(), piece.lower()).ratio())

    return tuple(nearest(piece) for piece in [piece for piece in pieces if piece][:horizon])


def predict_plans(
    model: HeadModel,
    episodes: Sequence[Episode],
    actions: Sequence[str],
    *,
    rows: int = 64,
    bar: Bar = Bar(),
) -> list[tuple[str, ...]]:
    """The main task, decoded greedily with the model's own (first) head; at most as many actions as the episode's future has."""
    longest = max(len(model.tokenizer(f" {a}{SEPARATOR}", add_special_tokens=False)["input_ids"]) for a in actions)
    plans = []
    for start in range(0, len(episodes), rows):
        some = episodes[start : start + rows]
        room = 1 + longest * max(len(episode.future) for episode in some)
        texts = model.generate([PLAN.exercise(e).prompt for e in some], max_new_tokens=room, do_sample=False)
        plans += [parse_plan(text, actions, len(e.future)) for text, e in zip(texts, some, strict=True)]
        bar(len(some))
    return plans


@dataclass(frozen=True)
class PlanScores:
    """Means over `n` episodes, in [0, 1], and their standard errors in the same order."""

    success_rate: float
    mean_accuracy: float
    mean_iou: float
    stderr: tuple[float, float, float]
    n: int

    def __str__(self) -> str:
        return f"SR {self.success_rate:.3f}, mAcc {self.mean_accuracy:.3f}, mIoU {self.mean_iou:.3f} (n = {self.n})"


def plan_scores(predicted: Sequence[Sequence[str]], truth: Sequence[Sequence[str]]) -> PlanScores:
    """SR, mAcc and mIoU (formulas above). A missing action is a wrong one; `InputError` for plans longer than the truth."""
    if len(predicted) != len(truth) or not truth or not all(truth):
        raise InputError(
            f"got {len(predicted)} plans and {len(truth)} true ones; give as many of both, the true ones not empty."
        )
    if any(len(plan) > len(true) for plan, true in zip(predicted, truth, strict=True)):
        raise InputError("a plan has more actions than the true one; cut it to the horizon.")
    each = np.array([_scores(plan, true) for plan, true in zip(predicted, truth, strict=True)])
    (success, accuracy, iou), error = (part.tolist() for part in mean_stderr(each))
    return PlanScores(success, accuracy, iou, (error[0], error[1], error[2]), len(each))


def _scores(plan: Sequence[str], true: Sequence[str]) -> tuple[float, float, float]:
    right = sum(a == b for a, b in zip(plan, true, strict=False))
    return float(right == len(true)), right / len(true), jaccard(set(plan), set(true))
