"""Embers of autoregression (#89): a deterministic task is done better where task, output and input are probable text.

McCoy et al., arXiv:2309.13638. Four cells: copy a list of words, or say it backwards, where the words are those of a sentence in
its own order (probable) or in the opposite order. All four have the same words, so length, characters and tokens are matched.
With the share of items done wholly right, c of copying and r of reversing, n and u where the *output* is natural or not,

    output = (c_n - c_u + r_n - r_u) / 2        input = (c_n - c_u + r_u - r_n) / 2        task = (c_n + c_u - r_n - r_u) / 2

(a reversed sentence as output has the sentence as input). A model that never says a list backwards shows output and input as
one, c_n - c_u. Refuted by: an effect that is not above 0. Right means that greedy decoding would write the whole answer. Each
item has solved examples of its own, two in each order, the same in its four cells: with one set for all, the effect of that set
would pass for one of the items. The control flips signs of the items' differences. That the natural order is the more probable
one is checked by counts of word pairs in *other* sentences, not by the model that is tested.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.lab.laws.law import LawRow, effect_of, judged
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, encode, whole_answers
from manyheads.tasks.texts import bundled_prose

SHOWN = 4  # solved examples in front of each, two in each order
CONTRASTS = {"output": (1, -1, 1, -1), "input": (1, -1, -1, 1), "task": (1, 1, -1, -1)}  # of c_n, c_u, r_n, r_u


def sentences(
    texts: Sequence[str] | None, n: int, words: int, seed: int = 0
) -> tuple[list[list[str]], list[list[str]]]:
    """`n` runs of `words` lower-case words from different places of the texts, and as many others that they are judged by."""
    check_integer(n, "n", 4)
    check_integer(words, "words", 2, 20)
    runs = []
    for text in bundled_prose() if texts is None else texts:
        for sentence in re.split(r"[.!?;:,()\n]+\s*", text):
            found = sentence.lower().split()
            if (
                len(found) >= words
                and all(word.isalpha() for word in found[:words])
                and len(set(found[:words])) == words
            ):
                runs.append(found[:words])
    runs = [list(run) for run in dict.fromkeys(map(tuple, runs))]  # one that stands twice would judge itself
    random.Random(seed).shuffle(runs)
    if len(runs) < n + SHOWN + 20:
        raise InputError(
            f"the texts have {len(runs)} plain stretches of {words} words; give longer texts, or fewer items."
        )
    return runs[:n], runs[n:]


def pair_probability(runs: Sequence[Sequence[str]], known: Sequence[Sequence[str]]) -> Float[np.ndarray, "N"]:
    """Mean log-probability (nats) of each next word by counts of pairs in `known`, with one added to each."""
    pairs = Counter(pair for run in known for pair in pairwise(run))
    firsts = Counter(word for run in known for word in run[:-1])
    size = len({word for run in known for word in run})
    found = [[math.log((pairs[a, b] + 1) / (firsts[a] + size)) for a, b in pairwise(run)] for run in runs]
    return np.array(found).mean(1)


def cells(
    model: HeadModel, items: Sequence[Sequence[str]], others: Sequence[Sequence[str]], seed: int = 0
) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 4"]]:
    """Of each item whether it is done right, and the answer's log-probability (nats), in c_n, c_u, r_n, r_u.

    The solved examples in front of each are drawn from `others`.
    """
    if model.tokenizer is None:
        raise InputError("words are text; open the model with its tokenizer.")
    examples, rng = [], random.Random(seed)
    for item in items:
        natural = rng.sample([True, False] * (SHOWN // 2), SHOWN)
        shown = [
            list(run)[:: 1 if order else -1] for run, order in zip(rng.sample(others, SHOWN), natural, strict=True)
        ]
        for copies in (True, False):
            examples += [_example(out, copies, shown) for out in (list(item), list(item)[::-1])]
    batch = encode(examples, model.tokenizer, len(examples))
    if len(batch) < len(examples):
        raise InputError(
            f"this tokenizer cannot put {len(examples) - len(batch)} of the items ({', '.join(batch.dropped)})."
        )
    found = whole_answers(model, batch)
    return found.right.double().numpy().reshape(-1, 4), found.answer.numpy().reshape(-1, 4)


def embers(
    model: HeadModel, texts: Sequence[str] | None = None, *, n: int = 192, words: int = 5, seed: int = 0
) -> list[LawRow]:
    """The three effects (formula above) as share of items done right. At the floor or the ceiling there is no verdict."""
    items, others = sentences(texts, n, words, seed)
    right, log_p = cells(model, items, others, seed)
    natural = pair_probability(items, others) - pair_probability([run[::-1] for run in items], others)
    if natural.mean() <= 0:
        raise InputError("these texts are no likelier in their own order by counts of word pairs; give plain prose.")
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(_NAMES, right.mean(0), strict=True))
    rows = []
    for name, signs in _contrasts(right).items():
        mean, stderr, control, p = effect_of(right @ signs, seed)
        flat = (right.std(0) == 0).all()
        answer = "not decided" if flat else judged(mean, stderr, p)
        says = f"{'at the floor or the ceiling; ' if flat else ''}{shares}; {(log_p @ signs).mean():.2f} nats an answer"
        rows.append(
            LawRow(f"embers: {name} probability", 89, "word lists", mean, stderr, "share", control, p, n, answer, says)
        )
    return rows


def _contrasts(right: Float[np.ndarray, "N 4"]) -> dict[str, Float[np.ndarray, "4"]]:
    """Of the formula; where no list is said backwards, output and input cannot be told apart, and are one."""
    found = {name: np.array(signs) / 2 for name, signs in CONTRASTS.items()}
    flat = [bool((right[:, task].std(0) == 0).all()) for task in ([0, 1], [2, 3])]
    if flat == [False, True]:
        return {"output and input": np.array([1.0, -1, 0, 0]), "task": found["task"]}
    return found


_NAMES = ("copy natural", "copy unnatural", "reverse to natural", "reverse to unnatural")


def _example(out: list[str], copies: bool, shown: Sequence[list[str]]) -> Example:
    name = "Copy" if copies else "Backwards"
    lead = ""
    for said in shown:
        lead += f"Words: {' '.join(said if copies else said[::-1])}\n{name}: {' '.join(said)}\n\n"
    given = out if copies else out[::-1]
    return Example(f"{lead}Words: {' '.join(given)}\n{name}:", " " + " ".join(out), continuation="\n")
