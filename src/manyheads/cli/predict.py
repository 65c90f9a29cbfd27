"""`manyheads predict`: heads on top of a trunk, and what the papers claim of them, tried here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, keeping, refuse, terminal
from manyheads.cli.predict_reward import predict_reward

if TYPE_CHECKING:
    from manyheads.evaluation import Tried

ROOM = "predict"
predict_app = typer.Typer(
    cls=Commands,
    help="Heads on top of a trunk: train them, and try what the papers claim of them.",
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(help="Which experiment; `manyheads predict list` has them.")]
Page = Annotated[Path | None, typer.Option(help="Write the page here, one HTML file.")]


predict_app.command("reward")(predict_reward)


@predict_app.command("list")
def predict_list() -> None:
    """List the experiments: name, number in the catalogue, what is asked, and about how long three seeds take."""
    from manyheads.evaluation import experiments

    table = Table("name", "#", "what is asked", "minutes")
    for one in experiments(ROOM).values():
        table.add_row(one.name, ", ".join(f"#{n}" for n in one.numbers), Text(one.question), f"{one.minutes:g}")
    terminal().print(table)


@predict_app.command("run")
def predict_run(
    name: Name,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds, from 0 on.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="On less data, to see that it runs.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Run anew what was run before.")] = False,
    out: Page = None,
    force: Force = False,
) -> None:
    """Run an experiment: each method on each data set with each seed, beside the baseline, and a verdict on each claim.

    Every run is kept when it is done (in the cache folder), so that an interrupted experiment goes on, and more seeds add to it.
    """
    refuse(out, force=force)
    from manyheads.evaluation import experiment
    from manyheads.progress import progressing

    one = experiment(ROOM, name)
    folder = _folder(name, quick)
    if again:
        (folder / "experiment.json").unlink(missing_ok=True)
    if not quick:
        terminal().print(Text(f"{name}: about {one.minutes * seeds / 3:.0f} minutes on two idle cores."))
    with progressing() as bar, keeping(folder):
        _show(one.run(seeds=range(seeds), quick=quick, folder=folder, bar=bar), out, force)


@predict_app.command("show")
def predict_show(
    name: Name,
    quick: Annotated[bool, typer.Option("--quick", help="The quick run.")] = False,
    out: Page = None,
    force: Force = False,
) -> None:
    """Show an experiment that was run, in the terminal and as a page."""
    refuse(out, force=force)
    from manyheads.evaluation import experiment

    _show(experiment(ROOM, name).kept(_folder(name, quick)), out, force)


def _folder(name: str, quick: bool) -> Path:
    from manyheads.reference.fetching import model_home

    return model_home() / ROOM / (f"{name}-quick" if quick else name)


def _show(tried: Tried, out: Path | None, force: bool) -> None:
    from manyheads.pages.experiment import values_table, verdicts_table

    terminal().print(values_table(tried))
    terminal().print(verdicts_table(tried))
    if out is not None:
        terminal().print(Text(f"Wrote {tried.report(out, force=force)}."))
