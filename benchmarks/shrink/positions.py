"""CARoPE (#115) and ComplexFormer (#116) beside RoPE: perplexity at the trained length and beyond it.

    manyheads bench positions --work positions [--texts FILE] [--steps 300] [--seeds 3]
    manyheads bench positions convert --work positions [--model ladon] [--steps 200]

The first form trains a small Llama (3 layers of 4 heads, width 128) from scratch on texts of `--length` tokens, with each kind of
angles in turn: the same weights to begin with, the same batches, the same steps. It prints held-out perplexity over texts of 1, 2
and 4 times that length, as ratios to RoPE of the same seed, and how far the learned parameters are from RoPE.

The second converts a trained model and goes on training it, beside the same model going on with RoPE.

Texts are Python's language reference, or those of `--texts`; the last tenth is held out. Tokens are the bundled model's. Rows
begin anywhere. Everything finished is kept in `--work`, and an interrupted run goes on.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.files import write_atomically
from manyheads.heads import mean_stderr
from manyheads.inputs import read_object, read_text
from manyheads.lab.small_llama import llama_config
from manyheads.progress import progressing
from manyheads.shrink.positions.carope import CARoPE
from manyheads.shrink.positions.complexformer import ComplexFormer
from manyheads.training import TrainSettings, fit, next_token_loss
from manyheads.training.batches import generator_of

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
METHODS: dict[str, Any] = {"RoPE": None, "CARoPE": CARoPE(), "ComplexFormer": ComplexFormer()}
MOST = 32_768  # tokens that each held-out perplexity is measured on, at most


def tokens_of(model: mh.HeadModel, texts: Path | None) -> tuple[Tensor, Tensor]:
    """Training tokens and held-out ones."""
    if texts is None:
        text = "\n".join(topics[name] for name in sorted(topics))
    else:
        text = read_text(texts)
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    cut = len(ids) * 9 // 10
    return ids[:cut], ids[cut:]


class Rows:
    """Batches of rows that begin anywhere."""

    def __init__(self, ids: Tensor, rows: int, length: int, seed: int) -> None:
        self.ids, self.rows, self.length, self.seed = ids, rows, length, seed

    def __call__(self, number: int) -> dict[str, Tensor]:
        starts = torch.randint(len(self.ids) - self.length, (self.rows,), generator=generator_of(self.seed, number))
        return {"input_ids": self.ids[starts[:, None] + torch.arange(self.length)]}


def loss_at(model: mh.HeadModel, held_out: Tensor, length: int) -> float:
    """Nats a token over texts of `length`, one after the other."""
    n = min(len(held_out), MOST) // length
    rows = held_out[: n * length].view(n, length)
    losses = []
    for batch in rows.split(max(1, 2048 // length)):
        logits = model.logits(batch)[:, :-1].flatten(0, 1)
        losses.append(F.cross_entropy(logits, batch[:, 1:].flatten(), reduction="none"))
    return float(torch.cat(losses).mean())


def moved(model: mh.HeadModel, ids: Tensor) -> dict[str, float]:
    """How far the new parameters are from RoPE."""
    modules = dict(model.plain.named_modules())
    steps = next((m for name, m in modules.items() if name.endswith("context_steps")), None)
    layers = [m for name, m in modules.items() if name.endswith("content_angles")]
    found: dict[str, float] = {}
    with torch.no_grad():
        if steps is not None:
            f = steps.log_f(model.layout.embedding(ids[None, :2048])).exp()[0]
            found = {
                "mean of f / theta": float(f.mean() / steps.theta),
                "spread of f over tokens": float(f.std(0).mean()),
            }
        if layers:
            delta = torch.stack([layer.delta for layer in layers])
            found = {
                "spread of delta over heads": float(delta.mean(-1).std()),
                "over pairs": float(delta.std(-1).mean()),
            }
    return found


def small_llama(vocab: int, length: int, seed: int) -> mh.HeadModel:
    torch.manual_seed(seed)
    config = llama_config(vocab, 128, 3, 4, intermediate_size=384, max_position_embeddings=4 * length)
    return mh.open_model(LlamaForCausalLM(config).eval())


def trained(
    start: mh.HeadModel, name: str, data: tuple[Tensor, Tensor], length: int, settings: TrainSettings, path: Path
) -> dict[str, Any]:
    """What one run gives, from the work folder where it is finished."""
    asked = {
        "length": length,
        "steps": settings.steps,
        "rate": settings.rate,
        "rows": settings.rows,
        "tokens": len(data[0]),
    }
    result = path.with_suffix(".json")
    if result.exists() and read_object(result)["asked"] == asked:
        return read_object(result)
    model = start if METHODS[name] is None else METHODS[name].convert(start)
    rows = Rows(data[0], settings.rows, length, settings.seed)
    with progressing() as bar:
        done = fit(model.plain, rows, settings, path, loss=next_token_loss, bar=bar.step(path.name, settings.steps))
    model.plain.eval()
    found = {
        "asked": asked,
        "minutes": done.minutes,
        "after": {str(k * length): loss_at(model, data[1], k * length) for k in (1, 2, 4)},
        "moved": moved(model, data[1]),
    }
    write_atomically(result, lambda to: to.write_text(json.dumps(found)), force=True)
    return found


def show(title: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Perplexities of each way, mean over seeds, with the ratio to the first way's of the same seed."""
    lengths = list(runs["RoPE"][0]["after"])
    table = Table(
        "",
        *(f"perplexity at {length}" for length in lengths),
        *(f"/ RoPE at {length}" for length in lengths),
        title=title,
    )
    for name, each in runs.items():
        losses = np.array([[run["after"][length] for length in lengths] for run in each])
        ratio = np.exp(losses - np.array([[run["after"][length] for length in lengths] for run in runs["RoPE"]]))
        mean, error = mean_stderr(ratio)
        cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(mean, error, strict=True)]
        table.add_row(name, *(f"{math.exp(x):.2f}" for x in losses.mean(0)), *cells)
    console = Console(width=150)
    console.print(table)
    for name, each in runs.items():
        for run in each:
            console.print(name, f"{run['minutes']:.1f} minutes", {key: round(v, 3) for key, v in run["moved"].items()})


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("positions"),
    texts: Annotated[Path | None, typer.Option(help="A text file; default: Python's language reference.")] = None,
    length: int = 128,
    steps: int = 300,
    rows: int = 8,
    seeds: int = 3,
    threads: int = 1,
) -> None:
    """Train from scratch."""
    if context.invoked_subcommand:
        return
    torch.set_num_threads(threads)
    ladon = mh.open_model()
    data = tokens_of(ladon, texts)
    print(f"{len(data[0])} tokens to train on, {len(data[1])} held out")
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        settings = TrainSettings(steps=steps, rows=rows, rate=3e-3, warmup=50, seed=seed, precision="fp32")
        for name in METHODS:
            start = small_llama(ladon.vocab_size, length, seed)
            path = work / f"scratch-{name}-{seed}"
            runs[name].append(trained(start, name, data, length, settings, path))
            print(name, seed, runs[name][-1], flush=True)
    show(f"{steps} steps of {rows} x {length} tokens, {seeds} seeds", runs)


@app.command()
def convert(
    work: Path = Path("positions"),
    model: str = "ladon",
    texts: Path | None = None,
    length: int = 256,
    steps: int = 200,
    rows: int = 4,
    rate: float = 1e-4,
    seeds: int = 3,
    threads: int = 1,
) -> None:
    """Convert a trained model and go on training."""
    torch.set_num_threads(threads)
    opened = mh.open_model(model)
    data = tokens_of(opened, texts)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
    for seed in range(seeds):
        settings = TrainSettings(steps=steps, rows=rows, rate=rate, warmup=20, seed=seed, precision="fp32")
        for name in METHODS:
            path = work / f"{Path(model).name}-{name}-{seed}"
            runs[name].append(trained(mh.open_model(model), name, data, length, settings, path))
            print(name, seed, runs[name][-1], flush=True)
    show(f"{model}, {steps} steps of {rows} x {length} tokens, {seeds} seeds", runs)


if __name__ == "__main__":
    app()
