"""TimeSeriesScientist (#49): curate, plan, validate, combine, report; without a chat model unless one is given.

"TimeSeriesScientist: A General-Purpose AI Agent for Time Series Analysis", arXiv:2510.01538: MAE 10.4 % below statistical
baselines and 38.2 % below those of language models, over eight benchmarks. For each series and target by itself:

    curate     statistics, and repairs from a closed list (`scientist_curate`)
    plan       up to five models of the library, up to twenty settings together (`scientist_plan`)
    validate   fitted on the first 80 %, the mean absolute error of up to `windows` forecasts that begin in the last 20 %;
               the best setting of each model, then the `keep` best models
    combine    best | weights w_i = (1/e_i) / sum_j 1/e_j | median | trimmed mean (a tenth at each end), the one with the lowest
               validation error unless it is named; points, and quantiles level by level
    report     `report_`: JSON (`to_dict`), text (`says`) and a page (`report`)

What is forecast from is curated anew, from what was known then. A candidate that fails is an error, or is left out and named in
the report (`failed="drop"`); nothing takes its place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster, forecasts
from manyheads.forecast.core.panel import Forecasts, FrameColumns, Panel, Series
from manyheads.forecast.pipelines.scientist_curate import SeriesStatistics, curated
from manyheads.forecast.pipelines.scientist_plan import Candidate, PlanningChat, planned
from manyheads.inputs import check_choice, check_integer
from manyheads.progress import Bar
from manyheads.report import Reported

HELD = 5  # a fifth of a series validates
SHORTEST = 10  # steps; a shorter series repeats its last season
COMBINATIONS = ("weights", "median", "trimmed", "best")


@dataclass(frozen=True)
class SeriesPlan:
    """What the pipeline found of one series and target: `errors` of the validation by candidate, in the unit of the series.

    `kept` with their `weights`, and how they are combined. `repairs` says how many steps were repaired, by kind.
    """

    name: str
    statistics: SeriesStatistics
    repairs: dict[str, int]
    errors: dict[str, float]
    kept: tuple[Candidate, ...]
    weights: tuple[float, ...]
    combine: str

    @property
    def says(self) -> str:
        """The plan in a few sentences."""
        s = self.statistics
        season = f"a season of {s.season} steps (strength {s.season_strength:.2f})" if s.season > 1 else "no season"
        fixed = ", ".join(f"{kind}: {n}" for kind, n in self.repairs.items()) or "none"
        members = ", ".join(f"{one} with weight {w:.2f}" for one, w in zip(self.kept, self.weights, strict=True))
        return (
            f"{self.name} has {s.n} steps, {s.missing:.1%} missing, {season} and a trend of strength {s.trend_strength:.2f}. "
            f"Repaired steps: {fixed}. Of {len(self.errors)} candidates were kept: {members}. Combined by: {self.combine}."
        )


@dataclass(frozen=True)
class ScientistReport(Reported):
    """The plans of all series, and the candidates that failed with the reason."""

    horizon: int
    plans: tuple[SeriesPlan, ...]
    failures: dict[str, str]

    @property
    def says(self) -> str:
        """The report as text."""
        failed = [f"{one} failed and was left out: {why}" for one, why in self.failures.items()]
        return "\n".join([*(plan.says for plan in self.plans), *failed])

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @staticmethod
    def of(found: Mapping[str, Any]) -> ScientistReport:
        """The report that `to_dict` wrote."""
        return ScientistReport(found["horizon"], tuple(map(_plan_of, found["plans"])), dict(found["failures"]))


@forecasts("scientist")
@dataclass(kw_only=True, eq=False)
class Scientist(Forecaster):
    """`keep` models of those tried, over `windows` of validation; `combine` "auto" or one of `COMBINATIONS`.

    `seed` is that of the networks. Give a chat model that plans by `advised_by`.
    """

    PAPER: ClassVar[str] = "2510.01538"

    keep: int = 3
    windows: int = 3
    combine: str = "auto"
    failed: str = "raise"
    seed: int = 0

    chat_: PlanningChat | None = field(default=None, init=False, repr=False)
    report_: ScientistReport | None = field(default=None, init=False, repr=False)
    members_: dict[Candidate, Forecaster] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer(self.keep, "keep", 1)
        check_integer(self.windows, "windows", 1)
        check_choice(self.combine, "combine", ("auto", *COMBINATIONS))
        check_choice(self.failed, "failed", ("raise", "drop"))

    def advised_by(self, chat: PlanningChat) -> Scientist:
        """This one, with a chat model that chooses the models to try."""
        self.chat_ = chat
        return self

    def fresh(self, **changes: Any) -> Scientist:
        """One with the same settings and chat model that has learned nothing."""
        made = super().fresh(**changes)
        assert isinstance(made, Scientist)
        made.chat_ = self.chat_
        return made

    def _fit(self, panel: Panel, *, validation: int | None, folder: Path | None, bar: Bar) -> None:
        whole = _separate(panel)
        failures: dict[str, str] = {}
        looked = [_curated(one, panel.season) for one in whole.series]
        seasons = [statistics for _, _, statistics in looked]
        tried = [_candidates(s, self.horizon, self.chat_) for s in seasons]
        held = [max(1, len(one) // HELD) if validation is None else validation for one in whole.series]
        judged = self._validated(whole, tried, held, panel.season, failures, bar)
        plans = [self._plan(f"{_title(panel, i)}", looked[i], tried[i], judged[i], failures) for i in range(len(whole))]
        repaired = replace(whole, series=tuple(one for one, _, _ in looked))
        self.members_ = {}
        for candidate in dict.fromkeys(one for plan in plans for one in plan.kept):
            users = [i for i, plan in enumerate(plans) if candidate in plan.kept]
            self.members_[candidate] = self._made(candidate).fit_panel(_some(repaired, users), bar=bar)
        self.report_ = ScientistReport(self.horizon, tuple(plans), failures)

    def _validated(
        self,
        whole: Panel,
        tried: Sequence[Sequence[Candidate]],
        held: Sequence[int],
        season: int,
        failures: dict[str, str],
        bar: Bar,
    ) -> list[dict[Candidate, tuple[np.ndarray, np.ndarray]]]:
        """For each series, by candidate: what it forecast, and the truth, [W, h]. The truth is what was observed, unrepaired."""
        found: list[dict[Candidate, tuple[np.ndarray, np.ndarray]]] = [{} for _ in tried]
        every = list(dict.fromkeys(one for rows in tried for one in rows))
        done = bar.step("validate", len(every))
        for candidate in every:
            users = [i for i, rows in enumerate(tried) if candidate in rows and len(whole.series[i]) >= SHORTEST]
            if users:
                try:
                    for i, pair in zip(users, self._judge(candidate, whole, users, held, season), strict=True):
                        found[i][candidate] = pair
                except InputError as error:
                    if self.failed == "raise":
                        raise InputError(f"{candidate} failed: {error} Give failed='drop' to leave it out.") from None
                    failures[str(candidate)] = str(error)
            done(1, note=candidate.name)
        return found

    def _judge(
        self, candidate: Candidate, whole: Panel, users: Sequence[int], held: Sequence[int], season: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        series = [whole.series[i] for i in users]
        fitted = self._made(candidate)
        first = tuple(_curated(one.until(len(one) - held[i]), season)[0] for i, one in zip(users, series, strict=True))
        fitted.fit_panel(replace(whole, series=first))
        cuts = [_cuts(len(one), held[i], self.horizon, self.windows) for i, one in zip(users, series, strict=True)]
        out: list[tuple[list[np.ndarray], list[np.ndarray]]] = [([], []) for _ in users]
        for w in range(self.windows):
            now = [k for k in range(len(users)) if w < len(cuts[k])]
            before = tuple(_curated(series[k].until(cuts[k][w]), season)[0] for k in now)
            if not now:
                continue
            points = fitted.forecast_panel(replace(whole, series=before), self.horizon, ()).point
            for k, point in zip(now, points, strict=True):
                truth = series[k].values[0, cuts[k][w] :][: self.horizon]
                out[k][0].append(np.pad(truth, (0, self.horizon - len(truth)), constant_values=np.nan))
                out[k][1].append(point[0])
        return [(np.stack(points), np.stack(truth)) for truth, points in out]

    def _plan(
        self,
        name: str,
        looked: tuple[Series, dict[str, int], SeriesStatistics],
        tried: Sequence[Candidate],
        judged: Mapping[Candidate, tuple[np.ndarray, np.ndarray]],
        failures: Mapping[str, str],
    ) -> SeriesPlan:
        _, repairs, statistics = looked
        errors = {one: _error(*pair) for one, pair in judged.items()}
        errors = {one: e for one, e in errors.items() if np.isfinite(e)}
        if not errors:  # too short to validate, or nothing was observed in the last fifth
            left = [one for one in tried if str(one) not in failures]
            if not left:
                raise InputError(f"no candidate of {name} is left: {'; '.join(failures.values())}")
            return SeriesPlan(name, statistics, repairs, {}, (left[0],), (1.0,), "best")
        best: dict[str, Candidate] = {}
        for one in sorted(errors, key=lambda one: errors[one]):
            best.setdefault(one.name, one)
        kept = tuple(best.values())[: self.keep]
        weights = _weights([errors[one] for one in kept])
        combine = self.combine
        if combine == "auto":
            points, truth = np.stack([judged[one][0] for one in kept]), judged[kept[0]][1]
            combine = min(COMBINATIONS, key=lambda how: _error(combined(points, weights, how), truth))
        return SeriesPlan(name, statistics, repairs, {str(o): e for o, e in errors.items()}, kept, weights, combine)

    def _made(self, candidate: Candidate) -> Forecaster:
        cls = FORECASTERS[candidate.name]
        seed = {"seed": self.seed} if hasattr(cls, "seed") else {}
        return cls(horizon=self.horizon, **seed, **dict(candidate.settings))

    def _forecast(self, panel: Panel, horizon: int, levels: tuple[float, ...]) -> Forecasts:
        looked = [_curated(one, panel.season) for one in _separate(panel).series]
        repaired = replace(_separate(panel), series=tuple(one for one, _, _ in looked))
        plans = [self._plan_for(_title(panel, i), looked[i][2]) for i in range(len(looked))]
        points: list[dict[Candidate, np.ndarray]] = [{} for _ in plans]
        quantiles: list[dict[Candidate, np.ndarray]] = [{} for _ in plans]
        for candidate, member in self.members_.items():
            users = [i for i, plan in enumerate(plans) if candidate in plan.kept]
            if users:
                found = member.forecast_panel(_some(repaired, users), horizon, levels)
                for k, i in enumerate(users):
                    points[i][candidate], quantiles[i][candidate] = found.point[k][0], found.quantiles[k][0]
        joined = [
            [
                combined(np.stack([one[i][c] for c in plan.kept]), plan.weights, plan.combine)
                for i, plan in enumerate(plans)
            ]
            for one in (points, quantiles)
        ]
        v = panel.n_targets
        point, quantile = ([np.stack(rows[i : i + v]) for i in range(0, len(rows), v)] for rows in joined)
        return Forecasts(horizon, levels, point, quantile)

    def _plan_for(self, name: str, statistics: SeriesStatistics) -> SeriesPlan:
        """A series' own plan; of one that was not there when it was fitted, the plan of the one that is most like it."""
        if self.report_ is None:
            raise InputError("this Scientist was not fitted; call fit(df) first.")
        for plan in self.report_.plans:
            if plan.name == name:
                return plan
        return min(self.report_.plans, key=lambda plan: _unlike(plan.statistics, statistics))

    def _tensors(self) -> dict[str, Tensor]:
        members = enumerate(self.members_.values())
        return {f"{i}.{name}": tensor for i, one in members for name, tensor in one._tensors().items()}

    def _about(self) -> dict[str, Any]:
        report = {} if self.report_ is None else self.report_.to_dict()
        return {"report": report, "members": [one._about() for one in self.members_.values()]}

    def _restore(self, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        self.report_ = ScientistReport.of(about["report"])
        plans, whole = self.report_.plans, _separate(self._fitted)
        candidates = list(dict.fromkeys(one for plan in plans for one in plan.kept))
        self.members_ = {one: self._made(one) for one in candidates}
        for i, (candidate, its) in enumerate(zip(candidates, about["members"], strict=True)):
            member = self.members_[candidate]
            member.panel_ = _some(whole, [k for k, plan in enumerate(plans) if candidate in plan.kept])
            own = {name.removeprefix(f"{i}."): t for name, t in tensors.items() if name.startswith(f"{i}.")}
            member._restore(own, its)


def combined(members: Float[np.ndarray, "M *S"], weights: Sequence[float], how: str) -> Float[np.ndarray, "*S"]:
    """The members' forecasts as one; `members[0]` is the best. A tenth of three members is none: then "trimmed" is the mean."""
    cut = len(members) // 10
    ways: dict[str, Callable[[], np.ndarray]] = {
        "best": lambda: members[0],
        "weights": lambda: np.tensordot(np.asarray(weights), members, 1),
        "median": lambda: np.median(members, 0),
        "trimmed": lambda: np.sort(members, 0)[cut : len(members) - cut].mean(0),
    }
    return ways[check_choice(how, "combine", COMBINATIONS)]()


def _candidates(statistics: SeriesStatistics, horizon: int, chat: PlanningChat | None) -> list[Candidate]:
    if statistics.n < SHORTEST:
        return [Candidate("seasonal_naive", (("season", statistics.season),))]
    return planned(statistics, horizon, chat)


def _separate(panel: Panel) -> Panel:
    """Every target a series of its own, named by its number, without covariates."""
    series: list[Series] = []
    for one in panel.series:
        nothing = np.zeros((0, len(one)))
        for row in one.values:
            series.append(Series(str(len(series)), one.times, row[None], nothing, nothing, np.zeros(0)))
    return Panel(tuple(series), FrameColumns(None, panel.columns.time, ("y",)), panel.freq)


def _some(panel: Panel, which: Sequence[int]) -> Panel:
    return replace(panel, series=tuple(panel.series[i] for i in which))


def _title(panel: Panel, i: int) -> str:
    one, target = panel.series[i // panel.n_targets], panel.columns.targets[i % panel.n_targets]
    return f"{one.name}/{target}"


def _curated(one: Series, season: int) -> tuple[Series, dict[str, int], SeriesStatistics]:
    values, repairs, statistics = curated(one.values[0], season)
    return replace(one, values=values[None]), {r.kind: len(r.steps) for r in repairs}, statistics


def _cuts(n: int, held: int, horizon: int, windows: int) -> list[int]:
    """Where the validation's forecasts begin: at the last fifth, and as late as a whole horizon fits, evenly between."""
    first, last = n - held, max(n - held, n - horizon)
    return sorted({int(at) for at in np.linspace(first, last, windows)})


def _error(points: Float[np.ndarray, "W H"], truth: Float[np.ndarray, "W H"]) -> float:
    seen = np.isfinite(truth)
    return float(np.abs(points - truth)[seen].mean()) if seen.any() else float("nan")


def _weights(errors: Sequence[float]) -> tuple[float, ...]:
    """Inverse errors, summing to one; members without any error share it alone."""
    e = np.asarray(errors)
    raw = (e == 0).astype(float) if (e == 0).any() else e.min() / e
    return tuple(map(float, raw / raw.sum()))


def _unlike(a: SeriesStatistics, b: SeriesStatistics) -> float:
    strengths = abs(a.season_strength - b.season_strength) + abs(a.trend_strength - b.trend_strength)
    return (a.season != b.season) + strengths


def _plan_of(found: Mapping[str, Any]) -> SeriesPlan:
    kept = tuple(Candidate(one["name"], tuple((k, v) for k, v in one["settings"])) for one in found["kept"])
    own = {"statistics": SeriesStatistics(**found["statistics"]), "kept": kept, "weights": tuple(found["weights"])}
    return SeriesPlan(**{**found, **own})
