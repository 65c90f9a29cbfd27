"""Uneven head pruning: what disk, KV cache and time fall to, and that the folder gives the logits of masking.

    manyheads bench pruning [--model smollm2] [--threads 1] [--prompt 128] [--tokens 32] [--rounds 5]

A random share of all KV heads goes with their query heads, whichever layers they are in; each layer keeps one or more. The
folder is written and read again. Times are processor seconds, whole model and pruned one in turns; the ratio is the median of the
rounds' ratios, with their range. A prefill is one pass over `prompt` tokens; decoding adds `tokens` to them. The error is the
largest difference of a logit to masking.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh

SHARES = (0.0, 0.25, 0.5, 0.75)


def chosen(model: mh.HeadModel, share: float, seed: int) -> mh.HeadSet:
    """Random groups, but for one in each layer."""
    group = model.n_heads // model.n_kv_heads
    rng = torch.Generator().manual_seed(seed)
    spared = [int(torch.randint(model.n_kv_heads, (), generator=rng)) for _ in range(model.n_layers)]
    groups = [(layer, g) for layer in range(model.n_layers) for g in range(model.n_kv_heads) if g != spared[layer]]
    n = round(share * model.n_layers * model.n_kv_heads)
    some = [groups[i] for i in torch.randperm(len(groups), generator=rng)[:n].tolist()]
    return mh.HeadSet(((layer, g * group + h) for layer, g in some for h in range(group)), model.shape)


def ratio(whole: Callable[[], Any], small: Callable[[], Any], rounds: int) -> str:
    """Time of `small` over that of `whole`: median and range over rounds in turns, the first of which warms up."""
    found = []
    for _ in range(rounds + 1):
        seconds = []
        for work in (whole, small):
            started = time.process_time()
            work()
            seconds.append(time.process_time() - started)
        found.append(seconds[1] / seconds[0])
    return f"{statistics.median(found[1:]):.2f} ({min(found[1:]):.2f}-{max(found[1:]):.2f})"


@torch.no_grad()
def kv_bytes(model: mh.HeadModel, ids: torch.Tensor) -> float:
    """Bytes a token that its cache holds after a pass."""
    layers = model.plain(ids, use_cache=True).past_key_values.layers
    return sum(t.nbytes for layer in layers for t in (layer.keys, layer.values)) / ids.shape[1]


def main(
    model: Annotated[str, typer.Option(help="Which model.")] = "ladon",
    threads: Annotated[int, typer.Option(help="Threads.")] = 1,
    prompt: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    rounds: Annotated[int, typer.Option(help="Rounds of each timing.")] = 5,
    seed: Annotated[int, typer.Option(help="Which heads, and which tokens.")] = 0,
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    whole = mh.open_model(model)
    ids = torch.randint(10, whole.vocab_size, (1, prompt), generator=torch.Generator().manual_seed(seed))
    rules: dict[str, Any] = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    table = Table(title=f"{model}, {threads} thread(s), prompt {prompt}, {tokens} tokens decoded: pruned / whole")
    for column in (
        "KV heads gone",
        "heads a layer",
        "MB on disk",
        "KV bytes a token",
        "prefill",
        "prompt + decoding",
        "error",
    ):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as folder:
        for share in SHARES:
            heads = chosen(whole, share, seed)
            path = (whole.prune(heads) if heads else whole).save_pretrained(Path(folder) / f"{share}")
            small = mh.open_model(path)
            with whole.editing(mh.Scale(heads, 0.0)):
                masked = whole.logits(ids)
            error = float((small.logits(ids) - masked).abs().max())
            counts = small.layout.counts or (small.n_heads,)
            table.add_row(
                f"{len(heads) / len(whole.heads):.0%}",
                f"{min(counts)}-{max(counts)}" if len(set(counts)) > 1 else f"{counts[0]}",
                f"{(path / 'model.safetensors').stat().st_size / 1e6:.1f}",
                f"{kv_bytes(small, ids):,.0f}",
                ratio(lambda: whole.logits(ids), lambda m=small: m.logits(ids), rounds),
                ratio(lambda: whole.generate(ids, **rules), lambda m=small: m.generate(ids, **rules), rounds),
                f"{error:.1e}",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
