"""Finding heads: ours beside plain forward passes and transformer-lens, on the same tokens and threads, in one run.

    make bench                      (or, in an environment with the extra `bench`:)
    manyheads bench atlas [--threads 2] [--repeats 3]

Three comparisons, on the bundled model and on a random model of GPT-2 small's size:

1. scoring all behaviours of the survey against the plain forward passes it contains (time, peak memory)
2. previous-token, duplicate-token and induction scores against transformer-lens's `run_with_cache` (time, memory, agreement)
3. a sweep that ablates every head in turn against one full forward pass per head

Times are the least of `repeats`, taken in turns; memory is what a process of its own grew by over its loaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measuring import grown, lens, print_growth, timed
from rich.console import Console
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import manyheads as mh
from manyheads.atlas.core.registry import behaviours, score_all
from manyheads.atlas.core.repeats import MAX_TOKENS, repeats
from manyheads.progress import Bar

ROWS, LENGTH = 32, 64
MODELS = ("ladon", "gpt2-small")


def load(name: str) -> mh.HeadModel:
    """The bundled model, or a random one of GPT-2 small's size (12 x 12 heads, 124 M parameters)."""
    if name == "ladon":
        return mh.open_model()
    torch.manual_seed(0)
    return mh.open_model(GPT2LMHeadModel(GPT2Config()).eval())


def score(model: mh.HeadModel) -> Any:
    """Every score of the survey, without checks."""
    return score_all(model, behaviours(), n=ROWS, seed=0, bar=Bar())[0]


def plain_passes(model: mh.HeadModel) -> list[Callable[[], Any]]:
    """The forward passes and generations that `score` contains, to be run with nothing read; a replay counts as a whole pass."""
    module, calls, generating = model.plain, [], False  # type: ignore[var-annotated]
    forward, generate = module.forward, module.generate

    def note_forward(*args: Any, **kwargs: Any) -> Any:
        if not generating:
            kept = {
                k: v
                for k, v in kwargs.items()
                if k in ("input_ids", "attention_mask", "position_ids", "logits_to_keep")
            }
            calls.append(partial(module, *args, **kept, use_cache=False))
        return forward(*args, **kwargs)

    def note_generate(*args: Any, **kwargs: Any) -> Any:
        nonlocal generating
        calls.append(partial(module.generate, *args, **kwargs))
        generating = True
        try:
            return generate(*args, **kwargs)
        finally:
            generating = False

    module.forward, module.generate = note_forward, note_generate
    try:
        score(model)
    finally:
        del module.forward, module.generate
    return calls


def run(calls: list[Callable[[], Any]]) -> None:
    """Run them, one after the other."""
    with torch.no_grad():
        for call in calls:
            call()


def patterns(model: mh.HeadModel) -> list[np.ndarray]:
    """The three pattern-based scores."""
    names = ("previous_token", "duplicate_token", "induction")
    scores, _ = score_all(model, names, n=ROWS, seed=0, bar=Bar())
    return [scores[name].values for name in names]


def lens_patterns(model: mh.HeadModel, hooked: Any) -> list[np.ndarray]:
    """The same three scores as a user of transformer-lens takes them: cache the patterns, average their diagonals."""
    rows, period, start = repeats(model, ROWS, LENGTH, 0)
    ends = ((1, start + 0 if start else 1), (period, start + period), (period - 1, start + period))
    sums = [[] for _ in ends]  # type: ignore[var-annotated]
    for chunk in rows.split(max(1, MAX_TOKENS // rows.shape[1])):
        with torch.no_grad():
            _, cache = hooked.run_with_cache(
                chunk, names_filter=lambda name: name.endswith("hook_pattern"), return_type=None
            )
        for (offset, first), kept in zip(ends, sums, strict=True):
            layers = [
                cache["pattern", layer].diagonal(-offset, dim1=-2, dim2=-1)[..., max(0, first - offset) :].mean(-1)
                for layer in range(model.n_layers)
            ]
            kept.append(torch.stack(layers, 1))
    return [np.asarray(torch.cat(kept).double().mean(0)) for kept in sums]


def sweep_inputs(model: mh.HeadModel, prompts: int) -> torch.Tensor:
    """Prompts of 33 tokens."""
    return repeats(model, prompts, 16, 3)[0]


def metric(logits: torch.Tensor) -> torch.Tensor:
    """A logit difference at the last position."""
    return logits[:, -1, 5] - logits[:, -1, 6]


def sweep(model: mh.HeadModel, prompts: int) -> np.ndarray:
    """Each head ablated in turn, replayed and batched."""
    return model.sweep(sweep_inputs(model, prompts), [mh.Ablate([head]) for head in model.heads], metric, keep=1)


def full_forwards(model: mh.HeadModel, prompts: int) -> np.ndarray:
    """Each head ablated in turn by a full forward pass."""
    inputs, values = sweep_inputs(model, prompts), []
    for head in model.heads:
        with model.editing(mh.Ablate([head])):
            values.append(metric(model.logits(inputs)).double().numpy())
    return np.stack(values)


def lens_forwards(model: mh.HeadModel, hooked: Any, prompts: int) -> np.ndarray:
    """The same with transformer-lens's hooks."""
    inputs, values = sweep_inputs(model, prompts), []
    for head in model.heads:

        def ablate(z: torch.Tensor, hook: Any, index: int = head.index) -> torch.Tensor:
            z[:, :, index] = 0
            return z

        with torch.no_grad():
            logits = hooked.run_with_hooks(inputs, fwd_hooks=[(f"blocks.{head.layer}.attn.hook_z", ablate)])
        values.append(metric(logits).double().numpy())
    return np.stack(values)


def child(task: str) -> None:
    """What a process of its own does for `grown`."""
    name, what = task.split(":")
    model = load(name)
    hooked = lens(model) if what == "lens" else None
    calls = plain_passes(model) if what == "plain" else []
    model.logits(torch.arange(4)[None])
    work: dict[str, Callable[[], Any]] = {
        "score": lambda: score(model),
        "plain": lambda: run(calls),
        "patterns": lambda: patterns(model),
        "lens": lambda: lens_patterns(model, hooked),
    }
    print_growth(work[what])


def peak(name: str, what: str, threads: int) -> float:
    """MiB by which a process of its own grew over its loaded model while doing `what`: at least 1, to be divided by."""
    return max(1.0, grown(__file__, f"{name}:{what}", threads))


def compare(name: str, rounds: int, threads: int, table: Table) -> None:
    """All comparisons for one model."""
    model = load(name)

    def row(what: str, ours: float, baseline: str, theirs: float, unit: str, goal: str, note: str = "") -> None:
        speed = goal.startswith(">=")
        ratio = theirs / ours if speed else ours / theirs
        digits = 3 if unit == "s" else 0
        table.add_row(
            name,
            what,
            f"{ours:.{digits}f} {unit}",
            baseline,
            f"{theirs:.{digits}f} {unit}",
            f"{ratio:.2f}x",
            goal,
            note,
        )

    calls = plain_passes(model)
    ours, theirs = timed(rounds, lambda: score(model), lambda: run(calls))
    row("all scores, time", ours, "its plain forwards", theirs, "s", "<= 1.5x", f"{len(calls)} passes")
    row(
        "all scores, peak memory",
        peak(name, "score", threads),
        "its plain forwards",
        peak(name, "plain", threads),
        "MiB",
        "<= 1.5x",
    )
    hooked = lens(model)
    a, b = patterns(model), lens_patterns(model, hooked)
    gap = max(float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
    ours, theirs = timed(rounds, lambda: patterns(model), lambda: lens_patterns(model, hooked))
    row("pattern scores, time", ours, "transformer-lens", theirs, "s", ">= 3x", f"scores differ by {gap:.0e}")
    row(
        "pattern scores, peak memory",
        peak(name, "patterns", threads),
        "transformer-lens",
        peak(name, "lens", threads),
        "MiB",
        "< 1x",
    )
    for prompts in (1, 8):
        what = f"ablate each head on {prompts} prompt{'s' if prompts > 1 else ''}, time"
        gap = float(np.abs(sweep(model, prompts) - full_forwards(model, prompts)).max())
        ours, theirs, lenses = timed(
            rounds,
            lambda prompts=prompts: sweep(model, prompts),
            lambda prompts=prompts: full_forwards(model, prompts),
            lambda prompts=prompts: lens_forwards(model, hooked, prompts),
        )
        row(what, ours, "full forwards", theirs, "s", ">= 3x", f"metrics differ by {gap:.0e}")
        row(what, ours, "transformer-lens hooks", lenses, "s", ">= 3x")


def main(
    threads: Annotated[int, typer.Option(help="Threads of every side.")] = 2,
    repeats: Annotated[int, typer.Option(help="Rounds; the least time counts.")] = 3,
    models: Annotated[str, typer.Option(help="Which models, separated by commas.")] = ",".join(MODELS),
    child_task: Annotated[str, typer.Option("--child", hidden=True)] = "",
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    if child_task:
        child(child_task)
        return
    table = Table(title=f"atlas, {threads} threads, {ROWS} rows of {2 * LENGTH} repeated tokens, least of {repeats}")
    for column in ("model", "what", "ours", "baseline", "theirs", "ratio", "goal", "note"):
        table.add_column(column)
    names = models.split(",")
    if unknown := set(names) - set(MODELS):
        raise mh.ManyheadsError(f"there is no model {', '.join(unknown)}; choose from {', '.join(MODELS)}.")
    for name in names:
        compare(name, repeats, threads, table)
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
