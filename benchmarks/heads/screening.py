"""What screening heads misses, beside ablating every head alone: `manyheads bench screening [MODEL] [--judges repeats,text]`.

For each judge of the survey: ablations made, heads that exact ablation finds (one-sided t-test over examples, q <= .05 over
heads, and an effect of at least `SIZE` of the largest), how many of them screening did not ablate alone, and the largest such
effect as a share of the largest of all. Seconds are of the processor, of one thread: the gradient's estimate alone, screening
with it, and exact. With --out each judge's row is kept, and is not computed again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats

import manyheads as mh
from manyheads.atlas.core.causal import ablation_effects
from manyheads.atlas.core.judges import Judge
from manyheads.atlas.core.registry import behaviours
from manyheads.atlas.core.screening import estimated_effects, screened_effects
from manyheads.errors import ManyheadsError
from manyheads.evaluation.controls import q_values
from manyheads.files import write_atomically
from manyheads.heads import HeadScores

SIZE = 0.02  # of the largest effect: what screening is asked to find


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """A result and the processor seconds that it took."""
    started = time.process_time()
    return function(), time.process_time() - started


def main(
    model: Annotated[str, typer.Argument(help="ladon, smollm2, or a folder.")] = "ladon",
    judges: Annotated[str, typer.Option(help="Only these, separated by commas. Default: all of the survey.")] = "",
    rows: Annotated[int | None, typer.Option(help="Rows of each judge. Default: its own number.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results, a file a judge.")] = None,
) -> None:
    """Compare screening with exact ablation of every head."""
    torch.set_num_threads(1)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    opened = mh.open_model(model)
    every = {one.judge.name: one.judge for one in behaviours().values()}
    titles = f"{'estimate':>9} {'screened':>9} {'exact':>8} {'found':>6} {'missed':>7} {'largest missed':>15}"
    print(f"{'judge':14} {'ablations':>12} {titles}")
    totals = np.zeros(7)
    for name in judges.split(",") if judges else every:
        file = None if out is None else out / f"{Path(model).name}-{name}-{rows}.json"
        if file is not None and file.is_file():
            row = json.loads(file.read_text("utf-8"))
        else:
            try:
                judge = every[name](opened, 1, n=rows)
            except ManyheadsError as error:
                print(f"{name:14} left out: {error}")
                continue
            row = compared(opened, judge)
            if file is not None:
                text = json.dumps(row)
                write_atomically(file, lambda path, text=text: path.write_text(text, "utf-8"))  # type: ignore[misc]
        *row, worst = row
        print(f"{line(name, row)} {worst:15.3f}", flush=True)
        totals += row
    print(line("all", totals))


def compared(model: mh.HeadModel, judge: Judge) -> list[float]:
    """A row of the table: ablations of heads, seconds of the three ways, heads found, those missed, the largest missed."""
    _, estimate = timed(lambda: estimated_effects(model, judge))
    screened, seconds = timed(lambda: screened_effects(model, "", judge))
    exact, exactly = timed(lambda: ablation_effects(model, "", judge))
    found, missed = matters(exact, judge.n), np.isnan(screened.values)
    effects = np.abs(exact.values)
    worst = effects[found & missed].max(initial=0) / effects.max()
    row = (screened.meta["screening"]["ablations"], effects.size, estimate, seconds, exactly)
    return [float(value) for value in (*row, found.sum(), (found & missed).sum(), worst)]


def line(name: str, row: Iterable[float]) -> str:
    """A line of the table."""
    made, size, estimate, seconds, exactly, found, missed = row
    times = f"{estimate:9.1f} {seconds:9.1f} {exactly:8.1f}"
    return f"{name:14} {made:5.0f} of {size:3.0f} {times} {found:6.0f} {missed:7.0f}"


def matters(exact: HeadScores, n: int) -> np.ndarray:
    """Heads whose loss is no chance (q <= .05 over heads) and of a size that screening is asked to find."""
    t = exact.values / np.maximum(exact.stderr, 1e-12)
    q = q_values(stats.t.sf(t, n - 1).ravel()).reshape(exact.shape)
    return (q <= 0.05) & (exact.values >= SIZE * np.abs(exact.values).max())


if __name__ == "__main__":
    typer.run(main)
