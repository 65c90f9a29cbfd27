"""Tests of a circuit: faithfulness, completeness, minimality, and faithfulness by size.

With F(C) the metric when everything outside C is taken from the corrupted prompts (or from their mean at each position), M the
whole model, and 0 the empty circuit,

    faithfulness(C)      (F(C) - F(0)) / (F(M) - F(0))          1: the circuit does it all; may be above 1 or below 0
    incompleteness(K)    |F(C - K) - F(M - K)| / |F(M) - F(0)|  K some of C's heads; small if C holds all that matters
    minimality(v)        |F(C) - F(C - v)| / |F(M) - F(0)|      compared with |F(C + u) - F(C)| for heads u outside
    CPR                  area under faithfulness over the share of items kept                   higher is better, about 1 at best
    CMD                  area between faithfulness and 1                                        lower is better, 0 at best

Sources: faithfulness, completeness and minimality from Wang et al., arXiv:2211.00593, as shares of the whole effect; the null of
minimality after Shi et al., arXiv:2410.13032; CPR and CMD from Mueller et al., arXiv:2504.13151. The baseline at every size of
the curve are random circuits with as many items in each layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value
from manyheads.heads import Head, HeadLike, HeadSet, mean_stderr
from manyheads.model.editing.edits import Patch
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.edges import Edge, Sender, name_of, patch_edge_sets
from manyheads.model.replay.edges import edges as edges_of
from manyheads.model.replay.edges import senders as senders_of
from manyheads.model.replay.patching import Mlp
from manyheads.model.replay.streaming import RowMetric
from manyheads.progress import Bar
from manyheads.trace.circuits.circuit import Circuit

Outside = Literal["corrupted", "mean"]
SHARES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


@dataclass(frozen=True)
class Faithfulness:
    """`value` with its standard error over prompts, and the means F(C), F(M) and F(0) it comes from."""

    value: float
    stderr: float
    circuit: float
    full: float
    empty: float
    n: int


@dataclass(frozen=True)
class SizeCurve:
    """`table`: size, share, faithfulness, stderr, and the random circuits' mean and spread. Areas are given for both."""

    table: pd.DataFrame
    cpr: float
    cmd: float
    random_cpr: float
    random_cmd: float


@dataclass(frozen=True)
class Trial:
    """The setting of a test: prompts and twins of one shape, a metric of the logits (of the last `keep` positions) that returns
    one number a row, and what replaces everything `outside` a circuit."""

    model: HeadModel
    clean: Any
    corrupted: Any
    metric: RowMetric
    outside: Outside = "corrupted"
    keep: int | None = 1

    def values(
        self, circuits: Sequence[Circuit], *, without: Sequence[Iterable[HeadLike]] | None = None
    ) -> Float[np.ndarray, "C B"]:
        """F of each circuit, minus the heads in `without` if given. All circuits must be of one kind."""
        kinds = {circuit.kind for circuit in circuits}
        if len(kinds) != 1:
            raise InputError(f"got circuits of kinds {', '.join(sorted(kinds)) or 'none'}; give circuits of one kind.")
        gone = [self.model.head_set(heads) for heads in without or [[]] * len(circuits)]
        if kinds == {"heads"}:
            return self._patched_heads([self.model.heads - (c.heads - k) for c, k in zip(circuits, gone, strict=True)])
        return self._patched_edges(
            [self._outside(circuit) + self._out_of(k) for circuit, k in zip(circuits, gone, strict=True)]
        )

    def bounds(self, circuit: Circuit) -> tuple[Float[np.ndarray, "B"], Float[np.ndarray, "B"]]:
        """F of the whole model and of the empty circuit of the same kind. `InputError` if they are equal."""
        full = self.values([whole(circuit, self.model)])[0]
        empty = self.values([circuit.only([])])[0]
        if abs(full.mean() - empty.mean()) < 1e-6:
            raise InputError("the metric is the same for the whole model and for the empty circuit; give other twins.")
        return full, empty

    def without(self, sets: Sequence[Iterable[HeadLike]]) -> Float[np.ndarray, "K B"]:
        """F of the whole model minus each set of heads."""
        return self._patched_heads([self.model.head_set(heads) for heads in sets])

    def _patched_heads(self, sets: Sequence[HeadSet]) -> Float[np.ndarray, "C B"]:
        source = self.model.read_z(self.corrupted)
        source = source.mean(1, keepdim=True) if self.outside == "mean" else source
        return self.model.sweep(self.clean, [Patch(heads, source) for heads in sets], self.metric, keep=self.keep)

    def _patched_edges(self, sets: Sequence[list[Edge]]) -> Float[np.ndarray, "C B"]:
        mean = self.outside == "mean"
        runs = patch_edge_sets(self.model, self.clean, self.corrupted, sets, mean=mean, keep=self.keep)
        return np.stack([self.metric(logits).detach().double().cpu().numpy() for logits in runs])

    def _outside(self, circuit: Circuit) -> list[Edge]:
        if circuit.kind == "edges":
            inside = set(circuit.edges)
            return [edge for edge in edges_of(self.model) if (name_of(edge[0]), name_of(edge[1])) not in inside]
        return self._out_of([s for s in senders_of(self.model) if s != "embedding" and name_of(s) not in circuit.nodes])

    def _out_of(self, senders: Iterable[Sender]) -> list[Edge]:
        gone = set(senders)
        return [edge for edge in edges_of(self.model) if edge[0] in gone] if gone else []


def whole(like: Circuit, model: HeadModel) -> Circuit:
    """The whole model as a circuit of the same kind."""
    if like.kind == "edges":
        found = {(name_of(s), name_of(r)): 0.0 for s, r in edges_of(model)}
        return Circuit("edges", model.shape, edges=found)
    kinds = (Head,) if like.kind == "heads" else (Head, Mlp)
    return Circuit(like.kind, model.shape, {name_of(s): 0.0 for s in senders_of(model) if isinstance(s, kinds)})


def faithfulness(trial: Trial, circuit: Circuit) -> Faithfulness:
    """Faithfulness (formula above); the standard error is that of the ratio of means."""
    full, empty = trial.bounds(circuit)
    found = trial.values([circuit])[0]
    value, stderr = _share(found, full, empty)
    return Faithfulness(value, stderr, float(found.mean()), float(full.mean()), float(empty.mean()), len(full))


def completeness(trial: Trial, circuit: Circuit, *, n: int = 20, seed: int = 0) -> pd.DataFrame:
    """Incompleteness for K empty, K each head, and K each of `n` random halves of the circuit's heads.

    One row a set: `without`, `circuit` (F(C - K)), `model` (F(M - K)), `incompleteness`. The largest one counts.
    """
    rng = np.random.default_rng(seed)
    heads = list(circuit.heads)
    halves = [[h for h in heads if rng.random() < 0.5] for _ in range(n)] if heads else []
    sets = [HeadSet(some, circuit.shape) for some in ([], *([h] for h in heads), *halves)]
    full, empty = trial.bounds(circuit)
    left = trial.values([circuit] * len(sets), without=sets).mean(1)
    model = trial.without(sets).mean(1)
    frame = pd.DataFrame({"without": [str(some) for some in sets], "circuit": left, "model": model})
    return frame.assign(incompleteness=np.abs(left - model) / abs(full.mean() - empty.mean()))


def minimality(trial: Trial, circuit: Circuit, *, n_random: int = 20, seed: int = 0) -> pd.DataFrame:
    """Effect of each head of the circuit, against heads outside. One row a head: `head`, `effect`, `random`, `p`.

    `random` is the mean effect of adding one of up to `n_random` heads from outside, `p` the p-value of `effect` among these. In
    an edge circuit, all edges out of a head are removed.
    """
    heads = list(circuit.heads)
    others = list(trial.model.heads - circuit.heads)
    rng = np.random.default_rng(seed)
    drawn = [others[i] for i in rng.permutation(len(others))[:n_random]]
    full, empty = trial.bounds(circuit)
    unit = abs(full.mean() - empty.mean())
    base = trial.values([circuit])[0].mean()
    effect = np.abs(trial.values([circuit] * len(heads), without=[[h] for h in heads]).mean(1) - base) / unit
    grown = [_with_head(circuit, head, trial.model) for head in drawn]
    null = np.abs(trial.values(grown).mean(1) - base) / unit if grown else np.zeros(0)
    p = [p_value(e, null) for e in effect]
    random = float(null.mean()) if len(null) else float("nan")
    return pd.DataFrame({"head": [str(h) for h in heads], "effect": effect, "random": random, "p": p})


def size_curve(
    trial: Trial,
    ranked: Circuit,
    *,
    shares: Sequence[float] = SHARES,
    n_random: int = 5,
    seed: int = 0,
    bar: Bar = Bar(),
) -> SizeCurve:
    """Faithfulness of the top items of `ranked`, which must score the whole model, at each share of items kept.

    Baseline: `n_random` circuits with as many items in each layer (an edge's is its receiver's). Areas by the trapezoid rule.
    """
    total = len(whole(ranked, trial.model))
    if len(ranked) < total:
        raise InputError(
            f"a size curve ranks everything, and this circuit scores {len(ranked)} of {total} items; give scores of all."
        )
    sizes = sorted({round(share * total) for share in shares})
    full, empty = trial.bounds(ranked)
    rng = np.random.default_rng(seed)
    rows, random = [], np.zeros((n_random, len(sizes)))
    for i, size in enumerate(sizes):
        kept = ranked.top(size)
        tried = [kept, *(_matched(ranked, kept, rng) for _ in range(n_random))]
        value, *others = trial.values(tried)
        found, stderr = _share(value, full, empty)
        random[:, i] = [_share(other, full, empty)[0] for other in others]
        rows.append((size, size / total, found, stderr, random[:, i].mean(), random[:, i].std()))
        bar(1)
    columns = ["size", "share", "faithfulness", "stderr", "random", "random_spread"]
    table = pd.DataFrame(rows, columns=columns)
    x, y, null = table["share"], table["faithfulness"].to_numpy(), random.mean(0)
    areas = [float(np.trapezoid(area, x)) for area in (y, np.abs(1 - y), null, np.abs(1 - null))]
    return SizeCurve(table, *areas)


def _share(value: np.ndarray, full: np.ndarray, empty: np.ndarray) -> tuple[float, float]:
    """The ratio of means, and its standard error by the delta method."""
    whole_effect = full.mean() - empty.mean()
    share = (value.mean() - empty.mean()) / whole_effect
    apart = ((value - empty) - share * (full - empty)) / whole_effect
    return float(share), float(mean_stderr(apart)[1])


def _matched(ranked: Circuit, kept: Circuit, rng: np.random.Generator) -> Circuit:
    wanted = Counter(_layer(item) for item in kept.items)
    chosen: list[Any] = []
    for layer, n in sorted(wanted.items()):
        pool = [item for item in ranked.items if _layer(item) == layer]
        chosen += [pool[i] for i in rng.permutation(len(pool))[:n]]
    return ranked.only(chosen)


def _layer(item: str | tuple[str, str]) -> str:
    name = (item if isinstance(item, str) else item[1]).partition(".")[0]
    return name[1:].partition("H")[0] if name[0] in "LM" else name


def _with_head(circuit: Circuit, head: Head, model: HeadModel) -> Circuit:
    """The circuit plus one head; in an edge circuit, plus all edges between it and the circuit's nodes."""
    if circuit.kind != "edges":
        return Circuit(circuit.kind, circuit.shape, circuit.nodes | {str(head): 0.0})
    inside = {*circuit.members, str(head)}
    more = {}
    for sender, end in edges_of(model):
        ends = name_of(sender), name_of(end)
        whose = ends[1].partition(".")[0]
        if str(head) in (ends[0], whose) and ends[0] in inside and whose in inside:
            more[ends] = 0.0
    return Circuit("edges", circuit.shape, edges=circuit.edges | more)
