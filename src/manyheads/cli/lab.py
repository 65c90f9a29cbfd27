"""`manyheads lab`: models built by hand or trained from scratch, and what theory says of them, tried here."""

from __future__ import annotations

import typer

from manyheads.cli.common import Commands
from manyheads.cli.experiments import add_experiments

lab_app = typer.Typer(
    cls=Commands,
    help="Models whose heads are known: what theory says of them, beside what is measured.",
    no_args_is_help=True,
)
add_experiments(lab_app, "lab")
