"""LoFiT (#30) beside LoRA (peft), random heads and heads chosen for another task, on the bundled model.

    manyheads bench lofit [--threads 2] [--n 256] [--seeds 3]

The task: answer from memory where the prompt contradicts a fact, which the model does not do by itself (it answers what the
prompt says). Every side sees the same examples in the same order, as often; columns: share of held-out prompts answered from
memory; what became of other tasks (mean accuracy on facts, indirect objects and needles, 64 prompts each); numbers; seconds.
"""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.edit.examples import Answered
from manyheads.edit.lofit import lofit, select_heads
from manyheads.edit.tuning import Learning, accuracy
from manyheads.heads import HeadSet
from manyheads.model.replay import first_logits, no_cache
from manyheads.tasks import encode, get_task
from manyheads.training import TrainSettings, WarmupStableDecay, fit

OTHERS = ("facts", "ioi", "needle")
SPARSITY = 1e-3


@dataclass(frozen=True)
class Side:
    """What one way of tuning reached."""

    name: str
    reached: float
    kept: float
    numbers: int
    seconds: float


@dataclass(frozen=True)
class Case:
    """The model, the examples to learn from and the held-out ones."""

    model: mh.HeadModel
    train: Answered
    test: Answered
    others: list[Answered]


def case(model: mh.HeadModel, n: int) -> Case:
    """Prompts that contradict a fact, answered from memory."""
    task = get_task("counterfactual")
    train, test = (
        Answered.of_batch(encode(task, model.tokenizer, n, 0, split), foils=True) for split in ("train", "test")
    )
    return Case(model, train, test, [Answered.of_task(model, get_task(name), 64, split="test") for name in OTHERS])


def ours(given: Case, name: str, heads: HeadSet, seed: int, epochs: int) -> Side:
    """Offsets of these heads."""
    started = time.perf_counter()
    edit = lofit(given.model, given.train, heads=heads, tuning=Learning(rate=1e-2, epochs=epochs, seed=seed))
    seconds = time.perf_counter() - started
    reached = accuracy(given.model, given.test, edit.edits())
    kept = float(np.mean([accuracy(given.model, other, edit.edits()) for other in given.others]))
    return Side(name, reached, kept, edit.shift.numel(), seconds)


def lora(given: Case, rank: int, rate: float, seed: int, epochs: int) -> Side:
    """LoRA on queries and values, the usual places, through the same loop."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "v_proj"])
    tuned: Any = get_peft_model(copy.deepcopy(given.model.plain), config)
    numbers = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    each = len(given.train) // 8

    def batch_at(number: int) -> dict[str, torch.Tensor]:
        order = torch.randperm(len(given.train), generator=torch.Generator().manual_seed(seed + number // each))
        some = given.train.rows(order[number % each * 8 :][:8])
        return {"input_ids": some.input_ids, "attention_mask": some.attention_mask, "said": some.said}

    def loss(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        some = Answered(**batch)
        return -some.log_p(first_logits(module(**some.inputs(given.model), **no_cache(given.model.plain)))).mean()

    settings = TrainSettings(
        steps=epochs * each,
        schedule=WarmupStableDecay(peak=rate, warmup=1, decay=0.0),
        weight_decay=0.0,
        betas=(0.9, 0.999),
        precision="fp32",
        seed=seed,
    )
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        fit(tuned, batch_at, Path(folder), settings, loss=loss)
    seconds = time.perf_counter() - started
    merged = mh.open_model(tuned.merge_and_unload().eval(), tokenizer=given.model.tokenizer)
    kept = float(np.mean([accuracy(merged, other) for other in given.others]))
    return Side(f"LoRA, rank {rank}", accuracy(merged, given.test), kept, numbers, seconds)


def main(
    threads: Annotated[int, typer.Option(help="Threads.")] = 2,
    n: Annotated[int, typer.Option(help="Examples to learn from, and as many to judge by.")] = 256,
    seeds: Annotated[int, typer.Option(help="Runs of each, with other seeds (and other random heads).")] = 3,
    heads: Annotated[int, typer.Option(help="Heads to tune: 3 % of 48 is 1.4.")] = 2,
    epochs: Annotated[int, typer.Option(help="Passes over the examples.")] = 5,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    model = mh.open_model()
    given = case(model, n)
    chosen = select_heads(model, given.train, sparsity=SPARSITY).top(heads)
    foreign = select_heads(model, Answered.of_task(model, get_task("arithmetic"), n), sparsity=SPARSITY).top(heads)
    everywhere = model.heads
    rng = np.random.default_rng(0)
    ways: dict[str, Callable[[int], Side]] = {
        f"{heads} heads, chosen ({chosen})": lambda s: ours(given, "chosen", chosen, s, epochs),
        f"{heads} heads of the same layers": lambda s: ours(given, "random", chosen.matched_random(1, s)[0], s, epochs),
        f"{heads} heads of any layers": lambda s: ours(
            given,
            "random",
            model.head_set([list(everywhere)[i] for i in rng.permutation(len(everywhere))[:heads]]),
            s,
            epochs,
        ),
        f"{heads} heads chosen for arithmetic ({foreign})": lambda s: ours(given, "foreign", foreign, s, epochs),
        "all heads": lambda s: ours(given, "all", everywhere, s, epochs),
    }
    if importlib.util.find_spec("peft") is not None:
        ways["LoRA, rank 1"] = lambda s: lora(given, 1, 1e-3, s, epochs)
        ways["LoRA, rank 8"] = lambda s: lora(given, 8, 1e-3, s, epochs)
    table = Table(title=f"answering from memory, {n} examples, {epochs} epochs, {threads} threads, {seeds} seeds")
    for column in ("what is tuned", "answers from memory", "other tasks", "numbers", "seconds"):
        table.add_column(column, justify="left" if column == "what is tuned" else "right")
    kept = float(np.mean([accuracy(model, other) for other in given.others]))
    table.add_row("nothing", f"{accuracy(model, given.test):.2f}", f"{kept:.2f}", "0", "")
    for name, way in ways.items():
        sides = [way(seed) for seed in range(seeds)]
        reached = [side.reached for side in sides]
        table.add_row(
            name,
            f"{np.mean(reached):.2f} ({min(reached):.2f}-{max(reached):.2f})",
            f"{np.mean([side.kept for side in sides]):.2f}",
            f"{sides[0].numbers:,}",
            f"{np.mean([side.seconds for side in sides]):.1f}",
        )
    Console(width=130).print(table)
    if importlib.util.find_spec("peft") is None:
        Console().print("LoRA was left out; install it with pip install peft.")


if __name__ == "__main__":
    typer.run(main)
