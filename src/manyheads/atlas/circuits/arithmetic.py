"""Arithmetic heads (#14): the few heads that bring operands and operator to where the result is predicted.

Zhang et al., arXiv:2409.01659. Each prompt has a twin without its sense: the operator replaced by a null token (the paper), or
both operands by those of another prompt of the same form (ours, since a head that carries operands need not notice the operator).
Path patching sends one head's (or MLP's) output in the twin to the logits, all other heads frozen, MLPs recomputed. With y the
logit of the right answer C at the last position, over the prompts that the model answers,

    logit[l, h] = mean(y_clean - y_patched)                        in logits
    ratio[l, h] = mean(y_clean - y_patched) / |mean(y_clean)|      share of the logit lost, dimensionless

A head is a key head from a ratio of 0.05 on. The paper's effect is `(patched - clean) / clean` a prompt: the sign is turned here
so that what matters most ranks first, and means are divided rather than rows, since a row whose logit is near zero would
dominate. Even so a ratio depends on where the logits' zero happens to lie, which a softmax does not see: the difference does not.
On a model whose logits lie near 35 no head reaches 0.05, and only the differences say which heads matter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.answered import AnyTask, encoded, is_right
from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.causal import causal_check
from manyheads.atlas.core.judges import Judge, by_task
from manyheads.atlas.core.registry import register
from manyheads.atlas.core.result import CausalCheck
from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike, HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate, derangement
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.patching import Mlp, path_patching
from manyheads.progress import Bar, Scaled
from manyheads.tasks import Arithmetic, Example, Task, TaskBatch, right_answers
from manyheads.tasks.families.arithmetic_templates import ArithmeticTemplates

NULL_WORDS = (" nothing", " @", " <", "@", "<")
WORDS = (
    *("plus", "minus", "times", "less", "over", "sum", "difference", "product", "quotient"),
    *("added to", "multiplied by", "divided by"),
)
OPERATORS = re.compile(rf"\b({'|'.join(WORDS)})\b|(?<=\s)[-+*/×÷](?=\s)")
PAPER = "arXiv:2409.01659"


def _about(name: str, title: str, what: str, ratio: bool) -> About:
    formula = "answer's logit lost when only this head's path to the logits sees the twin"
    return About(
        name=name,
        title=title,
        what=what,
        formula=f"share of the {formula}" if ratio else formula,
        unit="share" if ratio else "logits",
        paper=PAPER,
        threshold=0.05 if ratio else 0.5,
        kind="arithmetic",
        low=-1.0 if ratio else -10.0,
        high=1.0 if ratio else 10.0,
    )


ABOUT = {
    "arithmetic": _about(
        "arithmetic", "Arithmetic", "Brings an operand or the operator to where the result is predicted.", True
    ),
    "arithmetic_operator": _about(
        "arithmetic_operator", "Operator", "Carries which operation is meant to the answer.", True
    ),
    "arithmetic_operands": _about(
        "arithmetic_operands", "Operands", "Carries which numbers are meant to the answer.", True
    ),
    "arithmetic_operator_logit": _about(
        "arithmetic_operator_logit", "Operator, in logits", "Carries which operation is meant to the answer.", False
    ),
    "arithmetic_operands_logit": _about(
        "arithmetic_operands_logit", "Operands, in logits", "Carries which numbers are meant to the answer.", False
    ),
}


def arithmetic(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    operator: str = "operator",
    operands: Sequence[str] = ("a", "b"),
    null: int | None = None,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head by both twins, as ratio and as difference (formulas above), over the prompts answered rightly.

    `task` (see `default_task`) is any task, list of examples or `TaskBatch` whose spans name the `operator` and the
    `operands`; in text the operator's span is found if it is missing. `null` is the token that takes the operator's place
    (default: the first of `NULL_WORDS` that is one token). "arithmetic" is the larger of the two ratios. `meta` holds the
    MLPs' effects by layer and how many were answered; `n` counts the prompts of a score, 0 where none was answered or had a
    twin. `bar` counts rows, twice.
    """
    batch = arithmetic_batch(model, task, operator, n, seed)
    _needs(batch, (operator, *operands))
    answered = batch.take(is_right(model, batch))
    null = null_token(model) if null is None else null
    meta: dict[str, Any] = {"rows": len(batch), "answered": len(answered), "null": null}
    scores: dict[str, HeadScores] = {}
    for kind in ("operator", "operands"):
        twins, kept = (
            without(answered, operator, null) if kind == "operator" else other_operands(answered, operands, seed)
        )
        lost, clean = _lost(model, answered.take(kept), twins[kept], bar)
        scores |= _scores(model, f"arithmetic_{kind}", lost, clean, seed, meta)
    return {"arithmetic": _larger(scores["arithmetic_operator"], scores["arithmetic_operands"]), **scores}


def key_heads(
    scores: dict[str, HeadScores],
    threshold: float | None = None,
    *,
    unit: Literal["share", "logits"] = "share",
    per_layer: int | None = None,
) -> HeadSet:
    """The heads that cost at least `threshold` (0.05 of the logit, or 0.5 logits) under either twin.

    At most `per_layer` a layer, the strongest: so that a layer keeps heads that random sets can be drawn from.
    """
    names = [f"arithmetic_{kind}{'' if unit == 'share' else '_logit'}" for kind in ("operator", "operands")]
    least = ABOUT[names[0]].threshold if threshold is None else threshold
    larger = np.maximum(*(scores[name].values for name in names))
    heads = [Head(int(layer), int(i)) for layer, i in np.argwhere(larger >= least)]
    by_layer: dict[int, list[Head]] = {}
    for head in sorted(heads, key=lambda head: -larger[head]):
        by_layer.setdefault(head.layer, []).append(head)
    return HeadSet([head for some in by_layer.values() for head in some[:per_layer]], scores[names[0]].shape)


def knockout(
    model: HeadModel,
    heads: HeadSet | Sequence[HeadLike],
    *,
    apart_from: HeadSet | Sequence[HeadLike] = (),
    task: AnyTask | None = None,
    n: int = 64,
    n_random: int = 20,
    seed: int = 1,
) -> CausalCheck:
    """Mean-ablate `heads` and random sets matched by layer: what either costs in accuracy on `task` (see `default_task`).

    With `apart_from` the random sets hold none of these heads nor of `heads`: the check is then against heads that were not
    found. Only `len(random_effects)` different sets may exist; p is at least one in as many and one. `InputError` if there is
    none.
    """
    task = default_task(model) if task is None else task
    batch = arithmetic_batch(model, task, None, n, seed)
    judge = accuracy_judge(model, batch, task.name if isinstance(task, Task) else "arithmetic")
    found, apart = model.head_set(heads), model.head_set(apart_from)
    if not apart:
        return causal_check(model, "arithmetic", found, judge, "mean", n_random=n_random, seed=seed)
    drawn = dict.fromkeys(found.matched_random(100 * n_random, seed, shape=model.shape))
    controls = [some for some in drawn if not some & (found | apart)][:n_random]
    if not controls:
        raise InputError(f"the layers of {found} have no random set apart from {apart}; give fewer heads a layer.")
    edits = [Ablate(some, "mean", judge.mean_z) for some in (found, *controls)]
    values = model.sweep(judge.recording, edits, judge.score, keep=judge.keep)
    return CausalCheck.of("arithmetic", "mean", found, judge.metric, judge.clean, values)


def default_task(model: HeadModel) -> Task:
    """Arithmetic where " 42" is one token after a prompt, as the method needs; else the templates with results of one digit.

    The method reads one token after the prompt, so where digits are split results must have one.
    `InputError` without a tokenizer.
    """
    if model.tokenizer is None:
        raise InputError("a task needs a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    prompt, both = (len(model.tokenizer(text)["input_ids"]) for text in ("37 + 5 =", "37 + 5 = 42"))
    return Arithmetic() if both == prompt + 1 else ArithmeticTemplates(largest=9)


def accuracy_judge(model: HeadModel, batch: TaskBatch, name: str) -> Judge:
    """Judge ablations by the share of rows whose largest logit is a right answer."""

    def score(logits: Tensor) -> Tensor:
        return right_answers(logits[:, -1], batch).double()

    return Judge(f"accuracy of {name} answers (share)", model, batch.inputs, score, 1)


def arithmetic_batch(model: HeadModel, task: AnyTask | None, operator: str | None, n: int, seed: int) -> TaskBatch:
    """The prompts as tensors; with `operator`, text that has no such span gets one around its first operation word or sign."""
    task = default_task(model) if task is None else task
    if operator is None or isinstance(task, TaskBatch):
        return encoded(model, task, n, seed)
    examples = task.examples(8 * n, seed) if isinstance(task, Task) else task
    return encoded(model, [with_operator(example, operator) for example in examples], n, seed)


def with_operator(example: Example, name: str = "operator") -> Example:
    """The example with a span around its first operation word or sign, unless it has one. `InputError` if there is none."""
    if name in example.spans:
        return example
    found = OPERATORS.search(example.prompt)
    if found is None:
        raise InputError(f"no operator in {example.prompt!r}; give examples with a span named {name!r}.")
    return replace(example, spans={**example.spans, name: found.span()})


def null_token(model: HeadModel) -> int:
    """The first of `NULL_WORDS` that is one token. `InputError` if none is."""
    if model.tokenizer is None:
        raise InputError(
            "a null token needs a tokenizer; open the model with tokenizer=, or give null=, a token id that means no operation."
        )
    for word in NULL_WORDS:
        ids = model.tokenizer(word, add_special_tokens=False)["input_ids"]
        if len(ids) == 1 and ids[0] != model.tokenizer.unk_token_id:
            return int(ids[0])
    raise InputError(f"none of {', '.join(map(repr, NULL_WORDS))} is one token; give null=, a token id.")


def without(batch: TaskBatch, span: str, null: int) -> tuple[Int[Tensor, "N T"], Int[Tensor, "M"]]:
    """Every row with `null` in place of the span's tokens, and the rows that have the span."""
    return batch.input_ids.masked_fill(inside(batch, span), null), _having(batch, [span])


def other_operands(batch: TaskBatch, spans: Sequence[str], seed: int) -> tuple[Int[Tensor, "N T"], Int[Tensor, "M"]]:
    """Every row with the spans' tokens of another row whose spans stand at the same places, and the rows that found one."""
    twins, found = batch.input_ids.clone(), []
    forms: dict[tuple[Any, ...], list[int]] = {}
    for row in _having(batch, spans).tolist():
        form = (int(batch.attention_mask[row].sum()), *(tuple(batch.spans[name][row].tolist()) for name in spans))
        forms.setdefault(form, []).append(row)
    for rows in forms.values():
        if len(rows) < 2:
            continue
        where = torch.stack([inside(batch, name)[rows[0]] for name in spans]).any(0)
        for row, donor in zip(rows, derangement(len(rows), seed).tolist(), strict=True):
            twins[row, where] = batch.input_ids[rows[donor], where]
            if not torch.equal(twins[row], batch.input_ids[row]):
                found.append(row)
    return twins, torch.tensor(sorted(found), dtype=torch.long)


def inside(batch: TaskBatch, span: str) -> Tensor:
    """Which columns of each row lie in the span, boolean `[N, T]`."""
    columns = torch.arange(batch.input_ids.shape[1])
    start, stop = batch.spans[span][:, :1], batch.spans[span][:, 1:]
    return (columns >= start) & (columns < stop)


def _having(batch: TaskBatch, spans: Sequence[str]) -> Int[Tensor, "M"]:
    has = torch.stack([batch.spans[name][:, 0] >= 0 for name in spans]).all(0)
    return has.nonzero().flatten()


def _needs(batch: TaskBatch, spans: Sequence[str]) -> None:
    missing = [name for name in spans if name not in batch.spans]
    if missing or len(spans) < 2:
        raise InputError(
            f"arithmetic needs spans for the operator and the operands, {', '.join(spans)}; this task has "
            f"{', '.join(sorted(batch.spans)) or 'none'}. Name its spans with operator= and operands=."
        )


def _lost(
    model: HeadModel, batch: TaskBatch, twins: Int[Tensor, "M T"], bar: Bar
) -> tuple[Float[np.ndarray, "M S"], Float[np.ndarray, "M"]]:
    """How much of each row's answer logit each sender's path loses (heads in order, then MLPs), and the clean logit."""
    senders: list[Head | Mlp] = [*model.heads, *(Mlp(layer) for layer in range(model.n_layers))]
    lost, clean = [np.zeros((0, len(senders)))], [np.zeros(0)]
    done = 0
    for rows in batch.chunks():
        answers = rows.answer_ids.to(model.device)

        def answer_logit(logits: Tensor, answers: Tensor = answers) -> Tensor:
            return logits[:, -1].gather(1, answers[:, None])[:, 0]

        corrupted = {**rows.inputs, "input_ids": twins[done : done + len(rows)]}
        shown = Scaled(bar, len(rows), len(senders))
        effects = path_patching(model, rows.inputs, corrupted, answer_logit, senders=senders, keep=1, bar=shown)
        lost.append((effects.clean - effects.values).T)
        clean.append(effects.clean)
        done += len(rows)
    return np.concatenate(lost), np.concatenate(clean)


def _scores(
    model: HeadModel,
    name: str,
    lost: Float[np.ndarray, "M S"],
    clean: Float[np.ndarray, "M"],
    seed: int,
    meta: dict[str, Any],
) -> dict[str, HeadScores]:
    n_heads = len(model.heads)
    by_unit = {name: 1.0 / max(abs(clean.mean()), 1e-9) if len(clean) else 1.0, f"{name}_logit": 1.0}
    scores = {}
    for key, unit in by_unit.items():
        about = ABOUT[key].provenance(model, seed) | meta
        if not len(clean):
            scores[key] = HeadScores(key, np.zeros(model.shape), np.zeros(model.shape), 0, about)
            continue
        about |= {"clean_logit": float(clean.mean()), "mlp": (lost[:, n_heads:].mean(0) * unit).round(6).tolist()}
        scores[key] = HeadScores.from_examples(key, lost[:, :n_heads].reshape(-1, *model.shape) * unit, about)
    return scores


def _larger(one: HeadScores, two: HeadScores) -> HeadScores:
    first = one.values >= two.values
    meta = {**one.meta, "method": "arithmetic"}
    meta.pop("mlp", None)
    values, stderr = np.where(first, one.values, two.values), np.where(first, one.stderr, two.stderr)
    return HeadScores("arithmetic", values, stderr, min(one.n, two.n), meta)


register(
    ABOUT["arithmetic"],
    score=arithmetic,
    judge=by_task(default_task, name="arithmetic"),
    steps=lambda model, n: 2 * n,
    causal=True,
)
