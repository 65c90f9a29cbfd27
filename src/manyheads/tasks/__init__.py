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
    "Split",
    "Successor",
    "Task",
    "TaskBatch",
    "accuracy",
    "encode",
    "get_task",
    "repeated_tokens",
    "right_answers",
    "try_encode",
]
