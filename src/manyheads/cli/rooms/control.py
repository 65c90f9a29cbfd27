"""`manyheads control`: features of an environment that no reward trained, and experiments with agents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Commands, Force, Seed, refuse, terminal
from manyheads.cli.experiments import add_experiments

control_app = typer.Typer(
    cls=Commands,
    help="Control: what prediction heads do for the networks of agents.",
    no_args_is_help=True,
)
add_experiments(control_app, "control")


@control_app.command("features")
def control_features(
    environment: Annotated[
        str,
        typer.Argument(help="An environment of gymnasium, such as CartPole-v1, or four-rooms, which needs nothing."),
    ],
    out: Annotated[Path, typer.Option(help="Save the network into this new folder.")],
    module: Annotated[str | None, typer.Option(help="A Python module that registers the environment.")] = None,
    walked: Annotated[int, typer.Option(min=1, help="Steps of a random policy.")] = 20_000,
    features: Annotated[int, typer.Option(min=1, help="How many features.")] = 16,
    tasks: Annotated[int, typer.Option(min=1, help="How many random sets of states.")] = 100,
    share: Annotated[float, typer.Option(help="Which share of the states a set has.")] = 0.05,
    gamma: Annotated[float, typer.Option(help="The discount.")] = 0.99,
    steps: Annotated[int, typer.Option(min=1, help="Steps of learning.")] = 6000,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Features of an environment from random sets of its states, without any reward (#98): proto-value networks."""
    refuse(out, force=force, inputs=[], folder=True)
    from dataclasses import replace

    from manyheads.control.environments import open_environment
    from manyheads.control.proto_values import PROTO_TRAINING, learn_proto_values
    from manyheads.control.random_walk import random_walk
    from manyheads.progress import progressing

    env = open_environment(environment, module)
    with progressing() as bar:
        walk = random_walk(env, walked, seed=seed, bar=bar)
        found = learn_proto_values(
            walk,
            features=features,
            tasks=tasks,
            share=share,
            gamma=gamma,
            settings=replace(PROTO_TRAINING, steps=steps),
            seed=seed,
            bar=bar,
        )
    episodes = int((walk.at[1:] != walk.then[:-1]).sum()) + 1
    rates = f"{found.rates.min():.3f} to {found.rates.max():.3f}"
    terminal().print(Text(f"{walked} steps in {episodes} episodes; a set has {rates} of the observations."))
    terminal().print(Text(f"The TD loss of the last steps is {found.loss:.4g}. Wrote {found.save(out, force=force)}."))
