"""ACDC: the circuit that remains when every edge that does not matter is removed, from the logits down.

Conmy et al., arXiv:2304.14997. Receivers are visited in reverse order of the pass. An edge is removed (its receiver reads the
sender's corrupted write) if that moves the output by less than tau,

    D(removed + {edge}) - D(removed) < tau        D: KL(clean || edited) at the kept positions, nats, mean over rows; or
                                                  |metric(clean) - metric(edited)|, if a metric is given

and stays removed. If no kept edge reads a head or an MLP, its incoming edges are removed without a trial: they change nothing.

Departure: a receiver's edges are tried together first. If they cost less than tau together, all are removed; else each half is
tried, down to single edges, which are decided as in the paper. So the number of trials grows with the circuit, not the graph.
Edges that cancel each other may be removed as a group though single trials would keep them; no group costs more than tau.
`one_by_one` searches as in the paper.

`acdc_nodes` does the same for whole heads and MLPs, from the last layer down: a removed node writes as in the corrupted run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.edges import Edge, edges, name_of, patch_edge_sets, receivers
from manyheads.model.replay.streaming import RowMetric
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.trace.circuits.circuit import Circuit


@dataclass(frozen=True)
class Acdc:
    """`circuit` holds the edges or nodes that stayed, each with the cost of removing it at its turn, in D's unit (NaN: not
    tried). Columns of `trials`: `at` (receiver or layer), `tried` (how many together), `cost`, `removed`. `distance` is D of the
    circuit."""

    circuit: Circuit
    trials: pd.DataFrame
    distance: float
    finished: bool


def acdc(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    tau: float,
    *,
    metric: RowMetric | None = None,
    keep: int = 1,
    one_by_one: bool = False,
    max_trials: int | None = None,
    bar: Bar = Bar(),
) -> Acdc:
    """Find the edges of `clean` against `corrupted` prompts (rule above). A trial is one pass over a few copies of the batch.

    Kept edges that lie on no path from the embedding to the logits are left out. With `max_trials` the search ends early and
    untried edges stay (`finished` is then False). `bar` gets the number of edges decided.
    `InputError` for a threshold that is not positive; other errors as in `edge_attribution`.
    """
    search = _Search(model, clean, corrupted, tau, metric, keep, one_by_one, max_trials)
    incoming = _incoming(model)
    for end in reversed(receivers(model)):
        some = incoming[name_of(end)]
        if name_of(end).partition(".")[0] in {"logits", *(sender for sender, _ in search.kept)}:
            search.decide(name_of(end), some)
        bar(len(some))
    return search.result(Circuit("edges", model.shape, edges=search.kept, method="ACDC", meta=search.meta).connected())


def acdc_nodes(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    tau: float,
    *,
    metric: RowMetric | None = None,
    keep: int = 1,
    one_by_one: bool = False,
    max_trials: int | None = None,
    bar: Bar = Bar(),
) -> Acdc:
    """Find the heads and MLPs of `clean` against `corrupted` prompts: coarser than `acdc`, at a fraction of its cost.

    `bar` gets the number of nodes decided; all else as in `acdc`.
    """
    search = _Search(model, clean, corrupted, tau, metric, keep, one_by_one, max_trials)
    outgoing: dict[int, dict[str, list[Edge]]] = {layer: {} for layer in reversed(range(model.n_layers))}
    for edge in edges(model):
        if not isinstance(edge[0], str):
            outgoing[edge[0].layer].setdefault(name_of(edge[0]), []).append(edge)
    for layer, some in outgoing.items():
        search.decide(str(layer), dict(reversed(some.items())))
        bar(len(some))
    return search.result(Circuit("components", model.shape, search.kept, method="ACDC, nodes", meta=search.meta))


def _incoming(model: HeadModel) -> dict[str, dict[tuple[str, str], list[Edge]]]:
    """Each receiver's edges by name, the latest sender first."""
    found: dict[str, dict[tuple[str, str], list[Edge]]] = {name_of(end): {} for end in receivers(model)}
    for sender, end in reversed(edges(model)):
        found[name_of(end)][name_of(sender), name_of(end)] = [(sender, end)]
    return found


class _Search:
    """State of a search: removed edges, kept items, trials. An item is a name and the edges that are removed with it."""

    def __init__(
        self,
        model: HeadModel,
        clean: Any,
        corrupted: Any,
        tau: float,
        metric: RowMetric | None,
        keep: int,
        one_by_one: bool,
        max_trials: int | None,
    ) -> None:
        if not tau > 0:
            raise InputError(f"tau is {tau}; give a positive number, in nats (or the metric's unit).")
        self.tau, self.one_by_one, self.max_trials = tau, one_by_one, max_trials
        self.meta = Provenance.of(model, "ACDC", "arXiv:2304.14997", tau=tau).to_json()
        self.removed: set[Edge] = set()
        self.kept: dict[Any, float] = {}
        self.trials: list[tuple[str, int, float, bool]] = []
        self.distance = 0.0
        self._tried: set[Edge] = set()
        self._runs = patch_edge_sets(model, clean, corrupted, self._sets(), keep=keep)
        self._distance = _distance(next(self._runs), metric)

    def decide(self, at: str, items: Mapping[Any, Sequence[Edge]]) -> None:
        """Remove or keep each of `items`."""
        for group in [[name] for name in items] if self.one_by_one else [list(items)]:
            self._decide(at, items, group)

    def _decide(self, at: str, items: Mapping[Any, Sequence[Edge]], group: list[Any]) -> None:
        if not group:
            return
        if self.max_trials is not None and len(self.trials) >= self.max_trials:
            self.kept |= dict.fromkeys(group, float("nan"))
            return
        self._tried = self.removed.union(*(items[name] for name in group))
        distance = self._distance(next(self._runs))
        cost = distance - self.distance
        self.trials.append((at, len(group), cost, cost < self.tau))
        if cost < self.tau:
            self.removed, self.distance = self._tried, distance
        elif len(group) == 1:
            self.kept[group[0]] = cost
        else:
            self._decide(at, items, group[: len(group) // 2])
            self._decide(at, items, group[len(group) // 2 :])

    def result(self, circuit: Circuit) -> Acdc:
        """The result, with `circuit` as the circuit."""
        trials = pd.DataFrame(self.trials, columns=["at", "tried", "cost", "removed"])
        return Acdc(circuit, trials, self.distance, not any(map(math.isnan, self.kept.values())))

    def _sets(self) -> Iterator[set[Edge]]:
        while True:
            yield self._tried


def _distance(clean: Float[Tensor, "B K V"], metric: RowMetric | None) -> Callable[[Tensor], float]:
    """D of edited logits from the clean ones (formula above)."""
    if metric is not None:
        plain = metric(clean)
        return lambda logits: float((metric(logits) - plain).abs().mean())
    log_p = clean.double().log_softmax(-1)

    def kl(logits: Tensor) -> float:
        return float((log_p.exp() * (log_p - logits.double().log_softmax(-1))).sum(-1).mean())

    return kl
