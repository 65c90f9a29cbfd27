"""A circuit: the parts of a model that produce an answer, with their scores, whichever method found them.

There are three kinds, by what a circuit holds and what is ablated outside of it:

    heads        some attention heads; embedding and MLPs are never ablated
    components   some heads and MLPs; the embedding is never ablated
    edges        some edges of the residual graph (`manyheads.model.replay.edges`): which node reads which

Nodes are written `embedding`, `L0H3`, `M2`, `logits`; an edge's receiver may name a head's input, `L1H0.query`. Scores are in the
unit of the method that found them; a circuit is ranked by their magnitude.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from manyheads.errors import InputError, MismatchError
from manyheads.files import write_atomically
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.inputs import check_integer, check_number, read_object
from manyheads.model.headmodel import HeadModel
from manyheads.model.replay.edges import Edge, EdgeScores, name_of, node_named
from manyheads.model.replay.patching import Mlp, Receiver
from manyheads.provenance import Provenance
from manyheads.report import Reported

Kind = Literal["heads", "components", "edges"]
NamedEdge = tuple[str, str]
FORMAT = 1


@dataclass(frozen=True)
class Circuit(Reported):
    """Nodes or edges with their scores. `shape` is `(n_layers, n_heads)`; `meta` holds how it was found, and in which model.

    An edge circuit has no `nodes`: they are the ends of its edges. `InputError` for a name outside a model of this shape.
    """

    kind: Kind
    shape: tuple[int, int]
    nodes: dict[str, float] = field(default_factory=dict)
    edges: dict[NamedEdge, float] = field(default_factory=dict)
    method: str = ""
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"got a circuit of kind {self.kind!r}; give one of {', '.join(get_args(Kind))}.")
        if self.kind == "edges" and self.nodes:
            raise InputError("an edge circuit's nodes are the ends of its edges; give edges only.")
        if self.kind != "edges" and self.edges:
            raise InputError(f"a circuit of {self.kind} has no edges; give nodes only, or kind='edges'.")
        for name in (*self.nodes, *(end for edge in self.edges for end in edge)):
            self._check(name)

    def _check(self, name: str) -> None:
        node = node_named(name)
        head = node.head if isinstance(node, Receiver) else node
        if isinstance(head, Head):
            HeadSet([head], self.shape)
        elif isinstance(head, Mlp) and head.layer >= self.shape[0]:
            raise InputError(f"{name} is out of range: this model has layers 0-{self.shape[0] - 1}.")
        if self.kind == "heads" and not isinstance(node, Head):
            raise InputError(f"{name} is no head; a circuit of heads holds heads only, one of components MLPs too.")
        if self.kind == "components" and not isinstance(node, (Head, Mlp)):
            raise InputError(f"{name} is neither head nor MLP, which is what a circuit of components holds.")

    @classmethod
    def of_heads(cls, scores: HeadScores, heads: Iterable[Any] | int) -> Circuit:
        """The circuit of `heads`; an integer means that many heads with the scores of largest magnitude."""
        if isinstance(heads, int):
            order = np.argsort(-np.abs(scores.values), axis=None, kind="stable")[:heads]
            heads = [Head(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order]
        nodes = {str(head): scores[head] for head in HeadSet(heads, scores.shape)}
        return cls("heads", scores.shape, nodes, method=scores.name, meta=scores.meta)

    @classmethod
    def of_edges(
        cls, scores: EdgeScores, model: HeadModel, n: int, *, method: str = "", meta: Mapping[str, Any] | None = None
    ) -> Circuit:
        """The circuit of the `n` edges whose mean score has the largest magnitude."""
        magnitude = np.nan_to_num(np.abs(scores.mean), nan=-1.0)
        order = np.argsort(-magnitude, axis=None, kind="stable")[: min(n, int(scores.exists.sum()))]
        found = {}
        for s, r in zip(*np.unravel_index(order, magnitude.shape), strict=True):
            found[name_of(scores.senders[s]), name_of(scores.receivers[r])] = float(scores.mean[s, r])
        about = {**Provenance.of(model, method).to_json(), **(meta or {})}
        return cls("edges", model.shape, edges=found, method=method, meta=about)

    # Contents

    def __len__(self) -> int:
        """Number of edges, or of nodes."""
        return len(self.items)

    @property
    def items(self) -> dict[Any, float]:
        """The scored items: edges of an edge circuit, nodes of any other."""
        return self.edges if self.kind == "edges" else self.nodes  # type: ignore[return-value]

    @property
    def members(self) -> list[str]:
        """All its nodes in the order of the forward pass; a head's inputs count as the head."""
        names = {end.partition(".")[0] for edge in self.edges for end in edge} | set(self.nodes)
        return sorted(names, key=_place)

    @property
    def heads(self) -> HeadSet:
        """The heads among its nodes."""
        return HeadSet([name for name in self.members if name[0] == "L"], self.shape)

    @property
    def graph(self) -> list[Edge]:
        """Its edges as (sender, receiver) for `model.replay.edges`."""
        return [(node_named(s), node_named(r)) for s, r in self.edges]  # type: ignore[misc]

    def top(self, n: int) -> Circuit:
        """The `n` items with scores of the largest magnitude."""
        kept = dict(sorted(self.items.items(), key=lambda item: -abs(item[1]))[:n])
        return self.only(kept)

    def only(self, items: Iterable[Any]) -> Circuit:
        """The circuit with only these of its items."""
        wanted = set(items)
        kept = {item: score for item, score in self.items.items() if item in wanted}
        edges, nodes = (kept, {}) if self.kind == "edges" else ({}, kept)
        return Circuit(self.kind, self.shape, nodes, edges, self.method, self.meta)

    def connected(self) -> Circuit:
        """Without edges that lie on no path from the embedding to the logits."""
        kept = dict(self.edges)
        while True:
            fed = {"embedding"} | {r.partition(".")[0] for _, r in kept}
            read = {"logits"} | {s for s, _ in kept}
            left = {(s, r): v for (s, r), v in kept.items() if s in fed and r.partition(".")[0] in read}
            if len(left) == len(kept):
                return self.only(left)
            kept = left

    def to_frame(self) -> pd.DataFrame:
        """One row an item, largest magnitude first: `node`, or `sender` and `receiver`; `score`."""
        names = ["sender", "receiver"] if self.kind == "edges" else ["node"]
        rows = [(*(item if self.kind == "edges" else (item,)), score) for item, score in self.items.items()]
        frame = pd.DataFrame(rows, columns=[*names, "score"])
        return frame.sort_values("score", key=np.abs, ascending=False, kind="stable", ignore_index=True)

    # Files

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write it as JSON. `InputError` if `path` exists and `force` is not set."""
        about = asdict(self) | {"edges": [[*edge, score] for edge, score in self.edges.items()], "format": FORMAT}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        return write_atomically(path, lambda file: file.write_text(text + "\n", "utf-8"), force=force)

    @classmethod
    def load(cls, path: str | Path, *, fingerprint: str | None = None) -> Circuit:
        """Read what `save` wrote. With `fingerprint`, `MismatchError` for a circuit of another model."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"no circuit at {path}: there is no such file.")
        about = read_object(path)
        try:
            if about.pop("format") != FORMAT:
                raise ValueError("another format")
            about["edges"] = {(str(s), str(r)): check_number(score, "a score") for s, r, score in about["edges"]}
            about["nodes"] = {name: check_number(score, "a score") for name, score in about["nodes"].items()}
            n_layers, n_heads = (check_integer(size, "a size in its shape", 1) for size in about.pop("shape"))
            circuit = cls(shape=(n_layers, n_heads), **about)
            if not isinstance(circuit.meta, dict) or not isinstance(circuit.method, str):
                raise ValueError("another method or meta")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{path} is not a circuit; give a file that Circuit.save wrote.") from None
        found = circuit.meta.get("fingerprint")
        if fingerprint is not None and found != fingerprint:
            raise MismatchError(
                f"{path} holds a circuit of model {found}, not of this model, {fingerprint}; give its own model."
            )
        return circuit


def _place(name: str) -> tuple[int, int, int]:
    """Sort key of a node in the forward pass: layer, heads before the MLP, index."""
    if name in ("embedding", "logits"):
        return (-1, 0, 0) if name == "embedding" else (1 << 30, 0, 0)
    if name[0] == "M":
        return int(name[1:]), 1, 0
    head = Head.parse(name)
    return head.layer, 0, head.index
