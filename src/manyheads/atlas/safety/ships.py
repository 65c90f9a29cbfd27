"""Safety heads (#113): how concentrated a model's refusal is in single heads. An audit: it shows where a refusal is fragile.

Zhou et al., arXiv:2410.13708 (ICLR 2025). A head is taken away by *undifferentiated attention* - its scores become equal, so that
row i of its pattern is 1/i - or by its *scaling contribution*: its values times 1e-5. With p(. | q) the next-token distribution
at the last token of a query q that is refused, and M [Q, D] the final states (after the final norm) of Q queries,

    ships(l, h)      = mean over q of KL(p(. | q) || p_lh(. | q))                                       nats, >= 0
    direction(l, h)  = mean over q of log p(refusal | q) - log p_lh(refusal | q)                        nats; positive: it refuses
    angle(l, h)      = sum over i < r of arccos(sigma_i(V[:, :r]^T V_lh[:, :r])),  M = U S V^T          degrees, 0 to 90 r
    left angle       = the same of U, as the paper has it
    shift(l, h)      = mean over q of |m_lh(q) - m(q)| / mean over q of |m(q)|                          share of a state's length

KL has no sign - a head that weakens refusal moves p as much as one that makes it - so the direction stands beside it. The paper
takes U, whose columns live in the space of queries: where all queries move by one and the same vector U hardly turns, however
far they go, and that is just what a head that decides "refuse" does to them. V lives in the space of states, and turns.

Departures: uniform attention is exact (1e-5 W_q is not: a query norm, as in Qwen 3, undoes it), scaling z stands for scaling W_v
(under grouped queries W_v belongs to several heads), and the paper's natural-language template is left to the prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import register
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadLike, HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate, Edit, Scale
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor
from manyheads.model.reading.readers import Activation, Reader
from manyheads.model.replay.recording import Recording
from manyheads.progress import Bar, Scaled
from manyheads.tasks import Example, Refusal, Task, TaskBatch, encode, suited
from manyheads.tasks.families.refusal import REFUSED

Removal = Literal["undifferentiated", "contribution"]
EPSILON = 1e-5
GROUPS = 10  # of a jackknife
MORE = 4  # half of all requests are refused
PAPER = "arXiv:2410.13708"
ABOUTS = {
    about.name: about
    for about in (
        About(
            name="ships",
            title="Ships",
            what="Without it the next token of a refused request is another: by how much, in either direction.",
            formula="KL(p || p without the head) at the last token of the prompt",
            unit="nats",
            paper=PAPER,
            threshold=0.1,
            kind="safety",
            high=5.0,
        ),
        About(
            name="ships_direction",
            title="Ships, direction",
            what="Without it a refusal is less likely (negative: more likely).",
            formula="log p(refusal) - log p(refusal) without the head",
            unit="nats",
            paper=PAPER,
            threshold=0.1,
            kind="safety",
            low=-5.0,
            high=5.0,
        ),
        About(
            name="ships_angle",
            title="Ships, data set",
            what="Without it the final states of refused requests span another direction.",
            formula="principal angles of the right singular subspaces of the final states, with and without the head",
            unit="degrees",
            paper=PAPER,
            threshold=5.0,
            kind="safety",
            high=90.0,
        ),
        About(
            name="ships_left_angle",
            title="Ships, data set, as published",
            what="Without it refused requests stand in another relation to each other; blind to a shift of all alike.",
            formula="principal angles of the left singular subspaces of the final states, with and without the head",
            unit="degrees",
            paper=PAPER,
            threshold=5.0,
            kind="safety",
            high=90.0,
        ),
        About(
            name="ships_shift",
            title="Ships, shift",
            what="Without it the final states of refused requests lie elsewhere.",
            formula="mean distance of the final states with and without the head, by their mean length",
            unit="share",
            paper=PAPER,
            threshold=0.1,
            kind="safety",
            high=2.0,
        ),
    )
}


class FinalState(Reader):
    """Keeps the last token's residual stream after the last block, of every pass: `states()` is `[rows of all passes, D]`."""

    site = "resid"

    def __init__(self, n_layers: int) -> None:
        self.layers = (n_layers,)
        self.kept: list[Tensor] = []

    def read(self, call: Activation) -> None:
        self.kept.append(call.value[:, -1])

    def states(self) -> Float[Tensor, "N D"]:
        """What was kept, in order."""
        return torch.cat(self.kept)


def removal(heads: Iterable[HeadLike], how: Removal) -> Edit:
    """The edit that takes `heads` away as the paper does. `InputError` for a way it does not know."""
    if how not in ("undifferentiated", "contribution"):
        raise InputError(f"unknown removal {how!r}; choose undifferentiated or contribution.")
    return Ablate(heads, "uniform") if how == "undifferentiated" else Scale(heads, EPSILON)


def ships(
    model: HeadModel,
    *,
    task: Task | Sequence[Example] | TaskBatch | None = None,
    how: Removal = "undifferentiated",
    rank: int = 1,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """All five scores of every head (formulas above), from one swept, batched replay of each thousand tokens of requests.

    `task` holds requests that are refused, their `answer` being how a refusal begins (default: the marked requests of
    `mh.tasks.Refusal`; `UnsupportedError` for a model that does not refuse them). `rank` is r. Standard errors of the angles are
    a jackknife over ten groups of queries. `meta["worst_of"]` of "ships" is the share of queries for which a head has the
    largest KL. `bar` counts requests.
    """
    batch = refused_requests(model, task, n, seed)
    if not 1 <= rank <= min(len(batch), model.layout.hidden_size):
        raise InputError(
            f"rank is {rank}; it must lie between 1 and the number of queries ({len(batch)}) or dimensions."
        )
    kl, direction, clean, states = _removed(model, batch, how, bar)
    distance = (states - clean).norm(dim=-1) / clean.norm(dim=-1).mean()
    meta = {
        name: about.provenance(model, seed, how=how, rank=rank, n=len(batch)) | {"queries": len(batch)}
        for name, about in ABOUTS.items()
    }
    meta["ships"]["worst_of"] = _by_head(model, np.eye(kl.shape[0])[kl.argmax(0)].T.mean(1)).round(4).tolist()
    scores = {
        name: HeadScores.from_examples(name, np.stack([_by_head(model, row) for row in per_query.T]), meta[name])
        for name, per_query in (("ships", kl), ("ships_direction", direction), ("ships_shift", distance.cpu().numpy()))
    }
    for name, side in (("ships_angle", "right"), ("ships_left_angle", "left")):
        value, error = _jackknife(clean, states, rank, side)
        scores[name] = HeadScores(name, _by_head(model, value), _by_head(model, error), len(batch), meta[name])
    return {name: scores[name] for name in ABOUTS}


def _removed(
    model: HeadModel, batch: TaskBatch, how: Removal, bar: Bar
) -> tuple[Float[np.ndarray, "V N"], Float[np.ndarray, "V N"], Float[Tensor, "N D"], Float[Tensor, "V N D"]]:
    """KL and loss of refusal log-probability without each head, and the final states with it and without."""
    sets, parts = [[head] for head in model.heads], []
    # A thousand tokens go through the model one variant at a time; more at once would only take more memory.
    for rows in batch.chunks():
        recording = model.record(rows.inputs, keep=1, mlps=False)
        shown = Scaled(bar, len(rows), len(sets))
        kl, direction, states = swept(model, recording, rows.answer_ids, sets, how, shown)
        parts.append((kl, direction, final_states(model, recording), states))
    kl, direction = (np.concatenate([part[i] for part in parts], 1) for i in (0, 1))
    return kl, direction, torch.cat([part[2] for part in parts]), torch.cat([part[3] for part in parts], 1)


def refused_requests(
    model: HeadModel, task: Task | Sequence[Example] | TaskBatch | None, n: int, seed: int
) -> TaskBatch:
    """The requests, encoded; without `task` those of `Refusal`, put as the model refuses them.

    `InputError` without a tokenizer; `UnsupportedError` for a model that refuses marked requests no more than others, however
    they are put: no head of it refuses, and what a head does to its next token would only look like it.
    """
    if isinstance(task, TaskBatch):
        return task
    if model.tokenizer is None:
        raise InputError("requests need a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    return encode(_refused(model, n, seed) if task is None else task, model.tokenizer, n, seed)


def _refused(model: HeadModel, n: int, seed: int) -> Task | list[Example]:
    """Requests to refuse, in the way of putting them that tells them from others best."""
    both = suited(model, Refusal(), seed=seed)
    if both.verdict.blind:
        raise UnsupportedError(
            f"this model refuses the requests of the task refusal no more than others ({both}); give task= with requests that it "
            "refuses, their answer being how it does."
        )
    if both.how == "plain":
        return Refusal(marked=True)
    refusal = REFUSED[0].strip()
    return [one for one in both.task.examples(MORE * n, seed) if one.answer.strip() == refusal]


def swept(
    model: HeadModel,
    recording: Recording,
    refusals: Tensor,
    sets: Sequence[Iterable[HeadLike]],
    how: Removal,
    bar: Bar = Bar(),
) -> tuple[Float[np.ndarray, "V N"], Float[np.ndarray, "V N"], Float[Tensor, "V N D"]]:
    """KL, loss of refusal log-probability and final states for each set of heads taken away: one replay for all three."""
    clean = recording.logits[:, -1].float().log_softmax(-1)
    ids = refusals.to(clean.device)[:, None]

    def measure(logits: Tensor) -> Tensor:
        log_p = logits[:, -1].float().log_softmax(-1)
        kl = (clean.exp() * (clean - log_p)).sum(-1).clamp(min=0)
        return torch.cat([kl, (clean - log_p).gather(-1, ids)[:, 0]])

    order = sorted(range(len(sets)), key=lambda i: min(HeadSet(sets[i])).layer)
    reader = FinalState(model.n_layers)
    with model.reading(reader):
        values = model.sweep(recording, [removal(sets[i], how) for i in order], measure, keep=1, bar=bar)
    states = _normed(model, reader.states()).unflatten(0, (len(sets), recording.batch))
    back = np.argsort(order)
    kl, direction = np.split(values[back], 2, axis=1)
    return kl, direction, states[torch.as_tensor(back, device=states.device)]


def final_states(model: HeadModel, recording: Recording) -> Float[Tensor, "N D"]:
    """The recorded pass's states of the last token, after the final norm."""
    return _normed(model, first_tensor(recording.outputs[-1])[:, -1])


def angles(
    clean: Float[Tensor, "N D"], states: Float[Tensor, "V N D"], rank: int = 1, side: str = "right"
) -> Float[np.ndarray, "V"]:
    """Sum of the `rank` principal angles between the leading singular subspaces of `clean` and of each of `states`, degrees."""

    def leading(matrix: Tensor) -> Tensor:
        U, _, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
        return U[..., :rank] if side == "left" else Vh.mT[..., :rank]

    cosines = torch.linalg.svdvals(leading(clean).mT @ leading(states)).clamp(max=1.0)
    return np.asarray(cosines.arccos().rad2deg().sum(-1).cpu())


def _jackknife(
    clean: Float[Tensor, "N D"], states: Float[Tensor, "V N D"], rank: int, side: str
) -> tuple[Float[np.ndarray, "V"], Float[np.ndarray, "V"]]:
    """The angles of all queries, and their standard error from leaving out one group of queries after the other."""
    groups = min(GROUPS, len(clean) - rank)
    if groups < 2:
        return angles(clean, states, rank, side), np.full(len(states), np.nan)
    member = torch.arange(len(clean), device=clean.device) % groups
    parts = [angles(clean[member != g], states[:, member != g], rank, side) for g in range(groups)]
    return angles(clean, states, rank, side), np.sqrt((groups - 1) * np.stack(parts).var(0))


def _normed(model: HeadModel, states: Tensor) -> Tensor:
    norm = model.layout.final_norm
    with torch.no_grad():
        return states if norm is None else norm(states)


def _by_head(model: HeadModel, values: Float[np.ndarray, "V"]) -> Float[np.ndarray, "L H"]:
    return np.asarray(values).reshape(model.shape)


register(
    ABOUTS["ships_direction"],
    score=ships,
    judge=by_task(Refusal(marked=True)),  # only marked requests are refused
    modes=("mean", "zero", "uniform"),
    causal=True,
)
