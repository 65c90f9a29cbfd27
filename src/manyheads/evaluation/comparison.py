"""Comparisons: several methods on the same data with the same seeds, each beside a baseline.

With v[m, d, s] the value of a metric of method m on data set d with seed s, and b the baseline, over all P pairs (d, s),

    mean(m)        mean of v[m, d, s]
    difference(m)  mean of v[m, d, s] - v[b, d, s]
    stderr         standard deviation over the pairs / sqrt(P), of the values or of their differences

What makes one data set or seed harder than another is the same for both methods and cancels in the difference, so judge by
the standard error of the difference. It is about these data sets: other seeds of one are not other data. Values that are NaN do
not count, nor do their pairs; a difference has no standard error from a single pair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import pandas as pd

from manyheads.errors import InputError
from manyheads.heads import mean_stderr
from manyheads.progress import Bar

Data = TypeVar("Data")
COLUMNS = ["method", "dataset", "seed", "metric", "value"]
CELL = ["metric", "dataset", "seed"]


@dataclass(frozen=True)
class Comparison:
    """Values of methods beside a baseline: `table` has a row a value, with method, dataset, seed, metric and value.

    `InputError` for a table without the baseline, with a value twice, or where a method was not measured on what others were.
    """

    table: pd.DataFrame
    baseline: str

    def __post_init__(self) -> None:
        if missing := [name for name in COLUMNS if name not in self.table]:
            raise InputError(f"a comparison has the columns {', '.join(COLUMNS)}; {', '.join(missing)} is missing.")
        object.__setattr__(self, "table", self.table[COLUMNS].reset_index(drop=True))
        if self.baseline not in self.methods:
            raise InputError(
                f"the baseline {self.baseline!r} is none of the methods {', '.join(self.methods) or '(there are none)'}; "
                "a comparison needs one that was measured like the others."
            )
        twice = self.table[self.table.duplicated(COLUMNS[:-1])]
        if len(twice):
            raise InputError(f"{_named(twice.iloc[0])} is there twice; give one value for each.")
        every = pd.MultiIndex.from_frame(self.table[CELL].drop_duplicates())
        for method in self.methods:
            own = pd.MultiIndex.from_frame(self.table.loc[self.table["method"] == method, CELL])
            if len(lacking := every.difference(own, sort=False)):
                row = pd.Series(dict(zip(CELL, lacking[0], strict=True), method=method))
                raise InputError(f"{_named(row)} is missing; measure all methods on the same data with the same seeds.")

    @property
    def methods(self) -> list[str]:
        """The methods, in the order of the table."""
        return list(self.table["method"].unique())

    def to_frame(self) -> pd.DataFrame:
        """The table: a row a value."""
        return self.table.copy()

    def differences(self) -> pd.DataFrame:
        """A row a value, with `difference`: the value less the baseline's on the same data with the same seed."""
        of_baseline = self.table.loc[self.table["method"] == self.baseline, [*CELL, "value"]]
        paired = self.table.merge(of_baseline, on=CELL, how="left", suffixes=("", "_baseline"))
        return self.table.assign(difference=(paired["value"] - paired["value_baseline"]).to_numpy())

    def summary(self) -> pd.DataFrame:
        """A row a metric and method: mean, stderr, difference, difference_stderr, n (formulas above); n counts pairs."""
        rows = []
        for (metric, method), part in self.differences().groupby(["metric", "method"], sort=False):
            own, apart = (mean_stderr(part[column].to_numpy()) for column in ("value", "difference"))
            rows.append((metric, method, *map(float, (*own, *apart)), int(part["difference"].notna().sum())))
        columns = ["metric", "method", "mean", "stderr", "difference", "difference_stderr", "n"]
        return pd.DataFrame(rows, columns=columns)


def compare(
    methods: Mapping[str, Callable[[Data, int], Mapping[str, float]]],
    datasets: Mapping[str, Data],
    *,
    baseline: str,
    seeds: Sequence[int] = (0,),
    bar: Bar = Bar(),
) -> Comparison:
    """Run every method on every data set with every seed: `methods[name](data, seed)` returns its metrics by name.

    `baseline` names the method that the others are set beside. `bar` counts runs. `InputError` before anything is run if there
    is no such method, or nothing to run it on.
    """
    if baseline not in methods:
        raise InputError(
            f"the baseline {baseline!r} is none of the methods {', '.join(methods) or '(there are none)'}; give it too."
        )
    if not datasets or not seeds:
        raise InputError(f"got {len(datasets)} data sets and {len(seeds)} seeds; methods are compared on at least one.")
    rows = []
    for dataset, data in datasets.items():
        for seed in seeds:
            for method, run in methods.items():
                found = run(data, seed)
                rows += [(method, dataset, seed, metric, float(value)) for metric, value in found.items()]
                bar(1)
    return Comparison(pd.DataFrame(rows, columns=COLUMNS), baseline)


def _named(row: pd.Series) -> str:
    return f"{row['metric']} of {row['method']} on {row['dataset']} with seed {row['seed']}"
