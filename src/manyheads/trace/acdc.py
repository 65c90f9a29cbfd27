"""ACDC: the circuit that is left when every edge that does not matter is taken away, from the logits down.

Conmy et al., arXiv:2304.14997. Receivers are visited in reverse order of the pass. An edge is removed (its receiver reads the
sender's corrupted write) if that moves the output by less than tau,

    D(removed + {edge}) - D(removed) < tau        D: KL(clean || edited) at the positions kept, nats, mean over rows; or
                                                  |metric(clean) - metric(edited)|, if a metric is given

and stays removed. Incoming edges of a head or an MLP that nothing reads any more go without a trial.

Departure: a receiver's edges are tried together first. If all of them cost less than tau, they go at once; else each half is
tried by itself, down to single edges, which are decided as in the paper. Edges that cancel each other could hide in a group that
single trials would have split, but no group ever costs more than tau. The number of trials so follows the size of the circuit
instead of that of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pandas as pd
from jaxtyping import Float
from torch import Tensor

from manyheads import __version__
from manyheads.errors import InputError
from manyheads.model.edges import Edge, RowMetric, edges, name_of, patch_edge_sets, receivers
from manyheads.model.headmodel import HeadModel
from manyheads.trace.circuit import Circuit


@dataclass(frozen=True)
class Acdc:
    """`circuit` holds the edges that stayed, each with what removing it would have cost at its turn, in D's unit (NaN: not
    tried). `trials`: `receiver`, `edges` tried together, `cost`, `removed`. `distance` is D of the circuit."""

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
    max_trials: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Acdc:
    """Find the circuit of `clean` against `corrupted` prompts (rule above). A trial is one pass over a few copies.

    With `max_trials` the search ends early and untried edges stay (`finished` says so). `progress` gets the number of edges
    decided. `InputError` for a threshold that is not positive; other errors as in `edge_attribution`.
    """
    if not tau > 0:
        raise InputError(f"tau is {tau}; give a positive number, in nats (or the metric's unit).")
    search = _Search(model, clean, corrupted, tau, metric, keep, max_trials)
    decided, incoming = 0, _incoming(model)
    for end in reversed(receivers(model)):
        search.visit(name_of(end), _node(name_of(end)), incoming[name_of(end)])
        decided += len(incoming[name_of(end)])
        if progress is not None:
            progress(decided)
    kept = {(name_of(s), name_of(r)): cost for (s, r), cost in search.kept.items()}
    meta = {"tau": tau, "version": __version__, "fingerprint": model.fingerprint}
    circuit = Circuit("edges", model.shape, edges=kept, method="ACDC", meta=meta)
    trials = pd.DataFrame(search.trials, columns=["receiver", "edges", "cost", "removed"])
    return Acdc(circuit, trials, search.distance, search.in_time)


def _incoming(model: HeadModel) -> dict[str, list[Edge]]:
    """Each receiver's edges, the latest sender first."""
    found: dict[str, list[Edge]] = {name_of(end): [] for end in receivers(model)}
    for edge in edges(model):
        found[name_of(edge[1])].insert(0, edge)
    return found


def _node(receiver: str) -> str:
    return receiver.partition(".")[0]


class _Search:
    """What has been removed, what has been kept, and the trials."""

    def __init__(
        self,
        model: HeadModel,
        clean: Any,
        corrupted: Any,
        tau: float,
        metric: RowMetric | None,
        keep: int,
        max_trials: int | None,
    ) -> None:
        self.tau, self.max_trials = tau, max_trials
        self.removed: set[Edge] = set()
        self.kept: dict[Edge, float] = {}
        self.read: set[str] = {"logits"}
        self.trials: list[tuple[str, int, float, bool]] = []
        self.distance = 0.0
        self._tried: set[Edge] = set()
        self._runs = patch_edge_sets(model, clean, corrupted, self._sets(), keep=keep)
        self._distance = _distance(next(self._runs), metric)

    @property
    def in_time(self) -> bool:
        return self.max_trials is None or len(self.trials) < self.max_trials

    def visit(self, receiver: str, node: str, incoming: list[Edge]) -> None:
        """Decide all edges into one receiver."""
        if node not in self.read:
            self.removed |= set(incoming)
            return
        self._decide(receiver, incoming)

    def _decide(self, receiver: str, some: list[Edge]) -> None:
        if not some:
            return
        if not self.in_time:
            self._keep(some, float("nan"))
            return
        self._tried = self.removed | set(some)
        distance = self._distance(next(self._runs))
        cost = distance - self.distance
        self.trials.append((receiver, len(some), cost, cost < self.tau))
        if cost < self.tau:
            self.removed, self.distance = self._tried, distance
        elif len(some) == 1:
            self._keep(some, cost)
        else:
            self._decide(receiver, some[: len(some) // 2])
            self._decide(receiver, some[len(some) // 2 :])

    def _keep(self, some: list[Edge], cost: float) -> None:
        for edge in some:
            self.kept[edge] = cost
            self.read.add(name_of(edge[0]))

    def _sets(self) -> Iterator[set[Edge]]:
        while True:
            yield self._tried


def _distance(clean: Float[Tensor, "B K V"], metric: RowMetric | None) -> Callable[[Tensor], float]:
    """How far logits are from the clean ones."""
    if metric is not None:
        plain = metric(clean)
        return lambda logits: float((metric(logits) - plain).abs().mean())
    log_p = clean.double().log_softmax(-1)

    def kl(logits: Tensor) -> float:
        return float((log_p.exp() * (log_p - logits.double().log_softmax(-1))).sum(-1).mean())

    return kl
