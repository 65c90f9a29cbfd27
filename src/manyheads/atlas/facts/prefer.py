"""An edit that moves answers to memory or to the prompt where the two contradict each other (#8, #82).

Heads are found on some facts, and the edit is judged on others. Two ways:

    pruning (#82)        the heads that carry the other side by path patching, stable over two forms, are ablated
    value scaling (#8)   the head with the most extreme direct attribution is scaled, its factor found by grid
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from manyheads.atlas.facts.conflict_paths import conflict_paths, conflict_prompts, pruning
from manyheads.atlas.facts.memory_context import Source, conflicts, find_strength, memory_context
from manyheads.errors import InputError
from manyheads.model.editing.edits import Scale
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel


def prefer(
    model: HeadModel, source: Source, *, scale: bool = False, heads: int = 5, n: int = 64, seed: int = 0
) -> HeadEdit:
    """The edit that makes `source`, "memory" or "context", win: by pruning `heads` heads, or with `scale` by scaling one.

    Its `effect` holds the shares of answers from either side before and after, on facts that no head was found on. For pruning it
    also holds the gain beside random heads of the same layers, with p. `n` prompts are used to find heads, and as many to judge.
    """
    if source not in ("memory", "context"):
        raise InputError(f"source is {source!r}; choose memory or context.")
    settings = {"n": n, "seed": seed}
    if scale:
        found = memory_context(model, conflicts(model, n=n, seed=seed, split="train"), seed=seed)
        extremes = found["memory"].top(1) | found["context"].top(1)
        strength = find_strength(model, conflicts(model, n=n, seed=seed), extremes, source, share=0.5, seed=seed)
        how = f"extreme head by direct attribution, factor {strength.factor:g} by grid"
        effect: dict[str, Any] = {"before": asdict(strength.before), "after": asdict(strength.after)}
        return HeadEdit.of(
            model, strength.edit, method="value scaling (#8)", found=how, settings=settings, effect=effect
        )
    other = "context" if source == "memory" else "memory"
    paths = conflict_paths(model, conflict_prompts(model, n=n, seed=seed, split="train"), seed=seed)
    result = pruning(model, paths[f"{other}_path"].top(heads), conflicts(model, n=n, seed=seed), seed=seed)
    effect = {
        "before": asdict(result.before),
        "after": asdict(result.after),
        "gain": result.gain(source),
        "mean gain of random sets": float(result.random_gains(source).mean()),
        "p": result.p_value(source),
    }
    how = f"top {heads} {other} heads by path patching, stable over two forms"
    return HeadEdit.of(
        model, Scale(result.heads, 0.0), method="pruning (#82)", found=how, settings=settings, effect=effect
    )
