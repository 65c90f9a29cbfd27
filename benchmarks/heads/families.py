"""Which task families does a model answer, and which are beyond it? One table, ladon beside any other model.

    manyheads bench families [--model FOLDER ...] [--n 48] [--tries 16] [--untrained]

The verdict of `manyheads.tasks.task_verdict` on every family: as it stands, and put as the model answers it best (`suited`:
picked on `tries` rows of the training split among the family's own phrasings, a chat turn, and after solved examples; reported on
`n` rows of the test split). q is p corrected over the families (Benjamini-Hochberg). `--untrained` adds each model's twin with
random weights: what is above chance there is luck. A second table holds every way tried for the families that stay at chance.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import manyheads as mh
from manyheads.evaluation.controls import q_values
from manyheads.tasks import TASKS, Suited, TaskVerdict, openings, suited, task_verdict

Row = tuple[str, TaskVerdict, Suited, TaskVerdict]


def untrained(model: mh.HeadModel) -> mh.HeadModel:
    """The same architecture with random weights and the same tokenizer."""
    torch.manual_seed(0)
    return mh.open_model(AutoModelForCausalLM.from_config(model.config).eval(), tokenizer=model.tokenizer)


def measure(model: mh.HeadModel, n: int, tries: int) -> list[Row]:
    """A row a family: its verdict as it stands, the way picked, and the verdict on that."""
    rows: list[Row] = []
    for name, task in TASKS.items():
        plain = task_verdict(model, task, n=n)
        way = suited(model, task, n=tries)
        rows.append((name, plain, way, plain if way.task is task else task_verdict(model, way.task, n=n)))
    return rows


def figures(verdict: TaskVerdict) -> str:
    """Answered / preferred, in percent."""
    return f"{100 * verdict.answered:.0f} / {100 * verdict.preferred:.0f} ± {100 * verdict.stderr:.0f}"


def show(console: Console, name: str, model: mh.HeadModel, rows: list[Row]) -> None:
    """Both tables of one model."""
    q = q_values([verdict.p_value for *_, verdict in rows])
    above = sum(not verdict.blind for *_, verdict in rows)
    table = Table(title=f"{name}: {above} of {len(rows)} families above chance; {openings(model)}")
    for column in ("family", "as it stands, %", "verdict", "put", "answered / preferred, %", "p", "q", "verdict"):
        table.add_column(column)
    for (family, plain, way, verdict), each in zip(rows, q, strict=True):
        figure = (f"{verdict.p_value:.2g}", f"{each:.2g}")
        table.add_row(family, figures(plain), plain.verdict, way.how, figures(verdict), *figure, verdict.verdict)
    console.print(table)
    blind = [(family, way) for family, _, way, verdict in rows if verdict.blind]
    if blind:
        tried = Table(title=f"{name}: what was tried for those at chance (training split)")
        for column in ("family", "put", "answered / preferred, %", "p"):
            tried.add_column(column)
        for family, way in blind:
            for how, verdict in way.tried.items():
                tried.add_row(family, how, figures(verdict), f"{verdict.p_value:.2g}")
        console.print(tried)


def main(
    model: Annotated[list[str] | None, typer.Option(help="A model's folder or hub id; may be given again.")] = None,
    n: Annotated[int, typer.Option(help="Rows of the test split to report on.")] = 48,
    tries: Annotated[int, typer.Option(help="Rows of the training split to pick a way on.")] = 16,
    untrained_too: Annotated[bool, typer.Option("--untrained", help="Also each model with random weights.")] = False,
) -> None:
    """Which task families do models answer?"""
    torch.set_num_threads(1)
    console = Console(width=130)
    for name in ["ladon", *(model or [])]:
        opened = mh.open_model(name)
        show(console, name.rstrip("/").rpartition("/")[2], opened, measure(opened, n, tries))
        if untrained_too:
            twin = untrained(opened)
            show(console, f"{name.rstrip('/').rpartition('/')[2]}, untrained", twin, measure(twin, n, tries))


if __name__ == "__main__":
    typer.run(main)
