"""Memory heads and in-context heads (#8): when a prompt contradicts a known fact, which heads raise which answer?

Yu et al., arXiv:2310.15910. The prompt states a wrong answer c to a question whose answer m the model knows without it. With z_h
at the last position, W_U folded through the final norm (this pass's denominator, times the gain), and the two answers' tokens,

    d[l, h] = < z_lh W_O[l, h], W_U[c] - W_U[m] >        mean over prompts, in logits, any real number
    context = d,    memory = -d

so all heads, MLPs, biases and the embedding sum to `logit[c] - logit[m]`; the sums of each kind stand in `meta["direct"]`. Only
facts that are answered right without the statement count, and pairs that share their first token are dropped; both are counted.
Questions are put in the phrasing in which the model knows the answers (`known_phrasing`): `Q: What is the capital of France? A:`
where it knows half of them so, else that or `The capital of France is`, whichever it knows more of. The greedy answer is classed
as the context's, the memorised one, or another.

The paper scales one head's values by a factor chosen for the rate one wants: `find_strength`. z_h is scaled instead, which is the
same, and under grouped-query attention changes one head only. Departures: answers are read by their first token; a threshold
of half a logit, since the paper only takes the extreme heads; the grid and the share to tune on are ours. The paper's counts of
how often a corpus names country and city are not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import register
from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike, HeadScores
from manyheads.model.editing.edits import Edit, Scale
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attribution import Attribution, logit_attribution
from manyheads.progress import Bar
from manyheads.tasks import Counterfactual, Example, Split, Task, TaskBatch, encode

Source = Literal["context", "memory"]
MAX_TOKENS = 1024  # of one pass, before a sweep batches its variants
GRID = tuple(float(factor) for factor in np.arange(-3, 10.5, 0.5))
MORE = 8
NOTHING = Scale([], 1.0)

ABOUT: dict[str, About] = {
    "context": About(
        name="context",
        title="In-context",
        what="Raises the answer that the prompt states over the one the model knows.",
        formula="mean of <z_h W_O, W_U[stated] - W_U[memorised]> at the last position, final norm folded",
        unit="logits",
        paper="arXiv:2310.15910",
        threshold=0.5,
        kind="facts",
        low=-1.0,
    ),
    "memory": About(
        name="memory",
        title="Memory",
        what="Raises the answer the model knows over the one that the prompt states.",
        formula="mean of <z_h W_O, W_U[memorised] - W_U[stated]> at the last position, final norm folded",
        unit="logits",
        paper="arXiv:2310.15910",
        threshold=0.5,
        kind="facts",
        low=-1.0,
    ),
}


@dataclass(frozen=True)
class Conflicts:
    """Prompts that contradict a fact the model knows: `answer_ids` are the stated answers, `foil_ids` the memorised ones.

    `questions` are the same questions without the statement, left-padded, with their mask. `counts` has the numbers of
    examples tried, dropped (by reason), asked without the statement, and known of those.
    """

    batch: TaskBatch
    questions: dict[str, Int[Tensor, "N T"]]
    counts: dict[str, Any]

    def __len__(self) -> int:
        return len(self.batch)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The prompts as the model takes them."""
        return self.batch.inputs

    def at(self, index: Sequence[int] | Int[Tensor, "n"]) -> Conflicts:
        """The prompts of these rows alone."""
        rows = torch.as_tensor(index, dtype=torch.long)
        return Conflicts(self.batch.take(rows), {k: v[rows] for k, v in self.questions.items()}, self.counts)

    def chunks(self) -> Iterator[Conflicts]:
        """Parts of about `MAX_TOKENS` tokens."""
        for rows in torch.arange(len(self)).split(max(1, MAX_TOKENS // self.batch.input_ids.shape[1])):
            yield self.at(rows)


@dataclass(frozen=True)
class Rates:
    """Shares in [0, 1] of greedy answers to `n` conflicts, which sum to 1; `recall`: of the questions alone, the known answer."""

    context: float
    memory: float
    other: float
    recall: float
    n: int


@dataclass(frozen=True)
class Strength:
    """One head's z times `factor`, tuned for the rate of `wanted` on `tuned_on` prompts; both rates are of the other prompts."""

    head: Head
    factor: float
    wanted: Source
    before: Rates
    after: Rates
    tuned_on: int

    @property
    def gain(self) -> float:
        """Change of the wanted rate on prompts that took no part in the tuning."""
        return float(getattr(self.after, self.wanted) - getattr(self.before, self.wanted))

    @property
    def edit(self) -> Scale:
        """The edit itself, for other relations or for baking."""
        return Scale([self.head], self.factor)


def conflicts(
    model: HeadModel,
    task: Task | Sequence[Example] | TaskBatch | None = None,
    *,
    n: int = 64,
    seed: int = 0,
    split: Split = "test",
    questions: Int[Tensor, "N T"] | None = None,
) -> Conflicts:
    """Up to `n` prompts of `task` (None: the bare counterfactuals) whose facts the model knows without the statement.

    `n` are asked; of a task of which the model knows less than half, all different ones of the first `MORE * n`, for at most
    `n` that it knows.

    The task's answer is the stated one, its foil the memorised one. The question alone is the sentence that holds the span
    "query"; give `questions` as token ids where the prompts have no such span. `InputError` without a tokenizer (unless both
    are tensors), and if the model knows none of the facts.
    """
    if task is None:
        task = Counterfactual(form="bare", phrasing=known_phrasing(model, seed=seed))
    batch = task if isinstance(task, TaskBatch) else _encoded(model, task, n, seed, split)
    all_of_them, known = _asked(model, batch, questions)
    if isinstance(task, Task) and 2 * len(known) < len(all_of_them):
        # A model that knows one fact in ten still has its rows.
        different = list({example.prompt: example for example in task.examples(MORE * n, seed, split)}.values())
        all_of_them, known = _asked(model, _encoded(model, different, len(different), seed, split), None)
        known = known[:n]
    if not len(known):
        raise InputError(f"the model knows none of the {len(all_of_them)} facts without the statement; ask it others.")
    all_of_them.counts["known"] = len(known)
    return all_of_them.at(known)


def known_phrasing(model: HeadModel, *, n: int = 32, seed: int = 0) -> str:
    """The phrasing of `Counterfactual` in which the model knows the facts without the statement: the usual one if it knows half.

    Tried on the training split. `InputError` where it knows none in any phrasing.
    """
    shares: dict[str, float] = {}
    for phrasing in Counterfactual.choices["phrasing"]:
        batch = _encoded(model, Counterfactual(form="bare", phrasing=phrasing), n, seed, "train")
        asked, known = _asked(model, batch, None)
        shares[phrasing] = len(known) / len(asked)
        if shares[phrasing] >= 0.5:
            return phrasing
    if not any(shares.values()):
        tried = ", ".join(f"{phrasing} 0 of {n}" for phrasing in shares)
        raise InputError(
            f"the model knows no fact without the statement ({tried}); give conflicts of facts that it knows."
        )
    return max(shares, key=lambda phrasing: shares[phrasing])


def _asked(
    model: HeadModel, batch: TaskBatch, questions: Int[Tensor, "N T"] | None
) -> tuple[Conflicts, Int[Tensor, "K"]]:
    """The prompts that have two answers, and the numbers of those whose fact the model knows."""
    apart = torch.tensor([whole.shared == 0 for whole in batch.wholes])
    two = (batch.foil_ids >= 0) & (batch.foil_ids != batch.answer_ids) & apart
    if not two.any():
        raise InputError("no prompt has a stated answer and another, memorised one; give answer and foil, as in tasks.")
    dropped = dict(batch.dropped) | {"no two answers": int((~two).sum())}
    counts = {"tried": len(batch) + sum(batch.dropped.values()), "dropped": dropped, "asked": int(two.sum())}
    alone = _questions(model, batch) if questions is None else _full(questions)
    if len(alone["input_ids"]) != len(batch):
        raise InputError(f"got {len(alone['input_ids'])} questions for {len(batch)} prompts; give one for each.")
    all_of_them = Conflicts(batch, alone, counts).at(torch.nonzero(two)[:, 0])
    return all_of_them, torch.nonzero(torch.from_numpy(_recalled(model, all_of_them, [NOTHING])[0]))[:, 0]


def memory_context(
    model: HeadModel,
    prompts: Conflicts | None = None,
    *,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head as "context" and as "memory", its negative (formula above), on the unedited model.

    Without `prompts`, `n` bare counterfactuals (see `conflicts`). `meta` holds the unedited rates and what they count,
    and the mean direct effect of everything that is not a head.
    """
    prompts = conflicts(model, n=n, seed=seed) if prompts is None else prompts
    parts: list[Attribution] = []
    for chunk in prompts.chunks():
        parts.append(logit_attribution(model, chunk.inputs, chunk.batch.answer_ids, chunk.batch.foil_ids))
        bar(len(chunk))
    d = torch.cat([part.heads for part in parts]).cpu().numpy()
    direct = {
        "heads": d.sum((1, 2)).mean(),
        "attention_bias": torch.cat([part.attention_bias.sum(1) for part in parts]).mean(),
        "mlp": torch.cat([part.mlp.sum(1) for part in parts]).mean(),
        "embedding": torch.cat([part.embedding for part in parts]).mean(),
        "constant": torch.cat([part.constant for part in parts]).mean(),
        "logit_difference": torch.cat([part.total for part in parts]).mean(),
    }
    more = {
        "rates": vars(answer_rates(model, prompts, [NOTHING])[0]),
        "counts": prompts.counts,
        "direct": {name: float(value) for name, value in direct.items()},
    }
    return {
        name: HeadScores.from_examples(name, sign * d, about.provenance(model, seed, n=n) | more)
        for (name, about), sign in zip(ABOUT.items(), (1, -1), strict=True)
    }


def answer_rates(model: HeadModel, prompts: Conflicts, edits: Sequence[Edit], *, bar: Bar = Bar()) -> list[Rates]:
    """What the model answers under each edit by itself (`NOTHING` for none), and what it recalls without the statement.

    `bar` is called with the number of prompts done, and again with that of questions.
    """
    answers = _first_answers(model, [chunk.inputs for chunk in prompts.chunks()], edits, bar)
    context, memory = (answers == ids.numpy() for ids in (prompts.batch.answer_ids, prompts.batch.foil_ids))
    shares = (context, memory, ~(context | memory), _recalled(model, prompts, edits, bar))
    means = np.stack([share.mean(1) for share in shares], 1).tolist()
    return [Rates(c, m, other, recall, len(prompts)) for c, m, other, recall in means]


def find_strength(
    model: HeadModel,
    prompts: Conflicts,
    heads: Iterable[HeadLike],
    wanted: Source,
    *,
    grid: Sequence[float] = GRID,
    share: float = 0.1,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Strength:
    """The head of `heads` and the factor of `grid` with the highest rate of `wanted` on a `share` of the prompts.

    Of equal rates the factor nearest 1 is taken. The paper tries the two extreme heads of `memory_context`. A few dozen prompts
    are too few to tune on: the best of many factors is then chosen by luck. `InputError` if no prompt is left to tune on, or
    none to report on.
    """
    tuned_on = round(share * len(prompts))
    if not 0 < tuned_on < len(prompts):
        raise InputError(f"{share:g} of {len(prompts)} prompts leaves none to tune on, or none to report on.")
    if wanted not in ABOUT:
        raise InputError(f'wanted is {wanted!r}; it must be "context" or "memory".')
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed))
    tuning, rest = prompts.at(order[:tuned_on]), prompts.at(order[tuned_on:])
    tried = [(Head.of(head), factor) for head in heads for factor in grid]
    rates = answer_rates(model, tuning, [Scale([head], factor) for head, factor in tried], bar=bar)
    best = max(range(len(tried)), key=lambda i: (getattr(rates[i], wanted), -abs(tried[i][1] - 1)))
    head, factor = tried[best]
    before, after = answer_rates(model, rest, [NOTHING, Scale([head], factor)])
    return Strength(head, factor, wanted, before, after, tuned_on)


def _encoded(model: HeadModel, task: Task | Sequence[Example], n: int, seed: int, split: Split) -> TaskBatch:
    if model.tokenizer is None:
        raise InputError("conflicts need a tokenizer or a TaskBatch; open the model with tokenizer=.")
    return encode(task, model.tokenizer, n, seed, split)


def _questions(model: HeadModel, batch: TaskBatch) -> dict[str, Tensor]:
    """The sentence around the span "query", to the prompt's end."""
    if any("query" not in example.spans for example in batch.examples):
        raise InputError('a prompt has no span "query", the subject in the question; add it, or give questions=.')
    texts = [
        example.prompt[example.prompt.rfind(". ", 0, example.spans["query"][0]) + 2 :] for example in batch.examples
    ]
    if any(len(text) == len(example.prompt) for text, example in zip(texts, batch.examples, strict=True)):
        raise InputError("a prompt's question is not a sentence of its own after the statement; give questions=.")
    inputs = model.inputs(texts)
    return {name: inputs[name].cpu() for name in ("input_ids", "attention_mask")}


def _full(ids: Int[Tensor, "N T"]) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _recalled(model: HeadModel, prompts: Conflicts, edits: Sequence[Edit], bar: Bar = Bar()) -> Bool[np.ndarray, "E N"]:
    """Whether each question alone is answered from memory."""
    size = max(1, MAX_TOKENS // prompts.questions["input_ids"].shape[1])
    parts = zip(*(prompts.questions[name].split(size) for name in ("input_ids", "attention_mask")), strict=True)
    answers = _first_answers(model, [{"input_ids": ids, "attention_mask": mask} for ids, mask in parts], edits, bar)
    return np.asarray(answers == prompts.batch.foil_ids.numpy())


def _first_answers(
    model: HeadModel,
    chunks: Sequence[dict[str, Tensor]],
    edits: Sequence[Edit],
    bar: Bar,
) -> Int[np.ndarray, "E N"]:
    """The first token of each row's greedy answer, under each edit."""
    answers = []
    for inputs in chunks:
        answers.append(model.sweep(inputs, edits, lambda logits: logits[:, -1].argmax(-1), keep=1))
        bar(len(inputs["input_ids"]))
    return np.concatenate(answers, 1).astype(np.int64)


for _side in ("context", "memory"):
    register(
        ABOUT[_side],
        score=memory_context,
        judge=replace(by_task(Counterfactual(form=_side)), name=_side),
        example="counterfactual",
        causal=True,
    )
