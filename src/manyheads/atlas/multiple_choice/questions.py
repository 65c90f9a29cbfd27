"""Multiple-choice questions (#12) with their labels as they are or exchanged, and the margin by which the right label leads.

margin = logit[right label] - mean of the other labels' logits                                      in logits
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.editing.edits import Edit, derangement
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Choice, Example, Task, TaskBatch, encode

Labels = Literal["standard", "letters", "digits", "shuffled"]


_LINE = re.compile(r"^(\w+)\. (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Questions:
    """Encoded questions. `batch` has the spans `label0`, `option0`, ...; `labels` `[N, K]` are the tokens that would answer with
    each line's label, `right` `[N]` is the right line."""

    batch: TaskBatch
    labels: Int[Tensor, "N K"]
    right: Int[Tensor, "N"]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.batch.inputs

    @property
    def label_columns(self) -> Int[Tensor, "N K"]:
        """Where the labels stand (their last token)."""
        return torch.stack([self.batch.spans[f"label{k}"][:, 1] - 1 for k in range(self.labels.shape[1])], 1)

    def span(self, kind: str, lines: Int[Tensor, "N"]) -> Int[Tensor, "N 2"]:
        """The span of one line's label or option in each row."""
        spans = torch.stack([self.batch.spans[f"{kind}{k}"] for k in range(self.labels.shape[1])], 1)
        return spans[torch.arange(len(self)), lines]


def questions(
    model: HeadModel,
    task: Task | Sequence[Example] | None = None,
    *,
    labels: Labels = "standard",
    n: int = 64,
    seed: int = 0,
    split: Literal["train", "test"] = "test",
) -> Questions:
    """`n` questions whose options stand on lines `X. text`, with their labels as they are or exchanged.

    `InputError` without a tokenizer, or if a prompt has no such lines, the answer is none of their labels, or a label is not one
    token for any example.
    """
    if model.tokenizer is None:
        raise InputError("multiple-choice questions need a tokenizer; open the model with tokenizer=.")
    if labels not in get_args(Labels):
        raise InputError(f"labels is {labels!r}; choose from {', '.join(get_args(Labels))}.")
    task = Choice() if task is None else task
    examples = task.examples(n, seed, split) if isinstance(task, Task) else list(task)[:n]
    rng = random.Random(seed)
    lines = [_lines(example) for example in examples]
    rows = [_relabelled(e, _new_labels(names, labels, rng)) for e, (names, _) in zip(examples, lines, strict=True)]
    fits = [set(map(id, encode(column, model.tokenizer, n).examples)) for column in zip(*rows, strict=True)]
    usable = [i for i, row in enumerate(rows) if all(id(one) in fit for one, fit in zip(row, fits, strict=True))]
    if not usable:
        raise InputError(f"no question can be used: its {labels} labels are not one token each for this tokenizer.")
    right = [lines[i][1] for i in usable]
    batch = encode([rows[i][r] for i, r in zip(usable, right, strict=True)], model.tokenizer, n)
    columns = [encode([rows[i][k] for i in usable], model.tokenizer, n).answer_ids for k in range(len(rows[0]))]
    return Questions(batch, torch.stack(columns, 1), torch.tensor(right))


def margin(asked: Questions) -> Callable[[Tensor], Tensor]:
    """The metric (formula above), one number a row of logits `[N, T, V]`."""

    def metric(logits: Tensor) -> Tensor:
        of_labels = logits[:, -1].double().gather(1, asked.labels.to(logits.device))
        right = of_labels.gather(1, asked.right.to(logits.device)[:, None])[:, 0]
        return right - (of_labels.sum(1) - right) / (of_labels.shape[1] - 1)

    return metric


def measured(model: HeadModel, asked: Questions, edits: Sequence[Edit] = ()) -> tuple[float, float, float]:
    """Mean margin, mean loss over the labels (nats), accuracy among them."""
    with model.editing(*edits):
        logits = model.read(asked.inputs, keep=1)
    of_labels = logits[:, -1].double().gather(1, asked.labels.to(logits.device))
    right = asked.right.to(logits.device)
    loss = torch.nn.functional.cross_entropy(of_labels, right)
    return float(margin(asked)(logits).mean()), float(loss), float((of_labels.argmax(1) == right).double().mean())


def _lines(example: Example) -> tuple[list[str], int]:
    """The labels of an example's lines, and which one is the answer."""
    names = [match[1] for match in _LINE.finditer(example.prompt)]
    if len(names) < 2 or example.answer.strip() not in names:
        raise InputError(
            f"the prompt {example.prompt[:40]!r}... has no option lines 'X. text', or the answer {example.answer!r} is none of "
            "their labels."
        )
    return names, names.index(example.answer.strip())


def _new_labels(names: list[str], labels: Labels, rng: random.Random) -> list[str]:
    if labels == "letters":
        return rng.sample([c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in names], len(names))
    if labels == "digits":
        return rng.sample("123456789", len(names))
    if labels == "shuffled":
        order = derangement(len(names), rng.randrange(2**31)).tolist()
        return [names[i] for i in order]
    return names


def _relabelled(example: Example, labels: list[str]) -> list[Example]:
    """The example with these labels, once for each label as its answer, with the spans of labels and options."""
    text, at, spans = "", 0, {}
    for k, (match, label) in enumerate(zip(_LINE.finditer(example.prompt), labels, strict=True)):
        text += example.prompt[at : match.start()]
        spans[f"label{k}"] = (len(text), len(text) + len(label))
        text += f"{label}. "
        spans[f"option{k}"] = (len(text), len(text) + len(match[2]))
        text += match[2]
        at = match.end()
    text += example.prompt[at:]
    plain = replace(example, prompt=text, foil=None, corrupted=None, corrupted_answer=None, spans=spans, accepted=())
    return [replace(plain, answer=f" {label}") for label in labels]
