"""`manyheads predict`: heads on top of a trunk, and what the papers claim of them, tried here."""

from __future__ import annotations

import typer

from manyheads.cli.common import Commands
from manyheads.cli.experiments import add_experiments
from manyheads.cli.predict_reward import predict_reward

predict_app = typer.Typer(
    cls=Commands,
    help="Heads on top of a trunk: train them, and try what the papers claim of them.",
    no_args_is_help=True,
)
predict_app.command("reward")(predict_reward)
add_experiments(predict_app, "predict", "draft")
