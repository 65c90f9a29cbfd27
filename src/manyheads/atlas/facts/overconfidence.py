"""Anti-overconfidence (#75, step 3): what the last layer writes against its own answer, and what scaling that down changes.

Lv et al., arXiv:2403.19521. With s the final residual stream at the last position, w one write of the last layer (a head or the
MLP) and p the answer's probability, all other writes kept as they were,

    change[w] = mean over prompts of p(s - w) - p(s)              in [-1, 1]; positive: w damps the answer

On one half of the prompts the damping writes D (change above 0.001 and two standard errors) are picked, and one factor fitted:

    beta = argmin over [0, 1] of the mean of -log p(s - (1 - beta) sum_{w in D} w)            1: as it was, 0: removed

The other half measures what it changes: accuracy, mean -log p in nats, and the expected calibration error (ten bins of
confidence, the mean of |accuracy - confidence| by size). Restored confidence also restores confident errors. Beside it stand
what could do the same for less: a temperature fitted on the same half, and random sets of as many writes. The rule for D and the
fit are our reading of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.atlas.core.answered import AnyTask, encoded
from manyheads.atlas.core.last_position import last_writes
from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor
from manyheads.model.replay.recording import Recording, only_last, replay, starting_at
from manyheads.progress import Bar
from manyheads.tasks import Facts

BETAS = tuple(i / 20 for i in range(21))
MIN_CHANGE = 1e-3
TEMPERATURES = tuple(2 ** (i / 8) for i in range(-16, 17))


@dataclass(frozen=True)
class Quality:
    """How good answers are on some prompts: accuracy, mean -log p (nats), expected calibration error, mean probability."""

    accuracy: float
    nll: float
    calibration_error: float
    probability: float


@dataclass(frozen=True)
class Overconfidence:
    """Each final write's `change` of the answer's probability (all prompts), and what less damping changes (held-out half).

    `random` holds the quality of each random set of as many writes, fitted as the damping ones were.
    """

    change: dict[str, float]
    stderr: dict[str, float]
    damping: tuple[str, ...]
    beta: float
    temperature: float
    as_is: Quality
    damped: Quality
    tempered: Quality
    random: tuple[Quality, ...]
    n_fit: int
    n_held_out: int

    def to_frame(self) -> pd.DataFrame:
        """A row for each treatment, the random sets averaged."""
        rows = {"as it is": self.as_is, f"damping x {self.beta:.2f}": self.damped}
        rows[f"temperature {self.temperature:.2f}"] = self.tempered
        frame = pd.DataFrame([{"treatment": name, **vars(quality)} for name, quality in rows.items()])
        if not self.random:
            return frame
        mean = pd.DataFrame([vars(quality) for quality in self.random]).mean().to_dict()
        return pd.concat([frame, pd.DataFrame([{"treatment": "random writes", **mean}])], ignore_index=True)


@dataclass(frozen=True)
class _Answers:
    """Prompts ready to be answered again: their last layer's writes, and logits under any change of the final state."""

    model: HeadModel
    recordings: tuple[Recording, ...]
    writes: dict[str, Float[Tensor, "N D"]]
    answers: Int[Tensor, "N"]
    right: tuple[frozenset[int], ...]

    def logits(self, change: Float[Tensor, "N D"] | None = None) -> Float[Tensor, "N V"]:
        """Logits at the last position with `change` added to the final state."""
        found, done = [], 0
        for recording in self.recordings:
            rows = slice(done, done + recording.batch)
            found.append(_read_out(self.model, recording, None if change is None else change[rows]))
            done += recording.batch
        return torch.cat(found).double().cpu()

    def damped(self, names: Sequence[str], beta: float) -> Float[Tensor, "N V"]:
        """Logits with the named writes multiplied by `beta`."""
        return self.logits((beta - 1) * sum((self.writes[name] for name in names), torch.zeros(())))

    def probability(self, logits: Float[Tensor, "N V"]) -> Float[Tensor, "N"]:
        return logits.log_softmax(-1).gather(1, self.answers[:, None])[:, 0].exp()

    def quality(self, logits: Float[Tensor, "N V"], rows: Bool[Tensor, "N"]) -> Quality:
        p = logits.log_softmax(-1)[rows]
        confidence, best = p.exp().max(-1)
        accepted = [ids for ids, kept in zip(self.right, rows.tolist(), strict=True) if kept]
        hit = torch.tensor([b in ids for b, ids in zip(best.tolist(), accepted, strict=True)]).double()
        log_p = p.gather(1, self.answers[rows][:, None])[:, 0]
        return Quality(
            accuracy=float(hit.mean()),
            nll=float(-log_p.mean()),
            calibration_error=calibration_error(confidence, hit),
            probability=float(log_p.exp().mean()),
        )


def overconfidence(
    model: HeadModel,
    *,
    task: AnyTask | None = None,
    n: int = 128,
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Overconfidence:
    """Measure what each write of the last layer does to the answers of `task` (Facts), and fit and judge beta (formulas above).

    All prompts count, answered rightly or not. Without damping writes beta is 1 and nothing changes. `InputError` with fewer than
    eight prompts.
    """
    prompts = _prompts(model, Facts() if task is None else task, n, seed, bar)
    total = len(prompts.answers)
    if total < 8:
        raise InputError(f"{total} prompts are too few to fit on one half and judge on the other; give at least eight.")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    fit = torch.zeros(total, dtype=torch.bool)
    fit[order[: total // 2]] = True
    plain = prompts.logits()
    p = prompts.probability(plain)
    changes = {name: prompts.probability(prompts.damped([name], 0.0)) - p for name in prompts.writes}
    damping = tuple(name for name, change in changes.items() if _damps(change[fit]))
    beta, damped = _fit_beta(prompts, damping, fit)
    temperature = min(TEMPERATURES, key=lambda t: prompts.quality(plain / t, fit).nll)
    random = [_fit_beta(prompts, names, fit)[1] for names in _others(list(prompts.writes), damping, n_random, seed)]
    return Overconfidence(
        change={name: float(change.mean()) for name, change in changes.items()},
        stderr={name: _stderr(change) for name, change in changes.items()},
        damping=damping,
        beta=beta,
        temperature=temperature,
        as_is=prompts.quality(plain, ~fit),
        damped=prompts.quality(damped, ~fit),
        tempered=prompts.quality(plain / temperature, ~fit),
        random=tuple(prompts.quality(logits, ~fit) for logits in random),
        n_fit=int(fit.sum()),
        n_held_out=int((~fit).sum()),
    )


def calibration_error(confidence: Float[Tensor, "N"], hit: Float[Tensor, "N"], bins: int = 10) -> float:
    """`sum over bins of (size / N) |mean hit - mean confidence|`, bins of equal width in [0, 1]."""
    which = (confidence * bins).long().clamp(max=bins - 1)
    error = 0.0
    for i in which.unique().tolist():
        inside = which == i
        error += float(inside.double().mean() * (hit[inside].mean() - confidence[inside].mean()).abs())
    return error


def _prompts(model: HeadModel, task: AnyTask, n: int, seed: int, bar: Bar) -> _Answers:
    batch = encoded(model, task, n, seed)
    last = model.n_layers - 1
    recordings, writes = [], []
    for rows in batch.chunks():
        recordings.append(model.record(rows.inputs))
        writes.append(last_writes(model, rows.inputs, [last])[last])
        bar(len(rows))
    heads, mlp = torch.cat([one.heads for one in writes]), torch.cat([one.mlp for one in writes])
    named = {str(Head(last, h)): heads[:, h] for h in range(model.n_heads)} | {f"MLP {last}": mlp}
    right = tuple(frozenset(ids) for ids in batch.accepted_ids)
    return _Answers(model, tuple(recordings), named, batch.answer_ids, right)


def _read_out(model: HeadModel, recording: Recording, change: Float[Tensor, "B D"] | None) -> Float[Tensor, "B V"]:
    """Logits of the last position through the model's own norm and head, with `change` added to the final state there."""
    outputs = list(recording.outputs)
    if change is not None:
        hidden = first_tensor(outputs[-1]).clone()
        hidden[:, -1] += change.to(hidden)
        outputs[-1] = hidden if isinstance(outputs[-1], Tensor) else (hidden, *outputs[-1][1:])
    changed = replace(recording, outputs=outputs)
    with starting_at(model.layout, changed, model.n_layers):
        return replay(model.plain, changed, **only_last(model.plain, 1))[:, -1]


def _fit_beta(prompts: _Answers, names: Sequence[str], fit: Tensor) -> tuple[float, Float[Tensor, "N V"]]:
    if not names:
        return 1.0, prompts.logits()
    by_beta = {beta: prompts.damped(names, beta) for beta in BETAS}
    best = min(BETAS, key=lambda beta: prompts.quality(by_beta[beta], fit).nll)
    return best, by_beta[best]


def _others(names: list[str], damping: Sequence[str], n: int, seed: int) -> list[tuple[str, ...]]:
    """Up to `n` different sets of as many writes, none of them `damping` itself."""
    if not damping:
        return []
    rng = np.random.default_rng(seed)
    drawn = (tuple(sorted(rng.permutation(len(names))[: len(damping)].tolist())) for _ in range(10 * n))
    found = dict.fromkeys(tuple(names[i] for i in one) for one in drawn)
    return [one for one in found if set(one) != set(damping)][:n]


def _damps(change: Float[Tensor, "N"]) -> bool:
    return float(change.mean()) > max(MIN_CHANGE, 2 * _stderr(change))


def _stderr(values: Float[Tensor, "N"]) -> float:
    return float(values.std() / len(values) ** 0.5)
