"""LABOR-LLM (#68): a career written as text, and the next job's probability read off a language head.

Athey et al., arXiv:2406.17972. A history is a resume, a line a year; every title that there may be is scored as text, with the
line's end behind it, after the resume so far:

    P(title | history) = product over the tokens w_j of title + end of P(w_j | history, w_1 .. w_(j-1))

With the end, no title is the beginning of another, so these sum to at most 1 over any list; divided by their sum they are a
distribution over the list. Both are given. The resume is read once, and its keys and values serve all titles. Then the model is
tuned on resumes by the next-token loss, of all text.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.model.headmodel import HeadModel
from manyheads.model.opening import open_model
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit, generator_of

END = "\n"
TUNING = TrainSettings(steps=400, rows=16, rate=5e-4, warmup=20, decay=0.5, weight_decay=0.01, precision="fp32")


@dataclass(frozen=True)
class TitleScores:
    """Log-probability in nats of each of K titles after each of N histories. `titles` are in the order of the columns."""

    titles: tuple[str, ...]
    log_p: Float[Tensor, "N K"]

    @property
    def renormalised(self) -> Float[Tensor, "N K"]:
        """Log-probabilities over the list of titles alone."""
        return self.log_p.log_softmax(-1)

    def perplexity(self, chosen: Sequence[str], *, renormalised: bool = False) -> float:
        """Exp of the mean of -log p of the title that came next, one for each history."""
        where = torch.tensor([self.titles.index(title) for title in chosen])
        log_p = self.renormalised if renormalised else self.log_p
        return float(log_p.gather(1, where[:, None]).mean().neg().exp())


@torch.no_grad()
def title_scores(
    model: HeadModel, histories: Sequence[str], titles: Sequence[str], *, end: str = END, bar: Bar = Bar()
) -> TitleScores:
    """Score every title after every history (formula above). A history ends where a title begins: "... 2011:", " nurse".

    `InputError` where a title with its end begins another, or where the tokenizer joins the history's end with a title's
    beginning; `UnsupportedError` for models that do not write text from left to right.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not model.is_causal:
        raise UnsupportedError("titles are scored by a causal model with a tokenizer; give one.")
    if not titles or len(set(titles)) < len(titles) or not histories:
        raise InputError(f"there are {len(histories)} histories and {len(titles)} titles; give some, each title once.")
    out = torch.empty(len(histories), len(titles), dtype=torch.double)
    done = bar.step("scoring histories", len(histories))
    for i, history in enumerate(histories):
        prefix, rest = _split(tokenizer, history, [title + end for title in titles])
        out[i] = _after(model, prefix, rest)
        done(1)
    return TitleScores(tuple(titles), out)


def _split(tokenizer: Any, history: str, endings: Sequence[str]) -> tuple[list[int], list[list[int]]]:
    """The tokens of the history, and of each ending after it."""
    prefix = tokenizer(history)["input_ids"]
    rest = []
    for ending in endings:
        whole = tokenizer(history + ending)["input_ids"]
        if whole[: len(prefix)] != prefix:
            raise InputError(
                f"the tokenizer joins {history[-8:]!r} with {ending[:8]!r}; end histories before a space, not behind."
            )
        rest.append(whole[len(prefix) :])
    ordered = sorted(map(tuple, rest))
    for one, other in pairwise(ordered):
        if other[: len(one)] == one:
            short, long = (tokenizer.decode(tokens) for tokens in (one, other))
            raise InputError(f"{short!r} is the beginning of {long!r}; give an end that no title has.")
    return prefix, rest


def _after(model: HeadModel, prefix: list[int], rest: list[list[int]]) -> Float[Tensor, "K"]:
    """Log P of each continuation: one pass over the prefix, and one over all continuations beside each other."""
    plain, device = model.plain, model.device
    first = plain(input_ids=torch.tensor([prefix], device=device), use_cache=True)
    past = copy.deepcopy(first.past_key_values)
    past.batch_repeat_interleave(len(rest))
    width = max(map(len, rest))
    ids = torch.tensor([tokens + [tokens[-1]] * (width - len(tokens)) for tokens in rest], device=device)
    last = first.logits[:, -1:].expand(len(rest), 1, -1)
    logits = last if width == 1 else torch.cat([last, plain(input_ids=ids[:, :-1], past_key_values=past).logits], 1)
    log_p = logits.double().log_softmax(-1).gather(2, ids[..., None])[..., 0].cpu()
    real = torch.arange(width) < torch.tensor([len(tokens) for tokens in rest])[:, None]
    return (log_p * real).sum(1)


def resumes(
    frame: pd.DataFrame,
    *,
    person: str = "person",
    year: str = "year",
    title: str = "title",
    covariates: Sequence[str] = (),
) -> dict[Any, str]:
    """Each person's career as text: a line of covariates (their first values), then a line a year, "2011: nurse".

    `InputError` for columns that are not there, titles with a line's end in them, or two titles of one person in a year.
    """
    if missing := [name for name in (person, year, title, *covariates) if name not in frame]:
        raise InputError(f"the frame has no column {missing[0]!r}, only {', '.join(map(str, frame.columns))}.")
    if frame[title].astype(str).str.contains(END).any():
        raise InputError("a title holds the end of a line; replace it.")
    if frame.duplicated([person, year]).any():
        raise InputError("somebody has two titles in one year; keep one of them.")
    found = {}
    for who, own in frame.sort_values(year).groupby(person, sort=False):
        about = ", ".join(f"{name} {own[name].iloc[0]}" for name in covariates)
        lines = [f"{when}: {what}" for when, what in zip(own[year], own[title], strict=True)]
        found[who] = "\n".join([*([about] if about else []), *lines]) + END
    return found


def tune_on_texts(
    model: HeadModel,
    texts: Sequence[str],
    settings: TrainSettings = TUNING,
    folder: str | Path | None = None,
    *,
    bar: Bar = Bar(),
) -> HeadModel:
    """A copy of the model, tuned on whole texts by the next-token loss (mean over real tokens); the model stays as it is."""
    if not texts:
        raise InputError("there are no texts; give at least one.")
    module: Any = copy.deepcopy(model.plain)
    rows = [model.tokenizer(text)["input_ids"] for text in texts]

    def batch(number: int) -> dict[str, Tensor]:
        chosen = torch.randint(len(rows), (settings.rows,), generator=generator_of(settings.seed, number)).tolist()
        width = max(len(rows[i]) for i in chosen)
        ids = torch.tensor([rows[i] + [rows[i][-1]] * (width - len(rows[i])) for i in chosen])
        real = torch.arange(width) < torch.tensor([len(rows[i]) for i in chosen])[:, None]
        return {"input_ids": ids, "weights": real.float()}

    def loss(learning: Any, given: Mapping[str, Tensor]) -> Tensor:
        # Padding stands on the right, where a causal model does not see it.
        logits = learning(input_ids=given["input_ids"], use_cache=False).logits[:, :-1].float()
        log_p = logits.log_softmax(-1).gather(2, given["input_ids"][:, 1:, None])[..., 0]
        weights = given["weights"][:, 1:]
        return -(log_p * weights).sum() / weights.sum()

    fit(module, batch, settings, folder, loss=loss, bar=bar)
    return open_model(module.eval(), tokenizer=model.tokenizer)


# Do resumes say more of the next job than tables do?


@dataclass(frozen=True)
class _Careers:
    """Careers of two groups of people, the covariates, and the true probability of each next title where that is known."""

    train: pd.DataFrame
    test: pd.DataFrame
    covariates: tuple[str, ...]
    truth: Callable[[str, str], np.ndarray] | None
    steps: int
    most: int  # histories that are scored

    @property
    def titles(self) -> list[str]:
        """Every title of the people to learn from."""
        return sorted(self.train["title"].unique())


RANKS, FIELDS = ("junior", "senior", "chief", "deputy", "assistant"), (
    "nurse", "cook", "driver", "clerk", "farmer", "teacher", "welder", "painter", "lawyer", "baker",
)  # fmt: skip


def _chain(seed: int, steps: int, people: int = 1500, most: int = 300) -> _Careers:
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
        most,
    )


def _mvad(seed: int, steps: int, most: int = 300) -> _Careers:
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


def _language(*, tuned: bool) -> Callable[[Callable[[int], _Careers], int], dict[str, float]]:
    def run(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
        data, model = make(seed), open_model()
        if tuned:
            texts = list(resumes(data.train, covariates=data.covariates).values())
            model = tune_on_texts(model, texts, replace(TUNING, steps=data.steps, seed=seed))
        histories, chosen, _ = _asked(data, data.test, seed)
        scores = title_scores(model, histories, [f" {title}" for title in data.titles])
        spaced = [f" {title}" for title in chosen]
        mass = float(scores.log_p.exp().sum(1).mean())
        return {
            "perplexity": scores.perplexity(spaced, renormalised=True),
            "perplexity, all text": scores.perplexity(spaced),
            "mass on titles": mass,
        }

    return run


def _logit(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    """A multinomial logit on the title before, the covariates, and each covariate with the title."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    data = make(seed)

    def features(rows: pd.DataFrame) -> pd.DataFrame:
        crossed = {f"{name} x": rows[name].astype(str) + rows["title"] for name in data.covariates}
        return rows[["title", *data.covariates]].astype(str).assign(**crossed)

    frame = data.train.sort_values(["person", "year"])
    following = frame.groupby("person")["title"].shift(-1)
    known = following.notna()
    model = make_pipeline(OneHotEncoder(handle_unknown="ignore"), LogisticRegression(max_iter=300, C=3.0))
    model.fit(features(frame[known]), following[known])
    _, chosen, before = _asked(data, data.test, seed)
    return {"perplexity": _perplexity(model.predict_proba(features(before)), list(model.classes_), chosen)}


def _marginal(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    data = make(seed)
    _, chosen, _ = _asked(data, data.test, seed)
    share = data.train["title"].value_counts(normalize=True)[data.titles].to_numpy()
    return {"perplexity": _perplexity(np.tile(share, (len(chosen), 1)), data.titles, chosen)}


def _truth(make: Callable[[int], _Careers], seed: int) -> dict[str, float]:
    data = make(seed)
    if data.truth is None:
        return {"perplexity": float("nan")}
    _, chosen, before = _asked(data, data.test, seed)
    p = np.stack([data.truth(school, title) for school, title in zip(before["after"], before["title"], strict=True)])
    return {"perplexity": _perplexity(p, data.titles, chosen)}


def _perplexity(p: np.ndarray, titles: list[str], chosen: Sequence[str]) -> float:
    own = p[np.arange(len(chosen)), [titles.index(title) for title in chosen]]
    return float(np.exp(-np.log(np.maximum(own, 1e-12)).mean()))


def _datasets(quick: bool) -> dict[str, Callable[[int], _Careers]]:
    steps = 40 if quick else 800
    made: dict[str, Callable[[int], _Careers]] = {
        "chain": cache(lambda seed: _chain(seed, steps, most=40 if quick else 300))
    }
    if find_spec("sequenzo") is not None:
        made["mvad"] = cache(lambda seed: _mvad(seed, steps // 2, most=40 if quick else 300))
    return made


def _against(method: str) -> Callable[[Mapping[tuple[str, str], float]], float]:
    return lambda v: v["tuned", "perplexity"] / v[method, "perplexity"]


register_experiment(
    Experiment(
        "careers",
        (68,),
        "2406.17972",
        "Does a tuned language model know the next job better than a multinomial logit?",
        datasets=_datasets,
        methods={
            "logit": _logit,
            "frequencies": _marginal,
            "truth": _truth,
            "not tuned": _language(tuned=False),
            "tuned": _language(tuned=True),
        },
        baseline="logit",
        claims=(
            Claim("its perplexity is within 10 % of the true chain's", _against("truth"), at_most=1.1, on="chain"),
            Claim("it is below that of the titles' frequencies", _against("frequencies"), at_most=1.0),
            Claim("it is below that of the model that was not tuned", _against("not tuned"), at_most=1.0),
            Claim("it is below that of a multinomial logit", _against("logit"), at_most=1.0),
        ),
        minutes=12,
        lower=frozenset({"perplexity", "perplexity, all text"}),
    )
)
