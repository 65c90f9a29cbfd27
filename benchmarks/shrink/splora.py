"""Pruning adapters (#78) beside other ways to repair the same cut at equal tokens: `manyheads bench splora [--work splora-work]`.

AMP says which heads and MLP units go. Then as many tokens are learned by

    all weights      of what is left (fine-pruning, the paper's baseline)
    LoRA after       of rank `--rank`, on what is left
    SPLoRA at once   a low-rank change of the same rank beside the frozen weights, the mask closed from the first step
    SPLoRA           the same, the mask closing over the first half of the steps

Loss in nats a token of prose that nothing else reads; accuracy over the families that the whole model answers; "learned" is how
many numbers a task has of its own. With --work a run that was broken off goes on.
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
from amp import LEARNED, accuracies, lessons, loss
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.files import write_atomically
from manyheads.progress import progressing
from manyheads.shrink.recovery import LORA, recover
from manyheads.shrink.weights.amp import AMP
from manyheads.shrink.weights.splora import ADAPTING, SPLoRA
from manyheads.tasks import TASKS

Made = tuple[mh.HeadModel, int]  # and how many numbers were learned


def repaired(
    whole: mh.HeadModel, texts: list[str], ratio: float, tokens: int, rank: int, length: int, seed: int
) -> Any:
    """The ways by name, each a function of a bar."""
    steps, rows = max(1, round(tokens / (4 * length))), 4

    def after(lora_rank: int | None, rate: float, bar: Any) -> Made:
        cut = AMP(ratio, prompts=texts, seed=seed).convert(whole)
        how = replace(LORA, rows=rows, rate=rate)
        made, record = recover(cut, texts, tokens, lora_rank=lora_rank, length=length, settings=how, seed=seed, bar=bar)
        return made, record.trained

    def adapter(closing: float, bar: Any) -> Made:
        how = replace(ADAPTING, steps=steps, rows=rows)
        method = SPLoRA(ratio, rank, texts, 10**9, length, closing, how, seed)
        learned = method.learn(whole, bar=bar)
        return learned.convert(whole), learned.learned

    ways: dict[str, Callable[[Any], Made]] = {
        "cut alone": lambda bar: (AMP(ratio, prompts=texts, seed=seed).convert(whole), 0),
        "all weights": lambda bar: after(None, 1e-3, bar),
        "LoRA after": lambda bar: after(rank, 2e-3, bar),
        "SPLoRA at once": lambda bar: adapter(0.0, bar),
        "SPLoRA": lambda bar: adapter(0.5, bar),
    }
    return ways


def main(
    model: Annotated[str, typer.Argument()] = "ladon",
    ratio: Annotated[float, typer.Option(min=0.0, max=1.0)] = 0.3,
    tokens: Annotated[int, typer.Option(min=1)] = 40_960,
    rank: Annotated[int, typer.Option(min=1)] = 16,
    length: Annotated[int, typer.Option(min=2)] = 256,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    n: Annotated[int, typer.Option(min=1, help="Prompts of each family.")] = 32,
    work: Annotated[Path | None, typer.Option(help="Folder of results.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    torch.set_num_threads(threads)
    whole = mh.open_model(model)
    texts = [*LEARNED, *(lessons(whole) if model == "ladon" else [])]
    file = None if work is None else work / "splora.json"
    done: dict[str, Any] = json.loads(file.read_text("utf-8")) if file is not None and file.exists() else {}

    def keep() -> None:
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(file, lambda path: path.write_text(json.dumps(done, indent=1), "utf-8"), force=True)

    if "whole" not in done:
        tasks = accuracies(whole, list(TASKS), n)
        done["whole"] = {"loss": loss(whole), "tasks": {name: share for name, share in tasks.items() if share >= 0.5}}
        keep()
    able = list(done["whole"]["tasks"])
    for seed in range(seeds):
        for name, make in repaired(whole, texts, ratio, tokens, rank, length, seed).items():
            key = f"{name} {seed}"
            if key not in done:
                with progressing() as bar:
                    small, learned = make(bar.step(key))
                size = sum(p.numel() for p in small.plain.parameters())
                done[key] = {"loss": loss(small), "tasks": accuracies(small, able, n), "learned": learned, "size": size}
                keep()
    table = Table(title=f"{model}, {ratio:.0%} of all parameters gone, {tokens:,} tokens, {seeds} seeds")
    for column in ("", "parameters", "learned", "loss (range)", "accuracy (range)"):
        table.add_column(column, justify="left" if not column else "right")
    whole_accuracy = statistics.mean(done["whole"]["tasks"].values()) if able else float("nan")
    size = sum(p.numel() for p in whole.plain.parameters())
    table.add_row("whole", f"{size / 1e6:.2f} M", "", f"{done['whole']['loss']:.3f}", f"{whole_accuracy:.3f}")
    for name in repaired(whole, texts, ratio, tokens, rank, length, 0):
        runs = [done[f"{name} {seed}"] for seed in range(seeds)]
        losses = [run["loss"] for run in runs]
        shares = [statistics.mean(run["tasks"].values()) if able else float("nan") for run in runs]
        table.add_row(
            name,
            f"{runs[0]['size'] / 1e6:.2f} M",
            f"{runs[0]['learned'] / 1e6:.2f} M",
            f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})",
            f"{statistics.mean(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
