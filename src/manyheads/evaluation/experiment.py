"""Experiments: what a paper claims, tried over seeds beside the baseline that could embarrass it, with a verdict.

A method's file registers its experiment at its foot:

    KL = Claim("KL at most .6 of a linear head's", lambda v: v["fourier", "kl"] / v["linear", "kl"], at_most=0.6)
    register_experiment(
        Experiment("fourier", (19,), "2410.22269", "Does ...?", datasets=..., methods=..., baseline="linear", claims=(KL,))
    )

A method is a function of the data and a seed that gives metrics by name. A claim makes one number of the metrics of one data set
and seed, `v[method, metric]`, and has a bound. Over the P pairs of data set and seed, with mean m and standard error e,

    held       m is within the bound, and so is every value between m - 2 e and m + 2 e
    unsure     m is within the bound, but not all of these (or there is one pair only)
    missed     m is not within the bound
"""

from __future__ import annotations

import inspect
import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from manyheads.errors import InputError
from manyheads.evaluation.comparison import COLUMNS, Comparison
from manyheads.files import write_atomically
from manyheads.heads import mean_stderr
from manyheads.inputs import clause, read_object
from manyheads.progress import Bar
from manyheads.registry import Registry
from manyheads.report import Reported
from manyheads.version import __version__

Values = Mapping[tuple[str, str], float]
Answer = Literal["held", "unsure", "missed"]
RECORD = "experiment.json"


@dataclass(frozen=True)
class Claim:
    """What is claimed, in the words of the paper or of the issue, and one number a data set and seed with its bound.

    It is about the data set `on`, or about all.
    """

    says: str
    value: Callable[[Values], float]
    at_least: float | None = None
    at_most: float | None = None
    on: str | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise InputError(f"the claim {self.says!r} needs one bound; give at_least or at_most.")

    def within(self, value: float) -> bool:
        """Whether a value keeps the bound; NaN does not."""
        return value >= self.at_least if self.at_least is not None else value <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Verdict:
    """One claim, tried: its values over data sets and seeds, their mean and standard error, and the answer."""

    says: str
    bound: str
    values: tuple[float, ...]
    mean: float
    stderr: float
    answer: Answer


@dataclass(frozen=True)
class Experiment:
    """Methods on data sets, and what is claimed of them. `numbers` are the systems' in the catalogue, `paper` an arXiv number.

    `datasets(quick)` gives the data by name, smaller or fewer if `quick`; a method takes one and a seed. `minutes` says about how
    long three seeds take on two cores, `lower` which metrics are better when they are lower, `room` where it belongs.
    """

    name: str
    numbers: tuple[int, ...]
    paper: str
    question: str
    datasets: Callable[[bool], Mapping[str, Any]]
    methods: Mapping[str, Callable[[Any, int], Mapping[str, float]]]
    baseline: str
    claims: tuple[Claim, ...]
    minutes: float = 1.0
    lower: frozenset[str] = frozenset()
    room: str = "predict"

    def run(
        self,
        *,
        seeds: Sequence[int] = (0, 1, 2),
        quick: bool = False,
        folder: str | Path | None = None,
        bar: Bar = Bar(),
    ) -> Tried:
        """Run every method on every data set with every seed. With a `folder` each run is kept there, and not run again.

        `InputError` for no seeds, or for a folder of another experiment, or of this one by other code.
        """
        if not seeds or len(set(seeds)) < len(seeds):
            raise InputError(f"seeds are {list(seeds)}; give at least one, each once.")
        record = _Record(None if folder is None else Path(folder), f"{self.name}{' quick' if quick else ''}", self.code)
        data_sets = self.datasets(quick)
        done = bar.step(f"experiment {self.name}", len(data_sets) * len(seeds) * len(self.methods))
        for dataset, data in data_sets.items():
            for seed in seeds:
                for method, run in self.methods.items():
                    if not record.has(method, dataset, seed):
                        record.add(method, dataset, seed, {name: float(v) for name, v in run(data, seed).items()})
                    done(1, note=f"{method} on {dataset}, seed {seed}")
        return self._tried([row for row in record.rows if row[2] in set(seeds)], quick)

    @property
    def code(self) -> str:
        """A mark of the code in the folders of the data sets and methods: rows of other code are other experiments."""
        files = {Path(inspect.getfile(_function(one))) for one in (self.datasets, *self.methods.values())}
        folders = {file.parent for file in files if file.exists()}
        sources = [file.read_bytes() for folder in sorted(folders) for file in sorted(folder.glob("*.py"))]
        return f"{zlib.crc32(b''.join(sources)):08x}"

    def _tried(self, rows: Sequence[Any], quick: bool) -> Tried:
        """What only some methods measure is missing (NaN) for the others."""
        table = pd.DataFrame(rows, columns=COLUMNS)
        every = (
            table[["dataset", "seed", "metric"]].drop_duplicates().merge(table[["method"]].drop_duplicates(), "cross")
        )
        return Tried(self, Comparison(every.merge(table, "left"), self.baseline), quick)

    def kept(self, folder: str | Path) -> Tried:
        """What was kept in a folder by `run`. `InputError` where nothing of this experiment was."""
        for quick in (False, True):
            record = _Record(Path(folder), f"{self.name}{' quick' if quick else ''}", self.code, strict=False)
            if record.rows:
                return self._tried(record.rows, quick)
        raise InputError(f"{folder} holds no run of {self.name}; run it first.")


@dataclass(frozen=True)
class Tried(Reported):
    """An experiment that was run: all values beside the baseline, and a verdict on each claim."""

    experiment: Experiment
    comparison: Comparison
    quick: bool = False

    @property
    def verdicts(self) -> list[Verdict]:
        """A verdict a claim, in their order."""
        return [_verdict(claim, self.comparison) for claim in self.experiment.claims]

    def to_frame(self) -> pd.DataFrame:
        """A row a data set, metric and method: mean, stderr, difference from the baseline with its stderr, n (of seeds)."""
        table, baseline = self.comparison.table, self.comparison.baseline
        parts = {name: Comparison(part, baseline).summary() for name, part in table.groupby("dataset", sort=False)}
        return pd.concat(parts, names=["dataset"]).reset_index(level=0).reset_index(drop=True)


def register_experiment(experiment: Experiment) -> Experiment:
    """Let `experiments` and the command line find it."""
    _ROOMS.setdefault(experiment.room, Registry(experiment.room)).add(experiment.name, experiment)
    return experiment


def experiments(room: str) -> dict[str, Experiment]:
    """All experiments of a room such as "predict", by name."""
    return _ROOMS.setdefault(room, Registry(room)).all()


def experiment(room: str, name: str) -> Experiment:
    """The experiment called `name`. `InputError` lists the known ones."""
    known = experiments(room)
    if name not in known:
        raise InputError(f"there is no experiment {name!r}; choose from {', '.join(known)}.")
    return known[name]


_ROOMS: dict[str, Registry[Experiment]] = {}


class _Record:
    """What was run so far, as rows (method, dataset, seed, metric, value), on disk after every run."""

    def __init__(self, folder: Path | None, name: str, code: str, *, strict: bool = True) -> None:
        self.path, self.name, self.code = None if folder is None else folder / RECORD, name, code
        self.rows: list[Any] = []
        if self.path is None or not self.path.exists():
            return
        try:
            kept = read_object(self.path)
            if (kept["name"], kept["version"], kept.get("code")) == (name, __version__, code):
                self.rows = [(str(m), str(d), int(s), str(k), _number(v)) for m, d, s, k, v in kept["rows"]]
                return
            found = f"a run of {kept['name']} by version {kept['version']}{'' if kept.get('code') == code else ' and other code'}"
        except (ValueError, KeyError, TypeError) as error:
            found = f"something else ({clause(error)})"
        if strict:
            raise InputError(f"{self.path.parent} holds {found}; give another folder, or remove it (run --again).")

    def has(self, method: str, dataset: str, seed: int) -> bool:
        return any(row[:3] == (method, dataset, seed) for row in self.rows)

    def add(self, method: str, dataset: str, seed: int, found: Mapping[str, float]) -> None:
        self.rows += [(method, dataset, seed, metric, value) for metric, value in found.items()]
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [(*row[:4], row[4] if math.isfinite(row[4]) else None) for row in self.rows]  # JSON has no NaN
            text = json.dumps({"name": self.name, "version": __version__, "code": self.code, "rows": rows})
            write_atomically(self.path, lambda file: file.write_text(text, "utf-8"), force=True)


def _function(given: Any) -> Any:
    """What is called in the end: of a partial its function, of an object its class."""
    while isinstance(given, partial) or hasattr(given, "__wrapped__"):
        given = given.func if isinstance(given, partial) else given.__wrapped__
    return given if inspect.isroutine(given) or inspect.isclass(given) else type(given)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _verdict(claim: Claim, comparison: Comparison) -> Verdict:
    cells = [cell for dataset, cell in _cells(comparison) if claim.on in (None, dataset)]
    values = np.array([claim.value(cell) for cell in cells], dtype=np.float64)
    mean, stderr = map(float, mean_stderr(values))
    sure = all(claim.within(mean + side * stderr) for side in (-2, 2))
    answer: Answer = ("held" if sure else "unsure") if claim.within(mean) else "missed"
    bound = f">= {claim.at_least:g}" if claim.at_least is not None else f"<= {claim.at_most:g}"
    return Verdict(claim.says, bound, tuple(values.tolist()), mean, stderr, answer)


def _cells(comparison: Comparison) -> Iterator[tuple[str, Values]]:
    for (dataset, _), part in comparison.table.groupby(["dataset", "seed"], sort=False):
        yield dataset, {(row.method, row.metric): row.value for row in part.itertuples()}
