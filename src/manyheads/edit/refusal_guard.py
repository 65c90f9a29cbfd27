"""A guard on refusals (#113): which single heads carry them, and whether an edit touches those.

Zhou et al., arXiv:2410.13708, find that taking away one head can undo a model's refusals. Every head is removed by itself (z = 0)
and the replies are read (`manyheads.tasks.refusal_audit`): requests answered that should be refused, nonsense, harmless ones
refused. In redundant models no single head does it and a few together may; `side_effects` measures a whole edit.
"""

from __future__ import annotations

import pandas as pd

from manyheads.errors import UnsupportedError
from manyheads.heads import HeadSet
from manyheads.model.editing.edits import Edit, Scale
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.tasks.refusal_audit import Requests, refusal_audits, refusal_requests


def guard(
    model: HeadModel, edit: HeadEdit | None = None, *, requests: Requests | None = None, n: int = 64, seed: int = 1
) -> pd.DataFrame:
    """A row a head, those first without which most refusable requests are answered or turned to nonsense.

    Columns: `head`, `answered`, `nonsense`, `false_refusals` without it, `carries` (refusals lost: what the first two rise by
    over the whole model), and, given an `edit`, `edited`. One replayed sweep. `InputError` without a tokenizer or requests;
    `UnsupportedError` for a model that refuses these requests no more than harmless ones: no head of it carries refusals.
    """
    if edit is not None:
        edit.check(model)
    nothing: Edit = Scale(HeadSet([], model.shape), 1.0)
    requests = refusal_requests(model, n=n, seed=seed) if requests is None else requests
    whole = refusal_audits(model, [nothing], requests=requests)[0]
    refused = 1 - whole.answered - whole.nonsense
    if refused <= whole.false_refusals + 1e-9:
        raise UnsupportedError(
            f"this model refuses {refused:.0%} of {whole.n} requests that should be refused and {whole.false_refusals:.0%} of "
            f"{whole.n_harmless} harmless ones, so no head of it carries refusals; give requests= that it refuses."
        )
    audits = refusal_audits(model, [Scale([h], 0.0) for h in model.heads], requests=requests)
    rows = [
        {
            "head": str(head),
            "answered": audit.answered,
            "nonsense": audit.nonsense,
            "false_refusals": audit.false_refusals,
            "carries": audit.answered + audit.nonsense - whole.answered - whole.nonsense,
        }
        for head, audit in zip(model.heads, audits, strict=True)
    ]
    frame = pd.DataFrame(rows)
    if edit is not None:
        touched = {str(head) for head in edit.heads}
        frame["edited"] = [name in touched for name in frame["head"]]
    return frame.sort_values("carries", ascending=False, kind="stable", ignore_index=True)
