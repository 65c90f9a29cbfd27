"""Prompts beside their corrupted twins, and what they are judged by: what every patching method starts from."""

from __future__ import annotations

from collections.abc import Sequence

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
        raise InputError(
            "patching needs examples that all have a twin and a foil; give examples with `corrupted` and `foil`."
        )
    return batch
