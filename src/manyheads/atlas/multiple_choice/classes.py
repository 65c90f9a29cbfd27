"""Classes of the multiple-choice circuit's heads (#12), by where the last token looks.

Lieberum et al., arXiv:2307.09458. With A[r, k] a head's attention to label k where r is right, the first rule that fits:

| class | rule |
| --- | --- |
| correct letter | A[r, r] >= floor for every r |
| single letter | A[k, k] >= floor for some k, and A[r, k] < floor for all r != k |
| content gatherer | attention to the right option's text >= floor |
| amplification | attention to what follows the last option, the last token included >= floor |
| constant | attention to all labels together >= floor, whatever is right |

The paper's classes are made by eye; the rules are ours. A head of two labels is of no class.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.circuits.ioi import Edges
from manyheads.atlas.multiple_choice.questions import Questions
from manyheads.errors import InputError
from manyheads.heads import HeadSet
from manyheads.model.headmodel import HeadModel


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
        classes[name] = model.head_set((rule & left).nonzero().tolist())
        left &= ~rule
    return classes


def last_attention(
    model: HeadModel, asked: Questions, line: Int[Tensor, "N"] | None = None
) -> dict[str, Float[Tensor, "N L H"]]:
    """The last token's attention to the labels, to the right line's label and option, to the tail, and to `line`'s label."""
    k, length = asked.labels.shape[1], asked.batch.input_ids.shape[1]
    end = torch.full((len(asked),), length - 1)
    options_end = torch.stack([asked.batch.spans[f"option{j}"][:, 1] for j in range(k)]).amax(0)
    edges = {f"label{j}": (end, asked.batch.spans[f"label{j}"]) for j in range(k)}
    edges |= {
        "right label": (end, asked.span("label", asked.right)),
        "right option": (end, asked.span("option", asked.right)),
        "tail": (end, torch.stack([options_end, end + 1], 1)),
        "line": (end, asked.span("label", asked.right if line is None else line)),
    }
    reader = Edges(edges)
    model.read(asked.inputs, reader, keep=1)
    return reader.values
