"""Causal head gating: ours beside the authors' package (`nam-causal-head-gating`), on the same prompts, fits and steps.

    make bench                      (or, in an environment with the extra `bench`:)
    manyheads bench gating [--threads 2] [--fits 4] [--steps 100]

1. on a model set by hand, whose heads are known: how many of the heads each side puts into the right role
2. on the bundled model and one of its tasks: time of all fits, rank correlation and share of equal roles, beside what two runs of
   the same side with different seeds agree on, which is as much as can be asked

Both sides use the paper's objective and the same learning rates, so that what differs is what we do differently. Roles of both
sides are read off G+ and G- by the paper's three scores: the package's own table calls heads that are shut in both "irrelevant",
and would find no interfering head at all. The package calls its parameters "positive" where gates are pushed up: G+.
"""

from __future__ import annotations

import importlib.util
import time
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.circuits.gating import FIRST, PRESSURE, SECOND, gate_roles, gating
from manyheads.heads import HeadScores
from manyheads.lab.small_llama import llama_config
from manyheads.tasks import Example, TaskBatch, encode, get_task

PACKAGE = "causal_head_gating"


@dataclass(frozen=True)
class Run:
    """One side's three scores and the seconds they took."""

    scores: dict[str, HeadScores]
    seconds: float


def ours(model: mh.HeadModel, batch: TaskBatch, fits: int, steps: int, rows: int, seed: int) -> Run:
    """This package's fits."""
    started = time.perf_counter()
    scores = gating(
        model,
        batch,
        fits=fits,
        first=replace(FIRST, steps=steps, rows=rows),
        second=replace(SECOND, steps=steps, rows=rows),
        seed=seed,
    )
    return Run(scores, time.perf_counter() - started)


def theirs(model: mh.HeadModel, batch: TaskBatch, fits: int, steps: int, rows: int, seed: int) -> Run:
    """The authors' package, as its documentation has it: frozen weights, all fits in one trainer, right-padded prompts."""
    from causal_head_gating.core.trainer import CHGTrainer

    for parameter in model.plain.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(seed)
    trainer = CHGTrainer(
        model.plain,
        dataset(batch),
        num_masks=fits,
        batch_size=rows,
        l1_weight=PRESSURE,
        lr=FIRST.rate,
        lr_end=FIRST.rate * FIRST.floor,
        lr_reg=SECOND.rate,
        lr_reg_end=SECOND.rate * SECOND.floor,
    )
    started = time.perf_counter()
    for _ in trainer.fit(steps, steps, verbose=False):
        pass
    seconds = time.perf_counter() - started
    masks = trainer.get_final_masks()
    up, down = (masks[name].double().numpy() for name in ("necessary", "sufficient"))  # its names for G+ and G-
    values = {"facilitating": down, "interfering": 1 - up, "irrelevant": up * (1 - down)}
    return Run({name: HeadScores.from_examples(name, value) for name, value in values.items()}, seconds)


def dataset(batch: TaskBatch) -> Any:
    """Prompt and answer, right-padded by one column at least, with the answer marked, as the package wants them."""
    from causal_head_gating.data.datasets import MaskedSequenceDataset

    pad = int(batch.input_ids.max()) + 1 if bool(batch.attention_mask.all()) else int(batch.input_ids[:, 0].min())
    width = batch.input_ids.shape[1] + 2
    ids, answers = torch.full((len(batch), width), pad), torch.zeros(len(batch), width, dtype=torch.bool)
    for i, (row, mask) in enumerate(zip(batch.input_ids, batch.attention_mask, strict=True)):
        length = int(mask.sum())
        ids[i, :length], ids[i, length] = row[-length:], batch.answer_ids[i]
        answers[i, length] = True
    return MaskedSequenceDataset(pad_token_id=pad, input_ids=ids, loss_masks=answers)


def agreement(a: Run, b: Run) -> tuple[float, float]:
    """Mean rank correlation of the three scores, and the share of heads with one role."""
    correlations = [spearman(a.scores[name].values, b.scores[name].values) for name in a.scores]
    one, two = gate_roles(a.scores), gate_roles(b.scores)
    same = sum(len(one[name] & two[name]) for name in one)
    return float(np.mean(correlations)), same / a.scores["facilitating"].values.size


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of ranks; equal values share theirs."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, where, counts = np.unique(values.ravel().round(3), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[where]

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def known(seed: int) -> tuple[mh.HeadModel, TaskBatch, dict[str, mh.HeadSet]]:
    """Two layers of four heads: one says the word it sees, one speaks against it, six write where nobody reads."""
    width, words, head_dim, noise = 32, 8, 8, 17  # the package takes width / heads for the head dimension
    generator = torch.Generator().manual_seed(seed)
    config = llama_config(words + 1, width, 2, 4, max_position_embeddings=16)
    module = LlamaForCausalLM(config).eval()
    says, denies = (int(i) for i in torch.randperm(8, generator=generator)[:2])
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.fill_((101 / width) ** 0.5) if "norm" in name else parameter.zero_()
        module.model.embed_tokens.weight[:, 0] = 10.0
        module.model.embed_tokens.weight[range(words), range(1, 1 + words)] = 1.0
        module.lm_head.weight[range(words), range(9, 9 + words)] = 1.0
        for layer, block in enumerate(module.model.layers):
            block.self_attn.v_proj.weight.view(4, head_dim, width)[:, range(words), range(1, 1 + words)] = 1.0
            out = block.self_attn.o_proj.weight.view(width, 4, head_dim)
            for h in range(4):
                if 4 * layer + h in (says, denies):
                    out[range(9, 9 + words), h, range(words)] = 8.0 if 4 * layer + h == says else -3.0
                else:
                    out[noise:, h] = 0.3 * torch.randn(width - noise, head_dim, generator=generator)
    model = mh.open_model(module)
    word = torch.randint(words, (64,), generator=generator)
    ids = torch.stack([word, torch.full_like(word, words)], 1)
    none = torch.full((64,), -1)
    batch = TaskBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        answer_ids=word,
        foil_ids=none,
        corrupted_ids=None,
        corrupted_mask=None,
        corrupted_answer_ids=none,
        spans={},
        accepted_ids=[[int(w)] for w in word],
        examples=[Example("", "")] * 64,
        dropped={},
    )
    heads = [model.head_set([(i // 4, i % 4)]) for i in (says, denies)]
    truth = {"facilitating": heads[0], "interfering": heads[1], "irrelevant": model.heads - heads[0] - heads[1]}
    return model, batch, truth


def main(
    threads: Annotated[int, typer.Option(help="Threads of both sides.")] = 2,
    fits: Annotated[int, typer.Option(help="Fits of each run.")] = 4,
    steps: Annotated[int, typer.Option(help="Steps of each stage.")] = 100,
    rows: Annotated[int, typer.Option(help="Prompts a fit and step.")] = 16,
    n: Annotated[int, typer.Option(help="Prompts in all.")] = 128,
    models: Annotated[int, typer.Option(help="Models set by hand.")] = 5,
    task: Annotated[str, typer.Option(help="Which task of the bundled model.")] = "successor",
) -> None:
    """Print one table."""
    torch.set_num_threads(threads)
    if importlib.util.find_spec(PACKAGE) is None:
        raise typer.BadParameter("the comparison needs the package: pip install nam-causal-head-gating")
    table = Table(
        title=f"gating, {threads} threads, {fits} fits of {steps} + {steps} + {steps} steps of {rows} prompts"
    )
    for column in ("model", "what", "ours", "theirs", "note"):
        table.add_column(column)

    right = {"ours": 0, "theirs": 0}
    hinder = {"ours": 0, "theirs": 0}
    for seed in range(models):
        model, batch, truth = known(seed)
        for side, function in (("ours", ours), ("theirs", theirs)):
            found = gate_roles(function(model, batch, fits, steps, rows, seed).scores)
            right[side] += sum(len(found[name] & truth[name]) for name in truth)
            hinder[side] += int(found["interfering"] == truth["interfering"])
    table.add_row(
        "by hand", "heads in their role", *(f"{right[s]} of {8 * models}" for s in right), f"{models} models of 8 heads"
    )
    table.add_row("by hand", "exactly the head that hinders", *(f"{hinder[s]} of {models}" for s in hinder), "")

    model = mh.open_model()
    batch = encode(get_task(task), model.tokenizer, n, 0, "train")
    theirs(model, batch, 1, 2, 2, 0)  # warms up
    runs = {
        (side, seed): function(model, batch, fits, steps, rows, seed)
        for seed in (0, 1)
        for side, function in (("ours", ours), ("theirs", theirs))
    }
    seconds = [min(runs[side, seed].seconds for seed in (0, 1)) for side in ("ours", "theirs")]
    table.add_row(
        "ladon", f"time, {task}", *(f"{s:.1f} s" for s in seconds), f"{seconds[1] / seconds[0]:.2f}x, goal >= 1x"
    )
    within = [agreement(runs[side, 0], runs[side, 1]) for side in ("ours", "theirs")]
    across = [agreement(runs["ours", a], runs["theirs", 1 - a]) for a in (0, 1)]
    paired = [agreement(runs["ours", a], runs["theirs", a]) for a in (0, 1)]  # one seed draws both the same first gates
    for i, what in enumerate(("rank correlation", "heads with the same role")):
        between, same = (float(np.mean([pair[i] for pair in pairs])) for pairs in (across, paired))
        note = f"ours against theirs {between:.2f}, from the same gates {same:.2f}"
        table.add_row("ladon", f"{what}, two seeds", *(f"{pair[i]:.2f}" for pair in within), note)
    Console(width=140).print(table)


if __name__ == "__main__":
    typer.run(main)
