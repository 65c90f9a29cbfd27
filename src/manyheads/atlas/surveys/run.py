"""The survey: every behaviour of one model in one sweep of readers, each with its causal check.

Behaviours that share inputs share forward passes: see `atlas.core.registry`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from manyheads.atlas.core.causal import ablation_effects, causal_check
from manyheads.atlas.core.judges import Judge, by_task
from manyheads.atlas.core.null import NullScores, null_scores
from manyheads.atlas.core.registry import behaviours as registered
from manyheads.atlas.core.registry import score_all, top_heads
from manyheads.atlas.core.repeats import repeats
from manyheads.atlas.core.result import Atlas, CausalCheck, PatternExample
from manyheads.atlas.core.screening import screened_effects
from manyheads.atlas.core.silent import loud, silent_heads, write_norms
from manyheads.atlas.surveys.asking import AskedTask, asked_tasks, blind_behaviours
from manyheads.atlas.surveys.budget import LEAST, NULLS, SCORES, Budget
from manyheads.atlas.surveys.stability import stability
from manyheads.atlas.surveys.state import SurveyState
from manyheads.errors import InputError, ManyheadsError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.inputs import check_integer, check_number, check_seed, read_text
from manyheads.model.headmodel import HeadModel
from manyheads.model.packing import Packed
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention
from manyheads.progress import Bar, Deadline
from manyheads.tasks import Needle, encode, get_task
from manyheads.tasks.texts import passages
from manyheads.version import __version__

FULL = 32  # the `n` at which a check has its judge's own number of rows


def survey(
    model: HeadModel,
    behaviours: Sequence[str] | None = None,
    *,
    checks: bool = True,
    n: int = 32,
    n_random: int = 20,
    seed: int = 0,
    seeds: int = 1,
    budget: float | None = None,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> Atlas:
    """Score every head for every behaviour (or those named) and check each claim causally.

    `n` rows of repeated tokens are read, a quarter more needle tests, and checks are made on rows in proportion. `n_random`
    (>= 20) is the number of random head sets of each check. With `seeds` > 1 the scores are taken that many times on fresh
    inputs, and `agreement` is how well the rankings agree. A behaviour this model cannot be scored for (no tokenizer, no
    ordinals) is left out, and `skipped` has the reason. `InputError` for a behaviour that is not known, or if none is left.

    `budget` is in minutes (None: as long as it takes). Within it, linear layers run on packed weights where that is faster,
    fewer examples are read and heads are screened (see `budget.py` and `atlas/core/screening.py`), and where time is left,
    checks have more random sets. `card["settings"]` says what was done.

    In `folder` (see `files.working_folder`) each result is written as soon as it is there, and what an interrupted call with the
    same arguments wrote there is not computed again.
    """
    for name, value, least in (("n", n, 2), ("n_random", n_random, 20), ("seeds", seeds, 1)):
        check_integer(value, name, least)
    check_seed(seed)
    if budget is not None:
        check_number(budget, "budget", 0.1, 1e6)
    every = registered()
    names = list(every) if behaviours is None else list(dict.fromkeys(behaviours))
    unknown = [name for name in names if name not in every]
    if unknown or not names:
        raise InputError(f"unknown behaviour {', '.join(unknown) or '(none)'}; choose from {', '.join(every)}.")
    with Packed(
        model.plain, wanted=None if budget else False
    ):  # with a budget, faster products count more than rounding
        return _survey(model, names, checks, n, n_random, seed, seeds, budget, folder, bar)


def _survey(
    model: HeadModel,
    names: list[str],
    checks: bool,
    n: int,
    n_random: int,
    seed: int,
    seeds: int,
    budget: float | None,
    folder: Path | None,
    bar: Bar,
) -> Atlas:
    every = registered()
    started = time.perf_counter()
    state, time_left = SurveyState(folder), Budget(budget)
    asked = asked_tasks(model, names, seed=seed + 1, state=state, bar=bar)
    blind = blind_behaviours(names, asked)
    tasks = {name: put.task for name in names if (put := asked.get(every[name].judge.name)) and put.how != "plain"}
    tasks = {name: task for name, task in tasks.items() if "task" in signature(every[name].score).parameters}
    done = {name: one for name in names if (one := state.scores(name)) is not None}

    def keep(found: Mapping[str, HeadScores]) -> None:
        done.update(found)
        state.keep(found)

    examples = dict.fromkeys(names, n) | time_left.examples(
        model,
        [name for name in names if name not in done and name not in blind],
        n,
        share=SCORES / seeds,
        seed=seed,
        tasks=tasks,
        keep=keep,
        bar=bar,
    )
    able = [name for name in names if name not in blind]
    scores, skipped = score_all(model, able, n=examples, seed=seed, bar=bar, tasks=tasks, done=done, keep=keep)
    skipped |= blind
    if not scores:
        raise UnsupportedError("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    agreement = stability(model, scores, seeds, n=examples, seed=seed, tasks=tasks, bar=bar)
    about = {name: every[name].about.to_json() | {"judge": every[name].judge.name} for name in scores}
    silent = silent_heads(write_norms(model, seed=seed))
    if checks:
        for name, null in _nulls(model, scores, seed, bar, state, time_left).items():
            about[name] |= {"threshold": null.threshold(about[name]["threshold"]), "null": asdict(null)}
    found = {
        name: top_heads(loud(one, silent), about[name]["threshold"])
        for name, one in scores.items()
        if one.values.max() > 0
    }
    judges = _judges(model, scores, asked, n, seed + 1, time_left) if checks else {}
    if budget is not None and judges:
        fitting = time_left.rows(model, _to_check(found, judges, state), n_random, n)
        judges = _judges(model, scores, asked, fitting, seed + 1, time_left) if fitting < n else judges
    results = check_all(model, found, judges, n_random, seed, bar, state, time_left)
    effects = _effects(model, judges, seed, bar, state, time_left)
    settings: dict[str, Any] = {"n": n, "n_random": n_random, "checks": checks, "seeds": seeds, "budget": budget}
    if budget is not None:
        settings["examples"] = {name: one.n for name, one in scores.items() if one.n}
    return Atlas(
        scores={name: scores[name] for name in names if name in scores},
        checks=results,
        patterns=_patterns(model, scores, seed),
        effects=effects,
        agreement=agreement,
        about=about,
        skipped=skipped,
        card=_card(model, seed, time.perf_counter() - started, settings)
        | {"silent": [str(head) for head in silent], "families": {name: one.to_json() for name, one in asked.items()}},
    )


def check_all(
    model: HeadModel,
    found: dict[str, HeadSet],
    judges: dict[str, Judge],
    n_random: int,
    seed: int,
    bar: Bar,
    state: SurveyState,
    budget: Budget,
) -> list[CausalCheck]:
    """The causal checks of every behaviour that has a judge, with `n_random` random sets or as many more as the time allows.

    Those of one judge are made together: its run is not kept any longer.
    """
    every = registered()
    todo = [(name, mode) for name in found if every[name].judge.name in judges for mode in every[name].modes]
    left = _to_check(found, judges, state)
    if not budget.holds(model, left, n_random):
        # Every behaviour gets a verdict before any gets a second one by another way of ablating.
        todo = [(name, mode) for name, mode in todo if mode == every[name].modes[0] or state.check(name, mode)]
        left = [(found[n], judges[every[n].judge.name]) for n, mode in todo if state.check(n, mode) is None]
    n_random = budget.random_sets(model, left, n_random)
    step = bar.step("causal checks", len(todo))
    results = {}
    for judged, judge in judges.items():
        for name, mode in todo:
            if every[name].judge.name == judged:
                check = state.check(name, mode)
                if check is None:
                    check = causal_check(model, name, found[name], judge, mode, n_random=n_random, seed=seed)
                    state.keep_check(check)
                results[name, mode] = check
                step(1)
        judge.release()
    return [results[one] for one in todo]


def _to_check(found: dict[str, HeadSet], judges: dict[str, Judge], state: SurveyState) -> list[tuple[HeadSet, Judge]]:
    """The heads and judge of each check that is not done."""
    every = registered()
    return [
        (found[name], judges[every[name].judge.name])
        for name in found
        if every[name].judge.name in judges
        for mode in every[name].modes
        if state.check(name, mode) is None
    ]


def _effects(
    model: HeadModel, judges: dict[str, Judge], seed: int, bar: Bar, state: SurveyState, budget: Budget
) -> dict[str, HeadScores]:
    """What ablating each head alone costs, by judge; screened where there is no time for all heads."""
    effects: dict[str, HeadScores] = {}
    for i, (name, judge) in enumerate(judges.items()):
        done = state.scores(f"effects-{name}")
        if done is None:
            most = budget.ablations(model, judge, 1 / (len(judges) - i))
            step = bar.step(f"each head alone: {name}", most)
            if most >= len(model.heads):
                done = ablation_effects(model, name, judge, seed=seed, bar=step)
            else:
                done = screened_effects(model, name, judge, most=most, seed=seed, bar=step)
            state.keep({f"effects-{name}": done})
            judge.release()
        effects[name] = done
    return effects


def _nulls(
    model: HeadModel, scores: Mapping[str, HeadScores], seed: int, bar: Bar, state: SurveyState, budget: Budget
) -> dict[str, NullScores]:
    """The nulls of these behaviours, as kept or new; with a budget, those that are scored in its share of the time."""
    saved = state.note("nulls")
    if saved is None:
        step = bar.step("thresholds from an untrained twin", None)
        if budget.minutes is not None:
            step = Deadline(60 * NULLS * budget.minutes)
        saved = {name: asdict(null) for name, null in null_scores(model, list(scores), seed=seed, bar=step).items()}
        state.keep_note("nulls", saved)
    return {name: NullScores(**null) for name, null in saved.items() if name in scores}


def _judges(
    model: HeadModel, names: Iterable[str], asked: Mapping[str, AskedTask], n: int, seed: int, budget: Budget
) -> dict[str, Judge]:
    """The judges of these behaviours, each run and timed once; without those this model has no tokens for, or is blind to.

    Each has its own number of rows in proportion to `n`, but not fewer than `LEAST`.
    """
    every = registered()
    wanted = {every[name].judge.name: every[name].judge for name in names}
    judges = {}
    for name, judge in wanted.items():
        if name in asked and asked[name].verdict.blind:
            continue
        if name in asked and asked[name].how != "plain":
            judge = by_task(asked[name].task, n=judge.n)
        with contextlib.suppress(ManyheadsError):
            made = judge(model, seed, n=max(min(LEAST, judge.n), round(judge.n * n / FULL)))
            budget.cost(model, made)
            made.release()
            judges[name] = made
    return judges


def _patterns(model: HeadModel, scores: dict[str, HeadScores], seed: int, k: int = 2) -> list[PatternExample]:
    """The patterns of each behaviour's top heads on one example, for the report: one pass an example."""
    wanted: dict[str, list[tuple[str, int, int]]] = {}
    for name in scores:
        for head in scores[name].top(k):
            wanted.setdefault(registered()[name].example, []).append((name, head.layer, head.index))
    patterns = []
    for example, heads in wanted.items():
        try:
            ids = _example_ids(model, example, seed)
        except ManyheadsError:
            continue
        kept: dict[tuple[int, int], Any] = {}

        def note(call: AttentionCall, heads: Any = heads, kept: Any = kept) -> None:
            for layer, h in {(layer, h) for _, layer, h in heads if layer == call.layer}:
                kept[layer, h] = call.pattern[0, h].float().cpu().numpy()

        model.look(ids, ReadAttention(note))
        tokens = tuple(_token(model, int(i)) for i in ids[0])
        patterns += [PatternExample(name, f"L{layer}H{h}", tokens, kept[layer, h]) for name, layer, h in heads]
    return patterns


def _example_ids(model: HeadModel, example: str, seed: int) -> torch.Tensor:
    if example == "repeats":
        return repeats(model, 1, 12, seed + 2)[0]
    if example == "text":
        return passages(model, None, n=1, length=32, seed=seed + 2)
    if model.tokenizer is None:
        raise InputError("no tokenizer")
    task = Needle(shortest=24, longest=32) if example == "needle" else get_task(example)
    batch = encode(task, model.tokenizer, 1, seed + 2)
    return batch.input_ids[:, -int(batch.attention_mask[0].sum()) :]


def _token(model: HeadModel, token: int) -> str:
    return str(token) if model.tokenizer is None else model.tokenizer.decode([token])


def _card(model: HeadModel, seed: int, seconds: float, settings: dict[str, Any]) -> dict[str, Any]:
    path = str(getattr(model.config, "_name_or_path", "") or type(model.plain).__name__)
    card = Path(path) / "card.md"
    more = {"card_markdown": read_text(card)} if card.is_file() else {}
    return more | {
        "model": Path(path).name if Path(path).is_absolute() else path,
        "architecture": type(model.plain).__name__,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "n_kv_heads": model.n_kv_heads,
        "head_dim": model.head_dim,
        "parameters": sum(p.numel() for p in model.plain.parameters()),
        "dtype": str(next(model.plain.parameters()).dtype).removeprefix("torch."),
        "fingerprint": model.fingerprint,
        "proof": {"errors": dict(model.proof.errors), "failed": dict(model.proof.failed)},
        "seed": seed,
        "version": __version__,
        "seconds": round(seconds, 1),
        "settings": settings,
    }
