"""The rows of a task that a model answers rightly: what methods that explain a right answer look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, Task, TaskBatch, encode, right_answers

MAX_TOKENS = 1024  # of one forward pass

AnyTask = Task | Sequence[Example] | TaskBatch


def encoded(model: HeadModel, task: AnyTask, n: int, seed: int) -> TaskBatch:
    """The task as tensors; a `TaskBatch` needs no tokenizer and is taken as it is. `InputError` without a tokenizer."""
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("a task needs a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    return encode(task, model.tokenizer, n, seed)


def inputs_of(batch: TaskBatch, ids: Int[Tensor, "N T"] | None = None) -> dict[str, Any]:
    """What a model reads of a batch, with `ids` in place of its tokens if given."""
    return {"input_ids": batch.input_ids if ids is None else ids, "attention_mask": batch.attention_mask}


def is_right(model: HeadModel, batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Whether the largest logit at each row's last position is a right answer."""
    return torch.cat([right_answers(model.read(inputs_of(rows), keep=1)[:, -1], rows) for rows in chunks(batch)])


def chunks(batch: TaskBatch, max_tokens: int = MAX_TOKENS) -> list[TaskBatch]:
    """The batch in pieces of at most `max_tokens` tokens, or of one row."""
    size = max(1, max_tokens // batch.input_ids.shape[1])
    return [batch.rows(start, start + size) for start in range(0, len(batch), size)]


def chosen(batch: TaskBatch, rows: Bool[Tensor, "N"] | Int[Tensor, "M"]) -> TaskBatch:
    """Some rows of a batch, by mask or by number."""
    numbers = torch.as_tensor(rows)
    numbers = numbers.nonzero().flatten() if numbers.dtype == torch.bool else numbers
    keep = numbers.tolist()

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[numbers]

    return replace(
        batch,
        input_ids=batch.input_ids[numbers],
        attention_mask=batch.attention_mask[numbers],
        answer_ids=batch.answer_ids[numbers],
        foil_ids=batch.foil_ids[numbers],
        corrupted_ids=cut(batch.corrupted_ids),
        corrupted_mask=cut(batch.corrupted_mask),
        corrupted_answer_ids=batch.corrupted_answer_ids[numbers],
        spans={name: spans[numbers] for name, spans in batch.spans.items()},
        accepted_ids=[batch.accepted_ids[i] for i in keep],
        examples=[batch.examples[i] for i in keep],
    )
