"""Insertion, deletion and MuFidelity (#93, LiMA): scores of a ranking of an input's regions, and baseline rankings.

Petsiuk et al., arXiv:1806.07421; Bhatt et al., arXiv:2005.00631. With S_k the first k regions of a ranking, a_k their share of
the input and p_c the probability of class c,

    insertion  = area under p_c(x(S_k))     over a_k        in [0, 1], higher is better
    deletion   = area under p_c(x(V - S_k)) over a_k        in [0, 1], lower is better
    highest    = max over k of p_c(x(S_k))                  in [0, 1], for the right class of a wrong prediction
    MuFidelity = Spearman over random sets T of cells of a grid: sum of T's attributions, p_c(x(V)) - p_c(x(V - T))   in [-1, 1]

Both areas run from the empty to the whole input. LiMA's greedy search optimises insertion, but not MuFidelity: this uses cells of
a grid independent of the regions, and values instead of prefixes. A ranking's values are m, m - 1, ..., 1 over m, as in the
released code.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.evaluation.metrics import rank_correlation
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Keep
from manyheads.report.numbers import visible
from manyheads.trace.regions.cutting import Regions

Probabilities = Callable[[Any], Tensor]
Order = Sequence[int]


class Game:
    """Class probabilities of a black box for subsets of an input's regions, at most `rows` subsets a forward pass.

    `probabilities(batch)` gets the output of `regions.reveal` and returns `[N, C]`. The default `target` is the whole input's
    class. `passes` counts every evaluated subset, including the empty and the whole one, which are evaluated at the start.
    """

    def __init__(
        self, regions: Regions, probabilities: Probabilities, target: int | None = None, *, rows: int = 64
    ) -> None:
        if rows < 1:
            raise InputError(f"got rows={rows}; give at least 1 row a forward pass.")
        self.regions, self.probabilities, self.rows, self.passes = regions, probabilities, rows, 0
        ends = self.classes(np.stack([np.zeros(self.m, bool), np.ones(self.m, bool)]))
        self.n_classes = ends.shape[1]
        self.target = int(ends[1].argmax()) if target is None else target
        if not 0 <= self.target < self.n_classes:
            raise InputError(f"got target {target}; give one of classes 0 to {self.n_classes - 1}.")
        self.empty, self.full = float(ends[0, self.target]), float(ends[1, self.target])
        self.predicted = int(ends[1].argmax())

    @property
    def m(self) -> int:
        """Number of regions."""
        return self.regions.m

    def __call__(self, subsets: Bool[np.ndarray, "N m"]) -> Float[np.ndarray, "N"]:
        """p_c of each subset."""
        return np.asarray(self.classes(subsets)[:, self.target])

    def classes(self, subsets: Bool[np.ndarray, "N m"]) -> Float[np.ndarray, "N C"]:
        """The probabilities of all classes for each subset. `InputError` if the black box returns no distribution."""
        if not len(subsets):
            return np.zeros((0, self.n_classes))
        parts = [self._forward(subsets[start : start + self.rows]) for start in range(0, len(subsets), self.rows)]
        self.passes += len(subsets)
        return np.concatenate(parts)

    def _forward(self, subsets: Bool[np.ndarray, "N m"]) -> Float[np.ndarray, "N C"]:
        with torch.no_grad():
            output = self.probabilities(self.regions.reveal(torch.from_numpy(subsets)))
        p = output.detach().double().cpu().numpy()
        if p.ndim != 2 or len(p) != len(subsets) or p.shape[1] < 2:
            raise InputError(
                f"got {list(p.shape)} of the black box for {len(subsets)} rows; return probabilities [N, C] of 2 classes or more."
            )
        if not (p > -1e-4).all() or not np.allclose(p.sum(1), 1, atol=1e-2):
            raise InputError("the black box returned no probabilities that sum to 1; take the softmax of its logits.")
        return p


@dataclass(frozen=True)
class Curves:
    """p_c with a ranking's first k regions shown (`insertion[k]`) or hidden (`deletion[k]`), k = 0..m; `area[k]`: their share."""

    insertion: Float[np.ndarray, "K"]
    deletion: Float[np.ndarray, "K"]
    area: Float[np.ndarray, "K"]

    @property
    def insertion_score(self) -> float:
        """Area under the insertion curve."""
        return float(np.trapezoid(self.insertion, self.area))

    @property
    def deletion_score(self) -> float:
        """Area under the deletion curve."""
        return float(np.trapezoid(self.deletion, self.area))

    def highest(self, within: float = 1.0) -> tuple[float, float]:
        """The highest p_c over prefixes of at least one region and at most the share `within`, and that prefix's share."""
        allowed = np.flatnonzero(self.area[1:] <= within + 1e-9) + 1
        if not len(allowed):
            raise InputError(
                f"the first region alone shows {self.area[1]:.2f} of the input, more than within={within}; give a larger share."
            )
        best = allowed[self.insertion[allowed].argmax()]
        return float(self.insertion[best]), float(self.area[best])


def curves(game: Game, order: Order) -> Curves:
    """Both curves of a ranking, best region first, in 2 (m - 1) forward passes."""
    order = check_order(order, game.m)
    prefixes = np.tri(game.m, dtype=bool)[:-1]  # by rank
    subsets = np.zeros_like(prefixes)
    subsets[:, order] = prefixes
    shown, left = game(subsets), game(~subsets)
    return Curves(
        np.array([game.empty, *shown, game.full]), np.array([game.full, *left, game.empty]), areas(game.regions, order)
    )


def areas(regions: Regions, order: Order) -> Float[np.ndarray, "{len(order)}+1"]:
    """The share of the input shown by each prefix of the ranking."""
    return np.concatenate([[0.0], regions.sizes[list(order)].cumsum()])


def importance(order: Order) -> Float[np.ndarray, "m"]:
    """A ranking as values: 1 for the first region, 1 / m for the last."""
    values = np.empty(len(order))
    values[list(order)] = np.arange(len(order), 0, -1) / len(order)
    return values


def mufidelity(
    game: Game, values: Float[np.ndarray, "m"], *, grid: int = 7, samples: int = 200, share: float = 0.2, seed: int = 0
) -> float:
    """MuFidelity of each region's attribution (formula above), over `samples` sets with `share` of the cells.

    A unit has its region's value, a cell the sum over its units. NaN if there is nothing to correlate: hiding changes nothing, or
    all values are equal. `InputError` unless there is one value a region.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.shape != (game.m,) or not 0 < share < 1 or samples < 3:
        raise InputError(
            f"MuFidelity needs a value for each of {game.m} regions, 0 < share < 1 and 3 samples or more; "
            f"got {list(values.shape)}, {share} and {samples}."
        )
    cells = Game(game.regions.gridded(grid), game.probabilities, game.target, rows=game.rows)
    rng, size = np.random.default_rng(seed), max(1, round(share * cells.m))
    hidden = rng.permuted(np.tile(np.arange(cells.m) < size, (samples, 1)), axis=1)
    attribution = hidden @ (game.regions.overlap(cells.regions) @ values)
    drop = cells.full - cells(~hidden)
    game.passes += cells.passes
    return rank_correlation(attribution.round(12), drop.round(12))


def single_regions(game: Game) -> list[int]:
    """The ranking by p_c(x({r})) of each region alone: m forward passes."""
    return np.argsort(-game(np.eye(game.m, dtype=bool)), kind="stable").tolist()


def leave_one_out(game: Game) -> list[int]:
    """The ranking by the loss without each region, p_c(x(V)) - p_c(x(V - {r})): m forward passes."""
    return np.argsort(game(~np.eye(game.m, dtype=bool)), kind="stable").tolist()


def random_orders(m: int, n: int, seed: int = 0) -> Int[np.ndarray, "n m"]:
    """`n` random rankings: a baseline."""
    return np.random.default_rng(seed).permuted(np.tile(np.arange(m), (n, 1)), axis=1)


def check_order(order: Order, m: int) -> list[int]:
    """The ranking as a list. `InputError` unless it holds each of the `m` regions once."""
    order = [int(i) for i in order]
    if sorted(order) != list(range(m)):
        raise InputError(f"got a ranking of {len(order)} entries, {order[:12]}; give each of {m} regions once.")
    return order


@dataclass(frozen=True)
class Classifier:
    """A HeadModel as a black box: an image classifier, or a language model whose classes are possible answer tokens.

    `answers` are the ids of these tokens (default: the whole vocabulary). The softmax is over them alone, at position `position`.
    Active edits apply. `features` are the last residual stream, averaged over positions.
    """

    model: HeadModel
    answers: Sequence[int] | None = None
    position: int = -1

    def __call__(self, batch: Tensor | dict[str, Tensor]) -> Float[Tensor, "N C"]:
        """Class probabilities of a batch from `Regions.reveal`."""
        logits = self.model.read(self._inputs(batch), keep=1 if self.position == -1 else None)
        if logits.ndim == 3:
            logits = logits[:, self.position]
        if self.answers is not None:
            logits = logits[:, list(self.answers)]
        return logits.float().softmax(-1)

    def features(self, batch: Tensor | dict[str, Tensor]) -> Float[Tensor, "N D"]:
        """The mean last residual stream of each input, for the effectiveness term."""
        keep = Keep("resid", layers=[self.model.n_layers])
        self.model.look(self._inputs(batch), keep)
        return keep.values[self.model.n_layers].float().mean(1)

    def name(self, target: int) -> str:
        """The name of a class: its token, or its label in the config."""
        token = target if self.answers is None else self.answers[target]
        if self.model.tokenizer is not None:
            return visible(self.model.tokenizer.decode([token]).strip())
        return str((getattr(self.model.config, "id2label", None) or {}).get(token, token))

    def _inputs(self, batch: Tensor | dict[str, Tensor]) -> dict[str, Tensor]:
        if isinstance(batch, Tensor):
            name = self.model.plain.main_input_name
            return {name: batch.to(next(self.model.plain.parameters()).dtype) if batch.is_floating_point() else batch}
        takes = inspect.signature(self.model.plain.forward).parameters
        return {name: value for name, value in batch.items() if name != "position_ids" or name in takes}
