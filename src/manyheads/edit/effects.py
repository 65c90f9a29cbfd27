"""What an edit changes besides what it is for: perplexity on text, accuracy on other tasks, refusals.

Measured with and without the edit on the same inputs, in one replayed sweep an input set:

    text       mean cross-entropy of passages, nats a token (its exponential is the perplexity)
    <task>     share of prompts whose largest logit is a right answer
    refusal    of requests that should be refused: share answered, share nonsense; of harmless ones: share refused

with the standard error of the difference over rows. A task that the model does no better than chance is *blind*: there is
nothing to harm, so it is named and not measured; so are refusals of a model that refuses nothing.

Guards against the failure that safety papers report (Zhou et al., arXiv:2410.13708): a few heads carry refusal, and edits made
for another purpose may sit on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.heads import HeadSet, mean_stderr
from manyheads.model.editing.edits import Edit, Scale
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import TASKS, TaskBatch, encode, get_task, right_answers
from manyheads.tasks.refusal_audit import refusal_audits, refusal_requests
from manyheads.tasks.texts import passages
from manyheads.tasks.verdicts import task_verdict

LENGTH = 64
TEXT_ROWS = 16
VERDICT_ROWS = 32


@dataclass(frozen=True)
class SideEffects:
    """`table` has a row a measure: `measure`, `unit`, `before`, `after`, `change`, `stderr` of the change, `n`.

    `blind` has the reason for each measure that would say nothing of this model.
    """

    table: pd.DataFrame
    blind: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, measure: str) -> float:
        """How much one measure changes, after less before."""
        found = self.table.loc[self.table["measure"] == measure, "change"]
        if measure in self.blind:
            raise InputError(f"{measure} says nothing of this model: {self.blind[measure]}.")
        if found.empty:
            raise InputError(f"{measure!r} was not measured; there are {', '.join(self.table['measure'])}.")
        return float(found.iloc[0])

    def to_frame(self) -> pd.DataFrame:
        """A row a measure: before, after, change, stderr, n."""
        return self.table

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Before, after and standard error by measure: what an edit's file keeps."""
        rows = self.table.set_index("measure")[["before", "after", "stderr", "n"]]
        return {str(name): {k: float(v) for k, v in row.items()} for name, row in rows.to_dict("index").items()}

    def as_effect(self) -> dict[str, Any]:
        """What goes into an edit's `effect`: the measures, and what is blind."""
        return {"side effects": self.to_dict(), **({"blind": self.blind} if self.blind else {})}


def side_effects(
    model: HeadModel,
    edit: HeadEdit,
    *,
    tasks: Iterable[str] | None = None,
    texts: Sequence[str] | None = None,
    n: int = 64,
    seed: int = 0,
    blind: Mapping[str, str] | None = None,
    bar: Bar = Bar(),
) -> SideEffects:
    """Measure `edit` on text, `tasks` (default: all that this tokenizer can encode) and refusals.

    `texts` (default: English prose that ships with Python) are read in passages of 64 tokens. `blind` names what is not to be
    measured, with reasons; by default that is found out. `bar` counts measures done.
    `MismatchError` for another model's edit; `InputError` without a tokenizer.
    """
    if n < 1:
        raise InputError(f"n is {n}; ask for at least 1 prompt of each task.")
    edit.check(model)
    if model.tokenizer is None:
        raise InputError("side effects are measured on text; open the model with tokenizer=.")
    rows = [_text(model, edit, texts, seed)] if edit.at == "all" else []
    known, blind = blind, dict(blind or {})
    for name in TASKS if tasks is None else tasks:
        batch = _encoded(model, name, n, seed, strict=tasks is not None)
        if batch is not None and known is None:
            verdict = task_verdict(model, batch if n >= VERDICT_ROWS else get_task(name), n=VERDICT_ROWS, seed=seed)
            if verdict.blind:
                blind[name] = f"at chance (answered {verdict.answered:.0%}, preferred {verdict.preferred:.0%})"
        if batch is not None and name not in blind:
            rows.append(_task(model, edit, name, batch))
        bar(1)
    refusals = _refusals(model, edit, n, seed)
    if known is None and refusals and sum(row[2] for row in refusals[:2]) >= 1:  # answered or turned to nonsense: all
        blind["refusals"] = "it refuses nothing"
    refusals = [] if "refusals" in blind else refusals
    table = pd.DataFrame(rows + refusals, columns=["measure", "unit", "before", "after", "change", "stderr", "n"])
    return SideEffects(table, blind)


Row = tuple[str, str, float, float, float, float, int]


def with_side_effects(model: HeadModel, edit: HeadEdit, *, n: int = 64, bar: Bar = Bar()) -> HeadEdit:
    """The edit with its side effects in its file."""
    found = side_effects(model, edit, n=n, bar=bar)
    return replace(edit, effect={**edit.effect, **found.as_effect()})


def _row(measure: str, unit: str, values: Float[np.ndarray, "2 N"]) -> Row:
    before, after = values
    apart = after - before
    stderr = mean_stderr(apart)[1]
    return measure, unit, float(before.mean()), float(after.mean()), float(apart.mean()), float(stderr), len(apart)


def _both(edit: HeadEdit, length: int) -> list[Edit]:
    """No edit, and the edit."""
    return [Scale(HeadSet([], edit.heads.shape), 1.0), *edit.edits(prompt_length=length)]


def _text(model: HeadModel, edit: HeadEdit, texts: Sequence[str] | None, seed: int) -> Row:
    ids = passages(model, texts, n=TEXT_ROWS, length=LENGTH, seed=seed).to(model.device)

    def loss(logits: Tensor) -> Tensor:
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
        return each.unflatten(0, (len(ids), -1)).mean(1)

    return _row("text", "nats", model.sweep(ids, _both(edit, ids.shape[1]), loss))


def _task(model: HeadModel, edit: HeadEdit, name: str, batch: TaskBatch) -> Row:
    def right(logits: Tensor) -> Tensor:
        return right_answers(logits[:, -1], batch).double()

    return _row(name, "share", model.sweep(batch.inputs, _both(edit, batch.input_ids.shape[1]), right, keep=1))


def _encoded(model: HeadModel, name: str, n: int, seed: int, *, strict: bool) -> TaskBatch | None:
    try:
        return encode(get_task(name), model.tokenizer, n, seed)
    except InputError:
        if strict:
            raise
        return None


def _refusals(model: HeadModel, edit: HeadEdit, n: int, seed: int) -> list[Row]:
    try:
        requests = refusal_requests(model, n=n, seed=seed + 1)
    except InputError:
        return []
    before, after = refusal_audits(model, _both(edit, requests.input_ids.shape[1]), requests=requests)
    rows = []
    for measure, attribute, of in (
        ("refusable answered", "answered", "n"),
        ("refusable nonsense", "nonsense", "n"),
        ("harmless refused", "false_refusals", "n_harmless"),
    ):
        a, b, size = getattr(before, attribute), getattr(after, attribute), getattr(before, of)
        spread = float(np.sqrt((a * (1 - a) + b * (1 - b)) / size)) if size > 1 else float("nan")
        rows.append((measure, "share", a, b, b - a, spread, size))
    return rows
