"""Does advice make people forecast better? (#7): a randomised trial of advisers, scored and tested.

Schoenegger, Park, Karger, Trott and Tetlock, arXiv:2402.07862. Forecaster i was given an arm by lot and answers questions q,
whose outcomes y_q are known by now:

    number        e_iq = |f_iq - y_q| / sd of the control arm's forecasts of q         sd, so that questions can be averaged
    probability   e_iq = (f_iq - y_q)^2                                                Brier score, y_q in {0, 1}
    score         s_i  = mean of e_iq over the questions that i answered               lower is better
    effect        1 - mean s (arm) / mean s (control)                                  share of the error that advice takes away

The largest 5 % of the e of a question in an arm count as much as the one at 95 % (`tails`): within an arm, so that an arm whose
errors are all halved has an effect of exactly one half. p is of a lottery: how often would arms, dealt out again among the
forecasters of both, differ as much (Fisher); q over all arms. Intervals are 95 % of a bootstrap over forecasters. Every effect is
given again without each question: six questions are few, and one can carry it all.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Shaped

from manyheads.errors import InputError
from manyheads.evaluation.controls import p_value, q_values
from manyheads.inputs import check_choice, check_integer, check_number, check_seed

Scored = Literal["number", "probability"]
LEAST = 3  # forecasters of an arm
CROWDS = 100  # resampled crowds, for the standard error of their medians
TRIAL_COLUMNS = ("forecaster", "arm", "question", "forecast", "outcome")


@dataclass(frozen=True)
class AdviceTrial:
    """What a trial showed, as frames.

    `effects`: a row an arm, with `effect`, `low`, `high`, `p`, `q`, forecasters and mean score. `without`: the effect without
    each question. `crowds`: a row an arm, the control too, with the mean error of its median forecast (the crowd's), its standard
    error, and `spread`, the mean standard deviation of its forecasts over the control's. `halves`: the effect among the less and
    the more skilled half of forecasters (if there is a column skill), and on the easier and the harder half of questions, with p
    of the difference.
    """

    effects: pd.DataFrame
    without: pd.DataFrame
    crowds: pd.DataFrame
    halves: pd.DataFrame
    control: str

    def carried_by(self, arm: str) -> str | None:
        """The one question without which an arm's effect shrinks to less than half or changes its sign; None if none is."""
        whole = float(self.effects.set_index("arm").loc[arm, "effect"])
        rows = self.without[self.without["arm"] == arm].set_index("question")["effect"] * np.sign(whole)
        return str(rows.idxmin()) if len(rows) and rows.min() < abs(whole) / 2 else None


def advice_trial(
    frame: pd.DataFrame,
    *,
    control: str,
    scored: Scored = "number",
    tails: float = 0.05,
    draws: int = 2000,
    seed: int = 0,
) -> AdviceTrial:
    """Score a trial (formulas above). `frame` has a row a forecast: forecaster, arm, question, forecast, outcome; skill if known.

    `InputError` for columns that are missing, a forecaster in two arms, a question with two outcomes, an arm with fewer than
    three forecasters, a question of which the control arm's forecasts do not differ, or numbers that are none.
    """
    check_choice(scored, "scored", ("number", "probability"))
    check_number(tails, "tails", 0.0, 0.4)
    check_integer(draws, "draws", 20, 1_000_000)
    answers = _answers(_checked(frame, str(control), scored), str(control), scored, tails)
    lot = np.random.default_rng(check_seed(seed))
    picks = {name: _picks(answers.of(name), draws, lot) for name in answers.names}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # a question that nobody of a resampled arm answered is left out
        return AdviceTrial(
            _effects(answers, picks, draws, lot),
            _without(answers),
            _crowds(answers, picks),
            _halves(answers, picks, lot),
            answers.names[0],
        )


@dataclass(frozen=True)
class _Answers:
    """Errors, and forecasts and outcomes in units of the control's spread; NaN where a question was not answered."""

    arms: Shaped[np.ndarray, "P"]
    names: tuple[str, ...]  # of arms, the control first
    questions: tuple[str, ...]
    errors: Float[np.ndarray, "P Q"]
    forecasts: Float[np.ndarray, "P Q"]
    outcomes: Float[np.ndarray, "Q"]
    skill: Float[np.ndarray, "P"] | None
    squared: bool

    def of(self, arm: str) -> Int[np.ndarray, "N"]:
        return np.flatnonzero(self.arms == arm)

    def score(self, people: Int[np.ndarray, "... N"], questions: Bool[np.ndarray, "Q"] | None = None) -> Any:
        """Mean score of some forecasters, on all questions or on some."""
        errors = self.errors if questions is None else self.errors[:, questions]
        there = ~np.isnan(errors)
        own = np.where(there, errors, 0.0).sum(1) / np.where(there.any(1), there.sum(1), np.nan)
        return np.nanmean(own[people], axis=-1)


def _checked(frame: pd.DataFrame, control: str, scored: Scored) -> pd.DataFrame:
    missing = [name for name in TRIAL_COLUMNS if name not in frame]
    if missing:
        raise InputError(
            f"the table has no column {missing[0]!r}; a trial has {', '.join(TRIAL_COLUMNS)}, and skill if known."
        )
    numbers = [name for name in ("forecast", "outcome", "skill") if name in frame]
    rows = frame[[*TRIAL_COLUMNS[:3], *numbers]].copy()
    for name in numbers:
        rows[name] = pd.to_numeric(rows[name], errors="coerce").astype(float)
    rows = rows.dropna()
    if not np.isfinite(rows[numbers].to_numpy()).all():
        raise InputError("the table holds infinite numbers; mend them first.")
    rows[["forecaster", "arm", "question"]] = rows[["forecaster", "arm", "question"]].astype(str)
    for one, of in (("forecaster", "arm"), ("question", "outcome")):
        kinds = rows.groupby(one)[of].nunique()
        if (kinds > 1).any():
            raise InputError(f"{one} {kinds.idxmax()!r} has more than one {of}; give each {one} one {of}.")
    again = rows[rows.duplicated(["forecaster", "question"])]
    if len(again):
        raise InputError(
            f"forecaster {again.iloc[0]['forecaster']!r} answered {again.iloc[0]['question']!r} twice; keep one answer."
        )
    counts = rows.groupby("arm")["forecaster"].nunique()
    if control not in counts or len(counts) < 2:
        raise InputError(f"there is no arm {control!r} beside another; the arms are {', '.join(counts.index)}.")
    if (counts < LEAST).any():
        raise InputError(f"arm {counts.idxmin()!r} has {counts.min()} forecasters; {LEAST} at least are needed.")
    if scored == "probability" and not (rows["forecast"].between(0, 1).all() and rows["outcome"].isin([0, 1]).all()):
        raise InputError("probabilities lie in [0, 1], and their outcomes are 0 or 1; else score numbers.")
    return rows


def _answers(rows: pd.DataFrame, control: str, scored: Scored, tails: float) -> _Answers:
    wide = rows.pivot(index="forecaster", columns="question", values="forecast")
    people = rows.groupby("forecaster").first().loc[wide.index]
    arms, forecasts = people["arm"].to_numpy(dtype=str), wide.to_numpy()
    outcomes = rows.groupby("question")["outcome"].first().loc[wide.columns].to_numpy()
    if scored == "number":
        sd = wide[arms == control].std(ddof=1)
        if not (sd > 0).all():
            raise InputError(f"the control arm's forecasts of {sd[~(sd > 0)].index[0]!r} do not differ; leave it out.")
        forecasts, outcomes = forecasts / sd.to_numpy(), outcomes / sd.to_numpy()
    errors = np.abs(forecasts - outcomes) ** (2 if scored == "probability" else 1)
    for arm in set(arms):
        own = errors[arms == arm]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a question that nobody of the arm answered
            errors[arms == arm] = np.minimum(own, np.nanquantile(own, 1 - tails, axis=0))
    names = (control, *sorted(set(arms) - {control}))
    skill = people["skill"].to_numpy() if "skill" in people else None
    return _Answers(arms, names, tuple(wide.columns), errors, forecasts, outcomes, skill, scored == "probability")


def _picks(people: Int[np.ndarray, "N"], draws: int, lot: np.random.Generator) -> Int[np.ndarray, "R N"]:
    return people[lot.integers(len(people), size=(draws, len(people)))]


def _effects(
    answers: _Answers, picks: dict[str, Int[np.ndarray, "R N"]], draws: int, lot: np.random.Generator
) -> pd.DataFrame:
    control, *others = answers.names
    base = float(answers.score(answers.of(control)))
    found = []
    for name in others:
        own = answers.of(name)
        score = float(answers.score(own))
        dealt = np.stack([lot.permutation(np.concatenate([own, answers.of(control)])) for _ in range(draws)])
        null = np.log(answers.score(dealt[:, : len(own)]) / answers.score(dealt[:, len(own) :]))
        low, high = np.nanquantile(1 - answers.score(picks[name]) / answers.score(picks[control]), [0.025, 0.975])
        p = p_value(abs(np.log(score / base)), np.abs(null))
        found.append((name, len(own), score, 1 - score / base, low, high, p))
    table = pd.DataFrame(found, columns=["arm", "forecasters", "score", "effect", "low", "high", "p"])
    return table.assign(q=q_values(table["p"].to_numpy()))


def _without(answers: _Answers) -> pd.DataFrame:
    control, *others = answers.names
    found = []
    for j, question in enumerate(answers.questions if len(answers.questions) > 1 else ()):
        rest = np.arange(len(answers.questions)) != j
        base = float(answers.score(answers.of(control), rest))
        found += [(question, name, 1 - float(answers.score(answers.of(name), rest)) / base) for name in others]
    return pd.DataFrame(found, columns=["question", "arm", "effect"])


def _crowds(answers: _Answers, picks: dict[str, Int[np.ndarray, "R N"]]) -> pd.DataFrame:
    power = 2 if answers.squared else 1

    def missed(people: Int[np.ndarray, "N"]) -> float:
        median = np.nanmedian(answers.forecasts[people], axis=0)
        return float(np.nanmean(np.abs(median - answers.outcomes) ** power))

    base = np.nanstd(answers.forecasts[answers.of(answers.names[0])], axis=0, ddof=1)
    found = []
    for name in answers.names:
        own = answers.of(name)
        spread = np.nanstd(answers.forecasts[own], axis=0, ddof=1) / np.where(base > 0, base, np.nan)
        again = [missed(one) for one in picks[name][:CROWDS]]
        found.append((name, missed(own), float(np.std(again, ddof=1)), float(np.nanmean(spread))))
    return pd.DataFrame(found, columns=["arm", "error", "stderr", "spread"])


def _halves(answers: _Answers, picks: dict[str, Int[np.ndarray, "R N"]], lot: np.random.Generator) -> pd.DataFrame:
    control, *others = answers.names
    hard = np.nanmean(answers.errors[answers.of(control)], axis=0)
    harder = hard > np.median(hard)
    found = []
    for name in others:
        if harder.any():
            sides = [(answers.of(name), answers.of(control), part) for part in (~harder, harder)]
            drawn = [(picks[name], picks[control], part) for part in (~harder, harder)]
            found.append((name, "difficulty", *_difference(answers, sides, drawn)))
        if answers.skill is not None:
            able = answers.skill > np.median(answers.skill)
            groups = [
                [answers.of(arm)[able[answers.of(arm)] == high] for arm in (name, control)] for high in (False, True)
            ]
            if all(len(one) > 1 for pair in groups for one in pair):
                sides = [(own, base, None) for own, base in groups]
                draws = len(picks[name])
                drawn = [(_picks(own, draws, lot), _picks(base, draws, lot), None) for own, base in groups]
                found.append((name, "skill", *_difference(answers, sides, drawn)))
    return pd.DataFrame(found, columns=["arm", "by", "lower half", "upper half", "p"])


_Side = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # forecasters of an arm and of the control, and questions


def _difference(answers: _Answers, sides: Sequence[_Side], drawn: Sequence[_Side]) -> tuple[float, float, float]:
    """The effects on two sides, and how often a bootstrap turns their order round, two-sided."""
    low, high = (float(1 - answers.score(a, part) / answers.score(b, part)) for a, b, part in sides)
    again = [1 - answers.score(a, part) / answers.score(b, part) for a, b, part in drawn]
    over = (np.sum(again[1] - again[0] >= 0) + 1) / (len(again[0]) + 1)
    under = (np.sum(again[1] - again[0] <= 0) + 1) / (len(again[0]) + 1)
    return low, high, float(min(1.0, 2 * min(over, under)))
