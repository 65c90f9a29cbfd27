"""Retrieval heads (#11): which heads copy a needle out of a long context.

Wu et al., arXiv:2404.15574. While the model answers greedily, a step that emits token w is a copy by head h if the key that the
newest query attends to most lies in the needle and holds w. With g_h the needle positions that head h copied and k the needle's,

    score[l, h] = mean over tests of |g_h and k| / |k|        in [0, 1], dimensionless

over tests whose answer recalls more than half of the needle's tokens (ROUGE-1 recall). Positions are counted once, so that
scores cannot pass 1 as they do in the released code, which adds 1 / |k| a hit. A score of 0.1 makes a retrieval head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.behaviour import About, provenance
from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.model.attention import AttentionCall
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading import Reader
from manyheads.tasks import Example, Needle, Task, TaskBatch, encode

MAX_TOKENS = 4096
ABOUT = About(
    name="retrieval",
    title="Retrieval",
    what="Copies a fact word by word out of a long context: while it is said, the head looks at it.",
    formula="share of a needle's tokens that were emitted while the head attended most to them",
    unit="share",
    paper="arXiv:2404.15574",
    threshold=0.1,
)


class NewestArgmax(Reader):
    """Keeps, for each decoding step, the column each head's newest query attends to most: `columns[step][l]` `[B, H]`."""

    site = "attention"

    def __init__(self) -> None:
        self.columns: list[list[Tensor]] = []

    def read(self, call: AttentionCall) -> None:
        """Look at the newest query's row only."""
        row = call.pattern_rows(slice(-1, None))[:, :, 0]
        if call.layer == 0:
            self.columns.append([])
        self.columns[-1].append(row.argmax(-1).cpu() + call.first_column)


@dataclass(frozen=True)
class NeedleTest:
    """One needle test: did the model recall it, and what share of it did each head copy."""

    recall: float
    copied: Float[np.ndarray, "L H"]


def retrieval(
    model: HeadModel,
    *,
    task: Task | Sequence[Example] | TaskBatch | None = None,
    lengths: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n: int = 40,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HeadScores:
    """Score every head by how much of the needle it copies (formula above).

    Without `task`, `n` needle tests are spread over `lengths` (words of the prompt) and `depths`. A `TaskBatch` with a span
    "needle" needs no tokenizer. `n` of the result counts the
    tests that the model answered; with none answered all scores are 0 and `meta["answered"]` is 0.
    """
    batches = needle_batches(model, task, lengths, depths, n, seed)
    tests: list[NeedleTest] = []
    for batch in batches:
        for rows in _chunks(batch):
            tests += _run(model, rows)
            if progress is not None:
                progress(len(rows))
    answered = [test.copied for test in tests if test.recall > 0.5]
    meta = provenance(model, ABOUT, seed, lengths=list(lengths), depths=list(depths), n=n)
    meta |= {"tests": len(tests), "answered": len(answered)}
    if not answered:
        zero = np.zeros(model.shape)
        return HeadScores(ABOUT.name, zero, zero, 0, meta)
    meta["activation_frequency"] = (np.stack(answered) > 0).mean(0).round(4).tolist()
    return HeadScores.from_examples(ABOUT.name, np.stack(answered), meta)


def needle_batches(
    model: HeadModel,
    task: Task | Sequence[Example] | TaskBatch | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int,
) -> list[TaskBatch]:
    """The tests, encoded, one batch a length. `InputError` without a tokenizer."""
    if isinstance(task, TaskBatch):
        return [task]
    if model.tokenizer is None:
        raise InputError("retrieval heads need a tokenizer; open the model with tokenizer=.")
    if task is not None:
        return [encode(task, model.tokenizer, n, seed)]
    each = max(1, round(n / len(lengths)))
    batches = []
    for length in lengths:
        examples: list[Example] = []
        for i in range(each):
            cell = replace(Needle(), shortest=int(0.9 * length), longest=length, depth=depths[i % len(depths)])
            examples += cell.examples(1, seed=seed * 1000 + i)
        batches.append(encode(examples, model.tokenizer, each, seed))
    return batches


def _chunks(batch: TaskBatch) -> list[TaskBatch]:
    size = max(1, MAX_TOKENS // batch.input_ids.shape[1])
    return [batch.rows(start, start + size) for start in range(0, len(batch), size)]


def _run(model: HeadModel, batch: TaskBatch) -> list[NeedleTest]:
    """Answer one batch greedily and count each head's copies."""
    spans = batch.spans["needle"].tolist() if "needle" in batch.spans else [(-1, -1)] * len(batch)
    needles = [range(*span) if span[0] >= 0 else range(0) for span in spans]
    longest = max((len(needle) for needle in needles), default=0)
    reader = NewestArgmax()
    with model.reading(reader):
        ids = model.generate(
            {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
            do_sample=False,
            max_new_tokens=max(1, longest + 1),
        )
    new = ids[:, batch.input_ids.shape[1] :].cpu()
    columns = torch.stack([torch.stack(layers) for layers in reader.columns])  # [steps, L, B, H]
    return [
        _test(batch.input_ids[i], needles[i], new[i].tolist(), columns[: new.shape[1], :, i]) for i in range(len(batch))
    ]


def _test(prompt: Tensor, needle: range, said: list[int], columns: Tensor) -> NeedleTest:
    wanted = [int(prompt[j]) for j in needle]
    copied = np.zeros(columns.shape[1:])
    if not wanted:
        return NeedleTest(1.0, copied)
    for position, token in zip(needle, wanted, strict=True):
        steps = [step for step, w in enumerate(said) if w == token]
        if steps:
            copied += np.asarray((columns[steps] == position).any(0))
    return NeedleTest(_recall(wanted, said), copied / len(wanted))


def _recall(wanted: list[int], said: list[int]) -> float:
    """ROUGE-1 recall: the share of the wanted tokens that were said, each as often as it was."""
    left, hits = list(said), 0
    for token in wanted:
        if token in left:
            left.remove(token)
            hits += 1
    return hits / len(wanted)
