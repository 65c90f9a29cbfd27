"""Sahara (#113): which few heads together carry a model's refusal, found greedily; and what becomes of replies without them.

Zhou et al., arXiv:2410.13708 (ICLR 2025). Start with no head; at each of S <= 5 steps take away, besides the group, every other
head in turn, and keep the one that moves the final states of refused requests most (the data-set score of `ships`):

    group_{s+1} = group_s + argmax over h of score(group_s + h)        degrees ("angle"), or nats ("kl", "refusal")

Each group stands beside random groups with as many heads in each layer. An audit then reads the replies: to requests that are
refused, and to harmless ones, token by token under greedy decoding,

    answered = share of refused requests that get the whole reply of a granted one (the paper's attack success rate)
    nonsense = share that get neither a refusal nor that reply        false refusals = share of harmless requests refused

Departures: angles are those of right singular vectors (see `ships` for why); random groups, which the paper has not; a reply
counts as an answer only if it is one, where the paper counts whatever holds none of its keywords, nonsense included; the group
is found on other requests than it is audited on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from manyheads.atlas.safety.ships import Removal, angles, final_states, refused_requests, removal, swept
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets, p_value
from manyheads.heads import Head, HeadLike
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Example, Task, TaskBatch
from manyheads.tasks.refusal_audit import RefusalAudit, Requests, refusal_audits, refusal_requests

Measure = Literal["angle", "kl", "refusal"]


@dataclass(frozen=True)
class SafetyGroup:
    """A group of heads in the order they were found, beside random groups.

    `values[s]` is the score of its first s + 1 heads, in `unit`; `random_values[s]` those of random groups matched by layer.
    `audits[0]` is the model as it is, `audits[s + 1]` without the first s + 1 heads, `random_audits[s]` without each random
    group.
    """

    heads: tuple[Head, ...]
    unit: str
    values: tuple[float, ...]
    random_values: tuple[tuple[float, ...], ...]
    audits: tuple[RefusalAudit, ...] = ()
    random_audits: tuple[tuple[RefusalAudit, ...], ...] = ()

    @property
    def p_values(self) -> tuple[float, ...]:
        """For each size, how rarely a random group lets as many refused requests be answered; empty without an audit.

        There is no p of `values`: a greedy search keeps the best of many groups on the very requests it scores, which random
        groups do not, so the found group would win by chance alone. Giving each random group a search of its own costs
        `n_random` times as much. The audit is on requests that the search has not seen, where the best of many has no such
        advantage, and the same for all groups.
        """
        pairs = zip(self.audits[1:], self.random_audits, strict=True)
        return tuple(p_value(found.answered, [one.answered for one in random]) for found, random in pairs)

    def __str__(self) -> str:
        lines = [str(self.audits[0])] if self.audits else []
        for s, value in enumerate(self.values):
            random = self.random_values[s]
            line = f"+ {self.heads[s]}: {value:.2f} {self.unit}, random groups {np.mean(random):.2f} ± {np.std(random):.2f}"
            if self.audits:
                answered = np.mean([audit.answered for audit in self.random_audits[s]])
                line += (
                    f"; {self.audits[s + 1]}; without random groups {answered:.0%} answered, p = {self.p_values[s]:.3f}"
                )
            lines.append(line)
        return "\n".join(lines)


def sahara(
    model: HeadModel,
    *,
    task: Task | Sequence[Example] | TaskBatch | None = None,
    requests: Requests | None = None,
    size: int = 3,
    by: Measure = "angle",
    how: Removal = "undifferentiated",
    rank: int = 1,
    n: int = 64,
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> SafetyGroup:
    """Find `size` heads greedily, and audit them (formulas above).

    `task` holds the refused requests to search on (see `ships`); `requests` those to audit on (default: the refusal task, another
    seed; no audit where `task` is given without them). `by` is what a step keeps the largest of: the angle of the final states'
    right singular subspaces of rank `rank`, the KL of the next token, or the log-probability that the refusal loses.
    `bar` counts groups tried.
    """
    if not 1 <= size <= min(5, model.n_layers * model.n_heads):
        raise InputError(f"size is {size}; a safety group has 1 to 5 heads.")
    if by not in ("angle", "kl", "refusal"):
        raise InputError(f"by is {by!r}; choose angle, kl or refusal.")
    if n_random < 20:
        raise InputError(f"a group is set beside at least 20 random ones, not {n_random}.")
    batch = refused_requests(model, task, n, seed)
    recording = model.record(batch.inputs, keep=1, mlps=False)

    def score(groups: Sequence[Iterable[HeadLike]]) -> Float[np.ndarray, "V"]:
        kl, loss, states = swept(model, recording, batch.answer_ids, groups, how, bar)
        if by == "angle":
            return angles(final_states(model, recording), states, rank)
        return np.asarray((kl if by == "kl" else loss).mean(1))

    group: list[Head] = []
    values, random_values, random_groups = [], [], []
    for _ in range(size):
        others = [head for head in model.heads if head not in group]
        scores = score([[*group, head] for head in others])
        group.append(others[int(scores.argmax())])
        values.append(float(scores.max()))
        random_groups.append(matched_sets(model.head_set(group), n_random, seed))
        random_values.append(tuple(float(v) for v in score(random_groups[-1])))
    found = SafetyGroup(tuple(group), "degrees" if by == "angle" else "nats", tuple(values), tuple(random_values))
    if requests is None and task is not None:
        return found
    requests = refusal_requests(model, n=n, seed=seed + 1) if requests is None else requests
    groups = [model.head_set(group[:s]) for s in range(size + 1)]
    audits = audit(model, [*groups, *(g for several in random_groups for g in several)], requests=requests, how=how)
    rest = iter(audits[size + 1 :])
    return SafetyGroup(
        found.heads,
        found.unit,
        found.values,
        found.random_values,
        tuple(audits[: size + 1]),
        tuple(tuple(next(rest) for _ in several) for several in random_groups),
    )


def audit(
    model: HeadModel,
    groups: Sequence[Iterable[HeadLike]],
    *,
    requests: Requests | None = None,
    how: Removal = "undifferentiated",
    top_k: int = 1,
    n: int = 64,
    seed: int = 1,
) -> list[RefusalAudit]:
    """Take each group of heads away by itself and read the replies, in one sweep. An empty group is the model as it is.

    See `refusal_audits` for how, and for sampling from the `top_k` likeliest tokens (the paper: 5) instead of greedy decoding.
    """
    edits = [removal(model.head_set(group), how) for group in groups]
    return refusal_audits(model, edits, requests=requests, top_k=top_k, n=n, seed=seed)
