"""AMP (#84) beside its controls, before and after recovery: loss on held-out text, and accuracy of the tasks the model can do.

    manyheads bench amp [--model smollm2] [--ratio 0.3] [--recover 1000000] [--seeds 3] [--work amp-work] [--threads 1]

The loss is of prose of the package, in nats a token. Accuracy is the share of prompts answered, over the families that the whole
model answers. Scores and recovery come from other prose and, for ladon, from prompts of the families' train splits with their
answers. Recovery is LoRA of rank 8, or of every weight (`--full`), by next tokens or by the whole model's predictions
(`--teacher`). Seeds draw calibration prompts, random cuts and training.
With --work a run that was broken off goes on.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.progress import progressing
from manyheads.shrink.recovery import LORA, recover
from manyheads.shrink.weights.amp import AMP
from manyheads.tasks import TASKS, task_verdict
from manyheads.tasks.texts import passages
from manyheads.training import next_token_loss

PROSE = [topics[name] for name in sorted(topics) if len(topics[name]) > 1500]
LEARNED, HELD_OUT = PROSE[::2], PROSE[1::2]
ORDERS = ("standard", "magnitude", "random", "reversed")


@torch.no_grad()
def loss(model: mh.HeadModel) -> float:
    """Nats a token of prose that nothing else here reads."""
    rows = passages(model, HELD_OUT, n=32, length=128, seed=0)
    return float(torch.stack([next_token_loss(model.plain, {"input_ids": row[None]}) for row in rows]).mean())


def accuracies(model: mh.HeadModel, names: list[str], n: int) -> dict[str, float]:
    """The share of prompts answered, by family."""
    return {name: task_verdict(model, TASKS[name], n=n, seed=1).answered for name in names}


def lessons(model: mh.HeadModel, n: int = 1500) -> list[str]:
    """Prompts of the train splits with their answers, as documents."""
    end = model.tokenizer.eos_token or "\n"
    found = []
    for task in TASKS.values():
        some = task.examples(n, seed=5, split="train")
        found.append(end.join(example.prompt + example.answer for example in some))
    return found


def main(
    model: Annotated[str, typer.Option(help="Which model.")] = "ladon",
    ratio: Annotated[float, typer.Option(help="Share of all parameters to cut.")] = 0.3,
    recovery: Annotated[
        int, typer.Option("--recover", help="Tokens of recovery of the standard cut; 0: none.")
    ] = 1_000_000,
    full: Annotated[bool, typer.Option("--full", help="Recover every weight, without LoRA.")] = False,
    teacher: Annotated[bool, typer.Option("--teacher", help="Recover by what the whole model predicts.")] = False,
    rate: Annotated[float, typer.Option(help="Highest learning rate of recovery.")] = 1e-3,
    batch: Annotated[int, typer.Option(help="Passages of 256 tokens in a batch of recovery.")] = 8,
    seeds: Annotated[int, typer.Option(help="Seeds.")] = 3,
    n: Annotated[int, typer.Option(help="Prompts of each family.")] = 64,
    work: Annotated[Path | None, typer.Option(help="Folder of results; an unfinished run goes on from it.")] = None,
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    whole = mh.open_model(model)
    file = None if work is None else work / "results.json"
    done: dict[str, Any] = json.loads(file.read_text("utf-8")) if file is not None and file.exists() else {}

    def kept(name: str, make: Any) -> Any:
        if name not in done:
            done[name] = make()
            if file is not None:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(json.dumps(done, indent=1), "utf-8")
        return done[name]

    texts = [*LEARNED, *(lessons(whole) if model == "ladon" else [])]

    def measured(one: mh.HeadModel, names: list[str]) -> dict[str, Any]:
        size = sum(p.numel() for p in one.plain.parameters())
        return {"parameters": size, "loss": loss(one), "tasks": accuracies(one, names, n)}

    before = kept("whole", lambda: measured(whole, list(TASKS)))
    able = [name for name, share in before["tasks"].items() if share >= 0.5]
    rows: dict[str, list[dict[str, Any]]] = {"whole": [before]}
    for order in ORDERS:
        for seed in range(seeds):

            def cut(order: Any = order, seed: int = seed) -> mh.HeadModel:
                return AMP(ratio, order=order, prompts=texts, seed=seed).convert(whole)

            rows.setdefault(order, []).append(kept(f"{order} {seed}", lambda cut=cut: measured(cut(), able)))
    taught = ", from the whole" if teacher else ""
    tuned = f"recovered {'in full' if full else 'by LoRA'}{taught}, {recovery:,} tokens"
    for seed in range(seeds if recovery else 0):

        def recovered(seed: int = seed) -> dict[str, Any]:
            small = AMP(ratio, prompts=texts, seed=seed).convert(whole)
            folder = None if work is None else work / f"{tuned} {seed}"
            with progressing() as bar:
                after, record = recover(
                    small,
                    texts,
                    recovery,
                    teacher=whole if teacher else None,
                    lora_rank=None if full else 8,
                    settings=replace(LORA, rate=rate, rows=batch),
                    seed=seed,
                    folder=folder,
                    bar=bar,
                )
            return measured(after, able) | {"minutes": record.minutes, "tokens": record.tokens}

        rows.setdefault(tuned, []).append(kept(f"{tuned} {seed}", recovered))
    table = Table(title=f"{model}, {ratio:.0%} of all parameters, {seeds} seeds; families: {', '.join(able)}")
    for column in ("", "parameters", "loss (range)", "accuracy (range)", "of the whole's"):
        table.add_column(column, justify="left" if not column else "right")
    base = statistics.mean(before["tasks"][name] for name in able)
    for name, found in rows.items():
        losses = [one["loss"] for one in found]
        shares = [statistics.mean(one["tasks"][family] for family in able) for one in found]
        extra = f", {found[0]['minutes']:.1f} min" if "minutes" in found[0] else ""
        table.add_row(
            name + extra,
            f"{found[0]['parameters'] / 1e6:.2f} M",
            f"{statistics.mean(losses):.3f} ({min(losses):.3f}-{max(losses):.3f})",
            f"{statistics.mean(shares):.3f} ({min(shares):.3f}-{max(shares):.3f})",
            f"{statistics.mean(shares) / base:.0%}",
        )
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
