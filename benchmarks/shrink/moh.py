"""MoH (#16): from scratch beside all heads and fewer heads, a converted model beside an equally tuned one, and time.

    manyheads bench moh [--out moh.json] [--seeds 3] [--steps 300]        from scratch
    manyheads bench moh --model ladon [--text FILE] [--steps 60]           converted, then tuned
    manyheads bench moh --times ladon [--rounds 5]                         prefill and decode

From scratch: bytes of the prose that ships with Python (every tenth passage held out), a Llama of 4 layers and 8 heads on a
stream of 64. All see the same batches. MHA has 8 heads; MoH 2 shared and 6 routed ones, of which a token uses 4 (75 %);
"6 heads" is MHA without two heads in each layer, from the start. Numbers are nats a byte on the held-out passages. "Most" is the
largest load of a routed head over the mean, in the layer where it is largest.

Converted: 4 of 8 heads shared, 2 of 4 routed, by the length of queries; beside it the same model tuned on the same batches.
Times are the least of interleaved rounds, over those of the model with all heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from _measuring import timed
from dha import byte_passages, loss_of, text_passages
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.lab.small_llama import llama_config
from manyheads.model.offloading import own_copy
from manyheads.shrink.weights.moh import TUNING, MoH, loads, routers, train_routed
from manyheads.shrink.weights.skipping import skipping
from manyheads.training import TrainSettings

SCRATCH = TrainSettings(rows=16, rate=2e-3, warmup=50, decay=0.5, precision="fp32")
LENGTH = 64


def small(heads: int, seed: int) -> mh.HeadModel:
    """A model of 8 heads in each layer, of which the first `heads` write."""
    torch.manual_seed(seed)
    config = llama_config(256, 64, 4, 8, intermediate_size=128, max_position_embeddings=LENGTH)
    model = mh.open_model(LlamaForCausalLM(config).eval())
    write = (torch.arange(8) < heads).float().repeat_interleave(8)
    for block in model.layout.blocks if heads < 8 else ():
        block.projection.register_forward_pre_hook(lambda _, args: (args[0] * write,))
    return model


def most(model: mh.HeadModel, held: Tensor) -> float:
    """The largest load of a routed head over the mean of its layer."""
    return max(float(each.max() / each.mean()) for each in loads(model, held)) if routers(model.plain) else 1.0


def scratch(way: str, seed: int, steps: int) -> dict[str, float]:
    """One training from the start."""
    ids = byte_passages(LENGTH)
    held, ids = ids[::10], ids[[i for i in range(len(ids)) if i % 10]]
    model = small(6 if way == "6 heads" else 8, seed)
    if way == "MoH":
        model = MoH(share=0.75, shared=2, router="learned", seed=seed).convert(model)
    train_routed(model, ids, replace(SCRATCH, steps=steps, seed=seed))
    return {"loss": loss_of(model, held), "most": most(model, held)}


def converted(way: str, name: str, text: Path | None, steps: int, rows: int, rate: float) -> dict[str, float]:
    """One tuning of a model as it comes."""
    model = mh.open_model(name)
    ids = text_passages(model, text, 128)
    held, ids = ids[::10][:64], ids[[i for i in range(len(ids)) if i % 10]]
    if way == "MoH":
        made = MoH(share=0.75).convert(model)
    elif way == "fixed":
        last = range(model.n_heads - model.n_heads // 4, model.n_heads)
        made = model.bake(mh.Scale([(layer, h) for layer in range(model.n_layers) for h in last], 0.0))
    else:
        made = mh.open_model(own_copy(model.plain), tokenizer=model.tokenizer)
    first = loss_of(made, held)
    train_routed(made, ids, replace(TUNING, steps=steps, rows=rows, rate=rate))
    return {"first": first, "loss": loss_of(made, held), "most": most(made, held)}


def times(name: str, rounds: int) -> Table:
    model = mh.open_model(name)
    shown = Table(title=f"{name}: time over that of all heads (least of {rounds} interleaved rounds, one thread)")
    for column in ("", "prefill of 64", "prefill of 512", "decode, 32 tokens behind 256"):
        shown.add_column(column)
    share = round(0.75 * model.n_heads) / model.n_heads
    ways = [
        (f"learned, {share:.0%}", MoH(share=share, shared=1, router="learned").convert(model)),
        (f"queries, {share:.0%}", MoH(share=share).convert(model)),
    ]
    ids = torch.randint(5, model.vocab_size, (1, 512), generator=torch.Generator().manual_seed(0))
    how: dict[str, Any] = dict(max_new_tokens=32, min_new_tokens=32, do_sample=False, pad_token_id=0)
    jobs: list[Callable[[mh.HeadModel], Any]] = [
        lambda m: m.logits(ids[:, :64]),
        lambda m: m.logits(ids),
        lambda m: m.plain.generate(ids[:, :256], **how),
    ]
    cells: dict[str, list[str]] = {}
    for job in jobs:

        def of(way: mh.HeadModel, skip: bool, job: Callable[[mh.HeadModel], Any] = job) -> Callable[[], Any]:
            def run() -> None:
                with skipping(way) if skip else nullcontext():
                    job(way)

            return run

        runs = [of(model, False), *(of(way, skip) for _, way in ways for skip in (False, True))]
        whole, *found = timed(rounds, *runs)
        labels = [f"{label}, {how}" for label, _ in ways for how in ("masked", "skipped")]
        for label, seconds in zip(labels, found, strict=True):
            cells.setdefault(label, []).append(f"{seconds / whole:.2f}")
    for label, row in cells.items():
        shown.add_row(label, *row)
    return shown


def main(
    model: Annotated[str | None, typer.Option(help="A model to convert.")] = None,
    times_of: Annotated[str | None, typer.Option("--times", help="A model to time.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text for it; without, prose that ships with Python.")] = None,
    out: Annotated[Path, typer.Option(help="What is done, as JSON.")] = Path("moh.json"),
    seeds: int = 3,
    steps: int = 300,
    rows: int = 8,
    rate: float = 1e-4,
    rounds: int = 5,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    console = Console()
    if times_of is not None:
        console.print(times(times_of, rounds))
        return
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if model is None:
        ways = [(w, s, f"small {w} seed {s}") for s in range(seeds) for w in ("MHA", "MoH", "6 heads")]
    else:
        ways = [(w, 0, f"{model} {w}") for w in ("MHA", "MoH", "fixed")]
    for way, seed, key in ways:
        if key not in done:
            done[key] = scratch(way, seed, steps) if model is None else converted(way, model, text, steps, rows, rate)
            out.write_text(json.dumps(done, indent=1))
    shown = Table(title=f"{model or 'from scratch'}, {steps} steps")
    for column in ("", "at first", "nats", "minus MHA", "each run", "most"):
        shown.add_column(column)
    for way in dict.fromkeys(way for way, _, _ in ways):
        runs = [done[key] for w, _, key in ways if w == way]
        base = [done[key] for w, _, key in ways if w == "MHA"][: len(runs)]
        difference = sum(run["loss"] - other["loss"] for run, other in zip(runs, base, strict=True)) / len(runs)
        shown.add_row(
            way,
            f"{runs[0]['first']:.3f}" if "first" in runs[0] else "",
            f"{sum(run['loss'] for run in runs) / len(runs):.3f}",
            f"{difference:+.3f}",
            " ".join(f"{run['loss']:.3f}" for run in runs),
            f"{max(run['most'] for run in runs):.2f}",
        )
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
