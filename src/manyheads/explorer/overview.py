"""An atlas as the plain numbers that the page draws: scores, effects, checks and roles of every head."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from manyheads.atlas.core.result import Atlas, CausalCheck, PatternExample
from manyheads.atlas.core.roles import HeadRoles, Role, roles
from manyheads.errors import InputError
from manyheads.heads import Head, HeadScores
from manyheads.pages.atlas_tables import checks_of, families, model_name, q_of, threshold_of, title_of
from manyheads.report.numbers import visible
from manyheads.version import __version__

EXAMPLE = "red cat seven lamp Paris red cat seven lamp"
HISTORY = ("update", "loss", "accuracy", "head")  # columns of a history beside its scores


def head_names(shape: tuple[int, int]) -> list[str]:
    """Every head's name, layer by layer: the order of all lists of numbers here."""
    return [str(Head(layer, index)) for layer in range(shape[0]) for index in range(shape[1])]


def atlas_numbers(atlas: Atlas) -> dict[str, Any]:
    """Everything of an atlas that is drawn; numbers that are not there are None."""
    return {
        "name": model_name(atlas),
        "fingerprint": atlas.card.get("fingerprint"),
        "shape": list(atlas.shape),
        "series": [score_series(atlas, name) for name in atlas.scores],
        "effects": [_effects(name, scores) for name, scores in atlas.effects.items()],
        "checks": [_check(atlas, check) for check in atlas.checks],
        "roles": {
            str(head): _roles(held) for head, held in roles(atlas).items() if held.roles or held.traits or held.silent
        },
        "kinds": _kinds(atlas),
        "skipped": dict(atlas.skipped),
        "patterns": [example_numbers(example) for example in atlas.patterns],
    }


def score_series(atlas: Atlas, name: str) -> dict[str, Any]:
    """One behaviour's scores, in the order of `head_names`, with what they mean."""
    scores, about, family = atlas[name], atlas.about.get(name, {}), families(atlas)[name]
    checks = checks_of(atlas, name)
    return {
        "name": name,
        "title": title_of(atlas, name),
        "kind": family.kind,
        "family": family.title,
        "unit": str(about.get("unit") or ""),
        "formula": str(about.get("formula") or ""),
        "trait": bool(about.get("trait")),
        "threshold": threshold_of(atlas, name),
        "n": scores.n,
        "values": numbers(scores.values),
        "stderr": numbers(scores.stderr),
        "p": None if not checks else _number(checks[0].p_value),
        "q": None if not checks else _number(q_of(atlas, checks[0])),
    }


def numbers(values: Float[np.ndarray, "..."]) -> list[float | None]:
    """Four significant digits of each, None for what is not finite."""
    return [_number(x) for x in np.asarray(values).ravel().tolist()]


def pattern_numbers(pattern: Float[np.ndarray, "T S"]) -> str:
    """A pattern in one byte a weight, row by row, base64: as text a long prompt would be several times as large."""
    weights = np.clip(np.round(255 * np.nan_to_num(np.asarray(pattern, dtype=np.float64))), 0, 255).astype(np.uint8)
    return base64.b64encode(weights.tobytes()).decode()


def example_numbers(example: PatternExample) -> dict[str, Any]:
    """An atlas's example pattern."""
    return {
        "behaviour": example.behaviour,
        "head": example.head,
        "tokens": [visible(token) for token in example.tokens],
        "weights": pattern_numbers(example.pattern),
    }


def _number(x: float) -> float | None:
    return float(f"{x:.4g}") if math.isfinite(x) else None


def _effects(name: str, scores: HeadScores) -> dict[str, Any]:
    metric = str(scores.meta.get("metric") or "the judge's metric")
    return {
        "name": name,
        "title": f"Ablated alone: {name.replace('_', ' ')}",
        "unit": metric,
        "values": numbers(scores.values),
        "stderr": numbers(scores.stderr),
        "n": scores.n,
    }


def _check(atlas: Atlas, check: CausalCheck) -> dict[str, Any]:
    return {
        "behaviour": check.behaviour,
        "title": title_of(atlas, check.behaviour) if check.behaviour in atlas.scores else check.behaviour,
        "mode": check.mode,
        "heads": list(check.heads),
        "metric": check.metric,
        "n": check.n,
        "effect": _number(check.effect),
        "stderr": _number(check.stderr),
        "random": _number(check.random_mean),
        "spread": _number(check.random_spread),
        "sets": len(check.random_effects),
        "p": _number(check.p_value),
        "q": _number(q_of(atlas, check)),
    }


def _roles(held: HeadRoles) -> dict[str, Any]:
    return {
        "roles": [_role(role) for role in held.roles],
        "traits": [_role(role) for role in held.traits],
        "polysemantic": held.polysemantic,
        "silent": held.silent,
    }


def _role(role: Role) -> dict[str, Any]:
    effect = None if role.effect is None else _number(role.effect)
    return {
        "behaviour": role.behaviour,
        "kind": role.kind,
        "score": _number(role.score),
        "stderr": _number(role.stderr),
        "confidence": _number(role.confidence),
        "p": None if role.p_value is None else _number(role.p_value),
        "effect": effect,
    }


def _kinds(atlas: Atlas) -> list[dict[str, str]]:
    found = {family.kind: family for family in families(atlas).values()}
    return [{"kind": family.kind, "title": family.title, "letter": family.letter} for family in found.values()]


def overview(
    about: dict[str, Any],
    *,
    atlases: Sequence[Atlas] = (),
    history: Path | None = None,
    prompts: Sequence[dict[str, Any]] = (),
    labels: Sequence[dict[str, Any]] = (),
    label_file: Path | None = None,
    forecast: dict[str, Any] | None = None,
    can_ask: bool = False,
) -> dict[str, Any]:
    """All that the page has at once. `about` says what the model is (`Workbench.about`), `prompts` what was asked before."""
    drawn = [atlas_numbers(atlas) for atlas in atlases]
    for one in drawn:
        if one["shape"] != [about["layers"], about["heads"]]:
            wanted = f"{about['layers']} layers of {about['heads']} heads"
            raise InputError(
                f"the atlas {one['name']} is of {one['shape'][0]} layers of {one['shape'][1]} heads, not of {wanted}."
            )
    return {
        "version": __version__,
        "model": {**about, "can_ask": can_ask},
        "atlases": drawn,
        "history": None if history is None else history_numbers(history, (about["layers"], about["heads"])),
        "forecast": forecast,
        "prompts": list(prompts),
        "labels": list(labels),
        "label_file": None if label_file is None else label_file.name,
        "example": EXAMPLE,
        "start": _start(drawn),
    }


def about_atlas(atlas: Atlas) -> dict[str, Any]:
    """What an atlas's card says of its model, where the model itself is not open."""
    card = atlas.card
    return {
        "name": model_name(atlas),
        "layers": atlas.shape[0],
        "heads": atlas.shape[1],
        "kv_heads": card.get("n_kv_heads"),
        "head_dim": card.get("head_dim"),
        "parameters": card.get("parameters"),
        "fingerprint": card.get("fingerprint"),
        "behaviours": [],
    }


def history_shape(file: Path) -> tuple[int, int]:
    """Layers and heads of a table of `manyheads lab watch`."""
    heads = [Head.parse(name) for name in _history(file)["head"].unique()]
    return 1 + max(head.layer for head in heads), 1 + max(head.index for head in heads)


def history_numbers(file: Path, shape: tuple[int, int]) -> dict[str, Any]:
    """Scores over training, from a table of `manyheads lab watch --table`. `InputError` for a table of another model."""
    frame = _history(file)
    names = [name for name in frame.columns if name not in HISTORY]
    updates = frame["update"].drop_duplicates().tolist()
    if sorted(frame["head"].unique()) != sorted(head_names(shape)) or len(frame) != len(updates) * shape[0] * shape[1]:
        raise InputError(
            f"{file} tells of other heads than {shape[0]} layers of {shape[1]}; give the model it belongs to."
        )
    first = frame.drop_duplicates("update")
    order = frame.pivot(index="update", columns="head", values=names)
    series = [
        {
            "name": name,
            "title": name.capitalize(),
            "unit": "",
            "values": [numbers(row) for row in order[name].loc[updates, head_names(shape)].to_numpy()],
        }
        for name in names
    ]
    curves = {name: numbers(first[name].to_numpy()) for name in ("loss", "accuracy")}
    return {"steps": [int(update) for update in updates], "curves": curves, "series": series}


def _history(file: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is no readable Parquet table ({' '.join(str(error).split())[:120]}).") from None
    missing = [name for name in HISTORY if name not in frame.columns]
    if missing or frame.empty or len(frame.columns) <= len(HISTORY):
        raise InputError(
            f"{file} is no table of `manyheads lab watch --table`: it lacks {', '.join(missing) or 'scores'}."
        )
    return frame


def _start(drawn: Sequence[dict[str, Any]]) -> str | None:
    """The head whose card is open at first: the one with the surest role, if there is one."""
    for one in drawn[:1]:
        held = {name: role["roles"][0] for name, role in one["roles"].items() if role["roles"]}
        if held:
            return max(held, key=lambda name: held[name]["score"] or 0.0)
    return None
