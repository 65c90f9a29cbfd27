"""The methods to explain one answer. Each registers itself at the end of its own file:

    @explains("gim", "an estimate of ...", needs_twin=True)
    def _explain(model: HeadModel, batch: TaskBatch) -> Found: ...

`explain`, the command line and the page of an explanation look it up here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from manyheads.model.headmodel import HeadModel
from manyheads.provenance import Provenance
from manyheads.registry import Registry
from manyheads.tasks import TaskBatch
from manyheads.trace.circuits.circuit import Circuit

Found = tuple[Circuit, dict[str, float]]  # every component's score, and constants that belong to no component
LOST = "how much of the difference of the two logits is lost when"


@dataclass(frozen=True)
class Way:
    """One method: its name, what its scores mean, whether it needs a corrupted prompt, and its function."""

    name: str
    what: str
    needs_twin: bool
    score: Callable[[HeadModel, TaskBatch], Found]


_WAYS: Registry[Way] = Registry("trace")


def explains(
    name: str, what: str, *, needs_twin: bool = False
) -> Callable[[Callable[[HeadModel, TaskBatch], Found]], Callable[[HeadModel, TaskBatch], Found]]:
    """Register a function as a method (see above); `what` follows "Method: <name>, " on the page."""

    def register(score: Callable[[HeadModel, TaskBatch], Found]) -> Callable[[HeadModel, TaskBatch], Found]:
        _WAYS.add(name, Way(name, what, needs_twin, score))
        return score

    return register


def ways() -> dict[str, Way]:
    """All methods by name."""
    return _WAYS.all()


def way(name: str) -> Way:
    """The method called `name`. `InputError` lists the known ones."""
    return _WAYS[name]


def components(
    model: HeadModel, method: str, heads: Float[np.ndarray, "L H"], mlps: Float[np.ndarray, "L"] | None = None
) -> Circuit:
    """Scores of every head, and of every MLP if given, as a circuit."""
    nodes = {str(head): float(heads[head]) for head in model.heads}
    nodes |= {} if mlps is None else {f"M{layer}": float(value) for layer, value in enumerate(mlps)}
    meta = Provenance.of(model, method).to_json()
    return Circuit("heads" if mlps is None else "components", model.shape, nodes, method=method, meta=meta)
