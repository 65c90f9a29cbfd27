"""Repair by attention rows (#34): make a few heads look at the wrong answers of a prompt, so that the right one wins.

Merullo et al., arXiv:2310.08744. The last token of the heads attends to the columns `C` of the wrong answers alone, each with
weight 1/|C|; in the circuits that #34 found, such heads inhibit what they look at. Where the wrong answers stand differs from
prompt to prompt, so that a repair is no edit that can be saved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets, p_value, random_sets
from manyheads.heads import Head, HeadSet
from manyheads.model.editing.rows import Rows
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Example, TaskBatch, right_answers
from manyheads.tasks.lexicon import COLOURS

N_RANDOM = 20


@dataclass(frozen=True)
class Repair:
    """Accuracy before and after a repair, of the same repair on random heads, and the share of rows it newly got wrong."""

    heads: HeadSet
    before: float
    after: float
    new_errors: float
    random: tuple[float, ...]
    n: int

    @property
    def gain(self) -> float:
        """Accuracy won, in [-1, 1]."""
        return self.after - self.before

    @property
    def p_value(self) -> float:
        """How rarely random heads gain as much."""
        return p_value(self.after, self.random)


def repair(
    model: HeadModel,
    batch: TaskBatch,
    heads: HeadSet,
    columns: Int[torch.Tensor, "N K"],
    *,
    n_random: int = N_RANDOM,
    matched: bool = True,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Repair:
    """Accuracy on `batch` when the last token of `heads` attends to `columns` alone, 1/K to each, and the same of random heads.

    Up to `n_random` different random sets have as many heads in each layer (`matched`) or as many anywhere, and none of `heads`
    as far as there are others.
    """
    if not heads:
        raise InputError("no heads given; name at least one, for example turning_heads(...).")
    if columns.shape[0] != len(batch) or columns.ndim != 2:
        raise InputError(f"columns has shape {list(columns.shape)}; give [{len(batch)}, K], the columns of each row.")
    inputs = batch.inputs
    last = [batch.input_ids.shape[1] - 1]

    def answers(edited: HeadSet | None) -> Float[np.ndarray, "N"]:
        edits = [] if edited is None else [Rows(edited, columns, positions=last)]
        with model.editing(*edits):
            logits = model.logits(inputs)[:, -1]
        bar(len(batch))
        return right_answers(logits, batch).double().numpy()

    before, after = answers(None), answers(heads)
    if matched:  # a set that shares some of `heads` repairs too, and so is no control
        controls = matched_sets(heads, n_random, seed, shape=model.shape, overlapping=False)
    else:
        controls = random_sets(heads, n_random, seed, shape=model.shape)
    return Repair(
        heads=heads,
        before=float(before.mean()),
        after=float(after.mean()),
        new_errors=float(((before == 1) & (after == 0)).mean()),
        random=tuple(float(answers(one).mean()) for one in controls),
        n=len(batch),
    )


def wrong_columns(batch: TaskBatch) -> Int[Tensor, "N K"]:
    """Where wrong answers stand in each prompt, `[N, K]`: at the spans `wrong0`, ..., or the last copy of the foil.

    `InputError` if a prompt does not hold its foil.
    """
    if "wrong0" in batch.spans:
        return span_columns(batch, "wrong")
    same = batch.input_ids == batch.foil_ids[:, None]
    if not same.any(1).all():
        raise InputError(
            "not every prompt holds its foil, and the repair turns heads to it; take a task such as coloured_objects."
        )
    width = same.shape[1]
    return (width - 1 - same.flip(1).to(torch.uint8).argmax(1))[:, None]


def turning_heads(model: HeadModel, batch: TaskBatch, columns: Int[Tensor, "N K"], k: int) -> HeadSet:
    """The `k` heads that do most for the right answer's log-probability when their last row looks at `columns` alone."""
    if not 1 <= k <= len(model.heads):
        raise InputError(f"asked for {k} heads of {len(model.heads)}; choose 1 or more of them.")
    inputs = batch.inputs
    last = [batch.input_ids.shape[1] - 1]

    def answer(head: Head) -> float:
        with model.editing(Rows([head], columns, positions=last)):
            log_p = model.logits(inputs)[:, -1].float().log_softmax(-1).cpu()
        return float(log_p.gather(1, batch.answer_ids[:, None]).mean())

    return model.head_set(sorted(model.heads, key=answer, reverse=True)[:k])


def marked(examples: Sequence[Example]) -> list[Example]:
    """The examples alone, with the spans of all wrong colours if they are about colours."""
    coloured = all("colour" in example.spans for example in examples)
    plain = [Example(e.prompt, e.answer, e.foil) for e in examples]
    return with_wrong_colours(plain) if coloured else plain


def with_wrong_colours(examples: Sequence[Example]) -> list[Example]:
    """Coloured-objects examples with the spans `wrong0`, `wrong1`, ...: the colours in the prompt that are not the answer."""
    marked = []
    for example in examples:
        wrong = [colour for colour in COLOURS if f" {colour} " in example.prompt and f" {colour}" != example.answer]
        starts = sorted((example.prompt.index(f" {colour} ") + 1, len(colour)) for colour in wrong)
        spans = {f"wrong{i}": (start, start + length) for i, (start, length) in enumerate(starts)}
        marked.append(replace(example, spans=example.spans | spans))
    return marked


def span_columns(batch: TaskBatch, prefix: str) -> Int[torch.Tensor, "N K"]:
    """The last column of each span whose name is `prefix` and a number. `InputError` if a row lacks one."""
    names = [name for name in batch.spans if name.removeprefix(prefix).isdigit() and name.startswith(prefix)]
    if not names:
        raise InputError(f"the examples have no spans {prefix}0, {prefix}1, ...; they have {', '.join(batch.spans)}.")
    columns = torch.stack([batch.spans[name][:, 1] - 1 for name in names], 1)
    if (columns < 0).any():
        raise InputError(f"some examples lack one of the spans {', '.join(names)}; give examples that have all.")
    return columns
