"""LABOR-LLM (#68), its claims: does a language model know the next job better than a multinomial logit?

Chains: fifty titles whose law is known, of 1,500 people and of 9,000 (NLSY97, the smallest of the paper's surveys, has 8,984).
Real: what 712 young people of Northern Ireland did. The longer logit also sees the two titles before that, the years in each, and
the time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import pandas as pd

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.predict.output.careers import FROM_NOTHING, TUNING, language_of, resumes, title_scores, tune_on_texts


@dataclass(frozen=True)
class _Careers:
    """Careers of two groups of people, the covariates, and the true probability of each next title where that is known."""

    train: pd.DataFrame
    test: pd.DataFrame
    covariates: tuple[str, ...]
    truth: Callable[[str, str], np.ndarray] | None
    steps: int  # of tuning the bundled model; 0: it is not tried
    small_steps: int  # of training a small one; 0: it is not tried
    most: int  # histories that are scored

    @property
    def titles(self) -> list[str]:
        """Every title of the people to learn from."""
        return sorted(self.train["title"].unique())


RANKS, FIELDS = ("junior", "senior", "chief", "deputy", "assistant"), (
    "nurse", "cook", "driver", "clerk", "farmer", "teacher", "welder", "painter", "lawyer", "baker",
)  # fmt: skip


def _chain(seed: int, steps: int, small_steps: int, people: int = 1500, most: int = 300) -> _Careers:
    """Fifty titles, many with the same first word; people stay with probability .6, else go where their schooling leads."""
    rng = np.random.default_rng(1)  # one law for all seeds
    titles = [f"{rank} {field}" for rank in RANKS for field in FIELDS]
    law = {}
    for school in ("school", "college"):
        for i, title in enumerate(titles):
            p = np.zeros(50)
            p[rng.choice(50, 5, replace=False)] = 0.4 * rng.dirichlet(np.ones(5))
            p[i] += 0.6
            law[school, title] = p / p.sum()
    draw, rows = np.random.default_rng(100 + seed), []
    for who in range(people + 200):
        school, title = draw.choice(["school", "college"]), draw.choice(titles)
        for year in range(2001, 2009):
            rows.append((who, year, title, school))
            title = draw.choice(titles, p=law[school, title])
    frame = pd.DataFrame(rows, columns=["person", "year", "title", "after"])
    order = sorted(range(50), key=titles.__getitem__)
    return _Careers(
        frame[frame["person"] < people],
        frame[frame["person"] >= people],
        ("after",),
        lambda school, title: law[school, title][order],
        steps,
        small_steps,
        most,
    )


def _mvad(seed: int, steps: int, small_steps: int, most: int = 300) -> _Careers:
    """712 young people of Northern Ireland (McVicar and Anyadike-Danes, 2002): what each did, every half year of six years."""
    spec = find_spec("sequenzo")
    assert spec is not None and spec.submodule_search_locations
    wide = pd.read_csv(Path(spec.submodule_search_locations[0]) / "datasets" / "mvad.csv")
    months = [name for name in wide.columns if name[:4] in ("Jan.", "Jul.")]
    long = wide.melt(["id", "male", "Grammar", "gcse5eq"], months, "month", "title").assign(
        title=lambda f: f["title"].str.lower()
    )
    when = {name: i for i, name in enumerate(months)}
    long = long.assign(person=long["id"], year=long["month"].map(when)).rename(columns={"Grammar": "grammar"})
    order = np.random.default_rng(seed).permutation(wide["id"].to_numpy())
    test = set(order[:150])
    return _Careers(
        long[~long["person"].isin(test)],
        long[long["person"].isin(test)],
        ("male", "grammar", "gcse5eq"),
        None,
        steps,
        small_steps,
        most,
    )


def _asked(data: _Careers, frame: pd.DataFrame, seed: int) -> tuple[list[str], list[str], pd.DataFrame]:
    """Resumes cut off where a title begins, the title that followed, and the rows of the year before."""
    frame = frame.sort_values(["person", "year"])
    texts = resumes(frame, covariates=data.covariates)
    histories, chosen, before = [], [], []
    for who, own in frame.groupby("person", sort=False):
        head, *lines = texts[who].split("\n")
        for i in range(1, len(own)):
            histories.append("\n".join([head, *lines[:i], f"{own['year'].iloc[i]}:"]))
            chosen.append(own["title"].iloc[i])
            before.append(own.iloc[i - 1])
    some = np.random.default_rng(seed).permutation(len(chosen))[: data.most]
    return [histories[i] for i in some], [chosen[i] for i in some], pd.DataFrame([before[i] for i in some])


_NOT_TRIED = {"perplexity": float("nan")}


def _asked_of(model: HeadModel, data: _Careers, seed: int) -> dict[str, float]:
    histories, chosen, _ = _asked(data, data.test, seed)
    scores = title_scores(model, histories, [f" {title}" for title in data.titles])
    spaced = [f" {title}" for title in chosen]
    return {
        "perplexity": scores.perplexity(spaced, renormalised=True),
        "perplexity, all text": scores.perplexity(spaced),
        "mass on titles": float(scores.log_p.exp().sum(1).mean()),
    }


def _language(*, tuned: bool) -> Callable[[Callable[[int], _Careers], int], dict[str, float]]:
    def run(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
        data = make(seed)
        if not data.steps:
            return _NOT_TRIED
        model = open_model()
        if tuned:
            texts = list(resumes(data.train, covariates=data.covariates).values())
            model = tune_on_texts(model, texts, replace(TUNING, steps=data.steps, seed=seed))
        return _asked_of(model, data, seed)

    return run


def _small(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    """A small model with tokens of its own, trained from nothing; some of the people say when it was best."""
    data = make(seed)
    if not data.small_steps:
        return _NOT_TRIED
    texts = list(resumes(data.train, covariates=data.covariates).values())
    each = max(10, len(texts) // 200)
    learn, held = [text for i, text in enumerate(texts) if i % each], texts[::each]
    settings = replace(FROM_NOTHING, steps=data.small_steps, every=max(1, data.small_steps // 10), seed=seed)
    begun = process_time()
    model = tune_on_texts(language_of(learn, seed=seed), learn, settings, held_out=held)
    minutes = (process_time() - begun) / 60
    return _asked_of(model, data, seed) | {"minutes": minutes}


def _logit(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    """A multinomial logit on the title before, the covariates, and each covariate with the title."""
    return _fitted(make(seed), seed, [], [3.0])


def _long_logit(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    """The same, with the two titles before that, the time, the time with the title, and the years in each title so far."""
    data = make(seed)
    if data.truth is not None:
        return _NOT_TRIED  # the law knows the title before alone
    return _fitted(data, seed, ["second", "third", "time", "time x"], [0.03, 0.1, 0.3, 1.0, 3.0])


def _fitted(data: _Careers, seed: int, more: list[str], strengths: Sequence[float]) -> dict[str, float]:
    """Of several strengths the one that does best on a fifth of the people, learned from the others."""
    from sklearn.compose import make_column_transformer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    crossed = [f"{name} x" for name in data.covariates]
    years = [f"years as {title}" for title in data.titles] if more else []
    columns = [("passthrough", years)] if years else []

    def model(strength: float, rows: pd.DataFrame) -> Any:
        one_hot = (OneHotEncoder(handle_unknown="ignore"), ["title", *data.covariates, *crossed, *more])
        chosen = make_pipeline(make_column_transformer(one_hot, *columns), LogisticRegression(max_iter=300, C=strength))
        return chosen.fit(rows, rows["following"])

    def perplexity(fitted: Any, rows: pd.DataFrame) -> float:
        return _perplexity(fitted.predict_proba(rows), list(fitted.classes_), list(rows["following"]))

    rows = _features(data, data.train).dropna(subset="following")
    known = rows[rows["following"].isin(data.titles)]
    if len(strengths) > 1:
        people = np.random.default_rng(seed).permutation(known["person"].unique())[:1500]
        held = known["person"].isin(people[: len(people) // 5])
        learn = known["person"].isin(people[len(people) // 5 :])
        tried = {strength: perplexity(model(strength, known[learn]), known[held]) for strength in strengths}
        strengths = [min(tried, key=tried.__getitem__)]
    _, chosen, before = _asked(data, _features(data, data.test), seed)
    return {"perplexity": perplexity(model(strengths[0], known), before.assign(following=chosen)), "C": strengths[0]}


def _features(data: _Careers, frame: pd.DataFrame) -> pd.DataFrame:
    """What the logits see of a year, and the title that follows."""
    frame = frame.sort_values(["person", "year"])
    own = frame.groupby("person")["title"]
    seen = pd.get_dummies(frame["title"]).reindex(columns=data.titles, fill_value=False).astype(float)
    years = np.log1p(seen.groupby(frame["person"]).cumsum()).add_prefix("years as ")
    time = frame["year"].astype(str)
    crossed = {f"{name} x": frame[name].astype(str) + frame["title"] for name in data.covariates}
    return frame.assign(
        following=own.shift(-1), second=own.shift(1).fillna("none"), third=own.shift(2).fillna("none"),
        time=time, **{"time x": time + frame["title"]}, **crossed,
    ).join(years)  # fmt: skip


def _marginal(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    data = make(seed)
    _, chosen, _ = _asked(data, data.test, seed)
    share = data.train["title"].value_counts(normalize=True)[data.titles].to_numpy()
    return {"perplexity": _perplexity(np.tile(share, (len(chosen), 1)), data.titles, chosen)}


def _truth(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    data = make(seed)
    if data.truth is None:
        return _NOT_TRIED
    _, chosen, before = _asked(data, data.test, seed)
    p = np.stack([data.truth(school, title) for school, title in zip(before["after"], before["title"], strict=True)])
    return {"perplexity": _perplexity(p, data.titles, chosen)}


def _perplexity(p: np.ndarray, titles: list[str], chosen: Sequence[str]) -> float:
    own = p[np.arange(len(chosen)), [titles.index(title) for title in chosen]]
    return float(np.exp(-np.log(np.maximum(own, 1e-12)).mean()))


def _datasets(quick: bool) -> dict[str, Callable[[int], _Careers]]:
    steps, small, most = (40, 60, 40) if quick else (300, 1500, 300)
    made: dict[str, Callable[[int], _Careers]] = {
        "chain": cache(lambda seed: _chain(seed, steps, 0, most=most)),
        "chain of 9,000": cache(lambda seed: _chain(seed, 0, small, 1500 if quick else 9000, most=most)),
    }
    if find_spec("sequenzo") is not None:
        made["mvad"] = cache(lambda seed: _mvad(seed, steps // 2, small // 5, most=most))
    return made


def _against(method: str, way: str = "tuned") -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v[way, "perplexity"] / v[method, "perplexity"]


_COMMON = {
    "frequencies": "the titles' frequencies",
    "not tuned": "the model that was not tuned",
    "logit": "a multinomial logit",
}
_OPPONENTS = {"chain": _COMMON}
if find_spec("sequenzo") is not None:
    _OPPONENTS["mvad"] = _COMMON | {"longer logit": "a logit that sees more of the history"}

register_experiment(
    Experiment(
        "careers",
        (68,),
        "2406.17972",
        "Does a tuned language model know the next job better than a multinomial logit?",
        datasets=_datasets,
        methods={
            "logit": _logit,
            "longer logit": _long_logit,
            "frequencies": _marginal,
            "truth": _truth,
            "not tuned": _language(tuned=False),
            "tuned": _language(tuned=True),
            "small": _small,
        },
        baseline="logit",
        claims=(
            Claim("its perplexity is within 10 % of the true chain's", _against("truth"), at_most=1.1, on="chain"),
            Claim("a small model's is, of 9,000 people", _against("truth", "small"), at_most=1.1, on="chain of 9,000"),
            Claim(
                "a small model takes at most 8 minutes",
                lambda v: v["small", "minutes"],
                at_most=8.0,
                on="chain of 9,000",
            ),
            *(
                Claim(f"on {name}, it is below that of {what}", _against(other), at_most=1.0, on=name)
                for name, opponents in _OPPONENTS.items()
                for other, what in opponents.items()
            ),
        ),
        minutes=30,
        lower=frozenset({"perplexity", "perplexity, all text", "minutes"}),
    )
)
