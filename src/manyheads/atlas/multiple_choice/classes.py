"""Classes of the multiple-choice circuit's heads (#12), by where the last token looks.

Lieberum et al., arXiv:2307.09458. With A[r, k] a head's attention to label k where r is right, the first rule that fits:

| class | rule |
| --- | --- |
| correct letter | A[r, r] >= floor for every r |
| single letter | A[k, k] >= floor for some k, and A[r, k] < floor for all r != k |
| content gatherer | attention to the right option's text >= floor |
| amplification | attention to what follows the last line, the last token included >= floor, and `passed` >= 0.05 of the margin |
| constant | attention to all labels together >= floor, whatever is right |

Attention to the last tokens alone amplifies nothing: many heads of the first layer look there, before any head has written. So

    passed[h] = margin - margin(h's values at the last tokens are those of another question)          in logits

is what h passes on of what lower layers brought there; its pattern stays. In the first layer it is 0, since these tokens are the
same in every question. The paper's classes are made by eye, of the nodes that matter; the rules are ours. A head of two labels is
of no class.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.atlas.circuits.ioi import Edges
from manyheads.atlas.multiple_choice.questions import Questions, margin
from manyheads.errors import InputError
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Swap, derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention

PASSED = 0.05  # of the margin


def choice_classes(
    model: HeadModel, asked: Questions, heads: HeadSet | None = None, *, floor: float = 0.4
) -> dict[str, HeadSet]:
    """The classes of `heads` (None: all) by the last token's attention (table above); heads of no class are left out.

    `InputError` if some label is never the right one.
    """
    k = asked.labels.shape[1]
    if len(asked.right.unique()) < k:
        raise InputError("classes need questions in which every label is the right one at times; give more of them.")
    looks = last_attention(model, asked)
    by_right = torch.stack(  # A: [r, k, L, H]
        [torch.stack([looks[f"label{j}"][asked.right == r].mean(0) for j in range(k)]) for r in range(k)]
    )
    own = by_right.diagonal(dim1=0, dim2=1).permute(2, 0, 1)  # [k, L, H]
    others = torch.stack([by_right[[r for r in range(k) if r != j], j].amax(0) for j in range(k)])
    rules = {
        "correct_letter": own.amin(0) >= floor,
        "single_letter": ((own >= floor) & (others < floor)).sum(0) == 1,
        "content_gatherer": looks["right option"].mean(0) >= floor,
        "amplification": looks["tail"].mean(0) >= floor,
        "constant": by_right.sum(1).amin(0) >= floor,
    }
    left = torch.zeros(model.shape, dtype=torch.bool)
    for head in model.heads if heads is None else heads:
        left[head] = True
    classes = {}
    for name, rule in rules.items():
        if name == "amplification":
            rule = rule & _amplifies(model, asked, model.head_set((rule & left).nonzero().tolist()))
        classes[name] = model.head_set((rule & left).nonzero().tolist())
        left &= ~rule
    return classes


def _amplifies(model: HeadModel, asked: Questions, heads: HeadSet) -> Bool[Tensor, "L H"]:
    """Which of `heads` pass on at least `PASSED` of the margin, which must be positive."""
    found = torch.zeros(model.shape, dtype=torch.bool)
    clean, parts = passed(model, asked, heads)
    for head, part in zip(heads, parts, strict=True):
        found[head] = bool(part >= PASSED * clean > 0)
    return found


def passed(model: HeadModel, asked: Questions, heads: HeadSet, seed: int = 0) -> tuple[float, Float[np.ndarray, "h"]]:
    """The mean margin, and what each of `heads` passes on of what stands at the last tokens (formula above), in logits."""
    length = asked.batch.input_ids.shape[1]
    columns = list(range(int(_lines_end(asked).max()), length))  # left padding: the last tokens are the same columns
    if not columns or not heads:
        return float("nan"), np.zeros(len(heads))
    order, values = derangement(len(asked), seed), dict[int, Tensor]()

    def note(call: AttentionCall) -> None:
        values[call.layer] = call.value.repeat_interleave(model.n_heads // call.value.shape[1], 1)[order]

    model.read(asked.inputs, ReadAttention(note, layers=set(heads.by_layer())), keep=1)
    recording, metric = model.record(asked.inputs, keep=1, mlps=False), margin(asked)
    edits = [Swap([head], "value", values, positions=columns) for head in heads]
    clean = float(metric(recording.logits).mean())
    return clean, clean - model.sweep(recording, edits, metric, keep=1).mean(1)


def _lines_end(asked: Questions) -> Int[Tensor, "N"]:
    """The column after each prompt's last line."""
    k = asked.labels.shape[1]
    ends = [asked.batch.spans[f"{part}{j}"][:, 1] for part in ("label", "option") for j in range(k)]
    return torch.stack(ends).amax(0)


def last_attention(
    model: HeadModel, asked: Questions, line: Int[Tensor, "N"] | None = None
) -> dict[str, Float[Tensor, "N L H"]]:
    """The last token's attention to the labels, to the right line's label and option, to the tail, and to `line`'s label."""
    k, length = asked.labels.shape[1], asked.batch.input_ids.shape[1]
    end = torch.full((len(asked),), length - 1)
    edges = {f"label{j}": (end, asked.batch.spans[f"label{j}"]) for j in range(k)}
    edges |= {
        "right label": (end, asked.span("label", asked.right)),
        "right option": (end, asked.span("option", asked.right)),
        "tail": (end, torch.stack([_lines_end(asked), end + 1], 1)),
        "line": (end, asked.span("label", asked.right if line is None else line)),
    }
    reader = Edges(edges)
    model.read(asked.inputs, reader, keep=1)
    return reader.values
