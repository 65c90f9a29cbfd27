"""Caches cut head by head beside the full one: `manyheads bench cache [MODEL] [--lengths 512,2048]`.

For every length of context and every way to keep less of it:

    bytes      of keys and values after the context, as they lie in memory
    peak       MiB by which a process of its own grew while it read the context and eight tokens more
    prefill    seconds to read the context, as a ratio to Transformers' own cache
    decode     seconds of one more token, the same; the ways take turns, the median over rounds and its quartiles
    needles    share of sentences in the context that are said word for word when asked for afterwards
    loss       nats a token of the text that follows a context of prose; "-" where no text is long enough

Each line is in --out as soon as it is there; what is there is not measured again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # run as a file, too
from _measuring import grown, print_growth

import manyheads as mh
from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.inputs import read_text
from manyheads.shrink.cache.duo_attention import DuoAttention
from manyheads.shrink.cache.haystacks import haystacks, needle_recall
from manyheads.shrink.cache.press import Press
from manyheads.shrink.cache.snapkv import AdaKV, SnapKV
from manyheads.shrink.cache.streaming import Streaming
from manyheads.shrink.measuring import Read, loss_after

Line = dict[str, Any]


def ways(ratio: float, sinks: int, recent: int) -> dict[str, Press | None]:
    """The ways to keep a context; None is Transformers' own cache."""
    return {
        "transformers": None,
        "ragged, all kept": Press(),
        f"duo {ratio:g}": DuoAttention(ratio, sinks, recent),
        f"duo {ratio:g}, prompt streams": DuoAttention(ratio, sinks, recent, prompt="streaming"),
        f"snapkv {ratio:g}": SnapKV(compression_ratio=ratio),
        f"adakv {ratio:g}": AdaKV(SnapKV(compression_ratio=ratio)),
        "streaming": Streaming(sinks, recent),
    }


def context(model: mh.HeadModel, length: int) -> torch.Tensor:
    return torch.randint(5, model.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))


def _loss(model: mh.HeadModel, press: Press, length: int, texts: list[str] | None) -> float | None:
    """Nats a token after a context of prose; None where no text is so long."""
    try:
        return loss_after(model, press, length, texts, n=4, seed=3)
    except InputError:
        return None


def measured(model: mh.HeadModel, length: int, all_ways: dict[str, Press | None], rounds: int) -> dict[str, Line]:
    """Bytes, prefill and decode of all ways at one length."""
    ids = context(model, length)
    kept = {name: Read(model, press) for name, press in all_ways.items()}
    prefill = {name: one.context(ids) for name, one in kept.items()}
    nbytes = {name: one.nbytes for name, one in kept.items()}
    token = ids[:, :1]
    for one in kept.values():
        one.token(token)
    seconds = {name: [] for name in kept}  # type: dict[str, list[float]]
    for _ in range(rounds):
        for name, one in kept.items():
            seconds[name].append(one.token(token))
    plain = np.array(seconds["transformers"])
    lines = {}
    for name in kept:
        ratio = np.array(seconds[name]) / plain
        lines[name] = {
            "bytes": nbytes[name],
            "prefill": prefill[name] / prefill["transformers"],
            "decode": float(np.median(ratio)),
            "decode quartiles": [float(q) for q in np.quantile(ratio, (0.25, 0.75))],
            "decode ms": 1000 * float(np.median(seconds[name])),
        }
    return lines


def child(task: str) -> None:
    """A context and eight tokens in a process of its own."""
    given = json.loads(task)
    model = mh.open_model(given["model"])
    press = ways(given["ratio"], given["sinks"], given["recent"])[given["way"]]
    ids = context(model, given["length"])
    one = Read(model, press)
    one.context(ids[:, :64])  # what is loaded and proved once is no part of what a context takes

    def work() -> None:
        one.context(ids)
        for _ in range(8):
            one.token(ids[:, :1])

    print_growth(work)


def main(
    model: Annotated[str, typer.Argument()] = "ladon",
    lengths: Annotated[str, typer.Option(help="Tokens of context.")] = "512,1024,2048,4096",
    ratio: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of heads that stream, or of tokens dropped.")
    ] = 0.75,
    sinks: Annotated[int, typer.Option(min=0)] = 16,
    recent: Annotated[int, typer.Option(min=1)] = 128,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts with five needles each.")] = 8,
    asks: Annotated[bool, typer.Option(help="Ask for needles by questions.")] = False,
    texts: Annotated[Path | None, typer.Option(help="A file of prose for the loss.")] = None,
    only: Annotated[str | None, typer.Option(help="Some of the ways, by how they begin, such as duo,snapkv.")] = None,
    rounds: Annotated[int, typer.Option(min=3)] = 30,
    needles_to: Annotated[int, typer.Option(help="The longest context with needles and prose.")] = 2048,
    peak: Annotated[bool, typer.Option(help="Measure the memory of processes of their own.")] = True,
    out: Annotated[Path, typer.Option()] = Path("bench-cache.json"),
    threads: Annotated[int, typer.Option(min=1)] = 1,
    child_task: Annotated[str | None, typer.Option("--child", hidden=True)] = None,
) -> None:
    torch.set_num_threads(threads)
    if child_task is not None:
        child(child_task)
        return
    done: dict[str, dict[str, Line]] = json.loads(out.read_text("utf-8")) if out.is_file() else {}

    def keep() -> None:
        write_atomically(out, lambda file: file.write_text(json.dumps(done, indent=1), "utf-8"), force=True)

    opened = mh.open_model(model)
    prose = None if texts is None else [read_text(texts, most=1 << 26)]
    starts = ("transformers", *(only or "").split(","))  # the first is what all others are measured by
    chosen = {name: press for name, press in ways(ratio, sinks, recent).items() if name.startswith(starts)}
    with torch.inference_mode():
        for length in map(int, lengths.split(",")):
            if str(length) not in done:
                done[str(length)] = measured(opened, length, chosen, rounds)
                keep()
            hay = haystacks(opened, contexts, length, asks=asks, seed=11) if length <= needles_to else []
            for name, press in chosen.items():
                line = done[str(length)][name]
                if hay and press is not None and "needles" not in line:
                    line["needles"] = float(needle_recall(opened, press, hay).mean())
                    line["loss"] = _loss(opened, press, length, prose)
                    keep()
                if peak and "peak" not in line:
                    task = {
                        "model": model,
                        "way": name,
                        "length": length,
                        "ratio": ratio,
                        "sinks": sinks,
                        "recent": recent,
                    }
                    line["peak"] = grown(__file__, json.dumps(task), threads)
                    keep()
    show(done)


def show(done: dict[str, dict[str, Line]]) -> None:
    table = Table("context", "way", "MB", "of full", "peak MiB", "prefill", "decode", "quartiles", "needles", "loss")
    for length, lines in done.items():
        full = lines["transformers"]["bytes"]
        for name, line in lines.items():
            low, high = line["decode quartiles"]
            share = f"1/{full / line['bytes']:.2f}"
            needles, nats = line.get("needles"), line.get("loss")
            table.add_row(
                length,
                name,
                f"{line['bytes'] / 1e6:.2f}",
                share,
                f"{line['peak']:.0f}" if "peak" in line else "-",
                f"{line['prefill']:.2f}",
                f"{line['decode']:.2f}",
                f"{low:.2f}-{high:.2f}",
                "-" if needles is None else f"{needles:.2f}",
                "-" if nats is None else f"{nats:.3f}",
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
