"""Language models as trunks of forecasters, once on a larger model or on series of your own: error, seconds and memory.

    manyheads bench language --model smollm2 --out language            # a few processor minutes; what was run is not run again
    manyheads bench language --sines --rows 16 --steps 1000            # five times as long as the experiment trains
    manyheads bench language FOLDER/ETTh1.csv --column OT --steps 200  # hourly series of a file

Without a file it is monthly CO2, or the four series of sines. Errors are those of `manyheads forecast try language`
(`forecast.language.matters`): in the scale of the training part, one, two and four segments ahead. The line has ten epochs,
Time-LLM half the steps of AutoTimes, and 100 prototypes: with a large vocabulary each costs as many weights as there are words.
Memory is by how much the process grew at most while a method trained and forecast, its language model with it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from _measuring import highest_memory
from rich.console import Console
from rich.table import Table

from manyheads.files import write_atomically
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of, read_frame
from manyheads.forecast.language import matters

HOURS = 4000  # of a file


def data(path: Path | None, column: str, steps: int, sines: bool) -> matters.Series7:
    """CO2, sines, or a column of a file."""
    if sines:
        return matters.Series7(matters.sines(), 24, steps, stamps=False)
    if path is None:
        return matters.Series7(matters.co2(), 12, steps)
    df = read_frame(path)
    when = next(name for name in ("date", "timestamp", "ds") if name in df)
    df = df[[when, column]].iloc[:HOURS]
    return matters.Series7(panel_of(df, columns_of(df, time=when, target=[column])), 24, steps)


def methods(model: str, rows: int) -> dict[str, matters.Make]:
    """By name."""

    def small(make: matters.Make, **more: Any) -> matters.Make:
        def made(series: matters.Series7, seed: int) -> Forecaster:
            return make(series, seed).set_params(rows=rows, **more)

        return made

    return {
        "repeat": matters.METHODS["repeat"],
        "linear": small(matters.line, steps=None, epochs=10),
        "autotimes language": small(matters.autotimes("language", model)),
        "autotimes random": small(matters.autotimes("random", model)),
        "autotimes none": small(matters.autotimes("none", model)),
        "smetimes language": small(matters.smetimes("language", model)),
        "smetimes random": small(matters.smetimes("random", model)),
        "time-llm language": small(matters.time_llm("language", model), prototypes=100),
        "time-llm random": small(matters.time_llm("random", model), prototypes=100),
    }


def measured(make: matters.Make, series: matters.Series7, seed: int) -> dict[str, float]:
    """Errors, processor seconds and MiB."""
    found: dict[str, float] = {}
    before, started = psutil.Process().memory_info().rss, time.process_time()
    highest = highest_memory(lambda: found.update(matters.trial(make)(series, seed)))
    return found | {"seconds": time.process_time() - started, "MiB": (highest - before) / 2**20}


def main(
    path: Annotated[Path | None, typer.Argument(help="A file with a column of times; without it CO2.")] = None,
    column: Annotated[str, typer.Option(help="The series in the file.")] = "OT",
    sines: Annotated[bool, typer.Option("--sines", help="The experiment's sines.")] = False,
    model: Annotated[str, typer.Option(help="What open_model takes.")] = "ladon",
    steps: Annotated[int, typer.Option(min=2)] = 40,
    rows: Annotated[int, typer.Option(min=1)] = 8,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    only: Annotated[str, typer.Option(help="Only these methods, separated by commas.")] = "",
    out: Annotated[Path, typer.Option(help="Keep results in this folder.")] = Path("language"),
) -> None:
    torch.set_num_threads(1)
    name_of = "sines" if sines else "co2" if path is None else path.stem
    record = out / f"{name_of}-{Path(model).name}-{steps}-{rows}-{seed}.json"
    kept: dict[str, dict[str, float]] = json.loads(record.read_text("utf-8")) if record.exists() else {}
    series, made = data(path, column, steps, sines), methods(model, rows)
    for name in only.split(",") if only else made:
        if name not in kept:
            kept[name] = measured(made[name], series, seed)
            out.mkdir(parents=True, exist_ok=True)
            text = json.dumps(kept, indent=1)
            write_atomically(record, lambda file, text=text: file.write_text(text, "utf-8"), force=True)  # type: ignore[misc]
    columns = ("mse1", "mse2", "mse4", "mse4 told", "seconds", "MiB")
    table = Table("", *columns, title=f"{record.stem}: {steps} steps of {rows} windows")
    for name, row in kept.items():
        cells = [f"{row[key]:.4f}" if key in row else "" for key in columns[:4]]
        table.add_row(name, *cells, f"{row['seconds']:.0f}", f"{row['MiB']:.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    typer.run(main)
