"""Ways to find a circuit, side by side: seconds, how well they find the heads that matter, how faithful what they rank is.

    manyheads bench circuits [--threads 2] [--n 16] [--tasks ioi,greater_than,docstring,coloured_objects]

On models set by hand (means over three) the heads are known. On the bundled model the reference is exact: a head counts as known
if patching it alone from the twin moves the logit difference by 5 % or more of what the twin moves it. Columns:

    seconds       of the search, best of `--repeats`
    AUC           of the method's ranking of heads against the known ones; 0.5 is chance
    precision, recall   of the heads it chooses (where it only ranks: of as many as are known)
    stability     Jaccard overlap of its top heads (as many as are known), mean over pairs of `--draws` bootstraps of the prompts
    CPR, CMD      areas over and under the faithfulness of its top heads at all sizes (arXiv:2504.13151), heads patched from twins
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.evaluation.metrics import jaccard
from manyheads.heads import Head, HeadScores, HeadSet
from manyheads.lab.constructed import constructed
from manyheads.model.replay.edges import edge_attribution
from manyheads.model.replay.patching import activation_patching, path_patching
from manyheads.tasks import IOI, Example, TaskBatch, encode, get_task
from manyheads.trace.circuits.acdc import acdc
from manyheads.trace.circuits.attribution_patching import attribution_patching
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.circuits.codes import sae_codes
from manyheads.trace.circuits.discovery_roc import roc
from manyheads.trace.circuits.faithfulness import Trial, size_curve
from manyheads.trace.circuits.gim import gim
from manyheads.trace.contextual.circuit import contextual_circuit

MATTERS = 0.05
DIRECT = 0.02


@dataclass(frozen=True)
class Case:
    """A model, prompts with twins, and the heads that matter."""

    name: str
    model: mh.HeadModel
    batch: TaskBatch
    known: HeadSet


@dataclass(frozen=True)
class Found:
    """A method's ranking of heads, and the heads it chooses if it does."""

    values: np.ndarray
    chosen: HeadSet | None = None


def exact(case: Case) -> Found:
    """Patch every head by itself."""
    return Found(np.abs(effects(case.model, case.batch)))


def paths(case: Case) -> Found:
    """Path patching as in the IOI paper: into the logits, then into query, key and value of what was found, and once more."""
    model, metric = case.model, case.batch.logit_difference
    best, receivers = np.zeros(model.shape), None
    for _ in range(3):
        found = path_patching(model, case.batch.inputs, case.batch.twins, metric, receivers=receivers, keep=1)
        share = np.abs(found.by_head(*model.shape)) / abs(found.corrupted.mean() - found.clean.mean())
        fresh = [Head(int(i), int(h)) for i, h in np.argwhere((share >= DIRECT) & (best < DIRECT))]
        best = np.maximum(best, share)
        receivers = [(head, part) for head in fresh if head.layer for part in ("query", "key", "value")]
        if not receivers:
            break
    return Found(best, model.head_set([tuple(map(int, place)) for place in np.argwhere(best >= DIRECT)]))


def attribution(steps: int) -> Callable[[Case], Found]:
    """The gradient's estimate of patching."""

    def method(case: Case) -> Found:
        metric = case.batch.logit_difference
        args = (case.model, case.batch.inputs, case.batch.twins, metric)
        scores = attribution_patching(*args, sites=("z",), steps=steps, keep=1)
        return Found(np.abs(scores.heads.mean(0)))

    return method


def modified_gradients(case: Case) -> Found:
    """GIM: one gradient with constant denominators, a softer softmax and shared products."""
    metric = case.batch.logit_difference
    scores = gim(case.model, case.batch.inputs, case.batch.twins, metric, sites=("z",), keep=1)
    return Found(np.abs(scores.heads.mean(0)))


def edge_gradients(case: Case) -> Found:
    """EAP-IG: a head's score is the magnitude of all edges out of it."""
    metric = case.batch.logit_difference
    scores = edge_attribution(case.model, case.batch.inputs, case.batch.twins, metric, steps=5, keep=1)
    out = np.nan_to_num(np.abs(scores.mean)).sum(1)
    values = np.zeros(case.model.shape)
    for sender, value in zip(scores.senders, out, strict=True):
        if isinstance(sender, Head):
            values[sender] = value
    return Found(values)


def decomposition(case: Case) -> Found:
    """CD-T and its search; the heads it chooses rank first."""
    batch = case.batch
    args = (case.model, batch.inputs, batch.twins, batch.answer_ids, batch.foil_ids)
    found = contextual_circuit(*args)
    values = np.abs(found.scores.values)
    first = np.zeros_like(values)
    for head in found.heads:
        first[head] = values.max()
    return Found(values + first, found.heads)


def codes(case: Case) -> Found:
    """SAE codes, prompts against twins."""
    found = sae_codes(case.model, case.batch.inputs, case.batch.twins, examples=min(10, 2 * len(case.batch)))
    return Found(found.scores.values)


def difference_of_means(case: Case) -> Found:
    """Norm of the difference of mean writes: the control of SAE codes."""
    from manyheads.trace.circuits.codes import mean_head_outputs

    a, b = (mean_head_outputs(case.model, some).mean(0) for some in (case.batch.inputs, case.batch.twins))
    return Found((a - b).norm(dim=-1).numpy().reshape(case.model.shape))


def pruning(case: Case) -> Found:
    """ACDC on edges, by the logit difference; a head's score is the largest cost of an edge out of it."""
    metric = case.batch.logit_difference
    clean, corrupted = (metric(case.model.logits(some)[:, -1:]) for some in (case.batch.inputs, case.batch.twins))
    tau = 0.01 * float((clean - corrupted).abs().mean())
    found = acdc(case.model, case.batch.inputs, case.batch.twins, tau, metric=metric).circuit
    values = np.zeros(case.model.shape)
    for (sender, _), cost in found.edges.items():
        if sender[0] == "L":
            values[Head.parse(sender)] = max(values[Head.parse(sender)], cost)
    return Found(values, found.heads)


METHODS: dict[str, Callable[[Case], Found]] = {
    "each head patched": exact,
    "path patching": paths,
    "attribution patching": attribution(1),
    "GIM": modified_gradients,
    "attribution IG": attribution(5),
    "edge attribution IG": edge_gradients,
    "CD-T": decomposition,
    "SAE codes": codes,
    "mean difference": difference_of_means,
    "ACDC": pruning,
}


def effects(model: mh.HeadModel, batch: TaskBatch) -> np.ndarray:
    """What patching each head alone moves, as a share of what the twin moves."""
    found = activation_patching(model, batch.inputs, batch.twins, batch.logit_difference, keep=1)
    return found.by_head(*model.shape) / abs(found.corrupted.mean() - found.clean.mean())


def by_hand(seed: int, n: int) -> Case:
    """A planted induction circuit: `... a b ... c d ... a`, in the twin a and c change places."""
    given = constructed(seed=seed, plant=["previous_token", "induction", "copying", "retrieval"])
    model = mh.open_model(given.module, tokenizer=given.tokenizer)
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(np.stack([rng.permutation(np.arange(5, 60))[:12] for _ in range(n)]))
    other = ids.clone()
    other[:, [3, 7]] = ids[:, [7, 3]]
    clean, corrupted = (torch.cat([some, ids[:, 3:4]], 1) for some in (ids, other))
    batch = TaskBatch(
        input_ids=clean,
        attention_mask=torch.ones_like(clean),
        answer_ids=ids[:, 4],
        foil_ids=ids[:, 8],
        corrupted_ids=corrupted,
        corrupted_mask=torch.ones_like(clean),
        corrupted_answer_ids=ids[:, 8],
        spans={},
        accepted_ids=[[int(i)] for i in ids[:, 4]],
        examples=[Example("", "")] * n,
        dropped={},
    )
    return Case("induction, by hand", model, batch, given.known["previous_token"] | given.known["induction"])


def on_ladon(model: mh.HeadModel, name: str, n: int) -> Case:
    """One task of the bundled model, prompts of one length; the reference is exact patching."""
    task = IOI(corruption="abc", order="ABBA") if name == "ioi" else get_task(name)
    whole = encode(task, model.tokenizer, 8 * n, 0)
    lengths = whole.attention_mask.sum(1)
    usual = int(lengths.mode().values)
    examples = [e for e, length in zip(whole.examples, lengths.tolist(), strict=True) if length == usual][:n]
    batch = encode(examples, model.tokenizer, len(examples))
    found = np.abs(effects(model, batch)) >= MATTERS
    return Case(name, model, batch, model.head_set([tuple(map(int, place)) for place in np.argwhere(found)]))


def stability(case: Case, method: Callable[[Case], Found], draws: int) -> float:
    """How much the method's top heads overlap between bootstraps of the prompts."""
    rng = np.random.default_rng(0)
    tops = []
    for _ in range(draws):
        rows = torch.from_numpy(rng.integers(len(case.batch), size=len(case.batch)))
        found = method(replace(case, batch=case.batch.take(rows)))
        scores = HeadScores("ranking", found.values, np.zeros_like(found.values), len(rows))
        tops.append(scores.top(len(case.known)))
    return float(np.mean([jaccard(a, b) for a, b in combinations(tops, 2)])) if draws > 1 else float("nan")


def judged(case: Case, method: Callable[[Case], Found], repeats: int, draws: int) -> tuple[float, ...]:
    """One row of the table, for one model."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        found = method(case)
        seconds.append(time.perf_counter() - started)
    curve = roc(found.values, case.known)
    if found.chosen is None:
        precision, recall = curve.at(len(case.known))
    else:
        hits = len(found.chosen & case.known)
        precision, recall = hits / max(1, len(found.chosen)), hits / len(case.known)
    trial = Trial(case.model, case.batch.inputs, case.batch.twins, case.batch.logit_difference)
    scores = HeadScores("ranking", found.values, np.zeros_like(found.values), len(case.batch))
    sizes = size_curve(trial, Circuit.of_heads(scores, scores.values.size), shares=np.linspace(0, 1, 9), n_random=1)
    return min(seconds), curve.auc, precision, recall, stability(case, method, draws), sizes.cpr, sizes.cmd


def main(
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    n: Annotated[int, typer.Option(help="Prompts of a task.")] = 16,
    tasks: Annotated[
        str, typer.Option(help="Tasks of the bundled model.")
    ] = "ioi,greater_than,docstring,coloured_objects",
    methods: Annotated[str, typer.Option(help="Some of the methods, separated by commas. Default: all.")] = "",
    repeats: Annotated[int, typer.Option(help="Runs of each; the fastest counts.")] = 1,
    draws: Annotated[int, typer.Option(help="Bootstraps for the stability column; 0 leaves it out.")] = 4,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    wanted = [name.strip() for name in methods.split(",") if name.strip()] or list(METHODS)
    unknown = sorted(set(wanted) - set(METHODS))
    if unknown:
        raise typer.BadParameter(f"no method {unknown[0]!r}; choose from {', '.join(METHODS)}")
    model = mh.open_model()
    cases = [[by_hand(seed, n) for seed in range(3)]]
    cases += [[on_ladon(model, name.strip(), n)] for name in tasks.split(",") if name.strip()]
    table = Table(title=f"finding circuits, {threads} threads, {n} prompts a task")
    for column in ("task", "method", "seconds", "AUC", "precision", "recall", "stability", "CPR", "CMD"):
        table.add_column(column, justify="left" if column in ("task", "method") else "right")
    console = Console(width=120)
    for models in cases:
        case = models[0]
        for i, name in enumerate(wanted):
            row = np.mean([judged(one, METHODS[name], repeats, draws) for one in models], 0)
            table.add_row(f"{case.name} ({len(case.known)} heads)" if i == 0 else "", name, *(f"{x:.2f}" for x in row))
            Console(stderr=True).print(f"{case.name}: {name} {row[0]:.1f} s", style="dim")
        table.add_section()
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
