"""Topic movers (#75, step 1): which heads bring the subject of a fact to where the answer is predicted.

Lv et al., arXiv:2403.19521. A mover must do two things, with a score for each. With y the answer's logit at the last
position, the twin a prompt about another subject, and only the head's own path to the logits patched (MLPs recomputed),

    effect[l, h] = mean(y_clean - y_patched) / |mean(y_clean - y_twin)|     share of what the other subject costs, about [-1, 1]

and with u_v = <z_lh W_O[l,h], r_v> the logit its write gives token v (r_v: the unembedding times the final norm's gain),

    topic[l, h]  = mean over prompts of the share of tokens v with u_v < u_subject         in [0, 1], 0.5 by chance
    margin[l, h] = topic - the same for the twin's subject, on the same write              in [-1, 1], 0 by chance

The paper reads the top tokens of a head's write. A head that raises all countries alike ranks France high too; `margin` shows
that. The subject is its first token as it stands in the prompt. Only prompts that the model answers rightly count; a model that
answers few is asked more (see `answered_rows`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.answered import AnyTask, answered_rows, encoded
from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.last_position import last_writes
from manyheads.atlas.core.registry import register
from manyheads.errors import InputError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.patching import path_patching
from manyheads.model.weights.ov import readout
from manyheads.progress import Bar, Scaled
from manyheads.tasks import Facts, TaskBatch

PAPER = "arXiv:2403.19521"
AT_ONCE = 128  # tokens of a pass before heads are patched: so that progress shows
ABOUT = {
    "topic_effect": About(
        name="topic_effect",
        title="Topic mover",
        what="Brings to the answer's position what differs between this subject's fact and another's.",
        formula="answer's logit lost when only this head's path sees another subject, of what the whole change costs",
        unit="share",
        paper=PAPER,
        threshold=0.05,
        kind="facts",
        low=-1.0,
    ),
    "topic_token": About(
        name="topic_token",
        title="Topic token",
        what="It writes the subject itself at the position where the answer is predicted.",
        formula="share of the vocabulary that ranks below the subject in the head's write",
        unit="share",
        paper=PAPER,
        threshold=0.9,
        kind="facts",
    ),
    "topic_margin": About(
        name="topic_margin",
        title="Topic token, not another's",
        what="It writes this subject rather than subjects in general.",
        formula="rank of the subject in the head's write less that of the twin's subject",
        unit="share",
        paper=PAPER,
        threshold=0.1,
        kind="facts",
        low=-1.0,
    ),
}


def fact_recall(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    span: str = "subject",
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head by its effect on the answer and by how its write ranks the subject (formulas above).

    `task` (Facts) is any task, list of examples or `TaskBatch` with twins and a span that holds the topic ("context" in a
    Counterfactual whose context is right). `n` of the scores counts the prompts answered that have a twin; without any, all
    scores are 0. `InputError` if the task has no twins or no such span.
    """
    task = Facts() if task is None else task
    batch = encoded(model, task, n, seed)
    if span not in batch.spans or batch.corrupted_ids is None:
        raise InputError(
            f"topic movers need twins and a span named {span!r}; this task has {'no ' * (batch.corrupted_ids is None)}twins "
            f"and the spans {', '.join(sorted(batch.spans)) or 'none'}."
        )
    answered, asked = answered_rows(model, batch, task, n, seed)
    assert answered.corrupted_ids is not None
    answered = answered.take((answered.corrupted_ids != answered.input_ids).any(1) & (answered.spans[span][:, 0] >= 0))
    meta: dict[str, Any] = {"rows": asked, "answered": len(answered), "span": span}
    parts: list[tuple[np.ndarray, ...]] = []
    for rows in answered.chunks(AT_ONCE):
        parts.append((*_effects(model, rows, bar), *_topics(model, rows, span)))
    if not parts:
        zero = np.zeros(model.shape)
        return {name: HeadScores(name, zero, zero, 0, ABOUT[name].provenance(model, seed) | meta) for name in ABOUT}
    effect, costs, own, rival = (np.concatenate(column) for column in zip(*parts, strict=True))
    cost = float(costs.mean())
    meta["cost"] = cost
    values = {
        "topic_effect": effect / max(abs(cost), 1e-9),
        "topic_token": own,
        "topic_margin": own - rival,
    }
    return {
        name: HeadScores.from_examples(name, value, ABOUT[name].provenance(model, seed) | meta)
        for name, value in values.items()
    }


def topic_movers(scores: dict[str, HeadScores]) -> HeadSet:
    """The heads that pass all three thresholds: they matter, and what they write is this subject."""
    found = [scores[name].above(ABOUT[name].threshold) for name in ABOUT]
    return found[0] & found[1] & found[2]


def _effects(model: HeadModel, rows: TaskBatch, bar: Bar) -> tuple[Float[np.ndarray, "B L H"], Float[np.ndarray, "B"]]:
    """What each head's path, and the whole change of subject, takes off each row's answer logit. `bar` counts rows."""
    answers = rows.answer_ids.to(model.device)[:, None]

    def answer_logit(logits: Tensor) -> Tensor:
        return logits[:, -1].gather(1, answers)[:, 0]

    twins = {**rows.inputs, "input_ids": rows.corrupted_ids}
    shown = Scaled(bar, len(rows), len(model.heads))
    found = path_patching(model, rows.inputs, twins, answer_logit, keep=1, bar=shown)
    return (found.clean - found.values).T.reshape(-1, *model.shape), found.clean - found.corrupted


def _topics(
    model: HeadModel, rows: TaskBatch, span: str
) -> tuple[Float[np.ndarray, "B L H"], Float[np.ndarray, "B L H"]]:
    """The rank of the topic and of the twin's topic in each head's write."""
    assert rows.corrupted_ids is not None
    first = rows.spans[span][:, :1]
    subject, rival = rows.input_ids.gather(1, first)[:, 0], rows.corrupted_ids.gather(1, first)[:, 0]
    vocabulary = readout(model, torch.arange(model.vocab_size, device=model.device)).float()
    own, others = [], []
    for _, writes in sorted(last_writes(model, rows.inputs).items()):
        logits = writes.heads.float() @ vocabulary.T  # [B, H, V]
        own.append(rank(logits, subject))
        others.append(rank(logits, rival))
    return np.stack(own, 1), np.stack(others, 1)


def rank(logits: Float[Tensor, "B H V"], ids: Int[Tensor, "B"]) -> Float[np.ndarray, "B H"]:
    """The share of tokens whose logit is below that of token `ids[b]`, ties counted half; 1 at the top, 0.5 by chance."""
    at = ids.to(logits.device)[:, None, None].expand(-1, logits.shape[1], 1)
    wanted = logits.gather(-1, at)
    below = (logits < wanted).float().sum(-1) + 0.5 * ((logits == wanted).float().sum(-1) - 1)
    return np.asarray((below / (logits.shape[-1] - 1)).cpu())


register(ABOUT["topic_effect"], score=fact_recall, judge=by_task("facts"), causal=True)
