"""The rows of a task that a model answers rightly: what methods that explain a right answer look at."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, Task, TaskBatch, encode
from manyheads.tasks.scoring import right_wholes

MORE = 8
AnyTask = Task | Sequence[Example] | TaskBatch


def encoded(model: HeadModel, task: AnyTask, n: int, seed: int) -> TaskBatch:
    """The task as tensors; a `TaskBatch` needs no tokenizer and is taken as it is. `InputError` without a tokenizer."""
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("a task needs a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    return encode(task, model.tokenizer, n, seed)


def answered_rows(model: HeadModel, batch: TaskBatch, task: AnyTask, n: int, seed: int) -> tuple[TaskBatch, int]:
    """The rows of `batch`, `n` of `task`, that the model answers rightly, and the number of rows asked.

    Where it answers less than half, all different examples of the task's first `MORE * n` are asked, for at most `n` answered
    ones: a model that knows one fact in ten still has its rows.
    """
    right = batch.take(is_right(model, batch))
    if not isinstance(task, Task) or model.tokenizer is None or 2 * len(right) >= len(batch):
        return right, len(batch)
    different = list({example.prompt: example for example in task.examples(MORE * n, seed)}.values())
    batch = encode(different, model.tokenizer, len(different))
    return batch.take(is_right(model, batch)).rows(0, n), len(batch)


def is_right(model: HeadModel, batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Whether greedy decoding writes a right answer, all of it; for answers of one token the largest logit says so."""
    return right_wholes(model, batch)
