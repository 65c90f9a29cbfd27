"""LP-FT (#42) on a language model: the probe, plain FT and LP-FT on sentences, which of four libraries each documents.

    manyheads bench probe_tune [MODEL] [--train 200] [--held-out 400] [--epochs 3] [--rate 2e-5] [--pool mean] [--probe-only]

Each way begins from the model as it is. Shift is the mean distance that the pooled last state of a training sentence moved, over
its size. ECE is of held-out sentences, before and after the temperature that others of them fitted.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.predict.transfer.probe_then_tune import TUNING, Classified, probe_then_tune
from manyheads.predict.transfer.small_sets import documented

WAYS: dict[str, dict[str, Any]] = {"LP": {"settings": None}, "FT": {"probe": False}, "LP-FT": {}}


def main(
    model: Annotated[str, typer.Argument(help="A model as `manyheads` opens it.")] = "ladon",
    train: Annotated[int, typer.Option(help="Sentences to learn from.")] = 200,
    held_out: Annotated[int, typer.Option(help="Sentences to judge by.")] = 400,
    epochs: Annotated[int, typer.Option(help="Passes of FT.")] = 3,
    rate: Annotated[float, typer.Option(help="Learning rate of FT.")] = 2e-5,
    pool: Annotated[str, typer.Option(help="mean or last.")] = "mean",
    probe_only: Annotated[bool, typer.Option("--probe-only", help="Only LP.")] = False,
    threads: Annotated[int, typer.Option(help="Threads of PyTorch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    texts, labels = documented(train + held_out)
    whole = Classified({"text": texts}, labels)
    first, rest = torch.arange(len(whole)).tensor_split([train])
    names = ("way", "|V| at random", "before FT", "after", "shift", "FT ratio", "accuracy", "ECE", "scaled", "T")
    table = Table(*names, title=f"{model}, {train} sentences, {epochs} epochs at {rate:g}")
    for name, how in WAYS.items():
        if probe_only and name != "LP":
            continue
        how = {"settings": replace(TUNING, epochs=epochs, rate=rate)} | how
        data = whole.rows(first), whole.rows(rest)
        _, r = probe_then_tune(mh.open_model(model), *data, pool=pool, **how)  # type: ignore[arg-type]
        values = (r.head_norm_start, r.head_norm_before, r.head_norm_after, r.relative_shift, r.ft_ratio)
        values += (r.plain.accuracy, r.plain.ece, r.scaled.ece, r.temperature)
        table.add_row(name, *(f"{value:.3f}" for value in values))
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
