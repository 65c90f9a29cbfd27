"""LLMBoost (#13) measured: what a chain learns at equal cost, what its pipeline saves, and a first fit on a real model.

    manyheads bench boosting claims [--seeds 3] [--quick] [--work FOLDER]     resumable in --work
    manyheads bench boosting times [MODEL] [--chain 2] [--length 128]
    manyheads bench boosting first [MODEL] [--steps 10]

`times`: layers that only sleep show how many of them follow each other; then whole passes and decoded tokens, pipelined and in
turns, both in every round (ratios of wall time: median and quartiles), each model with one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import manyheads as mh
from manyheads.draft.boosting.chain import BoostedChain
from manyheads.draft.boosting.objective import BOOSTING
from manyheads.evaluation import experiment
from manyheads.pages.experiment import values_table, verdicts_table
from manyheads.progress import progressing
from manyheads.tasks.texts import bundled_prose, passages

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
Model = Annotated[str, typer.Argument(help="A model that `open_model` knows.")]


@app.command()
def claims(
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    quick: Annotated[bool, typer.Option("--quick")] = False,
    work: Annotated[Path | None, typer.Option(help="Keep every run here, and go on.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """The experiment `llm-boost`: a chain beside what the same cost buys otherwise."""
    torch.set_num_threads(threads)
    with progressing() as bar:
        tried = experiment("draft", "llm-boost").run(seeds=range(seeds), quick=quick, folder=work, bar=bar)
    console = Console(width=150)
    console.print(values_table(tried))
    console.print(verdicts_table(tried))


def slept_layers(n: int, layers: int, pipelined: bool, nap: float = 0.1) -> float:
    """How many naps long a pass is whose layers do nothing but take a nap."""
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=layers, num_attention_heads=2
    )
    model = mh.open_model(LlamaForCausalLM(config).eval())
    chain = BoostedChain([model] * n, rank=0, heads=1, head_dim=4)
    for one in chain._models:
        for block in one.layout.blocks:
            block.module.register_forward_pre_hook(lambda *_: time.sleep(nap))
    started = time.perf_counter()
    chain.each_logits(torch.arange(4)[None], pipelined=pipelined)
    return (time.perf_counter() - started) / nap


def ratios(rounds: int, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[float, float, float, float]:
    """Median and quartiles of the wall time of `second` over that of `first`, in turns; and the median ms of `first`."""
    taken = np.zeros((rounds + 1, 2))
    for turn in range(rounds + 1):
        for i, function in enumerate((first, second)):
            started = time.perf_counter()
            function()
            taken[turn, i] = time.perf_counter() - started
    share = taken[1:, 1] / taken[1:, 0]
    low, middle, high = np.quantile(share, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high), 1e3 * float(np.median(taken[1:, 0]))


@app.command()
def times(
    model: Model = "ladon",
    chain: Annotated[int, typer.Option(min=2, help="Models in the chain.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a pass.")] = 128,
    new: Annotated[int, typer.Option(min=1, help="Tokens to decode.")] = 16,
    rounds: Annotated[int, typer.Option(min=3)] = 9,
) -> None:
    """What the pipeline saves."""
    console = Console(width=150)
    table = Table(
        "models", "layers", "in turns", "n L", "pipelined", "L + n - 1", title="layers that follow each other"
    )
    for n, layers in ((2, 6), (3, 6), (2, 12)):
        slept = [f"{slept_layers(n, layers, pipelined):.1f}" for pipelined in (False, True)]
        table.add_row(str(n), str(layers), slept[0], str(n * layers), slept[1], str(layers + n - 1))
    console.print(table)
    opened = mh.open_model(model)
    boosted = BoostedChain([opened] * chain)
    ids = passages(opened, None, n=1, length=length, seed=0)

    def whole(pipelined: bool) -> Callable[[], Any]:
        return lambda: boosted.each_logits(ids, pipelined=pipelined)

    def decoded(pipelined: bool) -> Callable[[], Any]:
        how: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        return lambda: boosted.generate(ids[:, :16], pipelined=pipelined, **how)

    torch.set_num_threads(1)
    table = Table("what", "in turns, ms", "pipelined / in turns", title=f"{chain} x {model}")
    for name, make in ((f"a pass of {length} tokens", whole), (f"{new} tokens after 16", decoded)):
        middle, low, high, milliseconds = ratios(rounds, make(False), make(True))
        table.add_row(name, f"{milliseconds:.0f}", f"{middle:.2f} ({low:.2f} to {high:.2f})")
    console.print(table)


@app.command()
def first(
    model: Model = "smollm2",
    steps: Annotated[int, typer.Option(min=1)] = 10,
    rows: Annotated[int, typer.Option(min=1)] = 2,
    length: Annotated[int, typer.Option(min=2)] = 64,
    threads: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """A chain of a model with itself: what is equal at the start, and a short fit on prose, with seconds and memory."""
    torch.set_num_threads(threads)
    opened, process = mh.open_model(model), psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    chain = BoostedChain([opened, opened])
    made = time.perf_counter() - started
    learned, held = (passages(opened, bundled_prose(), n=n, length=length, seed=seed) for n, seed in ((64, 0), (8, 1)))
    apart = max(float((own - opened.logits(held)).abs().max()) for own in chain.each_logits(held))
    beside = max(
        float((one - other).abs().max())
        for one, other in zip(chain.each_logits(held), chain.each_logits(held, pipelined=True), strict=True)
    )
    print(
        f"{sum(p.numel() for p in chain.parameters()) / 1e6:.1f} M numbers learn, of {_size(opened):.0f} M; made in {made:.1f} s"
    )
    print(f"largest difference of logits at the start: {apart:g}; pipelined: {beside:g}")
    losses = [nats(chain, held)]
    started, ticks = time.perf_counter(), time.process_time()
    chain.fit(learned, replace(BOOSTING, steps=steps, rows=rows))
    seconds, ticks = time.perf_counter() - started, time.process_time() - ticks
    grown = (process.memory_info().rss - before) / 2**20
    print(
        f"{steps} steps of {rows} x {length} tokens: {seconds / steps:.2f} s a step ({ticks / steps:.2f} of the processor)"
    )
    print(f"memory grew by {grown:.0f} MiB in all, beside {before / 2**20:.0f} MiB of the open model")
    losses.append(nats(chain, held))
    print(
        "nats a token on held-out prose, of each model: "
        + ", then ".join(" ".join(f"{x:.3f}" for x in one) for one in losses)
    )


def nats(chain: BoostedChain, ids: torch.Tensor) -> list[float]:
    """Nats a token of each model of the chain."""
    every = (own[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]) for own in chain.each_logits(ids))
    return [float(-own.mean()) for own in every]


def _size(model: mh.HeadModel) -> float:
    return sum(p.numel() for p in model.plain.parameters()) / 1e6


if __name__ == "__main__":
    app()
