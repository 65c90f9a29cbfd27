"""DHA (#53) beside mean pooling at equal KV budgets and equal tokens: small models from scratch, and a whole model.

    manyheads bench dha [--out dha.json] [--seeds 3] [--steps 240] [--share 0.25]
    manyheads bench dha --model ladon [--text FILE] [--steps 40] [--rows 4] [--length 128] [--share 0.5 --share 0.25]

First form: bytes of the prose that ships with Python (every tenth passage held out), a Llama of 4 layers and 8 heads on a stream
of 64, trained here first. Second form: a model as it comes, and passages of a text. From the model, at a share of the KV heads,

    MHA       goes on training
    GQA       means of neighbouring heads, then training
    planned   means of the heads that DHA's plan puts together, then training
    DHA       the plan's groups fused and collapsed, then training
    DHA GQA   the same with one grouping for keys and values, as many heads in each layer: an ordinary checkpoint

each by `--steps` steps on the same batches, those of the fusion (half of them at most) among them. Numbers are nats a token on
the held-out passages, at first (of DHA: collapsed, before its training goes on) and at the end. The cache is measured: bytes of
a DynamicCache. With `--steps 0` nothing is trained. What is done stays in `--out`, and the
same command goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM

import manyheads as mh
from manyheads.lab.small_llama import llama_config
from manyheads.model.offloading import own_copy
from manyheads.progress import Bar
from manyheads.shrink.weights.dha import DHA, redundancy
from manyheads.shrink.weights.fusion import FUSION, fused
from manyheads.shrink.weights.shared_heads import Grouping, adjacent, mean_pooled
from manyheads.tasks.texts import passages
from manyheads.training import TrainSettings, epoch_rows, fit, next_token_loss

BASE = TrainSettings(steps=800, rows=16, rate=2e-3, warmup=50, decay=0.5, precision="fp32")


class Count(Bar):
    """Counts steps."""

    n = 0

    def __call__(self, more: int = 1, /, note: str = "") -> None:
        self.n += more


def byte_passages(length: int) -> Tensor:
    text = "\n".join(topics[name] for name in sorted(topics)).encode()
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    return ids[: len(ids) // length * length].reshape(-1, length)


def text_passages(model: mh.HeadModel, file: Path | None, length: int) -> Tensor:
    if file is None:
        return passages(model, None, n=400, length=length, seed=0)
    ids = model.tokenizer(file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids[: len(ids) // length * length]).reshape(-1, length)


def trained(model: mh.HeadModel, ids: Tensor, settings: TrainSettings, first: int = 0) -> mh.HeadModel:
    """A copy that was trained on, from batch `first` on."""
    module = own_copy(model.plain).requires_grad_(True)

    def batch(number: int) -> dict[str, Tensor]:
        return {"input_ids": ids[epoch_rows(len(ids), settings.rows, first + number, settings.seed)]}

    fit(module, batch, settings, loss=next_token_loss)
    return mh.open_model(module.eval(), tokenizer=model.tokenizer)


def loss_of(model: mh.HeadModel, held: Tensor) -> float:
    """Nats a token."""
    with torch.no_grad():
        parts = [
            F.cross_entropy(model.logits(rows)[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")
            for rows in held.split(16)
        ]
    return float(sum(parts)) / held[:, 1:].numel()


def cache_bytes(model: mh.HeadModel, ids: Tensor) -> float:
    """Bytes of keys and values a token."""
    cache = DynamicCache()
    with torch.no_grad():
        model.plain(input_ids=ids, past_key_values=cache)
    return sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / ids.numel()


def compared(
    model: mh.HeadModel, ids: Tensor, held: Tensor, share: float, settings: TrainSettings, done: Collection[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """What each way from one model gives, but for those that are done."""
    plan = DHA(share=share, seed=settings.seed).plan(model)
    plain = DHA(share=share, plain=True, seed=settings.seed).plan(model)
    whole = adjacent(model, model.n_kv_heads)
    usual = adjacent(model, len(plain.key[0]))
    steps = settings.steps or 0

    def means(grouping: Grouping) -> Callable[[], tuple[mh.HeadModel, int, float]]:
        return lambda: (mean_pooled(model, grouping) if grouping is not whole else model, 0, 0.0)

    def fusion(grouping: Grouping) -> Callable[[], tuple[mh.HeadModel, int, float]]:
        def made() -> tuple[mh.HeadModel, int, float]:
            count = Count()
            how = replace(FUSION, steps=steps // 2, rows=settings.rows, rate=settings.rate, seed=settings.seed)
            small, left = fused(model, grouping, ids, how, bar=count)
            return small, count.n, left

        return made

    ways: dict[str, Callable[[], tuple[mh.HeadModel, int, float]]] = {
        "MHA": means(whole),
        "GQA": means(usual),
        "planned": means(plan),
        "DHA": fusion(plan),
        "DHA GQA": fusion(plain),
    }
    for name, way in ways.items():
        if name in done or (not steps and "DHA" in name):
            continue
        made, used, left = way()
        first, size = loss_of(made, held), cache_bytes(made, held[:1])
        last = loss_of(trained(made, ids, replace(settings, steps=steps - used), used), held) if steps else first
        yield name, {"first": first, "last": last, "cache": size, "fusion": used, "F": left}


def table(title: str, runs: list[dict[str, Any]]) -> Table:
    """One row for each way: means over runs, and each run's end."""
    shown = Table(title=title)
    for column in ("", "cache, bytes a token", "at first", "at the end", "minus GQA", "each run", "fusion steps (F)"):
        shown.add_column(column)
    mean = lambda name, key: sum(run[name][key] for run in runs) / len(runs)  # noqa: E731
    for name in runs[0]:
        shown.add_row(
            name,
            f"{mean(name, 'cache'):.0f}",
            f"{mean(name, 'first'):.3f}",
            f"{mean(name, 'last'):.3f}",
            f"{mean(name, 'last') - mean('GQA', 'last'):+.3f}",
            " ".join(f"{run[name]['last']:.3f}" for run in runs),
            f"{mean(name, 'fusion'):.0f} ({mean(name, 'F'):.1g})" if "DHA" in name else "",
        )
    return shown


def main(
    model: Annotated[str | None, typer.Option(help="A model as it comes, in place of small ones.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text for it; without, prose that ships with Python.")] = None,
    out: Annotated[Path, typer.Option(help="What is done, as JSON.")] = Path("dha.json"),
    seeds: int = 3,
    steps: int = 240,
    share: Annotated[list[float] | None, typer.Option()] = None,
    length: int = 64,
    rows: int = 16,
    rate: float = 3e-4,
    most: Annotated[int, typer.Option(help="Held-out passages of a model as it comes.")] = 64,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    console = Console()
    settings = TrainSettings(
        steps=steps or None, rows=rows, rate=rate, warmup=10, decay=0.25, weight_decay=0.0, precision="fp32"
    )
    for part in share or [0.25]:
        runs = []
        for seed in range(seeds if model is None else 1):
            kept = done.setdefault(f"{model or 'small'} {part:g} seed {seed}", {})
            if len(kept) < (5 if steps else 3):
                opened, ids = source(model, text, length, seed)
                held = ids[::10] if model is None else ids[::10][:most]
                ids = ids[[i for i in range(len(ids)) if i % 10]]
                for name, found in compared(opened, ids, held, part, replace(settings, seed=seed), kept):
                    kept[name] = found
                    out.write_text(json.dumps(done, indent=1))
            runs.append(kept)
        console.print(
            table(f"{model or 'small models'}, {part:.0%} of the KV heads, {steps} steps of {rows} x {length}", runs)
        )
    if model is not None:
        for kind, values in redundancy(mh.open_model(model)).items():
            console.print(f"CKA of {kind} heads by layer: {' '.join(f'{v:.3f}' for v in values)}")


def source(model: str | None, text: Path | None, length: int, seed: int) -> tuple[mh.HeadModel, Tensor]:
    """The model to start from, and its passages."""
    if model is not None:
        opened = mh.open_model(model)
        return opened, text_passages(opened, text, length)
    ids = byte_passages(length)
    torch.manual_seed(seed)
    config = llama_config(256, 64, 4, 8, intermediate_size=128, max_position_embeddings=length)
    small = mh.open_model(LlamaForCausalLM(config).eval())
    train = ids[[i for i in range(len(ids)) if i % 10]]
    return trained(small, train, replace(BASE, seed=seed)), ids


if __name__ == "__main__":
    typer.run(main)
