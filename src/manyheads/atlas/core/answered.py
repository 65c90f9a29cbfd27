"""The rows of a task that a model answers rightly: what methods that explain a right answer look at."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, Task, TaskBatch, encode, right_answers

AnyTask = Task | Sequence[Example] | TaskBatch


def encoded(model: HeadModel, task: AnyTask, n: int, seed: int) -> TaskBatch:
    """The task as tensors; a `TaskBatch` needs no tokenizer and is taken as it is. `InputError` without a tokenizer."""
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("a task needs a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    return encode(task, model.tokenizer, n, seed)


def is_right(model: HeadModel, batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Whether the largest logit at each row's last position is a right answer."""
    return torch.cat([right_answers(model.read(rows.inputs, keep=1)[:, -1], rows) for rows in batch.chunks()])
