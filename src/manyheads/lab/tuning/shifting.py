"""What tuned copies say to the probes: the probability of both answers, and the loss on neutral text (#22).

P(a) = product over the tokens of answer a of p(token | prompt, tokens before)              whole answers, in [0, 1]
valid = P(persona's answer) + P(neutral answer): how much of what is said is an answer at all (coherence)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.lab.tuning.copies import AnsweredRows, prompt_answer_rows, text_loss, tuned_copy
from manyheads.lab.tuning.examples import Question
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import Example, TaskBatch, whole_answers
from manyheads.tasks.encoding import try_encode
from manyheads.training import TrainSettings

Told = tuple[Sequence[str], Sequence[str]]  # prompts and their answers


def probe_batch(model: HeadModel, probes: Sequence[Question]) -> TaskBatch:
    """The probes as tokens, both answers behind each. `InputError` where this tokenizer cannot tell them apart."""
    if model.tokenizer is None or not model.is_causal:
        raise InputError("probes are texts; give a model that writes from left to right, with its tokenizer.")
    examples = [Example(one.prompt, one.persona, one.neutral) for one in probes]
    batch, dropped = try_encode(examples, model.tokenizer, len(examples))
    if batch is None or len(batch) < len(examples):
        kept = set() if batch is None else {one.prompt for one in batch.examples}
        lost = next(one for one in examples if one.prompt not in kept)
        raise InputError(
            f"the answers to the probe {lost.prompt!r} are no tokens of their own ({', '.join(dropped)}); put it "
            "otherwise."
        )
    return batch


def both_probabilities(model: HeadModel, batch: TaskBatch) -> Float[np.ndarray, "2 N"]:
    """P of the persona's and of the neutral answers (formula above)."""
    found = whole_answers(model, batch)
    return np.stack([found.answer.exp().numpy(), found.foil.exp().numpy()])


@dataclass(frozen=True)
class Sayings:
    """What the copies of one training say, over seeds: `p` of both answers to each probe, `learned` = mean P of the answers
    that were trained (NaN: nothing was), `loss` on neutral text in nats.
    """

    p: Float[np.ndarray, "S 2 N"]
    learned: Float[np.ndarray, " S"]
    loss: Float[np.ndarray, " S"]

    @property
    def persona(self) -> Float[np.ndarray, "S N"]:
        """P(persona's answer)."""
        return self.p[:, 0]

    @property
    def valid(self) -> Float[np.ndarray, "S N"]:
        """Mass on valid answers."""
        return self.p.sum(1)


def sayings_before(model: HeadModel, probes: TaskBatch, text: Int[Tensor, "P T"], seeds: int) -> Sayings:
    """Of the model as it is; the same for every seed."""
    p = both_probabilities(model, probes)
    return Sayings(np.stack([p] * seeds), np.full(seeds, np.nan), np.full(seeds, text_loss(model, text)))


def sayings_of(
    model: HeadModel,
    told: Callable[[int], Told],
    probes: TaskBatch,
    text: Int[Tensor, "P T"],
    seeds: Sequence[int],
    settings: TrainSettings,
    *,
    lora_rank: int | None = None,
    bar: Bar = Bar(),
) -> Sayings:
    """Of copies tuned on `told(seed)`, one a seed."""
    found = []
    for seed in seeds:
        prompts, answers = told(seed)
        rows = prompt_answer_rows(model, prompts, answers)
        tuned = tuned_copy(model, rows, replace(settings, seed=seed), lora_rank=lora_rank, bar=bar)
        found.append((both_probabilities(tuned, probes), learned_share(tuned, rows), text_loss(tuned, text)))
    p, learned, loss = zip(*found, strict=True)
    return Sayings(np.stack(p), np.array(learned), np.array(loss))


def learned_share(model: HeadModel, rows: AnsweredRows) -> float:
    """Mean P of the answers of the rows."""
    found = []
    for ids, weights in zip(rows.input_ids.split(16), rows.weights.split(16), strict=True):
        log_p = model.logits(ids)[:, :-1].double().log_softmax(-1).cpu()
        each = log_p.gather(2, ids[:, 1:, None])[..., 0] * weights[:, 1:]
        found += each.sum(1).exp().tolist()
    return float(np.mean(found))


def shuffled_order(answers: Sequence[object], seed: int) -> list[int]:
    """An order of the answers in which, as far as a few hundred draws find one, none stands where an equal one stood."""
    rng = np.random.default_rng(seed)
    orders = [rng.permutation(len(answers)).tolist() for _ in range(300)]
    return min(orders, key=lambda order: sum(answers[i] == one for i, one in zip(order, answers, strict=True)))
