"""From a prediction to advice (#111): who is at risk, why, and the smallest change that would lower it, in words that are
checked.

After Susnjak, arXiv:2208.14582. With the risk p(x) of any classifier of two classes and a threshold,

    reasons    the Shapley value of each column: p(x) - mean p is shared out over columns, by sampled orders and rows of the data
    changes    argmin over x' of  sum_j |x'_j - x_j| / MAD_j + .5 (columns changed)        p(x') <= threshold - margin,
               fixed columns stay, some only rise or only fall, all stay within the range of the data; up to three columns change
    words      a template; or a writer of your own, whose every number and column must be among the facts, else the template

MAD is the median absolute deviation (the standard deviation where that is 0). One and two columns are searched on a grid of the
data's quantiles, whole; a third is added to the best pairs; then each change is made as small as still suffices. The margin (.05)
keeps off the edge of models that jump.

A change lowers the *model's* risk. It moves the world only as far as the model is right about causes, and another model, as good,
may advise otherwise (`judge.tables.multiplicity`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed

GRID, BEAM, SHRINK = 17, 12, 12
ENTRY = 0.5  # what changing one more column costs, in MADs


@dataclass(frozen=True)
class Change:
    """One way out: new values by column, the risk then, and what it costs (formula above)."""

    to: Mapping[str, float]
    risk: float
    cost: float


@dataclass(frozen=True)
class Prescription:
    """One case: its risk, the threshold, the columns that matter most with their Shapley values, and the cheapest changes."""

    risk: float
    threshold: float
    values: Mapping[str, float]
    reasons: Mapping[str, float]
    changes: tuple[Change, ...]

    def text(self, writer: Callable[[str], str] | None = None) -> str:
        """What to say. A `writer` gets the facts as text and may word them; what it gets wrong is not said."""
        plain = self._template()
        if writer is None:
            return plain
        worded = writer(f"Word these facts for the person concerned. Use no other number and no other name.\n{plain}")
        return worded if not self.wrong_in(worded) else plain

    def wrong_in(self, text: str) -> list[str]:
        """The numbers in a text that are none of the facts, and columns that are named without being part of them."""
        facts = self._template()
        known = {float(one) for one in _numbers(facts)}
        wrong = [one for one in _numbers(text) if not any(abs(float(one) - fact) < 1e-9 for fact in known)]
        for name in self.values:
            named = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)
            if named and not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", facts):
                wrong.append(name)
        return wrong

    def _template(self) -> str:
        said = [f"The risk is {self.risk:.2f}; from {self.threshold:.2f} on it counts as high."]
        most = sorted(self.reasons.items(), key=lambda item: -abs(item[1]))[:3]
        said += [
            f"{name} ({self.values[name]:g}) {'adds' if value > 0 else 'takes'} {abs(value):.2f}."
            for name, value in most
        ]
        if self.risk < self.threshold:
            return " ".join([*said, "Nothing needs to change."])
        if not self.changes:
            return " ".join([*said, "No change of what may change would lower it enough."])
        for change in self.changes:
            moves = " and ".join(f"{name} from {self.values[name]:g} to {value:g}" for name, value in change.to.items())
            said.append(f"With {moves} it would be {change.risk:.2f}.")
        return " ".join(said)


@dataclass(frozen=True)
class Prescriber:
    """Advises on cases of a table. `risk` gives the probability of the bad class of rows `[N, D]`; `data` are rows it was
    fitted to.

    `fixed` columns stay; `up` only rise, `down` only fall. `InputError` for names that are no columns, or that are in two lists.
    """

    risk: Callable[[Float[np.ndarray, "N D"]], Float[np.ndarray, "N"]]
    data: Float[np.ndarray, "R D"]
    columns: tuple[str, ...]
    threshold: float = 0.5
    margin: float = 0.05
    fixed: tuple[str, ...] = ()
    up: tuple[str, ...] = ()
    down: tuple[str, ...] = ()
    digits: int = 3  # significant digits of a value that is advised

    def __post_init__(self) -> None:
        check_number(self.threshold, "threshold", 0.0, 1.0)
        check_number(self.margin, "margin", 0.0, 0.5)
        if len(self.columns) != self.data.shape[1] or len(self.data) < 20:
            raise InputError(
                f"the data have {self.data.shape[0]} rows and {self.data.shape[1]} columns; name each, give 20 rows."
            )
        given = [*self.fixed, *self.up, *self.down]
        for name in given:
            if name not in self.columns:
                raise InputError(f"there is no column {name!r}; there are {', '.join(self.columns)}.")
            if given.count(name) > 1:
                raise InputError(f"{name!r} is named twice among what is fixed, rises or falls.")

    def prescribe(
        self, row: Float[np.ndarray, "D"], *, changes: int = 3, orders: int = 100, seed: int = 0
    ) -> Prescription:
        """Advice on one row: at most `changes` ways out, each with other columns. Shapley values by `orders` sampled orders."""
        check_integer(changes, "changes", 1, 20)
        if row.shape != (len(self.columns),) or not np.isfinite(row).all():
            raise InputError(f"a case has {len(self.columns)} finite numbers.")
        p = float(self.risk(row[None])[0])
        found = self.changes(row, changes) if p >= self.threshold else ()
        return Prescription(
            p,
            self.threshold,
            dict(zip(self.columns, row.tolist(), strict=True)),
            self.shapley(row, orders, seed),
            found,
        )

    def shapley(self, row: Float[np.ndarray, "D"], orders: int = 100, seed: int = 0) -> dict[str, float]:
        """Shapley values: columns are taken over from a random other row one by one, in random orders; they sum to p - mean p."""
        draw = np.random.default_rng(check_seed(seed))
        d = len(row)
        others = self.data[draw.integers(len(self.data), size=orders)]
        ranks = np.argsort(draw.random((orders, d)), 1)
        steps = np.repeat(others[:, None], d + 1, 1)
        for k in range(d):
            steps[np.arange(orders), k + 1 :, ranks[:, k]] = row[ranks[:, k]][:, None]
        p = self.risk(steps.reshape(-1, d)).reshape(orders, d + 1)
        gains = np.zeros(d)
        np.add.at(gains, ranks, np.diff(p, axis=1))
        return dict(zip(self.columns, (gains / orders).tolist(), strict=True))

    def changes(self, row: Float[np.ndarray, "D"], most: int = 3) -> tuple[Change, ...]:
        """The cheapest changes that bring the risk to threshold - margin, each with other columns, the cheapest first."""
        grids = {j: self._values(row, j) for j in range(len(row)) if self.columns[j] not in self.fixed}
        free = [j for j, values in grids.items() if len(values)]
        found = dict(self._valid(row, self._tries(row, grids, ((j,) for j in free))))
        pairs = list(combinations(free, 2))
        tried = self._tries(row, grids, pairs)
        found |= {key: x for key, x in self._valid(row, tried) if key not in found}
        if len(found) < most and len(free) > 2 and len(tried):
            near = tried[np.argsort(self.risk(tried), kind="stable")[:BEAM]]
            triples = [self._tries(x, grids, ((j,) for j in free if x[j] == row[j])) for x in near]
            found |= {key: x for key, x in self._valid(row, np.concatenate(triples)) if key not in found}
        small = [self._smallest(row, x) for x in found.values()]
        ordered: list[Change] = []
        for x in sorted(small, key=lambda x: self._cost(row, x)):
            names = {self.columns[j] for j in np.flatnonzero(x != row)}
            if any(set(one.to) <= names for one in ordered):  # what is already enough without the rest
                continue
            to = {self.columns[j]: float(x[j]) for j in np.flatnonzero(x != row)}
            ordered.append(Change(to, float(self.risk(x[None])[0]), self._cost(row, x)))
        return tuple(ordered[:most])

    def _scale(self) -> Float[np.ndarray, "D"]:
        mad = np.median(np.abs(self.data - np.median(self.data, 0)), 0)
        return np.where(mad > 0, mad, np.where(self.data.std(0) > 0, self.data.std(0), 1.0))

    def _cost(self, row: Float[np.ndarray, "D"], x: Float[np.ndarray, "D"]) -> float:
        return float((np.abs(x - row) / self._scale()).sum() + ENTRY * (x != row).sum())

    def _values(self, row: Float[np.ndarray, "D"], j: int) -> Float[np.ndarray, "G"]:
        """Where a column may go, as it is said: quantiles, rounded, and inside the range."""
        own = self.data[:, j]
        values = np.unique([self._rounded(v, own) for v in np.quantile(own, np.linspace(0, 1, GRID))])
        values = values[(values >= own.min()) & (values <= own.max()) & (values != row[j])]
        if self.columns[j] in self.up:
            return values[values > row[j]]
        return values[values < row[j]] if self.columns[j] in self.down else values

    def _rounded(self, value: float, own: Float[np.ndarray, "R"]) -> float:
        whole = bool((own == np.round(own)).all())
        return float(np.round(value)) if whole else float(f"{value:.{self.digits}g}")

    @staticmethod
    def _tries(
        row: Float[np.ndarray, "D"], grids: Mapping[int, Float[np.ndarray, "G"]], sets: Any
    ) -> Float[np.ndarray, "T D"]:
        found = [np.zeros((0, len(row)))]
        for chosen in sets:
            values = np.stack([one.ravel() for one in np.meshgrid(*(grids[j] for j in chosen), indexing="ij")], 1)
            x = np.repeat(row[None], len(values), 0)
            x[:, list(chosen)] = values
            found.append(x)
        return np.concatenate(found)

    def _valid(
        self, row: Float[np.ndarray, "D"], tried: Float[np.ndarray, "T D"]
    ) -> Iterator[tuple[tuple[int, ...], Float[np.ndarray, "D"]]]:
        """The cheapest of those with little enough risk, for each set of columns."""
        if not len(tried):
            return
        good = tried[self.risk(tried) <= self.threshold - self.margin]
        cost = (np.abs(good - row) / self._scale()).sum(1)
        seen: set[tuple[int, ...]] = set()
        for i in np.argsort(cost, kind="stable"):
            key = tuple(np.flatnonzero(good[i] != row).tolist())
            if key not in seen:
                seen.add(key)
                yield key, good[i]

    def _smallest(self, row: Float[np.ndarray, "D"], x: Float[np.ndarray, "D"]) -> Float[np.ndarray, "D"]:
        """Each change halved towards the old value as long as the risk stays low enough."""
        for j in np.flatnonzero(x != row):
            near, far = row[j], x[j]
            for _ in range(SHRINK):
                middle = self._rounded((near + far) / 2, self.data[:, j])
                if middle in (near, far):
                    break
                tried = x.copy()
                tried[j] = middle
                inside = self.data[:, j].min() <= middle <= self.data[:, j].max()
                if inside and self.risk(tried[None])[0] <= self.threshold - self.margin:
                    far = middle
                else:
                    near = middle
            x = x.copy()
            x[j] = far
        return x


@dataclass(frozen=True)
class CrossAdvisors:
    """Advice on the very rows that models are fitted to: each is advised by a model that did not see it.

    `risk` `[N]` are those held-out probabilities; `advisors` has one a fold, and `fold` `[N]` says which is a row's.
    """

    risk: Float[np.ndarray, "N"]
    advisors: tuple[Prescriber, ...]
    fold: Int[np.ndarray, "N"]

    def of(self, row: int) -> Prescriber:
        """The advisor of a row of the table that was fitted."""
        return self.advisors[self.fold[row]]


def cross_advisors(
    x: Float[np.ndarray, "N D"],
    bad: Bool[np.ndarray, "N"],
    columns: Sequence[str],
    *,
    folds: int = 5,
    seed: int = 0,
    fixed: tuple[str, ...] = (),
    up: tuple[str, ...] = (),
    down: tuple[str, ...] = (),
) -> CrossAdvisors:
    """Boosted trees (7 leaves, rate .05) on all folds but one, in turn; the threshold is tuned on the held-out rows of all.

    `fixed`, `up` and `down` are as in `Prescriber`. `InputError` for fewer than 2 `folds` rows of either class.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold

    check_integer(folds, "folds", 2, 100)
    if min(bad.sum(), (~bad).sum()) < 2 * folds:
        raise InputError(f"there are fewer than {2 * folds} rows of one class; that is too few to learn from.")
    risk, fold = np.zeros(len(bad)), np.zeros(len(bad), dtype=int)
    fitted = []
    for k, (train, test) in enumerate(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, bad)):
        model = HistGradientBoostingClassifier(max_leaf_nodes=7, learning_rate=0.05, random_state=seed)
        fitted.append((model.fit(x[train], bad[train]), train))
        risk[test], fold[test] = model.predict_proba(x[test])[:, 1], k
    threshold = tuned_threshold(risk, bad)
    advisors = [
        Prescriber(partial(_risk, model), x[train], tuple(columns), threshold, fixed=fixed, up=up, down=down)
        for model, train in fitted
    ]
    return CrossAdvisors(risk, tuple(advisors), fold)


def _risk(model: Any, x: Float[np.ndarray, "N D"]) -> Float[np.ndarray, "N"]:
    return model.predict_proba(x)[:, 1]


def tuned_threshold(p: Float[np.ndarray, "N"], bad: Sequence[bool] | np.ndarray) -> float:
    """The threshold with the most (share of the bad that is found - share of the good that is called bad), on held-out rows."""
    bad = np.asarray(bad, dtype=bool)
    if bad.all() or not bad.any():
        raise InputError("a threshold needs rows of both classes.")
    levels = np.unique(p)
    above = (p[None] >= levels[:, None]).astype(float)
    found, false = above[:, bad].mean(1), above[:, ~bad].mean(1)
    best = int(np.argmax(found - false))
    return float(levels[best] if best == 0 else (levels[best] + levels[best - 1]) / 2)


def _numbers(text: str) -> list[str]:
    return re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?", text)
