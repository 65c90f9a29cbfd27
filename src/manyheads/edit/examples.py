"""What edits learn from: prompts with right answers, and wrong ones to prefer them to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, Split, Task, TaskBatch, encode


@dataclass(frozen=True)
class Answered:
    """Prompts followed by answers, left-padded, so that all end at the last column. `said` marks the answers' tokens."""

    input_ids: Int[Tensor, "N T"]
    attention_mask: Int[Tensor, "N T"]
    said: Bool[Tensor, "N T"]

    @classmethod
    def of_tokens(cls, prompts: Int[Tensor, "N T"], answers: Int[Tensor, "N"]) -> Answered:
        """From prompts of one length and their one-token answers."""
        ids = torch.cat([prompts, answers[:, None]], 1)
        said = torch.zeros_like(ids, dtype=torch.bool)
        said[:, -1] = True
        return cls(ids, torch.ones_like(ids), said)

    @classmethod
    def of_batch(cls, batch: TaskBatch, *, foils: bool = False) -> Answered:
        """From an encoded task: every prompt with its answer, or with its foil."""
        ids = batch.foil_ids if foils else batch.answer_ids
        if (ids < 0).any():
            raise InputError("not every example has a foil; give examples that have, or leave foils out.")
        plain = cls.of_tokens(batch.input_ids, ids)
        mask = torch.cat([batch.attention_mask, torch.ones_like(ids)[:, None]], 1)
        return cls(plain.input_ids, mask, plain.said)

    @classmethod
    def of_task(
        cls, model: HeadModel, task: Task | Sequence[Example], n: int, *, seed: int = 0, split: Split = "train"
    ) -> Answered:
        """`n` examples of a task with their answers. `InputError` without a tokenizer."""
        if model.tokenizer is None:
            raise InputError("examples of a task need a tokenizer; open the model with tokenizer=.")
        return cls.of_batch(encode(task, model.tokenizer, n, seed, split))

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Int[Tensor, "n"] | slice) -> Answered:
        """Some of the rows."""
        return Answered(self.input_ids[index], self.attention_mask[index], self.said[index])

    def inputs(self, model: HeadModel) -> dict[str, Tensor]:
        """What the model takes: without the last token, which nothing follows."""
        return model.inputs({"input_ids": self.input_ids[:, :-1], "attention_mask": self.attention_mask[:, :-1]})

    def log_p(self, logits: Float[Tensor, "N T-1 V"]) -> Float[Tensor, "N"]:
        """Each answer's log-probability, in nats, given the logits of `inputs`."""
        each = logits.float().log_softmax(-1).gather(-1, self.input_ids[:, 1:, None].to(logits.device))[..., 0]
        return (each * self.said[:, 1:].to(each)).sum(-1)

    def right(self, logits: Float[Tensor, "N T-1 V"]) -> Bool[Tensor, "N"]:
        """Whether greedy decoding would give each answer."""
        best = logits.argmax(-1).cpu() == self.input_ids[:, 1:]
        return (best | ~self.said[:, 1:]).all(-1)
