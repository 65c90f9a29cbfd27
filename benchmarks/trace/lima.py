"""LiMA's bidirectional search beside naive greedy and the rankings that ask of one region at a time, in one run.

    manyheads bench lima [--draws 60] [--texts 4] [--threads 1]

1. on a game set by hand (30 regions: two groups of 4 of which one suffices, 6 interchangeable helpers, 6 harmful regions)
2. on the bundled model, the words of texts that hide a needle: p of its answer, hidden words unattended or behind the pad token,
   and one longer text

Insertion is what F climbs; MuFidelity (here over tokens) is independent of it. Forward passes and seconds are of the search
alone, a mean over inputs, in batches of up to 64 rows; curves and metrics are not counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.tasks import Needle, encode
from manyheads.trace.regions.cutting import PartRegions, Regions, text_regions
from manyheads.trace.regions.insertion import (
    Classifier,
    Game,
    Probabilities,
    curves,
    importance,
    leave_one_out,
    mufidelity,
    random_orders,
    single_regions,
)
from manyheads.trace.regions.lima import Weights, rank_regions

Case = tuple[Regions, Probabilities, int, Weights]


def planted(seed: int) -> Case:
    """The game set by hand, with its roles dealt out anew."""
    roles = np.random.default_rng(seed).permutation(30)

    def probabilities(subsets: torch.Tensor) -> torch.Tensor:
        shown = subsets.numpy().astype(float)
        group = np.maximum(shown[:, roles[:4]].mean(1), shown[:, roles[4:8]].mean(1)) ** 1.5
        helper = 0.35 * shown[:, roles[8:14]].max(1)
        harm = 0.12 * shown[:, roles[14:20]].sum(1)
        p = 1 / (1 + np.exp(-8 * (group + helper * (1 - group) - harm - 0.55)))
        return torch.from_numpy(np.stack([p, 1 - p], 1))

    return PartRegions(30), probabilities, 0, Weights(confidence=0.0)


def texts(n: int, hide: str, words: int = 36) -> list[Case]:
    """Needle tests of the bundled model; the question is always shown."""
    model = mh.open_model()
    batch = encode(Needle(shortest=words - 4, longest=words + 4), model.tokenizer, n)
    cases: list[Case] = []
    for example, answer in zip(batch.examples, batch.answer_ids.tolist(), strict=True):
        question = example.prompt.index("Q:"), len(example.prompt)
        regions = text_regions(model.tokenizer, example.prompt, always=[question], hide=hide)
        cases.append((regions, Classifier(model), answer, Weights()))
    return cases


def rankings(case: Case, seed: int) -> dict[str, tuple[float, ...]]:
    """Of each ranking: forward passes, seconds, insertion, deletion, MuFidelity."""
    regions, probabilities, target, weights = case
    game = Game(regions, probabilities, target)

    def greedy(search: str) -> Callable[[], tuple[Sequence[int], int]]:
        def run() -> tuple[Sequence[int], int]:
            found = rank_regions(regions, probabilities, target=target, search=search, weights=weights)
            return found.order, found.passes

        return run

    sides: dict[str, Callable[[], tuple[Sequence[int], int]]] = {
        "bidirectional": greedy("bidirectional"),
        "naive greedy": greedy("naive"),
        "single region": lambda: (single_regions(game), game.m),
        "leave one out": lambda: (leave_one_out(game), game.m),
        "random": lambda: (random_orders(game.m, 1, seed + 1000)[0].tolist(), 0),
    }
    results = {}
    for name, run in sides.items():
        started = time.perf_counter()
        order, passes = run()
        seconds = time.perf_counter() - started
        drawn = curves(game, order)
        fidelity = mufidelity(game, importance(order))
        results[name] = (passes, seconds, drawn.insertion_score, drawn.deletion_score, fidelity)
    return results


def main(
    draws: Annotated[int, typer.Option(help="Draws of the game set by hand.")] = 60,
    texts_: Annotated[int, typer.Option("--texts", help="Texts for the bundled model.")] = 4,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    table = Table(title=f"LiMA, {threads} thread(s)")
    for column in ("input", "regions", "ranking", "passes", "seconds", "insertion", "deletion", "MuFidelity"):
        table.add_column(column)
    for name, cases in (
        (f"by hand, {draws} draws", [planted(seed) for seed in range(draws)]),
        (f"ladon, {texts_} texts, pad", texts(texts_, "pad")),
        (f"ladon, {texts_} texts, unattended", texts(texts_, "attention")),
        ("ladon, a longer text, pad", texts(1, "pad", 68)),
    ):
        found = [rankings(case, seed) for seed, case in enumerate(cases)]
        m = f"{np.mean([case[0].m for case in cases]):.1f}"
        for ranking in found[0]:
            passes, seconds, *scores = np.mean([one[ranking] for one in found], 0)
            table.add_row(name, m, ranking, f"{passes:.0f}", f"{seconds:.3f}", *(f"{score:.3f}" for score in scores))
            name, m = "", ""
        table.add_section()
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
