"""LiMA (#93): the few regions of an input that carry the answer, ranked with forward passes only.

Chen et al., arXiv:2504.00470. For a subset S of the regions V, class c of C and f_i the features of region i alone,

    consistency    p_c(x(S))                                                              in [0, 1]
    collaboration  1 - p_c(x(V - S))                                                      in [0, 1]
    confidence     1 - entropy(p(x(S))) / log C                                           in [0, 1]
    effectiveness  sum_{i in S} min_{j in S, j != i} arccos(cos(f_i, f_j)) / pi           in [0, |S|], 0 where |S| = 1
    F(S)           20 consistency + 5 collaboration + 0.05 confidence + 0.01 effectiveness

(weights 20, 5, 0.01, 0 without features). Naive greedy search adds argmax_r F(A + {r}) to the ranking A, m times, with two
forward passes a candidate: m (m + 1). The bidirectional search fills A from the front and Z from the back. From the remaining
regions R it adds the argmax r* to A. If |R| > q it then takes the q regions with the lowest score (with the
effectiveness of Z + {r}), without r*, scores F(Z + {r}) for these, and adds the argmin to Z. The last region needs no score. The
ranking is A, then Z reversed:

    forward passes = sum over steps of 2 |R| + 2 (q, or q - 1 where r* is among them)     1,666 at m = 50, q = 8 (naive 2,550)

p_c(x(Z)) is a point of the deletion curve and p_c(x(V - Z)) one of the insertion curve: so the search gives both curves without
further passes. F is not provably submodular for a network, so there is no greedy guarantee. At the first step A and Z are both
empty and Z's q candidates are evaluated twice; we keep this, so that our count of passes is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.report import Reported
from manyheads.trace.regions.cutting import Regions
from manyheads.trace.regions.insertion import Curves, Game, Probabilities, areas, importance

Search = Literal["bidirectional", "naive"]
TERMS = ("consistency", "collaboration", "confidence", "effectiveness")
PAPER = "arXiv:2504.00470"


@dataclass(frozen=True)
class Weights:
    """The weights of F's terms, in the order of `TERMS`. (The released command line has another order.)"""

    consistency: float = 20.0
    collaboration: float = 5.0
    confidence: float = 0.01
    effectiveness: float = 0.0

    @property
    def vector(self) -> Float[np.ndarray, "4"]:
        """The four weights in the order of `TERMS`."""
        return np.array([getattr(self, name) for name in TERMS])


WITH_FEATURES = Weights(confidence=0.05, effectiveness=0.01)


@dataclass(frozen=True)
class Step:
    """One region placed at the front or the back of the ranking, with F and its terms of that end, the region included."""

    region: int
    front: bool
    terms: Float[np.ndarray, "4"]
    score: float


@dataclass(frozen=True, eq=False)
class Ranking(Reported):
    """A ranking of an input's regions, best first, and the record of the search.

    `curves` are p_c with the ranking's prefixes shown and hidden. `passes` counts the search's forward passes, `extra` all others
    (the empty and the whole input, and each region's features). `predicted` is the whole input's class; `labels` are the names of
    target and prediction.
    """

    order: tuple[int, ...]
    steps: tuple[Step, ...]
    curves: Curves
    passes: int
    extra: int
    target: int
    predicted: int
    labels: tuple[str, str]
    regions: Regions
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def empty(self) -> float:
        """p_c with every region hidden; it need not be small, since the replacement is a signal too."""
        return float(self.curves.insertion[0])

    @property
    def full(self) -> float:
        """p_c of the whole input."""
        return float(self.curves.insertion[-1])

    @property
    def values(self) -> Float[np.ndarray, "m"]:
        """The ranking as values: 1 for the first region, 1 / m for the last."""
        return importance(self.order)

    def to_frame(self) -> pd.DataFrame:
        """One row a region, best first: its name and share, the end it was placed at, F and its terms there.

        `p_shown` and `p_hidden` are p_c with all regions up to this one shown, or hidden. The last remaining region has no F.
        """
        steps = {step.region: step for step in self.steps}
        names = self.regions.names
        rows = []
        for rank, region in enumerate(self.order):
            step = steps.get(region)
            terms = step.terms if step else np.full(len(TERMS), np.nan)
            rows.append(
                {
                    "rank": rank,
                    "region": region,
                    "name": names[region],
                    "share": float(self.regions.sizes[region]),
                    "end": "left over" if step is None else "front" if step.front else "back",
                    "F": step.score if step else np.nan,
                    **dict(zip(TERMS, map(float, terms), strict=True)),
                    "p_shown": float(self.curves.insertion[rank + 1]),
                    "p_hidden": float(self.curves.deletion[rank + 1]),
                }
            )
        return pd.DataFrame(rows)


class SetFunction:
    """F of subsets. `distances` are the angles between the regions' features over pi; without them effectiveness is 0."""

    def __init__(self, game: Game, weights: Weights, distances: Float[np.ndarray, "m m"] | None = None) -> None:
        self.game, self.weights, self.distances = game, weights, distances

    def terms(self, subsets: Bool[np.ndarray, "N m"]) -> Float[np.ndarray, "N 4"]:
        """All four terms, in 2 N forward passes."""
        p = self.game.classes(subsets)
        entropy = -(p * np.log(p.clip(1e-12))).sum(1)
        columns = (
            p[:, self.game.target],
            1 - self.game(~subsets),
            1 - entropy / np.log(p.shape[1]),
            self.effectiveness(subsets),
        )
        return np.stack(columns, 1)

    def effectiveness(self, subsets: Bool[np.ndarray, "N m"]) -> Float[np.ndarray, "N"]:
        """The sum over a subset of each region's distance to the nearest other one."""
        if self.distances is None:
            return np.zeros(len(subsets))
        apart = self.distances + np.diag(np.full(len(self.distances), np.inf))
        nearest = np.where(subsets[:, None, :], apart, np.inf).min(-1)
        return np.asarray(np.where(subsets & np.isfinite(nearest), nearest, 0.0).sum(1))

    def score(self, terms: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N"]:
        """F from its terms: their weighted sum."""
        return np.asarray(terms @ self.weights.vector)


def rank_regions(
    regions: Regions,
    probabilities: Probabilities,
    *,
    target: int | None = None,
    search: Search = "bidirectional",
    q: int = 8,
    weights: Weights | None = None,
    features: Callable[[Any], Tensor] | None = None,
    rows: int = 64,
    bar: Bar = Bar(),
) -> Ranking:
    """Rank `regions` by how much they make a black box predict `target` (default: its prediction for the whole input).

    `probabilities(batch)` returns `[N, C]` for the output of `regions.reveal`: a `Classifier` of a HeadModel, or any function;
    `features(batch)`, `[N, D]`, adds the effectiveness term. For a wrong prediction give the right class as `target` and read
    `curves.highest()`. `rows` subsets go into one forward pass; `bar` counts placed regions. `InputError` for effectiveness
    without features, q < 1, or a black box that returns no probabilities.
    """
    if search not in ("bidirectional", "naive") or q < 1:
        raise InputError(f'search is {search!r} and q {q}; give "bidirectional" or "naive", and q of at least 1.')
    weights = weights or (Weights() if features is None else WITH_FEATURES)
    if weights.effectiveness and features is None:
        raise InputError("effectiveness compares features; give features=, or weights without it.")
    game = Game(regions, probabilities, target, rows=rows)
    distances = None if features is None else _angles(regions, features, rows)
    before = game.passes
    function = SetFunction(game, weights, distances)
    order, steps = _search(function, q if search == "bidirectional" else None, bar)
    settings: dict[str, Any] = {
        "search": search,
        "q": q,
        "weights": dict(zip(TERMS, weights.vector.tolist(), strict=True)),
    }
    meta = Provenance.of(getattr(probabilities, "model", None), "LiMA", PAPER, **settings).to_json()
    extra = before + (0 if features is None else regions.m)
    passes = game.passes - before
    name = getattr(probabilities, "name", str)
    return Ranking(
        order=tuple(order),
        steps=tuple(steps),
        curves=_recorded(game, order, steps),
        passes=passes,
        extra=extra,
        target=game.target,
        predicted=game.predicted,
        labels=(name(game.target), name(game.predicted)),
        regions=regions,
        meta=meta,
    )


def _search(function: SetFunction, q: int | None, bar: Bar) -> tuple[list[int], list[Step]]:
    """The greedy search from both ends; from the front alone, to the last region, if `q` is None."""
    front: list[int] = []
    back: list[int] = []
    left = list(range(function.game.m))
    steps: list[Step] = []
    while left:
        # Only one place remains between front and back: no score could change it.
        if len(left) == 1 and q is not None:
            front += left
            bar(1)
            break
        subsets = _with_each(front, left, function.game.m)
        terms = function.terms(subsets)
        scores = function.score(terms)
        best = int(scores.argmax())
        steps.append(Step(left[best], True, terms[best], float(scores[best])))
        front.append(left[best])
        placed = {left[best]}
        if q is not None and len(left) > q:
            worse = _with_each(back, left, function.game.m)
            # The front's terms are at hand, so guessing the back's candidates from them costs no pass: a region that adds little
            # to the front likely belongs at the back. Effectiveness needs no pass either, so it is that of the back.
            guess = function.score(np.column_stack([terms[:, :3], function.effectiveness(worse)]))
            pending = [i for i in np.argsort(guess, kind="stable")[:q] if i != best]
            if pending:
                terms = function.terms(worse[pending])
                scores = function.score(terms)
                worst = int(scores.argmin())
                region = left[pending[worst]]
                steps.append(Step(region, False, terms[worst], float(scores[worst])))
                back.append(region)
                placed.add(region)
        left = [region for region in left if region not in placed]
        bar(len(placed))
    return front + back[::-1], steps


def _with_each(chosen: Sequence[int], left: Sequence[int], m: int) -> Bool[np.ndarray, "N m"]:
    """One subset for each remaining region: `chosen` and this region."""
    subsets = np.zeros((len(left), m), bool)
    subsets[:, list(chosen)] = True
    subsets[np.arange(len(left)), list(left)] = True
    return subsets


def _recorded(game: Game, order: Sequence[int], steps: Sequence[Step]) -> Curves:
    """Both curves of the ranking, from the terms of its prefixes (front) and suffixes (back) in the search."""
    shown, hidden = np.full(game.m + 1, np.nan), np.full(game.m + 1, np.nan)
    shown[[0, -1]], hidden[[0, -1]] = (game.empty, game.full), (game.full, game.empty)
    first, last = 0, game.m
    for step in steps:
        consistency, collaboration = step.terms[:2]
        if step.front:
            first += 1
            shown[first], hidden[first] = consistency, 1 - collaboration
        else:
            # A suffix shown is a prefix hidden: consistency and collaboration change places.
            last -= 1
            shown[last], hidden[last] = 1 - collaboration, consistency
    return Curves(shown, hidden, areas(game.regions, order))


def _angles(regions: Regions, features: Callable[[Any], Tensor], rows: int) -> Float[np.ndarray, "m m"]:
    alone = torch.eye(regions.m, dtype=torch.bool)
    with torch.no_grad():
        found = torch.cat([features(regions.reveal(part)).detach().double().cpu() for part in alone.split(rows)])
    if found.ndim != 2 or len(found) != regions.m:
        raise InputError(f"got features {list(found.shape)} for {regions.m} regions; return [N, D], one row a region.")
    unit = torch.nn.functional.normalize(found, dim=-1)
    return np.asarray(((unit @ unit.T).clamp(-1, 1).arccos() / np.pi).numpy())
