"""Training draft heads on a frozen trunk, and their acceptance: how often the next token is their guess of each rank.

With head k's logits for token x_{t+1+k} (`DraftHeads.teacher_forced`), the trunk's own logits z for the same token and head
weights w_k = decay^(k-1), normalised to sum 1, the loss over the tokens that count is

    sum_k w_k ( data * CE(logits_k, x_{t+1+k})  +  teacher * CE(logits_k, softmax(z_{t+k})) )        in nats

Medusa and Clover learn from data (decay 0.8 in Medusa), Hydra++ from the teacher alone. Heads with a
`vocabulary` learn from the teacher's distribution over these tokens, and from those of the data. The trunk runs without
gradients, or not at all where the corpus has its states. `training.fit` runs the loop: an interrupted run resumes exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.draft.core.drafter import DraftHeads
from manyheads.draft.core.trunk import DraftTrunk
from manyheads.draft.training.corpus import Corpus, trunk_states
from manyheads.errors import InputError, MismatchError
from manyheads.progress import Bar
from manyheads.training import Batch, Progress, TrainSettings, drawn_rows, fit

UNKNOWN = -100


TRAINING = TrainSettings(
    steps=1000, rate=1e-3, warmup=50, decay=0.6, betas=(0.9, 0.999), weight_decay=0.0, precision="fp32"
)


@dataclass(frozen=True)
class Recipe:
    """The loss of draft heads (`data`, `teacher` and `decay` of the formula above) and the training `settings`.

    `noise` adds uniform noise of that size to the states, in units of their standard deviation (Hydra's option, off by default).
    `precision="bf16"` in `settings` multiplies in bfloat16, which is faster on processors that support it.
    """

    data: float = 0.0
    teacher: float = 1.0
    decay: float = 1.0
    noise: float = 0.0
    settings: TrainSettings = TRAINING

    def __post_init__(self) -> None:
        weights = {"data": self.data, "teacher": self.teacher, "decay": self.decay, "noise": self.noise}
        wrong = [f"{name} {value}" for name, value in weights.items() if not 0 <= value < math.inf]
        if wrong or not self.data + self.teacher:
            raise InputError(
                f"{', '.join(wrong) or 'data 0, teacher 0'}: give finite weights of 0 or more, and data or teacher above 0."
            )


@dataclass(frozen=True)
class TrainedHeads:
    """Results of a training. `acceptance` `[K, R]` is measured on held-out text (`rank_acceptance`)."""

    steps: int
    minutes: float
    loss: float
    acceptance: Float[Tensor, "K R"]
    losses: list[float] = field(default_factory=list, repr=False)

    def top(self, k: int) -> list[float]:
        """For each head, the share of tokens that are among its k best guesses."""
        shares: list[float] = self.acceptance[:, :k].sum(1).tolist()
        return shares


def train(
    trunk: DraftTrunk,
    drafter: DraftHeads,
    corpus: Corpus,
    recipe: Recipe | None = None,
    *,
    folder: str | Path | None = None,
    held_out: float = 0.1,
    ranks: int = 10,
    on_step: Callable[[Progress], object] | None = None,
    bar: Bar = Bar(),
) -> TrainedHeads:
    """Train `drafter` in place on all but the last `held_out` of the corpus, and measure it on the rest.

    With a `folder` an interrupted call resumes. The trunk stays bit for bit as it was. `bar` counts steps. `MismatchError` for a
    corpus of another model.
    """
    recipe = recipe or Recipe()
    settings = recipe.settings
    if corpus.fingerprint != trunk.model.fingerprint:
        raise MismatchError(
            f"this corpus belongs to model {corpus.fingerprint}, not {trunk.model.fingerprint}; make one for it."
        )
    training, judged = corpus.split(held_out)
    _check_states(trunk, training)
    losses: list[float] = []

    def batch_at(number: int) -> Batch:
        return rows_of(training, drawn_rows(len(training), settings.rows, number, settings.seed))

    def after(progress: Progress, _: torch.optim.Optimizer) -> object:
        losses.append(progress.loss)
        return None if on_step is None else on_step(progress)

    done = fit(_Lesson(trunk, drafter, recipe), batch_at, settings, folder, after_step=after, bar=bar)
    drafter.eval()
    found = rank_acceptance(trunk, drafter, judged, ranks=ranks)
    return TrainedHeads(done.step, done.minutes, done.loss, found, losses)


class _Lesson(nn.Module):
    """The drafter and its loss as one module, as `fit` needs it on several devices. The trunk is no part of it."""

    def __init__(self, trunk: DraftTrunk, drafter: DraftHeads, recipe: Recipe) -> None:
        super().__init__()
        self.drafter = drafter
        self._loss = lambda batch: drafting_loss(trunk, drafter, batch, recipe)

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        return self._loss(batch)


def rows_of(corpus: Corpus, rows: Tensor) -> Batch:
    """The batch of these rows, with the states where they were kept."""
    batch = {"input_ids": corpus.ids[rows], "counts": corpus.counts[rows]}
    return batch if corpus.hidden is None else batch | {"hidden": corpus.hidden[rows]}


def drafting_loss(trunk: DraftTrunk, drafter: DraftHeads, batch: Batch, recipe: Recipe) -> Float[Tensor, ""]:
    """The loss of a batch in nats (formula above), with the drafter's `extra_loss`."""
    ids, counts = batch["input_ids"], batch["counts"]
    vocabulary = drafter.vocabulary
    hidden, logits = _seen(trunk, batch, vocabulary)
    total = hidden.new_zeros(())
    outputs = drafter.teacher_forced(trunk, _noisy(hidden, recipe.noise), ids)
    weights = [recipe.decay**k for k in range(len(outputs))]
    teacher = logits.float().softmax(-1)
    targets = ids if vocabulary is None else _places(ids, vocabulary, trunk.vocab_size)
    for k, (weight, out) in enumerate(zip(weights, outputs, strict=True)):
        here = counts[:, 2 + k :]  # the token that head k predicts must count; those it reads need not
        out = out[here].float()
        if recipe.data:
            true = targets[:, 2 + k :][here]
            missed = F.cross_entropy(out, true, ignore_index=UNKNOWN, reduction="sum") / (
                true != UNKNOWN
            ).sum().clamp_min(1)
            total = total + weight * recipe.data * missed
        if recipe.teacher:
            total = total + weight * recipe.teacher * F.cross_entropy(out, teacher[:, 1 + k : -1][here])
    return total / sum(weights) + drafter.extra_loss(trunk, hidden, ids)


def _places(ids: Int[Tensor, "B T"], vocabulary: Int[Tensor, "v"], size: int) -> Int[Tensor, "B T"]:
    """Indices of tokens in `vocabulary`; `UNKNOWN` for others."""
    place = torch.full((size,), UNKNOWN, device=vocabulary.device)
    place[vocabulary] = torch.arange(len(vocabulary), device=vocabulary.device)
    return place[ids]


def _seen(trunk: DraftTrunk, batch: Batch, vocabulary: Int[Tensor, "v"] | None = None) -> tuple[Tensor, Tensor]:
    """States and logits, of all tokens or of those in `vocabulary`: kept states are multiplied with those rows only."""
    rows = slice(None) if vocabulary is None else vocabulary
    if "hidden" not in batch:
        states, logits = trunk_states(trunk.model, batch["input_ids"])
        return states, logits[..., rows]
    bias = trunk.readout_bias
    with torch.no_grad():
        return batch["hidden"], F.linear(batch["hidden"], trunk.readout[rows], None if bias is None else bias[rows])


def _noisy(hidden: Tensor, size: float) -> Tensor:
    return hidden + size * hidden.std() * (2 * torch.rand_like(hidden) - 1) if size else hidden


def _check_states(trunk: DraftTrunk, corpus: Corpus) -> None:
    """Kept states must be this trunk's, and its logits just their product with the output matrix, as `_seen` assumes."""
    if corpus.hidden is None:
        return
    end = max((i + 1 for i, on in enumerate(corpus.counts[0].tolist()) if on), default=1)  # what follows is no text
    batch = {name: value[:, :end] for name, value in rows_of(corpus, torch.tensor([0])).items()}
    hidden, logits = trunk_states(trunk.model, batch["input_ids"].to(trunk.device))
    kept, made = _seen(trunk, {name: value.to(trunk.device) for name, value in batch.items()})
    if not torch.allclose(kept.float(), hidden.float(), atol=1e-2, rtol=1e-2):
        raise MismatchError("the states in this corpus are not this model's; make them again with with_states.")
    if not torch.allclose(made.float(), logits.float(), atol=1e-2, rtol=1e-2):
        raise InputError("this model scales or caps its logits after the output matrix; give a corpus without states.")


@torch.inference_mode()
def rank_acceptance(
    trunk: DraftTrunk, drafter: DraftHeads, corpus: Corpus, *, ranks: int = 10, rows: int = 16
) -> Float[Tensor, "K R"]:
    """`a[k, r]`: how often the text's token is head k's guess of rank r, given the true text before it.

    On the model's own text this is the rate at which guesses are accepted, greedy or sampled as the text was.
    """
    hits: list[Tensor] = []
    seen: list[int] = []
    drafter.eval()
    for start in range(0, len(corpus), rows):
        batch = rows_of(corpus, torch.arange(start, min(start + rows, len(corpus))))
        batch = {name: value.to(trunk.device) for name, value in batch.items()}
        ids, counts = batch["input_ids"], batch["counts"]
        outputs = drafter.teacher_forced(trunk, _seen(trunk, batch)[0], ids)
        for k, out in enumerate(outputs):
            here = counts[:, 2 + k :]
            guesses = out[here].topk(min(ranks, out.shape[-1])).indices
            guesses = guesses if drafter.vocabulary is None else drafter.vocabulary[guesses]
            found = (guesses == ids[:, 2 + k :][here][:, None]).sum(0)
            if len(hits) <= k:
                hits.append(torch.zeros_like(found))
                seen.append(0)
            hits[k] = hits[k] + found
            seen[k] += int(here.sum())
    return torch.stack([h.double() / max(n, 1) for h, n in zip(hits, seen, strict=True)]).cpu()
