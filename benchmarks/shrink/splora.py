"""Pruning adapters (#78) beside other ways to repair the same cut at equal tokens: `manyheads bench splora [--model ladon]`.

AMP says which heads and MLP units go. Then `--steps` steps on the same passages teach

    all weights      of what is left (fine-pruning, the paper's baseline)
    LoRA after       of the same rank, on what is left
    SPLoRA at once   a low-rank change beside the frozen weights, the mask closed from the first step
    SPLoRA           the same, the mask closing over the first half of the steps

Without `--model`: Llamas of 4 layers and 8 heads on a stream of 64, trained here on bytes of the prose that ships with Python,
one a seed. Loss is nats a token of held-out passages; "learned" is how many numbers a task has of its own. What is done stays
in `--out`, and the same command goes on from there.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from dha import loss_of, source
from rich.console import Console
from rich.table import Table
from torch import Tensor

import manyheads as mh
from manyheads.shrink.recovery import LORA, recover
from manyheads.shrink.weights.amp import AMP
from manyheads.shrink.weights.splora import ADAPTING, SPLoRA

Made = tuple[mh.HeadModel, int]  # and how many numbers were learned


def repairs(
    whole: mh.HeadModel, ids: Tensor, ratio: float, steps: int, rows: int, rank: int, seed: int
) -> dict[str, Callable[[], Made]]:
    """The ways by name."""
    cut = AMP(ratio, prompts=ids, seed=seed)
    how = {"steps": steps, "rows": rows, "seed": seed}

    def after(lora_rank: int | None, rate: float) -> Made:
        tokens = steps * rows * ids.shape[1]
        settings = replace(LORA, rows=rows, rate=rate, every=steps)  # judged at the end alone, as SPLoRA is
        made, record = recover(cut.convert(whole), ids, tokens, lora_rank=lora_rank, settings=settings, seed=seed)
        return made, record.trained

    def adapter(closing: float) -> Made:
        method = SPLoRA(ratio, rank, ids, closing=closing, settings=replace(ADAPTING, **how, rate=2e-3), seed=seed)
        learned = method.learn(whole)
        return learned.convert(whole), learned.learned

    return {
        "cut alone": lambda: (cut.convert(whole), 0),
        "all weights": lambda: after(None, 1e-3),
        "LoRA after": lambda: after(rank, 2e-3),
        "SPLoRA at once": lambda: adapter(0.0),
        "SPLoRA": lambda: adapter(0.5),
    }


def main(
    model: Annotated[str | None, typer.Option(help="A model as it comes, in place of small ones.")] = None,
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.3,
    steps: Annotated[int, typer.Option(min=2)] = 240,
    rows: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=2)] = 64,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    out: Annotated[Path, typer.Option(help="What is done, as JSON.")] = Path("splora.json"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    done: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.is_file() else {}
    runs: list[dict[str, Any]] = []
    for seed in range(seeds):
        kept = done.setdefault(f"{model or 'small'} {ratio:g} {steps}x{rows}x{length} rank {rank} seed {seed}", {})
        runs.append(kept)
        if len(kept) == 6:
            continue
        whole, ids = source(model, None, length, seed)
        held, ids = ids[::10][:64], ids[[i for i in range(len(ids)) if i % 10]]
        ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))]
        ways = repairs(whole, ids, ratio, steps, rows, rank, seed)
        for name, make in {"whole": lambda whole=whole: (whole, 0), **ways}.items():
            if name not in kept:
                small, learned = make()
                size = sum(p.numel() for p in small.plain.parameters())
                kept[name] = {"loss": loss_of(small, held), "learned": learned, "parameters": size}
                out.write_text(json.dumps(done, indent=1), "utf-8")
    show(f"{model or 'small models'}, {ratio:.0%} of all parameters gone, {steps} steps of {rows} x {length}", runs)


def show(title: str, runs: list[dict[str, Any]]) -> None:
    table = Table(title=title)
    for column in ("", "parameters", "learned", "loss", "minus all weights", "each seed"):
        table.add_column(column, justify="left" if not column else "right")
    mean = {name: statistics.mean(run[name]["loss"] for run in runs) for name in runs[0]}
    for name, first in runs[0].items():
        each = " ".join(f"{run[name]['loss']:.3f}" for run in runs)
        difference = f"{mean[name] - mean['all weights']:+.3f}"
        table.add_row(name, f"{first['parameters']:,}", f"{first['learned']:,}", f"{mean[name]:.3f}", difference, each)
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
