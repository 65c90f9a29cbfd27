"""How often a corpus names a subject and an answer, and which answer wins when a prompt contradicts a fact (#8).

Yu et al., arXiv:2310.15910, find that the counts of both in the training text change how often the stated answer wins. With
c the stated answer, m the memorised one, x_s and x_c the logarithms to base 10 of 1 + the counts of subject and stated answer,

    logit[c] - logit[m] = a + b_s x_s + b_c x_c + error        b in logits for ten times the count, by least squares over prompts

A name is in many prompts, so p is not over prompts: counts are dealt out anew among the names of a kind, and p is the share of
deals whose |b| is as large. Beside it stand the shares of answers from either side, in the half of the prompts with the rarer
names and in the other half.

Departures: one slope for the difference of logits, where the paper has rates over bins of counts; counts are of whole words in
whatever texts are given. A slope tells no cause: what a text names often may be known better for other reasons.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from manyheads.atlas.facts.memory_context import NOTHING, Conflicts
from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel

KINDS = ("subject", "stated")


@dataclass(frozen=True)
class FrequencyEffects:
    """For "subject" and "stated": the slope (formula above), its p, how many names, and shares by half of the prompts.

    `rates[kind]` holds the shares answered from the context and from memory, `[rarer or more frequent half, side]`.
    """

    slopes: dict[str, float]
    p_values: dict[str, float]
    names: dict[str, int]
    rates: dict[str, Float[np.ndarray, "2 2"]]
    n: int


def name_counts(texts: Iterable[str], names: Collection[str]) -> dict[str, int]:
    """How often each name stands in the texts, as a whole word (or words)."""
    wanted = sorted(set(names), key=len, reverse=True)  # "New Zealand" before "New"
    if not wanted:
        raise InputError("there are no names to count; give some.")
    pattern = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, wanted))})(?!\w)")
    found = Counter(match for text in texts for match in pattern.findall(text))
    return {name: found[name] for name in wanted}


def prompt_names(prompts: Conflicts) -> dict[str, list[str]]:
    """The subject and the stated answer of each prompt. `InputError` for prompts without the span "query"."""
    examples = prompts.batch.examples
    if any("query" not in example.spans for example in examples):
        raise InputError('a prompt has no span "query", the subject in the question; give names=.')
    subjects = [example.prompt[slice(*example.spans["query"])] for example in examples]
    return {"subject": subjects, "stated": [example.answer.strip() for example in examples]}


def frequency_effects(
    model: HeadModel,
    prompts: Conflicts,
    counts: Mapping[str, int],
    *,
    names: Mapping[str, Sequence[str]] | None = None,
    n_random: int = 999,
    seed: int = 0,
) -> FrequencyEffects:
    """What the `counts` of names have to do with the answers to `prompts` (formula above). Use prompts of one relation.

    `names` are the subject and the stated answer of each prompt (default: `prompt_names`). `InputError` where a name has no
    count, or all names of a kind have the same.
    """
    check_integer(n_random, "n_random", 19)
    names = prompt_names(prompts) if names is None else names
    kinds = {kind: np.unique(list(names[kind]), return_inverse=True) for kind in KINDS}
    logs = {kind: _logs(kind, words, counts) for kind, (words, _) in kinds.items()}
    margin, context, memory = _answers(model, prompts)
    rng = np.random.default_rng(seed)

    def slope(kind: str, dealt: Float[np.ndarray, "W"]) -> float:
        columns = [(dealt if one == kind else logs[one])[kinds[one][1]] for one in KINDS]
        fitted = np.linalg.lstsq(np.column_stack([np.ones(len(margin)), *columns]), margin, rcond=None)[0]
        return float(fitted[1 + KINDS.index(kind)])

    slopes = {kind: slope(kind, logs[kind]) for kind in KINDS}
    dealt = {kind: [abs(slope(kind, rng.permutation(logs[kind]))) for _ in range(n_random)] for kind in KINDS}
    sides = np.column_stack([context, memory])
    halves = {kind: np.argsort(logs[kind][kinds[kind][1]], kind="stable") for kind in KINDS}
    return FrequencyEffects(
        slopes=slopes,
        p_values={kind: p_value(abs(slopes[kind]), dealt[kind]) for kind in KINDS},
        names={kind: len(words) for kind, (words, _) in kinds.items()},
        rates={kind: np.stack([sides[half].mean(0) for half in np.array_split(halves[kind], 2)]) for kind in KINDS},
        n=len(margin),
    )


def _logs(kind: str, words: np.ndarray, counts: Mapping[str, int]) -> Float[np.ndarray, "W"]:
    missing = [str(word) for word in words if word not in counts]
    if missing:
        raise InputError(f"there is no count of {', '.join(missing[:3])}; count all names of the prompts.")
    logs = np.log10([1 + counts[word] for word in words])
    if np.ptp(logs) == 0:
        raise InputError(f"every {kind} is named as often as the others, so no effect of the count can be seen.")
    return logs


def _answers(model: HeadModel, prompts: Conflicts) -> Float[np.ndarray, "3 N"]:
    """`logit[c] - logit[m]`, and whether the greedy answer is c, or m."""
    parts = []
    for chunk in prompts.chunks():
        ids = chunk.batch.answer_ids, chunk.batch.foil_ids

        def margin(logits: Tensor, ids: tuple[Tensor, Tensor] = ids) -> Tensor:
            c, m = (logits[:, -1].double().gather(1, one.to(logits.device)[:, None])[:, 0] for one in ids)
            return c - m

        def said(logits: Tensor) -> Tensor:
            return logits[:, -1].argmax(-1)

        difference, best = (model.sweep(chunk.inputs, [NOTHING], metric, keep=1)[0] for metric in (margin, said))
        parts.append([difference, *(best == one.numpy() for one in ids)])
    return np.concatenate([np.asarray(part, dtype=np.float64) for part in parts], 1)
