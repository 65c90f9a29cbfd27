"""Classes nobody has shown an example of (#99): a head whose rows for unseen classes come from a graph of classes.

After the survey arXiv:2112.10006; the propagation way of Wang, Ye and Gupta (arXiv:1803.08035) in its shallow form (Kampffmeyer
et al., arXiv:1805.11724). A linear head on features x `[D]` has a row W_c for each seen class c, of unit length. With the
vectors V `[C, E]` of all classes, and the graph's weights A^ = (A + I) with rows that sum to one,

    GCN        W~ = A^ relu(A^ V U1) U2,  learned so that |W~_c - W_c|^2 is least over the seen classes
    mapping    W~ = V U, the same without a graph: ridge regression                                     the baseline
    head       logits x . W~_c / |W~_c|;  seen classes keep their own rows, less `calibration`, which holds their bias back

How hard weights are pulled to 0 (AdamW's decay, the ridge) is chosen by a fifth of the seen classes that are left out: with few
classes a graph network remembers each and says nothing of others.

    few examples   W_c = the unit of  (n m_c + prior W~_c) / (n + prior)     m_c the direction to the mean of the n examples of c

**Zero-shot** accuracy chooses among unseen classes only. **Generalised** accuracy chooses among all; its figure is the harmonic
mean of the accuracies on rows of seen and of unseen classes, since either alone is won by never (or always) naming a seen class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.training import ADAM, fit

Way = Literal["gcn", "mapping"]
WAYS: tuple[Way, ...] = ("gcn", "mapping")
STRENGTHS = (0.1, 1.0, 3.0, 10.0, 30.0)


@dataclass(frozen=True)
class ZeroShotHead:
    """Rows `[C, D]` of unit length for all nodes, which of them are `classes`, and which of these were `seen`."""

    rows: Float[np.ndarray, "C D"]
    seen: Int[np.ndarray, "S"]
    classes: Int[np.ndarray, "K"]
    centre: Float[np.ndarray, "D"]
    calibration: float = 0.0

    def scores(self, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N C"]:
        """Cosines of features, less their training mean, with each row; those of seen classes less `calibration`."""
        centred = x - self.centre
        found = centred @ self.rows.T / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        found[:, self.seen] -= self.calibration
        return found

    def predict(self, x: Float[np.ndarray, "N D"], among: Sequence[int] | None = None) -> Int[np.ndarray, "N"]:
        """The class of each row, among some classes or all."""
        chosen = self.classes if among is None else np.asarray(among)
        return chosen[self.scores(x)[:, chosen].argmax(1)]

    def with_examples(self, x: Float[np.ndarray, "N D"], y: Int[np.ndarray, "N"], prior: float = 1.0) -> ZeroShotHead:
        """The head after a few examples of unseen classes; what the graph says counts as `prior` examples (formula above)."""
        check_number(prior, "prior", 0.0, 1e6)
        rows = self.rows.copy()
        for c in np.unique(y):
            if c in self.seen or c not in self.classes:
                raise InputError(f"{c} is no unseen class; examples are for these.")
            own = x[y == c].mean(0) - self.centre
            own = own / max(float(np.linalg.norm(own)), 1e-12)
            rows[c] = _unit((y == c).sum() * own[None] + prior * self.rows[[c]])[0]
        return replace(self, rows=rows)

    def judged(self, x: Float[np.ndarray, "N D"], y: Int[np.ndarray, "N"]) -> dict[str, float]:
        """Accuracies on rows of both kinds: zero-shot, seen and unseen among all classes, and their harmonic mean."""
        old = np.isin(y, self.seen)
        if old.all() or not old.any():
            raise InputError("judging needs rows of seen and of unseen classes.")
        unseen = np.setdiff1d(self.classes, self.seen)
        named = self.predict(x) == y
        a, b = float(named[old].mean()), float(named[~old].mean())
        zero = float((self.predict(x[~old], unseen.tolist()) == y[~old]).mean())
        return {"zero-shot": zero, "seen": a, "unseen": b, "harmonic": 2 * a * b / (a + b) if a + b else 0.0}


def zero_shot_head(
    x: Float[np.ndarray, "N D"],
    y: Int[np.ndarray, "N"],
    vectors: Float[np.ndarray, "C E"],
    edges: Sequence[tuple[int, int]] = (),
    *,
    classes: Sequence[int] | None = None,
    way: Way = "gcn",
    width: int = 64,
    length: int = 400,
    calibration: float = 0.0,
    seed: int = 0,
) -> ZeroShotHead:
    """Learn rows of all C nodes from features of some of them. `edges` are pairs of nodes, of either direction. Only
    `classes` are ever named (None: every node); the others, such as the inner nodes of a tree, only carry what is near to what.

    A row of a seen class is the direction from the mean of all features to the mean of its own. `InputError` for classes that are
    no node, fewer than two seen, edges that lead nowhere, or a graph that is missing.
    """
    check_choice(way, "way", WAYS)
    check_integer(width, "width", 1, 4096)
    check_integer(length, "length", 1, 100_000)
    check_number(calibration, "calibration", 0.0, 2.0)
    nodes = len(vectors)
    seen = np.unique(y)
    if len(seen) < 2 or seen[0] < 0 or seen[-1] >= nodes:
        raise InputError(f"the classes are numbers of the {nodes} nodes, two at least; there are {len(seen)}.")
    if any(not 0 <= node < nodes for edge in edges for node in edge):
        raise InputError(f"an edge leads to no node; nodes are 0 to {nodes - 1}.")
    if way == "gcn" and not len(edges):
        raise InputError("a graph has edges; without any, use way='mapping'.")
    named = np.arange(nodes) if classes is None else np.unique(np.asarray(classes, dtype=int))
    if not np.isin(seen, named).all() or named[0] < 0 or named[-1] >= nodes:
        raise InputError("`classes` are numbers of nodes, and those of `y` are among them.")
    centre = x.mean(0)
    own = _unit(np.stack([x[y == c].mean(0) - centre for c in seen]))

    def learned(which: Int[np.ndarray, "K"], strength: float) -> Float[np.ndarray, "C D"]:
        """Unit rows of all nodes from some of the seen ones (their places among these), pulled to 0 by `strength`."""
        if way == "mapping":
            return _unit(_mapped(vectors, own[which], seen[which], strength))
        return _unit(_propagated(vectors, own[which], seen[which], edges, width, length, strength, seed))

    rows = learned(np.arange(len(seen)), _strength(learned, own, seen, seed))
    rows[seen] = own
    return ZeroShotHead(rows, seen, named, centre, calibration)


def _unit(rows: Float[np.ndarray, "C D"]) -> Float[np.ndarray, "C D"]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _strength(
    learned: Callable[[Int[np.ndarray, "K"], float], Float[np.ndarray, "C D"]],
    own: Float[np.ndarray, "S D"],
    seen: Int[np.ndarray, "S"],
    seed: int,
) -> float:
    """By which weights are pulled to 0: that with which a fifth of the seen classes, left out, get rows nearest to their own."""
    if len(seen) < 10:
        return STRENGTHS[1]
    order = np.random.default_rng(seed).permutation(len(seen))
    out, kept = order[: len(seen) // 5], order[len(seen) // 5 :]
    near = [float((learned(kept, one)[seen[out]] * own[out]).sum(1).mean()) for one in STRENGTHS]
    return STRENGTHS[int(np.argmax(near))]


def _mapped(
    vectors: Float[np.ndarray, "C E"], own: Float[np.ndarray, "S D"], seen: Int[np.ndarray, "S"], strength: float
) -> Float[np.ndarray, "C D"]:
    v = np.column_stack([vectors, np.ones(len(vectors))])
    gram = v[seen].T @ v[seen] + 0.01 * strength * len(seen) * np.eye(v.shape[1])
    return v @ np.linalg.solve(gram, v[seen].T @ own)


class _Propagation(nn.Module):
    def __init__(
        self, spread: Float[Tensor, "C C"], vectors: Float[Tensor, "C E"], width: int, out: int, seed: int
    ) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        e = vectors.shape[1]
        self.spread, self.vectors = spread, vectors
        self.first = nn.Parameter(torch.randn(e, width, generator=draw) / e**0.5)
        self.second = nn.Parameter(torch.randn(width, out, generator=draw) / width**0.5)

    def forward(self) -> Float[Tensor, "C D"]:
        return self.spread @ torch.relu(self.spread @ self.vectors @ self.first) @ self.second


def _propagated(
    vectors: Float[np.ndarray, "C E"],
    own: Float[np.ndarray, "S D"],
    seen: Int[np.ndarray, "S"],
    edges: Sequence[tuple[int, int]],
    width: int,
    length: int,
    strength: float,
    seed: int,
) -> Float[np.ndarray, "C D"]:
    spread = np.eye(len(vectors))
    for a, b in edges:
        spread[a, b] = spread[b, a] = 1.0
    spread /= spread.sum(1, keepdims=True)
    as_tensor = [torch.from_numpy(one).float() for one in (spread, vectors, own)]
    model = _Propagation(as_tensor[0], as_tensor[1], width, own.shape[1], seed)
    target, which = as_tensor[2], torch.from_numpy(seen)

    def loss(module: nn.Module, batch: int) -> Float[Tensor, ""]:
        return (module()[which] - target).square().sum(1).mean()

    fit(
        model,
        lambda i: i,
        replace(ADAM, optimizer="adamw", steps=length, rate=0.01, weight_decay=strength, seed=seed),
        loss=loss,
        device="cpu",
    )
    with torch.no_grad():
        return model().numpy().astype(np.float64)
