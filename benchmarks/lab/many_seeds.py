"""Seeds trained in one run (`training.fit_seeds`) beside the same seeds one after another: how many times as fast?

    manyheads bench many_seeds [--seeds 5] [--rounds 5] [--updates 100]

One process. In each round every training runs both ways, in turns, so that other work on the machine slows both. The ratio is
seconds alone / seconds together, a number a round: the median, the least and the largest are printed. The largest difference of
any trained parameter stands beside it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from statistics import median
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from manyheads.lab.formation.abrupt import ItemLabelTask, abrupt_runs
from manyheads.lab.formation.minimal_head import DESCENT, MinimalHead
from manyheads.lab.in_context.autoregression import AutoregressiveSeries, trained_hankels
from manyheads.lab.in_context.gradient_descent import RegressionTasks, best_descents, trained_attentions
from manyheads.lab.in_context.initial_guess import PriorRegressions, trained_guesses
from manyheads.lab.in_context.softmax_regression import NoisyRegressions, trained_regressors
from manyheads.progress import progressing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Training = Callable[[Sequence[int]], list[Any]]


def trainings(updates: int) -> dict[str, Training]:
    """What is trained, by name: a function of seeds that gives their models."""
    task = ItemLabelTask(classes=16, labels=16, pairs=4)

    @cache  # its values come one after another, in Python
    def series(seed: int) -> Tensor:
        return AutoregressiveSeries().draw(seed)[0]

    def minimal(seeds: Sequence[int]) -> list[Any]:
        tasks = [replace(task, seed=seed) for seed in seeds]
        models = [MinimalHead(own, seed=seed) for own, seed in zip(tasks, seeds, strict=True)]
        abrupt_runs(tasks, models, settings=replace(DESCENT, steps=updates), every=updates, seeds=seeds)
        return models

    return {
        "one layer of linear attention (#54), batch 2,048": lambda s: trained_attentions(
            RegressionTasks(), seeds=s, length=updates
        ),
        "two layers (#54), batch 2,048": lambda s: trained_attentions(RegressionTasks(), 2, seeds=s, length=updates),
        "two steps of descent (#54), batch 2,048": lambda s: best_descents(
            RegressionTasks(), 2, seeds=s, length=updates
        ),
        "two softmax heads (#48), batch 256": lambda s: trained_regressors(NoisyRegressions(), seeds=s, length=updates),
        "a head with a guess (#27), batch 512": lambda s: trained_guesses(PriorRegressions(), seeds=s, length=updates),
        "Hankel attention, n = 28 (#26), batch 256": lambda s: trained_hankels(
            [series(seed) for seed in s], 3, 28, seeds=s, length=updates
        ),
        "minimal head (#51), batch 128": minimal,
    }


@app.command()
def main(
    seeds: Annotated[int, typer.Option(min=2)] = 5,
    rounds: Annotated[int, typer.Option(min=2)] = 5,
    updates: Annotated[int, typer.Option(min=10)] = 100,
) -> None:
    """Print a row a training."""
    table = Table("what is trained", "alone, s", "together, s", "ratio (least to largest)", "largest difference")
    with progressing() as bar:
        every = trainings(updates)
        done = bar.step("trainings", len(every) * (rounds + 1))
        for name, train in every.items():
            ratios, alone, together, apart = [], [], [], 0.0
            for turn in range(rounds + 1):
                started = time.perf_counter()
                ones = [train([seed])[0] for seed in range(seeds)]
                middle = time.perf_counter()
                all_at_once = train(range(seeds))
                ended = time.perf_counter()
                apart = max(apart, *map(_apart, ones, all_at_once))
                if turn:  # the first round warms up
                    alone.append(middle - started)
                    together.append(ended - middle)
                    ratios.append(alone[-1] / together[-1])
                done(1, note=name)
            spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            table.add_row(name, f"{median(alone):.2f}", f"{median(together):.2f}", spread, f"{apart:.0e}")
    Console(width=130).print(table)


def _apart(one: Any, other: Any) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


if __name__ == "__main__":
    app()
