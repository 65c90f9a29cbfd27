"""Whole answers, also of several tokens: their log-probability, and whether the model would write one. By teacher forcing.

    log p(a | prompt) = sum over the tokens a_j of the answer of log p(a_j | prompt, a_1 .. a_{j-1})          nats

An answer is *right* if greedy decoding writes all of an accepted answer, from the prompt's own end on, and then goes on with
something that is not more of its last word or number (` 6` is no right answer where the model writes ` 62`). The latter is
looked at for answers of several tokens only; answers of one token cost the one pass that they always did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.model.headmodel import HeadModel
from manyheads.tasks.encoding import TaskBatch, right_answers


@dataclass(frozen=True)
class AnswerScores:
    """Of each row: log-probability of the whole answer and the whole foil (nats; NaN without one); is greedy decoding right?"""

    answer: Float[Tensor, "N"]
    foil: Float[Tensor, "N"]
    right: Bool[Tensor, "N"]


def whole_answers(model: HeadModel, batch: TaskBatch) -> AnswerScores:
    """Score each row's answer and foil as a whole (formula above): one pass, and one more where foils have several tokens."""
    parts = [_scored(model, rows) for rows in batch.chunks()]
    return AnswerScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def right_wholes(model: HeadModel, batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Whether the model answers each row rightly, all of the answer."""
    return torch.cat([_right(model, rows, None) for rows in batch.chunks()])


def forced_answers(batch: TaskBatch) -> tuple[dict[str, Tensor], Int[Tensor, "N K"]]:
    """The rows with all of their answers but the last token behind them, and the answers' tokens at the last K columns.

    K is the longest answer, counted from where it parts from the foil; before shorter ones stands -1. The logits of the last K
    columns give the whole answers' log-probability.
    """
    if batch.whole is None:
        return batch.inputs, batch.answer_ids[:, None]
    rest = [whole.answer[whole.shared :] for whole in batch.whole]
    longest = max(map(len, rest))
    rows = [
        ids[mask.bool()].tolist() + answer[:-1]
        for ids, mask, answer in zip(batch.input_ids, batch.attention_mask, rest, strict=True)
    ]
    width = max(map(len, rows))
    inputs = {
        "input_ids": torch.tensor([[row[0]] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    return inputs, torch.tensor([[-1] * (longest - len(answer)) + answer for answer in rest])


@dataclass(frozen=True)
class _Forced:
    """`tokens` written after the prompt's own end: log-probability, and the greedy token at each place and after the last."""

    tokens: list[int]
    log_p: float
    greedy: list[int]


def _scored(model: HeadModel, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
    wholes = batch.wholes
    if batch.whole is None:
        last = model.read(batch.inputs, keep=1)[:, -1].cpu()
        log_p = last.double().log_softmax(-1)
        foils = log_p.gather(1, batch.foil_ids.clamp(min=0)[:, None])[:, 0]
        answers = log_p.gather(1, batch.answer_ids[:, None])[:, 0]
        return answers, foils.where(batch.foil_ids >= 0, torch.nan), right_answers(last, batch)
    answered = _forced(model, batch, range(len(batch)), [whole.answer for whole in wholes])
    with_foil = [i for i, whole in enumerate(wholes) if whole.foil]
    foils = torch.full((len(batch),), torch.nan, dtype=torch.float64)
    for i, one in zip(with_foil, _forced(model, batch, with_foil, [wholes[i].foil for i in with_foil]), strict=True):
        foils[i] = one.log_p
    return torch.tensor([one.log_p for one in answered]).double(), foils, _right(model, batch, answered)


def _right(model: HeadModel, batch: TaskBatch, forced: list[_Forced] | None) -> Tensor:
    """Follow the greedy tokens through the accepted answers; where they leave the tokens forced, force those they lead to."""
    if batch.whole is None:
        return right_answers(model.read(batch.inputs, keep=1)[:, -1].cpu(), batch)
    right = torch.zeros(len(batch), dtype=torch.bool)
    rows = list(range(len(batch)))
    forced = _forced(model, batch, rows, [whole.answer for whole in batch.whole]) if forced is None else forced
    while rows:
        again: list[tuple[int, list[int]]] = []
        for i, run in zip(rows, forced, strict=True):
            found = _follow(model, run, batch.whole[i].accepted)
            if isinstance(found, bool):
                right[i] = found
            else:
                again.append((i, found))
        rows = [i for i, _ in again]
        forced = _forced(model, batch, rows, [tokens for _, tokens in again])
    return right


def _follow(model: HeadModel, run: _Forced, accepted: list[list[int]]) -> bool | list[int]:
    """Whether greedy decoding writes one of `accepted`, or the one to force next to find out."""
    for j, token in enumerate(run.greedy):
        written = run.tokens[:j]
        if written in accepted and (len(written) == 1 or not _goes_on(model, written, token)):
            return True
        further = [ids for ids in accepted if ids[: j + 1] == [*written, token]]
        if not further:
            return False
        if run.tokens[: j + 1] != [*written, token]:
            return further[0]
    return False


def _goes_on(model: HeadModel, written: list[int], token: int) -> bool:
    """Whether `token` after `written` is more of the same word or number."""
    if model.tokenizer is None:
        return False
    before, after = model.tokenizer.decode(written), model.tokenizer.decode([*written, token])
    return after[len(before) :][:1].isalnum() and before[-1:].isalnum()


def _forced(model: HeadModel, batch: TaskBatch, rows: Sequence[int], answers: Sequence[Sequence[int]]) -> list[_Forced]:
    """One pass over the prompts of `rows`, each with its answer behind it."""
    if not rows:
        return []
    wholes = batch.wholes
    prompts = []
    for i in rows:
        prompt = batch.input_ids[i][batch.attention_mask[i].bool()].tolist()
        prompts.append(prompt[: len(prompt) - wholes[i].shared])  # another answer may begin in another way
    width, longest = max(map(len, prompts)), max(map(len, answers))
    # What fills up shorter answers stands behind all that is read, and a causal model does not see it before.
    ids = [
        [prompt[0]] * (width - len(prompt)) + prompt + list(answer) + [answer[-1]] * (longest - len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    mask = [[0] * (width - len(prompt)) + [1] * (len(prompt) + longest) for prompt in prompts]
    inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    log_p = model.read(inputs, keep=longest + 1).cpu().double().log_softmax(-1)
    found = []
    for row, tokens in zip(log_p, answers, strict=True):
        total = row[: len(tokens)].gather(1, torch.tensor([list(tokens)]).T).sum()
        found.append(_Forced(list(tokens), float(total), row[: len(tokens) + 1].argmax(-1).tolist()))
    return found
