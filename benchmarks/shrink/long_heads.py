"""LongHeads (#46): finding one sentence in texts longer than those a model was trained on, beside what else needs no training.

    manyheads bench long_heads [--n 40] [--work longheads]
    manyheads bench long_heads --model smollm2 --window 1024 --lengths 1024,4096 --n 10 --work longheads
    manyheads bench long_heads seconds [--model ladon] [--window 512]

Prompts: for the bundled model its own task (`tasks.Needle`: one needle at a random depth, one rival, an answer of one token); for
others the passkey of the paper's code (a number in repeated sentences). A prompt counts if every token of the answer is the most
likely one. Ways to read it:

    plain             the model as it is
    last tokens       the model on the last `window` tokens alone
    NTK               rotary frequencies of a base raised for this length:  base * (length / window)^(R / (R - 2))
    random chunks     LongHeads with random picks: what the numbering of positions does alone
    released, ...     LongHeads with each representation of chunks

With --work every finished prompt is kept, and a run that was interrupted goes on. `seconds` times prompts and tokens in turns.
"""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from _measuring import timed
from rich.console import Console
from rich.table import Table
from torch import Tensor

import manyheads as mh
from manyheads.heads import mean_stderr
from manyheads.inputs import read_lines
from manyheads.shrink.positions.chunk_attention import REPRESENTATIONS
from manyheads.shrink.positions.long_heads import LongHeads
from manyheads.shrink.positions.rotation import rotary_in

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
WAYS = ("plain", "last tokens", "NTK", "random chunks", "released", "keys", "mean", "tokens")
GARBAGE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def passkey(model: mh.HeadModel, length: int, seed: int) -> tuple[str, str]:
    """The prompt of the paper's code, of about `length` tokens, and its answer."""
    rng = random.Random(seed)
    key = rng.randint(1, 50_000)
    intro = (
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about "
        "the important information there.\n"
    )
    info = f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n"
    question = "\nWhat is the pass key? The pass key is"
    room = length - len(model.tokenizer(intro + info + question).input_ids)
    sentences = max(0, round(room / len(model.tokenizer(GARBAGE).input_ids) * 5))
    garbage = [part + "." for part in GARBAGE.strip().split(".") if part] * (sentences // 5 + 1)
    place = rng.randint(0, sentences)
    return intro + "".join(garbage[:place]) + info + "".join(garbage[:sentences][place:]) + question, f" {key}"


def prompts(model: mh.HeadModel, name: str, length: int, n: int) -> list[tuple[Tensor, Tensor]]:
    """Token ids of each prompt, `[1, T]`, and of its answer, `[A]`."""
    if name == "ladon":
        task = mh.tasks.Needle(shortest=length, longest=length)
        texts = [(example.prompt, example.answer) for example in task.examples(n)]
    else:
        texts = [passkey(model, length, seed) for seed in range(n)]
    encode = model.tokenizer
    return [
        (torch.tensor([encode(prompt).input_ids]), torch.tensor(encode(answer, add_special_tokens=False).input_ids))
        for prompt, answer in texts
    ]


@contextlib.contextmanager
def reading(model: mh.HeadModel, way: str, window: int, chunk: int, length: int) -> Iterator[None]:
    """The model as this way reads a text of `length` tokens."""
    if way in REPRESENTATIONS or way == "random chunks":
        with LongHeads(window, chunk, way)(model):
            yield
    elif way == "NTK":
        rotary = rotary_in(model.plain)
        before = rotary.inv_freq
        pairs = len(before)
        raised = max(1.0, length / window) ** (pairs / (pairs - 1))
        rotary.inv_freq = before * raised ** (-torch.arange(pairs) / pairs)
        try:
            yield
        finally:
            rotary.inv_freq = before
    else:
        yield


def is_right(model: mh.HeadModel, ids: Tensor, answer: Tensor) -> bool:
    """Whether each token of the answer is the most likely one."""
    logits = model.logits(torch.cat([ids, answer[None, :-1]], 1), logits_to_keep=len(answer))
    return bool((logits[0].argmax(-1) == answer).all())


@app.callback(invoke_without_command=True)
def main(
    context: typer.Context,
    model: str = "ladon",
    window: Annotated[int, typer.Option(help="W, in tokens.")] = 512,
    chunk: Annotated[int, typer.Option(help="w; 0: an eighth of the window.")] = 0,
    lengths: str = "640,1280,2560,5120",
    ways: str = ",".join(WAYS),
    n: int = 40,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps what is finished.")] = None,
    threads: int = 1,
) -> None:
    """Accuracy of every way at every length."""
    if context.invoked_subcommand:
        return
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    REPRESENTATIONS["random chunks"] = lambda how, q, k, v: torch.randn_like(k[..., :1, :])
    opened, chunk = mh.open_model(model), chunk or window // 8
    store = Kept(work)
    table = Table("tokens", *ways.split(","), title=f"{model}, {n} prompts each, window {window}, chunks of {chunk}")
    for length in map(int, lengths.split(",")):
        asked = prompts(opened, model, length, n)
        row = []
        for way in ways.split(","):
            names = [f"{model} {way} {window} {chunk} {length} {number}" for number in range(n)]
            if any(name not in store for name in names):
                with reading(opened, way, window, chunk, length):
                    for name, (ids, answer) in zip(names, asked, strict=True):
                        if name not in store:
                            store[name] = is_right(opened, ids[:, -window:] if way == "last tokens" else ids, answer)
            mean, error = mean_stderr(np.array([store[name] for name in names]))
            row.append(f"{mean:.2f} ± {error:.2f}")
            print(length, way, row[-1], flush=True)
        table.add_row(f"{np.mean([ids.shape[1] for ids, _ in asked]):.0f}", *row)
    Console(width=130).print(table)


@app.command()
def seconds(
    model: str = "ladon",
    window: int = 512,
    lengths: str = "1024,2048,4096",
    rounds: int = 3,
    threads: int = 1,
) -> None:
    """Times of a prompt and of one more token, plain and with LongHeads, in turns."""
    torch.set_num_threads(threads)
    plain, ours = mh.open_model(model), mh.open_model(model)
    table = Table("tokens", "prompt, plain", "prompt, LongHeads", "ratio", "token, plain", "token, LongHeads", "ratio")
    with LongHeads(window)(ours):
        for length in map(int, lengths.split(",")):
            ids = torch.randint(10, plain.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
            caches = [read(one, ids) for one in (plain, ours)]
            prompt = timed(rounds, *(partial(read, one, ids) for one in (plain, ours)))
            step = [partial(read, one, ids[:, :1], cache) for one, cache in zip((plain, ours), caches, strict=True)]
            token = timed(16 * rounds, *step)
            table.add_row(str(length), *cells(prompt), *cells(token))
    Console(width=130).print(table)


def cells(times: list[float]) -> list[str]:
    """Milliseconds of two ways, and how many times as long the second takes."""
    return [*(f"{1e3 * one:.1f} ms" for one in times), f"{times[1] / times[0]:.2f}"]


def read(model: mh.HeadModel, ids: Tensor, cache: Any = None) -> Any:
    """The cache after these tokens."""
    with torch.no_grad():
        return model.plain(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).past_key_values


class Kept(dict[str, bool]):
    """Results by name; with a folder, a line of its file each."""

    def __init__(self, folder: Path | None) -> None:
        super().__init__()
        self.path = None if folder is None else folder / "long_heads.jsonl"
        if self.path is not None and self.path.exists():
            for _, line in read_lines(self.path):
                super().update(json.loads(line))

    def __setitem__(self, name: str, value: bool) -> None:
        super().__setitem__(name, value)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({name: value}) + "\n")


if __name__ == "__main__":
    app()
