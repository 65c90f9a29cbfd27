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
import time
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
from manyheads.evaluation.run_record import RECORD, RunRecord
from manyheads.files import check_output, write_atomically
from manyheads.heads import mean_stderr
from manyheads.progress import Bar
from manyheads.registry import Registry
from manyheads.report import Reported
from manyheads.version import __version__

Values = Mapping[tuple[str, str], float]
Answer = Literal["held", "unsure", "missed"]
RESULTS, VERDICTS = "results.parquet", "verdicts.json"  # in the folder of a run, beside its record


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
    """One claim, tried: its values over data sets and seeds, their mean and standard error, and the answer.

    `within` counts the seeds, `of` so many, whose own value is within the bound on every data set that the claim is about.
    """

    says: str
    bound: str
    values: tuple[float, ...]
    mean: float
    stderr: float
    answer: Answer
    within: int
    of: int


@dataclass(frozen=True)
class Together:
    """A method that runs all its seeds in one: `over(data, seeds)` gives the metrics of each, in their order.

    Called like any method, with one seed, it runs that one alone.
    """

    over: Callable[[Any, Sequence[int]], Sequence[Mapping[str, float]]]

    def __call__(self, data: Any, seed: int) -> Mapping[str, float]:
        """The metrics of one seed."""
        return self.over(data, (seed,))[0]

    @property
    def __wrapped__(self) -> Callable[[Any, Sequence[int]], Sequence[Mapping[str, float]]]:
        """Whose code it is."""
        return self.over


@dataclass(frozen=True)
class Experiment:
    """Methods on data sets, and what is claimed of them. `numbers` are the systems' in the catalogue, `paper` an arXiv number.

    `datasets(quick)` gives the data by name, smaller or fewer if `quick`; a method takes one and a seed, or is `Together`, and
    takes all seeds that were not run yet. `minutes` says about how long three seeds take on two cores, `lower` which metrics are
    better when they are lower, `room` where it belongs.
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

        At the end the folder has every value (results.parquet) and the verdicts (verdicts.json) too. `InputError` for no seeds,
        for a folder of another experiment, or of this one by other code, or where such files stand without a record.
        """
        if not seeds or len(set(seeds)) < len(seeds):
            raise InputError(f"seeds are {list(seeds)}; give at least one, each once.")
        folder = None if folder is None else Path(folder)
        record = RunRecord(folder, f"{self.name}{' quick' if quick else ''}", self.code)
        if folder is not None and not (folder / RECORD).exists():
            for file in (RESULTS, VERDICTS):
                check_output(folder / file, folder=False)
        data_sets = self.datasets(quick)
        done = bar.step(f"experiment {self.name}", len(data_sets) * len(seeds) * len(self.methods))
        for dataset, data in data_sets.items():
            for seed in seeds:
                for method, run in self.methods.items():
                    if not record.has(method, dataset, seed):
                        started = time.monotonic()
                        left = [one for one in seeds if not record.has(method, dataset, one)]
                        found = _together(run, data, left) if isinstance(run, Together) else {seed: run(data, seed)}
                        record.add(method, dataset, found, time.monotonic() - started)
                    done(1, note=f"{method} on {dataset}, seed {seed}")
        tried = self._tried([row for row in record.rows if row[2] in set(seeds)], quick, record.seconds)
        if folder is not None:
            tried.save(folder)
        return tried

    @property
    def code(self) -> str:
        """A mark of the code in the folders of the data sets and methods: rows of other code are other experiments."""
        files = {Path(inspect.getfile(_function(one))) for one in (self.datasets, *self.methods.values())}
        folders = {file.parent for file in files if file.exists()}
        sources = [file.read_bytes() for folder in sorted(folders) for file in sorted(folder.glob("*.py"))]
        return f"{zlib.crc32(b''.join(sources)):08x}"

    def _tried(self, rows: Sequence[Any], quick: bool, seconds: float) -> Tried:
        """What only some methods measure is missing (NaN) for the others."""
        table = pd.DataFrame(rows, columns=COLUMNS)
        every = (
            table[["dataset", "seed", "metric"]].drop_duplicates().merge(table[["method"]].drop_duplicates(), "cross")
        )
        return Tried(self, Comparison(every.merge(table, "left"), self.baseline), quick, seconds)

    def kept(self, folder: str | Path) -> Tried:
        """What was kept in a folder by `run`. `InputError` where nothing of this experiment was."""
        for quick in (False, True):
            record = RunRecord(Path(folder), f"{self.name}{' quick' if quick else ''}", self.code, strict=False)
            if record.rows:
                return self._tried(record.rows, quick, record.seconds)
        raise InputError(f"{folder} holds no run of {self.name}; run it first.")


@dataclass(frozen=True)
class Tried(Reported):
    """An experiment that was run: all values beside the baseline, and a verdict on each claim. `seconds` is what all runs that
    its folder keeps took."""

    experiment: Experiment
    comparison: Comparison
    quick: bool = False
    seconds: float = 0.0

    @property
    def verdicts(self) -> list[Verdict]:
        """A verdict a claim, in their order."""
        return [_verdict(claim, self.comparison) for claim in self.experiment.claims]

    def to_frame(self) -> pd.DataFrame:
        """A row a data set, metric and method: mean, stderr, difference from the baseline with its stderr, n (of seeds)."""
        table, baseline = self.comparison.table, self.comparison.baseline
        parts = {name: Comparison(part, baseline).summary() for name, part in table.groupby("dataset", sort=False)}
        return pd.concat(parts, names=["dataset"]).reset_index(level=0).reset_index(drop=True)

    def save(self, folder: Path) -> None:
        """Write every value of every seed (results.parquet) and the verdicts (verdicts.json) into a folder of runs."""
        one, kept = self.experiment, {"quick": self.quick, "version": __version__, "code": self.experiment.code}
        table = self.comparison.table.assign(experiment=one.name, paper=one.paper, **kept)
        write_atomically(folder / RESULTS, lambda file: table.to_parquet(file, index=False), force=True)
        facts = {"experiment": one.name, "systems": one.numbers, "paper": one.paper, **kept, "seconds": self.seconds}
        verdicts = [{name: _told(value) for name, value in vars(verdict).items()} for verdict in self.verdicts]
        text = json.dumps(facts | {"verdicts": verdicts}, indent=1, allow_nan=False)
        write_atomically(folder / VERDICTS, lambda file: file.write_text(text, "utf-8"), force=True)


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


def _together(method: Together, data: Any, seeds: Sequence[int]) -> dict[int, Mapping[str, float]]:
    return dict(zip(seeds, method.over(data, seeds), strict=True))


def _function(given: Any) -> Any:
    """What is called in the end: of a partial its function, of an object its class."""
    while isinstance(given, partial) or hasattr(given, "__wrapped__"):
        given = given.func if isinstance(given, partial) else given.__wrapped__
    return given if inspect.isroutine(given) or inspect.isclass(given) else type(given)


def _told(value: Any) -> Any:
    """As JSON holds it, which has no NaN."""
    if isinstance(value, tuple):
        return [_told(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _verdict(claim: Claim, comparison: Comparison) -> Verdict:
    cells = [(seed, claim.value(cell)) for dataset, seed, cell in _cells(comparison) if claim.on in (None, dataset)]
    values = np.array([value for _, value in cells], dtype=np.float64)
    mean, stderr = map(float, mean_stderr(values))
    sure = all(claim.within(mean + side * stderr) for side in (-2, 2))
    answer: Answer = ("held" if sure else "unsure") if claim.within(mean) else "missed"
    bound = f">= {claim.at_least:g}" if claim.at_least is not None else f"<= {claim.at_most:g}"
    seeds, outside = {seed for seed, _ in cells}, {seed for seed, value in cells if not claim.within(value)}
    return Verdict(claim.says, bound, tuple(values.tolist()), mean, stderr, answer, len(seeds - outside), len(seeds))


def _cells(comparison: Comparison) -> Iterator[tuple[str, int, Values]]:
    for (dataset, seed), part in comparison.table.groupby(["dataset", "seed"], sort=False):
        yield dataset, seed, {(row.method, row.metric): row.value for row in part.itertuples()}
