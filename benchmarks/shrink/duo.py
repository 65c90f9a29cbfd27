"""Which heads may stream? Rankings of KV heads beside each other: `manyheads bench duo [MODEL] [--asks]`.

    one pass     what a head would write otherwise if it streamed, at the answers' tokens (`duo_scores`)
    gates        DuoAttention's trained gates (`duo_gates`); resumable in --work
    attention    how much of a head's attention, at the same tokens, lies beyond sinks and recent tokens
    random       the mean of --draws draws

For each ranking and share of streaming heads: needles said word for word when asked for after the context was cut. Contexts are
others than those that were scored. Seconds are of the processor.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads import shrink
from manyheads.heads import HeadScores
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import ReadAttention
from manyheads.progress import progressing
from manyheads.shrink.cache.duo_scores import asking_in


def attention_beyond(model: mh.HeadModel, length: int, sinks: int, recent: int, needles: int) -> np.ndarray:
    """The share of attention beyond the window at the tokens of the answers, `[L, Hkv]`."""
    found = np.zeros((model.n_layers, model.n_kv_heads))
    hay = shrink.haystacks(model, 4, length, needles=needles, seed=0)
    for one in hay:
        row, start = one.row
        asking = torch.tensor(asking_in(one, start))

        def read(call: AttentionCall, asking: torch.Tensor = asking) -> None:
            pattern = call.pattern_rows(asking)[0].float()
            column = torch.arange(pattern.shape[-1])
            beyond = (column >= sinks) & (asking[:, None] - column >= recent)
            share = (pattern * beyond).sum(-1).mean(-1).unflatten(0, (model.n_kv_heads, -1)).mean(1)
            found[call.layer] += share.numpy() / len(hay)

        model.read(row[None], ReadAttention(read), keep=1)
    return found


def main(
    model: Annotated[str, typer.Argument()] = "ladon",
    length: Annotated[int, typer.Option(min=64, help="Tokens of the contexts that are scored.")] = 512,
    lengths: Annotated[str, typer.Option(help="Tokens of the contexts that are asked about.")] = "500,800",
    ratios: Annotated[str, typer.Option(help="Shares of heads that stream.")] = "0.5,0.75,0.9",
    sinks: Annotated[int, typer.Option(min=0)] = 16,
    recent: Annotated[int, typer.Option(min=1)] = 64,
    steps: Annotated[int, typer.Option(min=0, help="Steps of training gates; 0 leaves them out.")] = 200,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts of five needles.")] = 12,
    draws: Annotated[int, typer.Option(min=1)] = 5,
    asks: Annotated[bool, typer.Option(help="Ask by questions instead of by the sentence's own words.")] = False,
    work: Annotated[Path | None, typer.Option(help="A folder in which training goes on.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    opened = mh.open_model(model)
    window = {"sinks": sinks, "recent": recent}
    started = time.process_time()
    scores = shrink.duo_scores(opened, length=length, **window)
    seconds = {"one pass": time.process_time() - started}
    rankings: dict[str, list[HeadScores]] = {"one pass": [scores]}
    if steps:
        started = time.process_time()
        with progressing() as bar:
            step = bar.step("gates", steps)
            rankings["gates"] = [shrink.duo_gates(opened, length=length, steps=steps, folder=work, bar=step, **window)]
        seconds["gates"] = time.process_time() - started
    started = time.process_time()
    rankings["attention"] = [replace(scores, values=attention_beyond(opened, length, sinks, recent, 8))]
    seconds["attention"] = time.process_time() - started
    rankings["random"] = [
        replace(scores, values=np.random.default_rng(seed).random(scores.shape)) for seed in range(draws)
    ]
    shares = [float(part) for part in ratios.split(",")]
    sizes = [int(part) for part in lengths.split(",")]
    table = Table("ranking", "seconds", *[f"{share:g} stream, {size} tokens" for size in sizes for share in shares])
    hays = [shrink.haystacks(opened, contexts, size, asks=asks, seed=21) for size in sizes]
    full = [float(shrink.needle_recall(opened, shrink.Press(), hay).mean()) for hay in hays]
    table.add_row("all kept", "", *[f"{value:.2f}" for value in full for _ in shares])
    for name, ranked in rankings.items():
        cells = []
        for hay in hays:
            for share in shares:
                kept = [shrink.DuoAttention(share, sinks, recent, one) for one in ranked]
                values = [float(shrink.needle_recall(opened, press, hay).mean()) for press in kept]
                spread = f" +- {np.std(values):.2f}" if len(values) > 1 else ""
                cells.append(f"{np.mean(values):.2f}{spread}")
        table.add_row(name, f"{seconds[name]:.1f}" if name in seconds else "", *cells)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
