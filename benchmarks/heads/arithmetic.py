"""Arithmetic heads (#14): found and knocked out, and tuned alone beside everything, in three tables.

    manyheads bench arithmetic [check | real | tune] [--model FOLDER] [--seeds 3] [--threads 1]

check   the bundled model: key heads knocked out beside random heads of the same layers, any of them or none that was found
real    the same on a model of yours, with operands 1-9, by operation (`--model`)
tune    the bundled model learns the 36 phrasings of four operations: a few heads' weights, random heads', all weights. Each way
        has the learning rate that is best for it on other examples with seed 0, and no early stop. Elsewhere: sums and
        differences as it knew them, the mean of 13 tasks, and loss on text
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

import manyheads as mh
from manyheads.atlas.circuits.arithmetic import arithmetic, default_task, key_heads, knockout
from manyheads.atlas.core.answered import is_right
from manyheads.edit.learn.examples import Answered
from manyheads.edit.learn.selective_tuning import tune_heads, tuning_effects
from manyheads.edit.learn.tuning import LEARNING, answer_accuracy
from manyheads.heads import HeadSet
from manyheads.tasks import Arithmetic, encode
from manyheads.tasks.families.arithmetic_templates import RESULT, ArithmeticTemplates

RATES = (3e-4, 1e-3, 3e-3)
Row = tuple[str | float, ...]


def print_table(title: str, columns: Iterable[str], rows: Iterable[Row]) -> None:
    """Rows as a table, numbers to three places."""
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:.3f}" for cell in row))
    Console(width=150).print(table)


def knocked_out(
    model: mh.HeadModel, sets: Mapping[str, HeadSet], found: HeadSet, n: int, n_random: int = 60
) -> list[Row]:
    """A row a set and kind of control."""
    rows: list[Row] = []
    for name, heads in sets.items():
        for kind, apart in (("any", HeadSet()), ("none found", found)):
            check = knockout(model, heads, apart_from=apart, n=n, n_random=n_random)
            without = check.clean - np.mean(check.random_effects)
            drawn = str(len(check.random_effects))
            rows.append((name, str(heads), check.clean, check.ablated, kind, drawn, without, check.p_value))
    return rows


CHECKED = ("set", "heads", "accuracy", "without", "random heads", "sets", "without random", "p")


def check() -> None:
    """Key heads of the bundled model, knocked out."""
    model = mh.open_model()
    scores = arithmetic(model)
    sets = {
        "all": key_heads(scores),
        "two a layer": key_heads(scores, per_layer=2),
        "one a layer": key_heads(scores, per_layer=1),
    }
    rows = knocked_out(model, sets, sets["all"], 64)
    print_table("ladon: key heads (a ratio of .05 on) knocked out, 64 prompts of another seed", CHECKED, rows)


def real(path: str, n: int) -> None:
    """Key heads of a model of the user's, by the logits they cost."""
    model = mh.open_model(path)
    task = default_task(model)
    if isinstance(task, ArithmeticTemplates):
        rows: list[Row] = []
        for sign in RESULT:
            batch = encode(replace(task, operation=sign), model.tokenizer, n)
            rows.append((sign, str(len(batch)), float(is_right(model, batch).double().mean())))
        print_table(f"{path}: answered, by operation", ("operation", "prompts", "right"), rows)
    scores = arithmetic(model, n=n)
    best = scores["arithmetic"]
    print(f"{best.meta['answered']} of {best.meta['rows']} answered; largest ratio {best.values.max():.3f}")
    for kind in ("operator", "operands"):
        found = scores[f"arithmetic_{kind}_logit"]
        leading = ", ".join(f"{h} {value:.2f} ({found.stderr[h]:.2f})" for h, value in found.ranked()[:6])
        print(
            f"{kind}: {found.n} prompts, clean logit {found.meta.get('clean_logit', np.nan):.1f}; logits lost: {leading}"
        )
    found = key_heads(scores, unit="logits")
    if found:
        rows = knocked_out(model, {"all": found}, found, min(n, 48), 20)
        print_table(f"{path}: heads that cost .5 logits, knocked out", CHECKED, rows)


def tune(seeds: int, n: int) -> None:
    """What tuning heads or everything wins and costs."""
    model = mh.open_model()
    ranked = [head for head, _ in arithmetic(model)["arithmetic"].ranked()]
    task = ArithmeticTemplates()
    test, known = (Answered.of_task(model, some, 200) for some in (task, Arithmetic()))
    dev = Answered.of_task(model, task, 200, seed=1)
    chosen: dict[str, Callable[[int], HeadSet | None]] = {
        **{f"{h} key heads": lambda seed, h=h: HeadSet(ranked[:h], model.shape) for h in (2, 4, 8, 16)},
        **{f"{h} random heads": lambda seed, h=h: model.head_set(random_heads(model, h, seed)) for h in (4, 16)},
        "all weights": lambda seed: None,
    }

    def tuned(heads: HeadSet | None, rate: float, seed: int) -> mh.HeadModel:
        train = Answered.of_task(model, task, n, seed=seed, split="train")
        settings = replace(LEARNING, rate=rate, rows=16, seed=seed)
        return tune_heads(model, train, heads, settings=settings)

    rows: list[Row] = [("nothing", "", answer_accuracy(model, test), 0.0, answer_accuracy(model, known), 0.0, 0.0, 0.0)]
    for name, heads in chosen.items():
        rates = [rate / 10 for rate in RATES] if name == "all weights" else RATES
        first = {rate: tuned(heads(0), rate, 0) for rate in rates}
        rate = max(rates, key=lambda rate: answer_accuracy(first[rate], dev))
        found = []
        for seed in range(seeds):
            after = first[rate] if seed == 0 else tuned(heads(seed), rate, seed)
            effects = tuning_effects(model, after, n=32).table.set_index("measure")["change"]
            others = effects.drop(
                ["text", "arithmetic", *(m for m in effects.index if m.startswith(("refus", "harm")))]
            )
            found.append((answer_accuracy(after, test), answer_accuracy(after, known), others.mean(), effects["text"]))
        mean, sd = np.mean(found, 0), np.std(found, 0, ddof=1)
        rows.append((name, f"{rate:g}", mean[0], sd[0], mean[1], sd[1], mean[2], mean[3]))
        print(name, {f"{r:g}": answer_accuracy(m, dev) for r, m in first.items()}, flush=True)
    columns = ("trained", "rate", "target", "sd", "sums known before", "sd", "other tasks", "text, nats")
    print_table(f"ladon learns 36 phrasings of four operations from {n} examples, {seeds} seeds", columns, rows)


def random_heads(model: mh.HeadModel, h: int, seed: int) -> list[mh.Head]:
    """`h` heads of any layers."""
    heads = list(model.heads)
    return [heads[i] for i in np.random.default_rng(seed).permutation(len(heads))[:h]]


def main(
    part: Annotated[str, typer.Argument(help="check, real or tune.")] = "check",
    model: Annotated[str, typer.Option(help="The model of `real`.")] = "smollm2",
    n: Annotated[int, typer.Option(help="Prompts of `real`, or training examples of `tune`.")] = 256,
    seeds: Annotated[int, typer.Option(help="Seeds of `tune`.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
) -> None:
    torch.set_num_threads(threads)
    {"check": check, "real": lambda: real(model, n), "tune": lambda: tune(seeds, n)}[part]()


if __name__ == "__main__":
    typer.run(main)
