"""The five properties of retrieval heads (#11): universal, sparse, intrinsic, dynamic, causal - measured, not assumed.

Wu et al., arXiv:2404.15574, on the scores of `retrieval`. With s[l, h] the score, and a head found from 0.1 on,

    universal   share of heads found, in every model and on every task given                                     in [0, 1]
    sparse      that share (the paper: under 0.05), and the share that scores exactly 0 (released files: 0.49 - 0.73)
    intrinsic   agreement of two score maps, Pearson and Spearman over all heads in [-1, 1] and the overlap of the found heads in
                [0, 1]: between models that come from one base, and between context lengths of one model. Beside it the mean
                Pearson after shuffling the heads within their layers: what agreeing on the layer alone would give
    dynamic     activation frequency, the share of answered tests in which a head copied anything: `always` 1, `never` 0
    causal      needle recall (ROUGE-1, in [0, 1]) lost with the top K attending uniformly while decoding, beside random sets

Masking acts from the query that makes the first token of the answer on; the context has been read by the whole model, as in the
released code. Departures: random sets are matched by layer and drawn at least 20 times, where the paper draws one set from all
layers; effects are judged on needles that the heads were not scored on.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from manyheads.atlas.core.result import CausalCheck
from manyheads.atlas.retrieval_heads.scores import (
    ABOUT,
    NeedleTest,
    Probe,
    Tests,
    answer,
    answered_probe,
    chunks,
    needle_batches,
    needle_tests,
    recall,
)
from manyheads.errors import InputError
from manyheads.evaluation.controls import matched_sets
from manyheads.evaluation.metrics import rank_correlation
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.model.editing.edits import Ablate, Mode
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.tasks import TaskBatch

LENGTHS = (32, 64, 128, 256)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SHUFFLES = 200


@dataclass(frozen=True)
class RetrievalProperties:
    """What `retrieval_properties` measured.

    `scores` are the model's own. `universal` has a row for each model and task: heads found, share found and share exactly 0 (the
    sparse property), the best score, tests run and answered. `intrinsic` has a row for each pair of score maps, `dynamic` one for
    each head, `causal` a check for each K.
    """

    scores: HeadScores
    universal: pd.DataFrame
    intrinsic: pd.DataFrame
    dynamic: pd.DataFrame
    causal: tuple[CausalCheck, ...]

    def to_frame(self) -> pd.DataFrame:
        """All five as one table: property, what it is a property of, quantity, value."""
        return pd.DataFrame(list(self._rows()), columns=["property", "of", "quantity", "value"])

    def _rows(self) -> Iterator[tuple[str, str, str, float]]:
        for row in self.universal.itertuples():
            yield "universal", row.of, "heads found", row.found
            yield "universal", row.of, "best score", row.best
        for row in self.universal.itertuples():
            yield "sparse", row.of, "share found", row.share_found
            yield "sparse", row.of, "share exactly 0", row.share_zero
        for row in self.intrinsic.itertuples():
            for quantity in ("pearson", "spearman", "overlap", "pearson_shuffled"):
                yield "intrinsic", row.of, quantity, getattr(row, quantity)
        found = self.dynamic[self.dynamic.score >= ABOUT.threshold]
        for kind in ("always", "sometimes", "never"):
            yield "dynamic", "found heads", kind, (found.active == kind).sum()
        for check in self.causal:
            of = f"top {len(check.heads)}"
            yield "causal", of, "recall", check.clean
            yield "causal", of, "recall with them masked", check.ablated
            yield "causal", of, "recall with random heads masked", check.clean - check.random_mean
            yield "causal", of, "p", check.p_value


def retrieval_properties(
    model: HeadModel,
    *,
    task: Tests | None = None,
    others: Mapping[str, HeadModel] | None = None,
    tasks: Mapping[str, Tests] | None = None,
    ks: Sequence[int] = (1, 2, 5, 10),
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    n: int = 80,
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> RetrievalProperties:
    """Measure the five properties of `model`'s retrieval heads.

    Needles are those of `retrieval` (or `task`'s), of the kind that the model answers. `others` are further models by name,
    scored on the same needles: those of the
    model's shape are taken for its relatives (checkpoints, fine-tunings) and compared head by head. `tasks` are further needle
    tests by name. `ks` are the sizes of the masked sets; sizes beyond the number of heads are left out. A `TaskBatch` is both
    scored and judged on. `bar` counts tests answered. `InputError` if `n_random` is below 20 or no K is left.
    """
    sizes = sorted({k for k in ks if 1 <= k <= len(model.heads)})
    if n_random < 20 or not sizes:
        raise InputError(
            f"the causal property needs 20 random sets and sizes K from 1 on; got {n_random} and {list(ks)}."
        )
    probe = answered_probe(model, seed) if task is None else None
    groups = _answered(model, task, lengths, depths, n, seed, bar, probe)
    own = _scores(model, groups)
    table = [_universal("model", own, groups)]
    pairs = [
        _agreement(f"{a} and {b} tokens", s, t, seed) for (a, s), (b, t) in combinations(_by_length(model, groups), 2)
    ]
    for name, other in (others or {}).items():
        theirs = _answered(other, task, lengths, depths, n, seed, bar, probe)
        table.append(_universal(name, _scores(other, theirs), theirs))
        if other.shape == model.shape:
            pairs.append(_agreement(f"model and {name}", own, _scores(other, theirs), seed))
    for name, further in (tasks or {}).items():
        theirs = _answered(model, further, lengths, depths, n, seed, bar)
        table.append(_universal(f"model on {name}", _scores(model, theirs), theirs))
    meta = ABOUT.provenance(model, seed, lengths=list(lengths), depths=list(depths), n=n)
    zero = np.zeros(model.shape)
    scores = (
        HeadScores.from_examples(ABOUT.name, own, meta) if len(own) else HeadScores(ABOUT.name, zero, zero, 0, meta)
    )
    batches = needle_batches(model, task, lengths, depths, n, seed + 1, probe)
    return RetrievalProperties(
        scores=scores,
        universal=pd.DataFrame(table),
        intrinsic=pd.DataFrame(pairs, columns=["of", "pearson", "spearman", "overlap", "pearson_shuffled", "k"]),
        dynamic=_dynamic(scores, [test for group in groups for test in group if test.answered]),
        causal=masking_curve(model, scores, batches, sizes, n_random=n_random, seed=seed, bar=bar),
    )


def masking_curve(
    model: HeadModel,
    scores: HeadScores,
    batches: Sequence[TaskBatch],
    ks: Sequence[int],
    *,
    mode: Mode = "uniform",
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> tuple[CausalCheck, ...]:
    """Needle recall with the top K heads masked while decoding, for each K, beside `n_random` sets matched by layer."""
    tops = [scores.top(k) for k in ks]
    sets = [[top, *matched_sets(top, n_random, seed, shape=model.shape)] for top in tops]
    flat = [model.head_set(()), *(s for several in sets for s in several)]
    recalls = masked_recall(model, batches, flat, mode=mode, bar=bar)
    edges = np.cumsum([1, *map(len, sets)])
    metric = "needle recall, heads masked while decoding"
    return tuple(
        CausalCheck.of(ABOUT.name, mode, top, metric, recalls[0], recalls[start:stop])
        for top, (start, stop) in zip(tops, pairwise(edges), strict=True)
    )


def masked_recall(
    model: HeadModel,
    batches: Sequence[TaskBatch],
    sets: Sequence[HeadSet],
    *,
    mode: Mode = "uniform",
    bar: Bar = Bar(),
) -> Float[np.ndarray, "S N"]:
    """Each test's recall with each set of heads masked while decoding. The context is read once, by the whole model.

    The last token of the prompt is left to decoding: its query makes the answer's first token, so it is masked too.
    """
    columns = []
    for rows in (rows for batch in batches for rows in chunks(batch)):
        cache = _read(model, rows)
        recalls = []
        for heads in sets:
            with model.editing(Ablate(heads, mode)):
                recalls.append(recall(rows, answer(model, rows, past_key_values=copy.deepcopy(cache))))
        columns.append(np.stack(recalls))
        bar(len(rows))
    return np.concatenate(columns, 1)


def _read(model: HeadModel, batch: TaskBatch) -> Any:
    """The cache after all of the prompt but its last token."""
    context = {"input_ids": batch.input_ids[:, :-1], "attention_mask": batch.attention_mask[:, :-1]}
    with torch.no_grad():
        return model(context, use_cache=True).past_key_values


def _answered(
    model: HeadModel,
    task: Tests | None,
    lengths: Sequence[int],
    depths: Sequence[float],
    n: int,
    seed: int,
    bar: Bar,
    probe: Probe | None = None,
) -> list[list[NeedleTest]]:
    return needle_tests(model, needle_batches(model, task, lengths, depths, n, seed, probe), bar)


def _scores(model: HeadModel, groups: Sequence[Sequence[NeedleTest]]) -> Float[np.ndarray, "N L H"]:
    """What each head copied in each answered test."""
    return np.array([t.copied for group in groups for t in group if t.answered]).reshape(-1, *model.shape)


def _by_length(
    model: HeadModel, groups: Sequence[Sequence[NeedleTest]]
) -> Iterator[tuple[int, Float[np.ndarray, "N L H"]]]:
    """The copies of each length that was answered at all, with the median number of tokens."""
    for group in groups:
        copied = _scores(model, [group])
        if len(copied):
            yield round(float(np.median([test.length for test in group]))), copied


def _universal(name: str, copied: Float[np.ndarray, "N L H"], groups: Sequence[Sequence[NeedleTest]]) -> dict[str, Any]:
    values = copied.mean(0) if len(copied) else np.zeros(copied.shape[1:])
    found = values >= ABOUT.threshold
    return {
        "of": name,
        "heads": values.size,
        "found": int(found.sum()),
        "share_found": float(found.mean()),
        "share_zero": float((values == 0).mean()),
        "best": float(values.max()),
        "tests": sum(map(len, groups)),
        "answered": len(copied),
    }


def _agreement(
    name: str, first: Float[np.ndarray, "N L H"], second: Float[np.ndarray, "M L H"], seed: int
) -> dict[str, Any]:
    """How alike two score maps are; NaN where one of them is the same for all heads."""
    a, b = (x.mean(0) if len(x) else np.zeros(x.shape[1:]) for x in (first, second))
    k = max(1, int((a >= ABOUT.threshold).sum()))
    top = [set(np.argsort(-x, axis=None, kind="stable")[:k].tolist()) for x in (a, b)]
    rng = np.random.default_rng(seed)
    shuffled = [_pearson(a, rng.permuted(b, axis=1)) for _ in range(SHUFFLES)]
    return {
        "of": name,
        "pearson": _pearson(a, b),
        "spearman": rank_correlation(a, b),
        "overlap": len(top[0] & top[1]) / k,
        "pearson_shuffled": float(np.mean(shuffled)),
        "k": k,
    }


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


def _dynamic(scores: HeadScores, tests: Sequence[NeedleTest]) -> pd.DataFrame:
    """A row a head: how often it was active, overall and where it was so least (over lengths, over quarters of depth)."""
    layers, indices = (axis.ravel() for axis in np.indices(scores.shape))
    active = np.array([test.copied > 0 for test in tests]).reshape(len(tests), -1)
    frequency = active.mean(0) if tests else np.zeros(scores.values.size)
    middle = np.median([test.length for test in tests]) if tests else 0
    cells: dict[str, list[int]] = {
        "least_by_length": [int(test.length > middle) for test in tests],
        "least_by_depth": [min(3, int(4 * test.depth)) for test in tests],
    }
    frame = pd.DataFrame(
        {
            "head": [str(Head(int(layer), int(i))) for layer, i in zip(layers, indices, strict=True)],
            "score": scores.values.ravel(),
            "frequency": frequency,
            **{name: _least(active, cell) if tests else frequency for name, cell in cells.items()},
        }
    )
    frame["active"] = np.select([frame.frequency == 1, frame.frequency == 0], ["always", "never"], "sometimes")
    return frame.sort_values("score", ascending=False, kind="stable").reset_index(drop=True)


def _least(active: np.ndarray, cell: Sequence[int]) -> np.ndarray:
    which = np.asarray(cell)
    return np.min([active[which == value].mean(0) for value in np.unique(which)], axis=0)
