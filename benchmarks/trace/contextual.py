"""Contextual decomposition: its cost beside a forward pass, and finding heads beside path patching, in one run.

    manyheads bench contextual [--threads 1] [--rows 16]

1. one decomposition (a head of layer 0 alone; all heads, each) against a forward pass of the same prompts
2. head discovery on an IOI template of the bundled model: effects of all heads on the logits and on each of the heads that matter
   most. CD-T has every head as a target after one sweep; path patching takes the logits, then each target by itself.
3. how well either's effect on the logits finds the heads whose mean ablation costs most: AUC, and precision (= recall) of the
   k best. Path patching gets the corrupted twin that its definition asks for. With `--model` of the permutation toy
   (`manyheads.lab.permutations`), the same for it.

Times are the least of `repeats`, on `rows` prompts. Ground truth, the fall of the mean logit difference, and both sides' scores
are taken over all prompts.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.heads import Head, HeadScores
from manyheads.lab.permutations import permutation_prompts
from manyheads.model.editing.edits import Ablate
from manyheads.model.reading.attention import Part
from manyheads.model.replay.patching import path_patching
from manyheads.tasks import encode
from manyheads.tasks.families.ioi import IOI
from manyheads.trace.contextual.effects import HeadEffects, head_effects
from manyheads.trace.contextual.splitting import Splitter

VARIANTS = {
    f"CD-T, {attention} pattern, {'signs' if signs else 'no signs'}": dict(attention=attention, signs=signs)
    for attention in ("total", "own")
    for signs in (False, True)
}


class Setting:
    """A model, prompts with answers and foils, twins, and the metric of both."""

    def __init__(self, name: str, model: mh.HeadModel, clean: Any, corrupted: Any, answers: Any, foils: Any) -> None:
        self.name, self.model, self.clean, self.corrupted = name, model, clean, corrupted
        self.answers, self.foils = answers, foils
        self.mean = model.mean_z(corrupted, by_position=True)

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """Logit difference at the last position."""
        row = torch.arange(len(logits))
        return logits[row, -1, self.answers[row]] - logits[row, -1, self.foils[row]]

    def truth(self) -> np.ndarray:
        """What mean-ablating each head costs."""
        edits = [Ablate([head], "mean", self.mean) for head in self.model.heads]
        ablated = self.model.sweep(self.clean, edits, self.metric, keep=1).mean(1)
        whole = float(self.metric(self.model.logits(self.clean)[:, -1:]).mean())
        return (whole - ablated).reshape(self.model.shape)

    def first(self, n: int) -> Setting:
        """The first prompts, with the means of all."""
        some = Setting.__new__(Setting)
        some.__dict__ = self.__dict__ | dict(
            clean=self.clean[:n], corrupted=self.corrupted[:n], answers=self.answers[:n], foils=self.foils[:n]
        )
        return some


def ioi(n: int) -> Setting:
    """One template of IOI at one length, so that positions mean the same; three strangers as twins."""
    model = mh.open_model()
    examples = [e for e in IOI(order="ABBA", corruption="abc").examples(60 * n) if e.prompt.startswith("When ")]
    batch = encode(examples, model.tokenizer, len(examples))
    lengths = batch.attention_mask.sum(1)
    width = int(lengths.mode().values)
    rows = (lengths == width).nonzero()[:n, 0]
    assert batch.corrupted_ids is not None
    ids, twins = batch.input_ids[rows, -width:], batch.corrupted_ids[rows, -width:]
    return Setting("ladon, IOI", model, ids, twins, batch.answer_ids[rows], batch.foil_ids[rows])


def toy(path: str, n: int) -> Setting:
    """The permutation toy; twins are prompts of any permutation."""
    model = mh.open_model(path)
    shots, twins = permutation_prompts(n, seed=3), permutation_prompts(n, seed=9)
    foils = model.logits(shots.tokens)[:, -1].scatter(1, shots.answers[:, None], -torch.inf).argmax(-1)
    return Setting("permutation toy", model, shots.tokens, twins.tokens, shots.answers, foils)


def contextual(given: Setting, **variant: Any) -> HeadEffects:
    """All effects of all heads."""
    return head_effects(given.model, given.clean, given.mean, given.answers, given.foils, **variant)


def paths(given: Setting, targets: list[Head]) -> np.ndarray:
    """All heads to the logits, and from every head below to each target: its query, key and value at once."""
    effects = path_patching(given.model, given.clean, given.corrupted, given.metric, keep=1)
    for target in targets:
        senders = [head for head in given.model.heads if head.layer < target.layer]
        ends: list[tuple[Head, Part]] = [(target, "query"), (target, "key"), (target, "value")]
        if senders:
            path_patching(
                given.model, given.clean, given.corrupted, given.metric, senders=senders, receivers=ends, keep=1
            )
    return effects.by_head(*given.model.shape)


def least(repeats: int, *functions: Callable[[], Any]) -> list[float]:
    """Seconds of each, in turns."""
    seconds = [[] for _ in functions]  # type: ignore[var-annotated]
    for _ in range(repeats):
        for times, function in zip(seconds, functions, strict=True):
            started = time.perf_counter()
            function()
            times.append(time.perf_counter() - started)
    return [min(times) for times in seconds]


def found(scores: np.ndarray, truth: np.ndarray, k: int) -> tuple[float, float]:
    """AUC of the k heads with the largest truth, and the share of them among the k with the largest score."""
    scores, top = scores.ravel(), np.zeros(truth.size, bool)
    top[np.argsort(-truth.ravel())[:k]] = True
    inside, outside = scores[top][:, None], scores[~top][None]
    best = np.argsort(-scores)[:k]
    return float(((inside > outside) + 0.5 * (inside == outside)).mean()), float(top[best].mean())


def main(
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    rows: Annotated[int, typer.Option(help="Prompts that are timed.")] = 16,
    truth: Annotated[int, typer.Option(help="Prompts that are scored; eight times as many of the toy.")] = 64,
    top: Annotated[int, typer.Option(help="How many heads the ground truth calls important.")] = 6,
    targets: Annotated[int, typer.Option(help="Heads to which paths are traced, besides the logits.")] = 6,
    repeats: Annotated[int, typer.Option(help="Runs of what is timed.")] = 3,
    model: Annotated[str | None, typer.Option(help="A saved permutation toy to measure as well.")] = None,
) -> None:
    """Print one table a model."""
    torch.set_num_threads(threads)
    for setting in [ioi(truth)] + ([toy(model, 8 * truth)] if model else []):
        some, true = setting.first(rows), setting.truth()
        recording = some.model.record(some.clean)
        ends = [h for h, _ in HeadScores("", true, true, truth).ranked()[:targets]]
        table = Table(title=f"{setting.name}, {rows} prompts of {some.clean.shape[1]} tokens, {threads} threads")
        for column in (
            "method",
            "one / pass",
            "each of all / pass",
            "seconds",
            "x path patching",
            "AUC",
            f"best {top} of {top}",
        ):
            table.add_column(column)
        jobs: list[Callable[[], Any]] = [
            lambda some=some: paths(some, []),
            lambda some=some, ends=ends: paths(some, ends),
            lambda some=some: some.model.logits(some.clean),
        ]
        for variant in VARIANTS.values():
            splitter = Splitter(some.model, **variant)  # type: ignore[arg-type]
            jobs.append(lambda some=some, s=splitter, r=recording: s.heads(r, [(0, 0)], some.mean))
            jobs.append(lambda some=some, variant=variant: contextual(some, **variant))
        alone, patching, forward, *split = least(repeats, *jobs)
        table.add_row("path patching, logits alone", "", "", f"{alone:.2f}", f"{patching / alone:.1f}", "", "")
        ranks = found(np.abs(paths(setting, [])), true, top)
        shown = f"path patching, logits + {len(ends)} heads"
        table.add_row(shown, "", "", f"{patching:.2f}", "1.0", *(f"{v:.2f}" for v in ranks))
        for (name, variant), one, sweep in zip(VARIANTS.items(), split[::2], split[1::2], strict=True):
            ranks = found(contextual(setting, **variant).on(), true, top)
            times = one / forward, sweep / len(some.model.heads) / forward, sweep
            table.add_row(name, *(f"{v:.2f}" for v in times), f"{patching / sweep:.1f}", *(f"{v:.2f}" for v in ranks))
        Console(width=150).print(table)


if __name__ == "__main__":
    typer.run(main)
