"""The planner of TimeSeriesScientist (#49): which models of the library to try on a series, with which settings.

The library is the registry of forecasters. A rule for each says how well it suits the statistics (0: not at all) and which
settings to try; the five that suit best are tried, at most twenty settings together. Rules look at the length, the season and
what there is to learn from, never at how well a model did. A chat model may choose in their place (`PlanningChat`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Protocol

from manyheads.errors import InputError
from manyheads.forecast.choosing import ENOUGH
from manyheads.forecast.core.forecaster import FORECASTERS
from manyheads.forecast.pipelines.scientist_curate import SeriesStatistics
from manyheads.inputs import parse_json

TRIED, MOST_SETTINGS = 5, 20
OWN = ("scientist", "ensemble")  # no models of the library, but made of them
Grid = dict[str, tuple[Any, ...]]


class PlanningChat(Protocol):
    """A chat model as the planner asks it: text in, text out."""

    def answer(self, question: str) -> str:
        """The answer to one question."""


@dataclass(frozen=True)
class Candidate:
    """A model of the library with settings, as pairs in the order of names."""

    name: str
    settings: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v}' for k, v in self.settings)})"


@dataclass(frozen=True)
class PlanRule:
    """`suits(statistics, horizon)` is larger for better models; `grid` has two or three values a setting."""

    suits: Callable[[SeriesStatistics, int], float]
    grid: Callable[[SeriesStatistics, int], Grid]


def _statistical(least: int, suits: float, longest: int = 400) -> PlanRule:
    def grid(s: SeriesStatistics, horizon: int) -> Grid:
        recent = max(8 * s.season, 3 * horizon, 60)
        return {"season": (s.season,), "most": (250, 1000) if recent >= s.n else (recent, 1000)}

    return PlanRule(lambda s, horizon: suits * (s.n >= least and s.season <= longest), grid)


def _learned(least: float, suits: float, **settings: Any) -> PlanRule:
    """A network, where there are so many windows to learn from."""

    def grid(s: SeriesStatistics, horizon: int) -> Grid:
        longest = max(4, (s.n * 4 // 5 - horizon) // 3)
        contexts = sorted(
            {min(longest, c) for c in (max(2 * s.season, horizon, 24), max(7 * s.season, 4 * horizon, 96))}
        )
        return {"context": tuple(contexts), **{k: (v,) for k, v in settings.items()}}

    return PlanRule(lambda s, horizon: suits * (s.n * 4 // 5 - 2 * horizon >= least), grid)


RULES: dict[str, PlanRule] = {
    "seasonal_naive": PlanRule(lambda s, horizon: 1.0, lambda s, horizon: {"season": (s.season,)}),
    "ets": _statistical(12, 0.9, longest=60),  # its states are as many as a season's steps
    "theta": _statistical(10, 0.8),
    "arima": _statistical(24, 0.6),
    "linear": _learned(ENOUGH, 0.7, epochs=20),
    "softs": _learned(5 * ENOUGH, 0.65, mixes=False, width=64, hidden=64),
    "patchtst": _learned(50 * ENOUGH, 0.5, patch=8, patch_stride=8),
}


def planned(statistics: SeriesStatistics, horizon: int, chat: PlanningChat | None = None) -> list[Candidate]:
    """The candidates of a series. `InputError` where a chat model names what the library does not have."""
    if chat is None:
        suits = {name: rule.suits(statistics, horizon) for name, rule in RULES.items()}
        names = [name for name in sorted(suits, key=lambda name: -suits[name]) if suits[name] > 0][:TRIED]
    else:
        names = _chosen(chat, statistics, horizon)
    found = [one for name in names for one in _settings(name, statistics, horizon)]
    return found[:MOST_SETTINGS]


def _settings(name: str, statistics: SeriesStatistics, horizon: int) -> list[Candidate]:
    if name not in RULES:
        return [Candidate(name)]
    grid: Mapping[str, tuple[Any, ...]] = RULES[name].grid(statistics, horizon)
    rows = product(*grid.values())
    # A series shorter than both values of `most` is the same to both.
    made = [dict(zip(grid, row, strict=True)) for row in rows]
    kept = [one for i, one in enumerate(made) if "most" not in one or i == 0 or made[i - 1]["most"] < statistics.n]
    return [Candidate(name, tuple(sorted(one.items()))) for one in kept]


def _chosen(chat: PlanningChat, statistics: SeriesStatistics, horizon: int) -> list[str]:
    library = [name for name in FORECASTERS.all() if name not in OWN]
    said = chat.answer(
        f"A series has these statistics: {json.dumps(asdict(statistics))}. It is forecast {horizon} steps ahead. Choose up to "
        f"{TRIED} models from {json.dumps(library)}. Answer with a JSON list of their names alone."
    )
    names = parse_json(said, "the chat model's answer")
    if not isinstance(names, list) or not names or any(name not in library for name in names):
        raise InputError(
            f"the chat model answered {said[:200]!r}; it has to answer with a list of names from {', '.join(library)}."
        )
    return list(dict.fromkeys(names))[:TRIED]
