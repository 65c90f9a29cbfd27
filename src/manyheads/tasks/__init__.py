"""Prompts with known answers, foils, corrupted twins and named spans, one file a family, for any tokenizer."""

from __future__ import annotations

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Split, Task
from manyheads.tasks.encoding import TaskBatch, accuracy, encode, right_answers, try_encode
from manyheads.tasks.families.arithmetic import Arithmetic
from manyheads.tasks.families.by_example import ByExample
from manyheads.tasks.families.choice import Choice
from manyheads.tasks.families.coloured_objects import ColouredObjects
from manyheads.tasks.families.counterfactual import Counterfactual
from manyheads.tasks.families.docstring import Docstring
from manyheads.tasks.families.facts import Facts
from manyheads.tasks.families.greater_than import GreaterThan
from manyheads.tasks.families.ioi import IOI
from manyheads.tasks.families.needle import Needle
from manyheads.tasks.families.refusal import Refusal
from manyheads.tasks.families.repeat import Repeat, repeated_tokens
from manyheads.tasks.families.successor import Successor
from manyheads.tasks.phrasing import Chat, Solved, Suited, as_chat, suited
from manyheads.tasks.scoring import right_wholes, whole_answers
from manyheads.tasks.texts import openings
from manyheads.tasks.verdicts import TaskVerdict, task_verdict

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Repeat(),
        Successor(),
        Needle(),
        IOI(),
        ColouredObjects(),
        Facts(),
        Counterfactual(),
        Arithmetic(),
        Choice(),
        GreaterThan(),
        Docstring(),
        ByExample(),
        Refusal(),
    )
}


def get_task(name: str) -> Task:
    """The task family called `name`, with its default settings."""
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; choose one of {', '.join(TASKS)}.")
    return TASKS[name]


__all__ = [
    "IOI",
    "TASKS",
    "Arithmetic",
    "ByExample",
    "Chat",
    "Choice",
    "ColouredObjects",
    "Counterfactual",
    "Docstring",
    "Example",
    "Facts",
    "GreaterThan",
    "Needle",
    "Refusal",
    "Repeat",
    "Solved",
    "Split",
    "Successor",
    "Suited",
    "Task",
    "TaskBatch",
    "TaskVerdict",
    "accuracy",
    "as_chat",
    "encode",
    "get_task",
    "openings",
    "repeated_tokens",
    "right_answers",
    "right_wholes",
    "suited",
    "task_verdict",
    "try_encode",
    "whole_answers",
]
