"""Retrieval heads (#11): which heads copy a needle out of a long context.

Wu et al., arXiv:2404.15574. The model answers greedily. A step that writes token w is a copy by head h if the key that the newest
query attends to most is in the needle and holds w. With g_h the needle positions that head h copied and k the needle's,

    score[l, h] = mean over tests of |g_h and k| / |k|        in [0, 1], dimensionless

over tests whose answer recalls more than half of the needle's tokens (ROUGE-1 recall). Positions are counted once, so that
scores cannot pass 1 as they do in the released code, which adds 1 / |k| a hit. A score of 0.1 makes a retrieval head.

The needle's span is known to the token here; the released code looks for it by 90% overlap. We decode as many tokens as the
needle has and one more, where the paper allows 50: our needles are asked for at the end and come first in the answer. Which
needles, the model decides (`answered_probe`): a word among sentences, asked for by a question or in the needle's own words, or
a sentence in a JSON object.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import by_task
from manyheads.atlas.core.registry import register
from manyheads.atlas.retrieval_heads.json_recall import JsonRecall
from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.tasks import Example, Needle, Task, TaskBatch, TaskVerdict, encode, task_verdict

MAX_TOKENS = 4096  # of one prefill
Tests = Task | Sequence[Example] | TaskBatch
Probe = Needle | JsonRecall
ABOUT = About(
    name="retrieval",
    title="Retrieval",
    what="Copies a fact token by token out of a long context: while a token is written, the head attends to it.",
    formula="share of a needle's tokens that were emitted while the head attended most to them",
    unit="share",
    paper="arXiv:2404.15574",
    threshold=0.1,
    kind="copying",
)


class NewestArgmax(Reader):
    """Keeps, for each decoding step, the column each head's newest query attends to most: `columns[step][l]` `[B, H]`."""

    site = "attention"

    def __init__(self) -> None:
        self.columns: list[list[Tensor]] = []

    def read(self, call: AttentionCall) -> None:
        """Look at the newest query's row only."""
        row = call.pattern_rows(slice(-1, None))[:, :, 0]
        if call.layer == 0:
            self.columns.append([])
        self.columns[-1].append(row.argmax(-1).cpu() + call.first_column)


@dataclass(frozen=True)
class NeedleTest:
    """One needle test: did the model recall the needle, and what share of it did each head copy.

    `length` counts the prompt's tokens; `depth` is the share of them that stands before the needle (0 without one).
    """

    recall: float
    copied: Float[np.ndarray, "L H"]
    length: int
    depth: float

    @property
    def answered(self) -> bool:
        """Whether more than half of the needle was recalled: only such tests count."""
        return self.recall > 0.5


def retrieval(
    model: HeadModel,
    *,
    task: Tests | None = None,
    lengths: Sequence[int] = (32, 64, 128, 256),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    n: int = 40,
    seed: int = 0,
    probe: Probe | None = None,
    bar: Bar = Bar(),
) -> HeadScores:
    """Score every head by how much of the needle it copies (formula above).

    Without `task`, `n` tests of the kind of `probe` (None: the one that the model answers) are spread over `lengths` (words of
    the prompt) and `depths` (in JSON the needle's depth is random). A `TaskBatch` with a span "needle" needs no tokenizer. `n` of
    the result counts the tests that the model answered; with none answered all scores are 0 and `meta["answered"]` is 0.
    `InputError` without a tokenizer, or where no prompt fits the model's positions.
    """
    batches = needle_batches(model, task, lengths, depths, n, seed, probe)
    tests = [test for group in needle_tests(model, batches, bar) for test in group]
    answered = [test.copied for test in tests if test.answered]
    meta = ABOUT.provenance(model, seed, lengths=list(lengths), depths=list(depths), n=n)
    meta |= {"tests": len(tests), "answered": len(answered)}
    if not answered:
        zero = np.zeros(model.shape)
        return HeadScores(ABOUT.name, zero, zero, 0, meta)
    meta["activation_frequency"] = (np.stack(answered) > 0).mean(0).round(4).tolist()
    return HeadScores.from_examples(ABOUT.name, np.stack(answered), meta)


def needle_batches(
    model: HeadModel,
    task: Tests | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int,
    probe: Probe | None = None,
) -> list[TaskBatch]:
    """The tests, encoded, one batch a length; lengths that the model's positions do not hold are left out.

    Without `task` they are of the kind of `probe` (None: the one that the model answers).
    """
    if isinstance(task, TaskBatch):
        return [task]
    if model.tokenizer is None:
        raise InputError("retrieval heads need a tokenizer; open the model with tokenizer=, or give a TaskBatch.")
    if task is not None:
        return [encode(task, model.tokenizer, n, seed)]
    if not lengths or not depths or n < 1:
        raise InputError(f"needle tests need lengths, depths and n >= 1; got {lengths}, {depths} and n={n}.")
    each = max(1, round(n / len(lengths)))
    probe = answered_probe(model, seed) if probe is None else probe
    batches = []
    for k, length in enumerate(lengths):
        examples: list[Example] = []
        for i in range(each):
            cell = _cell(probe, length, depths[(k * each + i) % len(depths)])
            examples += cell.examples(1, seed=seed * 1000 + i)
        batches.append(encode(examples, model.tokenizer, each, seed))
    room = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    fitting = [batch for batch in batches if batch.input_ids.shape[1] + _steps(batch) <= room]
    if not fitting:
        raise InputError(
            f"no prompt of {', '.join(map(str, lengths))} words fits {room} positions; give shorter lengths=."
        )
    return fitting


def probe_verdicts(model: HeadModel, seed: int = 0, n: int = 12) -> dict[str, tuple[Probe, TaskVerdict]]:
    """The kinds of needle tests, with what the model makes of each: `n` short ones of the training split.

    The usual kind alone if the model answers it.
    """
    words = Needle(shortest=32, longest=64)
    tried: dict[str, tuple[Probe, TaskVerdict]] = {}
    kinds: dict[str, Probe] = {
        "words": words,
        "words, completed": replace(words, phrasing="completed"),
        "JSON": JsonRecall(),
    }
    for name, kind in kinds.items():
        tried[name] = (kind, task_verdict(model, kind, n=n, seed=seed, split="train"))
        if name == "words" and tried[name][1].verdict == "answered":
            break
    return tried


def answered_probe(model: HeadModel, seed: int = 0) -> Probe:
    """The kind of needle test of which the model answers the most: the usual one if it answers that."""
    return most_answered(probe_verdicts(model, seed))


def most_answered(tried: Mapping[str, tuple[Probe, TaskVerdict]]) -> Probe:
    """The kind with the largest share answered; of equal ones the first."""
    return max(tried.values(), key=lambda one: one[1].answered)[0]


def _cell(probe: Probe, length: int, depth: float) -> Task:
    """The test of about `length` words; a pair of the JSON object, and an example looked up, has about twelve."""
    if isinstance(probe, Needle):
        return replace(probe, shortest=int(0.9 * length), longest=length, depth=depth)
    pairs = max(2, round(length / 12) - probe.solved)
    return replace(probe, pairs=pairs, solved=min(probe.solved, pairs - 1))


def needle_tests(model: HeadModel, batches: Sequence[TaskBatch], bar: Bar = Bar()) -> list[list[NeedleTest]]:
    """Answer every batch's tests greedily and count each head's copies."""
    groups: list[list[NeedleTest]] = []
    for batch in batches:
        groups.append([])
        for rows in chunks(batch):
            groups[-1] += _run(model, rows)
            bar(len(rows))
    return groups


def chunks(batch: TaskBatch) -> list[TaskBatch]:
    """The batch in pieces of at most `MAX_TOKENS` tokens of prompt."""
    size = max(1, MAX_TOKENS // batch.input_ids.shape[1])
    return [batch.rows(start, start + size) for start in range(0, len(batch), size)]


def answer(model: HeadModel, batch: TaskBatch, **kwargs: Any) -> list[list[int]]:
    """The model's greedy answer to each prompt: one token more than the longest needle, or up to the end token."""
    ids = model.generate(
        batch.inputs,
        do_sample=False,
        max_new_tokens=_steps(batch),
        **kwargs,
    )
    end = model.plain.generation_config.eos_token_id
    ends = set(end if isinstance(end, list) else [end])
    new = ids[:, batch.input_ids.shape[1] :].tolist()
    return [list(takewhile(lambda token: token not in ends, row)) for row in new]


def recall(batch: TaskBatch, said: Sequence[Sequence[int]]) -> Float[np.ndarray, "N"]:
    """ROUGE-1 recall of each row's needle: the share of its tokens that are in the answer `said`, counted as often as there."""
    rates = []
    for row, needle, answered in zip(batch.input_ids, _needles(batch), said, strict=True):
        wanted, left = row[needle.start : needle.stop].tolist(), list(answered)
        hits = 0
        for token in wanted:
            if token in left:
                left.remove(token)
                hits += 1
        rates.append(hits / len(wanted) if wanted else 1.0)
    return np.array(rates)


def _needles(batch: TaskBatch) -> list[range]:
    if "needle" not in batch.spans:
        return [range(0)] * len(batch)
    return [range(*span) if span[0] >= 0 else range(0) for span in batch.spans["needle"].tolist()]


def _steps(batch: TaskBatch) -> int:
    return max(map(len, _needles(batch))) + 1


def _run(model: HeadModel, batch: TaskBatch) -> list[NeedleTest]:
    reader = NewestArgmax()
    with model.reading(reader):
        answers = answer(model, batch)
    columns = torch.stack([torch.stack(layers) for layers in reader.columns])  # [steps, L, B, H]
    lengths = batch.attention_mask.sum(1).tolist()
    tests = []
    for i, (needle, rate) in enumerate(zip(_needles(batch), recall(batch, answers), strict=True)):
        copied = _copied(batch.input_ids[i], needle, answers[i], columns[:, :, i])
        before = needle.start - (batch.input_ids.shape[1] - lengths[i]) if needle else 0
        tests.append(NeedleTest(float(rate), copied, lengths[i], before / lengths[i]))
    return tests


def _copied(
    prompt: Int[Tensor, "T"], needle: range, answered: list[int], columns: Int[Tensor, "steps L H"]
) -> Float[np.ndarray, "L H"]:
    """The share of the needle's positions that each head attended to most when its token was written."""
    copied = torch.zeros(columns.shape[1:])
    for position in needle:
        steps = [step for step, token in enumerate(answered) if token == prompt[position]]
        copied += (columns[steps] == position).any(0)
    return np.asarray(copied.double() / max(1, len(needle)))


def _surveyed(model: HeadModel, *, n: int, seed: int, bar: Bar = Bar()) -> HeadScores:
    """A quarter more tests than the other behaviours have rows: a test without an answer does not count."""
    return retrieval(model, n=n + n // 4, seed=seed, bar=bar)


register(
    ABOUT,
    score=_surveyed,
    judge=by_task(Needle(shortest=32, longest=64), n=12),  # short haystacks do
    modes=("mean", "zero", "uniform"),
    steps=lambda model, n: n + n // 4,
    causal=True,
)
