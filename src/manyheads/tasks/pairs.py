"""Prompts beside their corrupted twins, and what they are judged by: what every patching method starts from."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks.base import Example, Task
from manyheads.tasks.encoding import TaskBatch, encode


def twinned(model: HeadModel, task: Task | Sequence[Example] | TaskBatch, n: int, seed: int) -> TaskBatch:
    """`n` examples with a twin and a foil, encoded. `InputError` where there are none."""
    if isinstance(task, TaskBatch):
        batch = task
    elif model.tokenizer is None:
        raise InputError("patching needs encoded prompts or a tokenizer; open the model with tokenizer=.")
    else:
        batch = encode(task, model.tokenizer, n, seed)
    if batch.corrupted_ids is None or (batch.foil_ids < 0).any():
        raise InputError("patching needs examples that all have a twin (corrupted) and a foil.")
    return batch


def prompts(batch: TaskBatch) -> dict[str, Tensor]:
    """What the model takes of the prompts."""
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}


def twins(batch: TaskBatch) -> dict[str, Tensor]:
    """What the model takes of the twins. `InputError` where there are none."""
    if batch.corrupted_ids is None or batch.corrupted_mask is None:
        raise InputError("these examples have no twins (corrupted prompts).")
    return {"input_ids": batch.corrupted_ids, "attention_mask": batch.corrupted_mask}


def logit_difference(batch: TaskBatch) -> Callable[[Tensor], Float[Tensor, "N"]]:
    """`logit[answer] - logit[foil]` of each row, at the last position."""

    def metric(logits: Tensor) -> Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        last = logits[:, -1].double()
        return last[rows, batch.answer_ids.to(last.device)] - last[rows, batch.foil_ids.to(last.device)]

    return metric
