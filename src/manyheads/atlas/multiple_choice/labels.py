"""What the multiple-choice circuit's heads (#12) find the right line by: its place, or its label.

Lieberum et al., arXiv:2307.09458. The same questions with other letters, with digits, and with ABCD in another order (no letter
in its place). With q taken from the standard run of the same question, a head that still finds the right line goes by "Nth item";
one that finds the line with the label that was right goes by "line labelled B".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from manyheads.atlas.multiple_choice.classes import last_attention
from manyheads.atlas.multiple_choice.questions import Labels, Questions, measured, questions
from manyheads.atlas.multiple_choice.subspaces import subspaces
from manyheads.errors import InputError
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Swap
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import ReadAttention
from manyheads.tasks import Example, Task


@dataclass(frozen=True)
class Mutation:
    """What other labels do. `attention` is that of the heads to the right label; `kept` the share of the margin left when their q
    and k are held to the standard labels' subspace; `nth` and `labelled` where the standard query looks: at the right line,
    and at the line with the label that was right (NaN where no line has it)."""

    labels: Labels
    n: int
    accuracy: float
    margin: float
    kept: float
    attention: float
    nth: float
    labelled: float


def label_mutations(
    model: HeadModel,
    heads: HeadSet,
    task: Task | Sequence[Example] | None = None,
    *,
    rank: int = 3,
    n: int = 64,
    seed: int = 0,
    split: Literal["train", "test"] = "test",
) -> dict[Labels, Mutation]:
    """The same questions under each kind of labels: what the model and its correct-letter `heads` still do (see `Mutation`)."""
    if not heads:
        raise InputError("no heads given; label_mutations looks at the correct-letter heads, see choice_classes.")
    sets = {kind: questions(model, task, labels=kind, n=n, seed=seed, split=split) for kind in get_args(Labels)}
    return mutations(model, heads, sets, rank=rank)


def mutations(
    model: HeadModel, heads: HeadSet, sets: dict[Labels, Questions], *, rank: int = 3
) -> dict[Labels, Mutation]:
    """As `label_mutations`, on questions encoded already; all must be the same questions in the same order."""
    standard = sets["standard"]
    if any(asked.right.tolist() != standard.right.tolist() for asked in sets.values()):
        raise InputError(
            "the sets do not hold the same questions; a tokenizer that drops some labels cannot be used here."
        )
    return {kind: _mutation(model, heads, kind, standard, asked, rank) for kind, asked in sets.items()}


def _mutation(
    model: HeadModel, heads: HeadSet, kind: Labels, standard: Questions, asked: Questions, rank: int
) -> Mutation:
    value, _, accuracy = measured(model, asked)
    held = measured(model, asked, subspaces(model, standard, heads, rank, parts=("query", "key"), where=asked))[0]
    chosen = tuple(np.array([*heads]).T)
    attention = last_attention(model, asked)["right label"].mean(0).numpy()[chosen].mean()
    before = standard.labels.gather(1, standard.right[:, None])
    has = asked.labels == before  # the line that bears the label that was right
    labelled = torch.where(has.any(1), has.int().argmax(1), -1)
    swaps = _standard_query(model, heads, standard)
    with model.editing(swaps):
        looks = last_attention(model, asked, labelled.clamp(min=0))
    there = looks["line"][labelled >= 0]
    return Mutation(
        labels=kind,
        n=len(asked),
        accuracy=accuracy,
        margin=value,
        kept=held / value,
        attention=float(attention),
        nth=float(looks["right label"].mean(0).numpy()[chosen].mean()),
        labelled=float(there.mean(0).numpy()[chosen].mean()) if len(there) else float("nan"),
    )


def _standard_query(model: HeadModel, heads: HeadSet, standard: Questions) -> Swap:
    tensors: dict[int, Tensor] = {}
    layers = set(heads.by_layer())
    model.read(standard.inputs, ReadAttention(lambda call: tensors.update({call.layer: call.query}), layers), keep=1)
    return Swap(heads, "query", tensors, positions=[standard.inputs["input_ids"].shape[1] - 1])
