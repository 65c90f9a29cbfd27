"""Networks of beliefs as plain data (#43): nodes, and edges from child to parent. Nothing here computes.

A belief is a Gaussian with a mean and a precision (1 / variance). A *value* parent drives its child's mean, a *volatility* parent
the logarithm of the variance that its child gains per unit of time. A node without a child is hidden; one that is observed is a
leaf: "continuous" with a fixed noise precision, or "binary", whose probability is the logistic function of its parent.

Numbers of a network have names, by which they are fitted or replaced: "omega x1", "kappa x2 x1" (from parent to child).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from manyheads.errors import InputError
from manyheads.inputs import check_number

BeliefUpdate = Literal["ehgf", "standard", "unbounded"]
UPDATES: tuple[BeliefUpdate, ...] = ("ehgf", "standard", "unbounded")
_OF_NODES = ("omega", "rho", "lambda", "mean", "precision")


@dataclass(frozen=True)
class BeliefNode:
    """`kind` is "hidden", "continuous" or "binary", the last two observed.

    `omega` is the logarithm of the variance gained per unit of time, `rho` the drift per unit of time, `lam` how much of the mean
    stays (1: a random walk). `mean` and `precision` are the belief before the first observation; of a continuous leaf `precision`
    is that of the noise of observations, and the others count for nothing.
    """

    name: str
    kind: Literal["hidden", "continuous", "binary"] = "hidden"
    omega: float = -4.0
    rho: float = 0.0
    lam: float = 1.0
    mean: float = 0.0
    precision: float = 1.0


@dataclass(frozen=True)
class BeliefEdge:
    """Node `child` depends on node `parent`, `strength` (alpha for values, kappa for volatility) times `shape` of its mean."""

    child: str
    parent: str
    kind: Literal["value", "volatility"] = "value"
    strength: float = 1.0
    shape: Literal["linear", "tanh", "sigmoid"] = "linear"


@dataclass(frozen=True)
class BeliefNetwork:
    """Nodes, edges, and how volatility parents are updated: "standard", "ehgf" (mean first) or "unbounded".

    `InputError` for edges to nobody, circles, leaves with children, binary leaves with anything but plain value parents.
    """

    nodes: tuple[BeliefNode, ...]
    edges: tuple[BeliefEdge, ...]
    update: BeliefUpdate = "ehgf"

    def __post_init__(self) -> None:
        names = [node.name for node in self.nodes]
        if len(set(names)) < len(names):
            raise InputError(f"two nodes have one name among {', '.join(names)}; name them apart.")
        if self.update not in UPDATES:
            raise InputError(f"update is {self.update!r}; choose from {', '.join(UPDATES)}.")
        pairs = [(edge.child, edge.parent) for edge in self.edges]
        if len(set(pairs)) < len(pairs):
            raise InputError(
                "two edges join the same child and parent; join a parent by its value or by its volatility."
            )
        for edge in self.edges:
            for name in (edge.child, edge.parent):
                if name not in names:
                    raise InputError(f"an edge names {name!r}, and the nodes are {', '.join(names)}.")
            if self[edge.parent].kind != "hidden":
                raise InputError(f"{edge.parent!r} is observed, and cannot be a parent; put a hidden node between.")
            plain = edge.kind == "value" and edge.shape == "linear" and edge.strength == 1.0
            if self[edge.child].kind == "binary" and not plain:
                raise InputError(f"{edge.child!r} is binary: its parents are linear value parents of strength 1.")
            if edge.kind == "volatility" and edge.shape != "linear":
                raise InputError(f"the volatility of {edge.child!r} is linear in its parent; leave `shape` out.")
        if not self.leaves:
            raise InputError("no node is observed; give one the kind 'continuous' or 'binary'.")
        for leaf in self.leaves:
            if not self.edges_up(leaf.name, "value"):
                raise InputError(f"{leaf.name!r} has no value parent, so nothing is believed of it; add an edge.")
        for node in self.nodes:
            if node.kind == "hidden" and not self.edges_down(node.name):
                raise InputError(f"{node.name!r} has no child, so nothing is ever learned about it; remove it.")
            given = {"omega": node.omega, "rho": node.rho, "lambda": node.lam, "mean": node.mean}
            for name, value in given.items():
                check_number(value, f"{name} of {node.name}", low=-1e6, high=1e6)
            check_number(node.precision, f"precision of {node.name}", low=1e-12, high=1e10)
        if self.update == "unbounded":
            for node in self.nodes:
                down = self.edges_down(node.name)
                if any(e.kind == "volatility" for e in down) and len(down) > 1:
                    raise InputError(
                        f"{node.name!r} has {len(down)} children; 'unbounded' takes volatility parents of one."
                    )
        list(self.parents_first())

    def __getitem__(self, name: str) -> BeliefNode:
        """The node called `name`."""
        for node in self.nodes:
            if node.name == name:
                return node
        raise InputError(f"there is no node {name!r}; the nodes are {', '.join(node.name for node in self.nodes)}.")

    @property
    def leaves(self) -> tuple[BeliefNode, ...]:
        """The observed nodes, in the order in which observations are given."""
        return tuple(node for node in self.nodes if node.kind != "hidden")

    def edges_up(self, child: str, kind: str) -> tuple[BeliefEdge, ...]:
        """The edges of one kind to a node's parents."""
        return tuple(edge for edge in self.edges if edge.child == child and edge.kind == kind)

    def edges_down(self, parent: str) -> tuple[BeliefEdge, ...]:
        """The edges to a node's children."""
        return tuple(edge for edge in self.edges if edge.parent == parent)

    def parents_first(self) -> Iterator[BeliefNode]:
        """Every node after all of its parents. `InputError` for a circle."""
        left = list(self.nodes)
        while left:
            waiting = {node.name for node in left}
            ready = [n for n in left if not any(e.child == n.name and e.parent in waiting for e in self.edges)]
            if not ready:
                raise InputError(f"the edges among {', '.join(sorted(waiting))} go in a circle; take one away.")
            yield from ready
            left = [node for node in left if node not in ready]

    def numbers(self) -> dict[str, float]:
        """Every number of the network by its name: "omega x1", "alpha x2 x1", "kappa x3 x2" (parent, then child)."""
        fields = {"lambda": "lam"}
        found = {f"{n} {node.name}": getattr(node, fields.get(n, n)) for node in self.nodes for n in _OF_NODES}
        for edge in self.edges:
            letter = "alpha" if edge.kind == "value" else "kappa"
            found[f"{letter} {edge.parent} {edge.child}"] = edge.strength
        return found

    def replaced(self, numbers: Mapping[str, float]) -> BeliefNetwork:
        """The network with other numbers, by their names."""
        known = self.numbers()
        for name in numbers:
            if name not in known:
                raise InputError(f"the network has no number {name!r}; it has {', '.join(known)}.")
        all_of = known | dict(numbers)
        nodes = tuple(
            replace(
                node,
                omega=all_of[f"omega {node.name}"],
                rho=all_of[f"rho {node.name}"],
                lam=all_of[f"lambda {node.name}"],
                mean=all_of[f"mean {node.name}"],
                precision=all_of[f"precision {node.name}"],
            )
            for node in self.nodes
        )
        edges = tuple(
            replace(e, strength=all_of[f"{'alpha' if e.kind == 'value' else 'kappa'} {e.parent} {e.child}"])
            for e in self.edges
        )
        return BeliefNetwork(nodes, edges, self.update)


def binary_beliefs(levels: int = 2, *, omega: float = -3.0, update: BeliefUpdate = "ehgf") -> BeliefNetwork:
    """The usual network for a series of 0 and 1: leaf "u", its log-odds "x2", and with 3 levels their volatility "x3"."""
    return _chain("binary", levels, omega, 1.0, update, first=2)


def continuous_beliefs(
    levels: int = 2, *, omega: float = -3.0, precision: float = 1e4, mean: float = 0.0, update: BeliefUpdate = "ehgf"
) -> BeliefNetwork:
    """The usual network for a series of numbers: leaf "u" with noise of `precision`, the state "x1", its volatility "x2", and
    with 3 levels that one's volatility "x3". With 1 level nothing is believed of the volatility: a Kalman filter.
    """
    network = _chain("continuous", levels + 1, omega, precision, update, first=1)
    return network.replaced({"mean x1": mean})


def _chain(
    kind: Literal["continuous", "binary"],
    nodes: int,
    omega: float,
    precision: float,
    update: BeliefUpdate,
    *,
    first: int,
) -> BeliefNetwork:
    if nodes not in (2, 3, 4) or (kind == "binary" and nodes == 4):
        raise InputError("levels are 2 or 3 for binary series, 1 to 3 for continuous ones.")
    hidden = [f"x{first + i}" for i in range(nodes - 1)]
    leaf = BeliefNode("u", kind, precision=precision)
    edges = [BeliefEdge("u", hidden[0])]
    edges += [BeliefEdge(low, high, "volatility") for low, high in pairwise(hidden)]
    return BeliefNetwork((leaf, *(BeliefNode(name, omega=omega) for name in hidden)), tuple(edges), update)
