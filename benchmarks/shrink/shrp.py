"""SHRP (#41): the experts used most, beside random ones and those used least, and the encoder before.

    manyheads bench shrp [--out shrp.json] [--seeds 3] [--steps 300]

A BERT of 4 layers and 4 heads on a stream of 64. Its task: a marker stands somewhere among 7 to 15 random tokens of
8 kinds, and the class is the token behind it, modulo 4. It is trained for twice `--steps`, converted, fine-tuned with routing
for `--steps`, and pruned. "same size" is a BERT with the pruned one's number of parameters (one head, fewer neurons), trained
from the start for as many steps in all. Numbers are accuracies on held-out examples.
"""

from __future__ import annotations

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
from manyheads.shrink.weights.shrp import SHRP, kept, train_experts, usage, with_one_expert
from manyheads.training import TrainSettings, generator_of

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


def main(
    out: Annotated[Path, typer.Option(help="What is done, as JSON.")] = Path("shrp.json"),
    seeds: int = 3,
    steps: int = 300,
    threads: int = 1,
) -> None:
    torch.set_num_threads(threads)
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    runs = []
    for seed in range(seeds):
        key = f"seed {seed}"
        if key not in done:
            done[key] = synthetic(seed, steps)
            out.write_text(json.dumps(done, indent=1))
        runs.append(done[key])
    shown = Table(title=f"a marked token, {seeds} seeds")
    for column in ("", "mean", "each run"):
        shown.add_column(column)
    for name in runs[0]:
        values = [run[name] for run in runs]
        form = "{:,.0f}" if "parameters" in name else "{:.3f}"
        shown.add_row(name, form.format(sum(values) / len(values)), " ".join(form.format(v) for v in values))
    Console().print(shown)


if __name__ == "__main__":
    typer.run(main)
