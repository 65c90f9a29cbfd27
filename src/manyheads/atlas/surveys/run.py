"""The survey: every behaviour of one model in one sweep of readers, each with its causal check.

Behaviours that share inputs share forward passes: see `atlas.core.registry`.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from manyheads.atlas.core.causal import ablation_effects, causal_check
from manyheads.atlas.core.judges import Judge
from manyheads.atlas.core.registry import behaviours as registered
from manyheads.atlas.core.registry import score_all, top_heads
from manyheads.atlas.core.repeats import repeats
from manyheads.atlas.core.result import Atlas, CausalCheck, PatternExample
from manyheads.atlas.surveys.stability import stability
from manyheads.errors import InputError, ManyheadsError, UnsupportedError
from manyheads.heads import HeadScores, HeadSet
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention
from manyheads.progress import Bar
from manyheads.tasks import Needle, encode, get_task
from manyheads.tasks.texts import passages
from manyheads.version import __version__


def survey(
    model: HeadModel,
    behaviours: Sequence[str] | None = None,
    *,
    checks: bool = True,
    n: int = 32,
    n_random: int = 20,
    seed: int = 0,
    seeds: int = 1,
    bar: Bar = Bar(),
) -> Atlas:
    """Score every head for every behaviour (or those named) and check each claim causally.

    `n` rows of repeated tokens are read, and a quarter more needle tests; `n_random` (>= 20) is the number of random
    head sets of each check. With `seeds` > 1 the scores are taken that many times on fresh inputs, and `agreement` is how well
    the rankings agree. A behaviour this model cannot be scored for (no tokenizer, no ordinals) is left out, and
    `skipped` has the reason. `InputError` for a behaviour that is not known, or if none is left.
    """
    every = registered()
    names = list(every) if behaviours is None else list(dict.fromkeys(behaviours))
    unknown = [name for name in names if name not in every]
    if unknown or not names:
        raise InputError(f"unknown behaviour {', '.join(unknown) or '(none)'}; choose from {', '.join(every)}.")
    started = time.perf_counter()
    scores, skipped = score_all(model, names, n=n, seed=seed, bar=bar)
    if not scores:
        raise UnsupportedError("; ".join(f"{name}: {reason}" for name, reason in skipped.items()))
    found = {name: top_heads(scores[name], every[name].about) for name in scores if scores[name].values.max() > 0}
    agreement = stability(model, scores, seeds, n=n, seed=seed, bar=bar)
    judges = _judges(model, scores, seed + 1) if checks else {}
    results = check_all(model, found, judges, n_random, seed, bar)
    effects = _effects(model, judges, seed, bar)
    patterns = _patterns(model, scores, seed)
    settings = {"n": n, "n_random": n_random, "checks": checks, "seeds": seeds}
    return Atlas(
        scores={name: scores[name] for name in names if name in scores},
        checks=results,
        patterns=patterns,
        effects=effects,
        agreement=agreement,
        about={name: every[name].about.to_json() | {"judge": every[name].judge.name} for name in scores},
        skipped=skipped,
        card=_card(model, seed, time.perf_counter() - started, settings),
    )


def check_all(
    model: HeadModel,
    found: dict[str, HeadSet],
    judges: dict[str, Judge],
    n_random: int,
    seed: int,
    bar: Bar,
) -> list[CausalCheck]:
    """The causal checks of every behaviour that has a judge."""
    every = registered()
    todo = [(name, mode) for name in found if every[name].judge.name in judges for mode in every[name].modes]
    step = bar.step("causal checks", len(todo))
    results = []
    for name, mode in todo:
        judge = judges[every[name].judge.name]
        results.append(causal_check(model, name, found[name], judge, mode, n_random=n_random, seed=seed))
        step(1)
    return results


def _effects(model: HeadModel, judges: dict[str, Judge], seed: int, bar: Bar) -> dict[str, HeadScores]:
    """What ablating each head alone costs, by judge."""
    effects = {}
    for name, judge in judges.items():
        step = bar.step(f"each head alone: {name}", model.n_layers * model.n_heads)
        effects[name] = ablation_effects(model, name, judge, seed=seed, bar=step)
    return effects


def _judges(model: HeadModel, names: Iterable[str], seed: int) -> dict[str, Judge]:
    """The judges of these behaviours, each with its clean run; without those this model has no tokenizer or tokens for."""
    every = registered()
    wanted = {every[name].judge.name: every[name].judge for name in names}
    judges = {}
    for name, judge in wanted.items():
        with contextlib.suppress(ManyheadsError):
            judges[name] = judge(model, seed)
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
    more = {"card_markdown": card.read_text()} if card.is_file() else {}
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
