"""The commands of a room's experiments: list, run (called `try` where `run` is taken) and show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, keeping, refuse, terminal

if TYPE_CHECKING:
    from manyheads.evaluation import Tried

Name = Annotated[str, typer.Argument(help="Which experiment; `list` has them.")]
Page = Annotated[Path | None, typer.Option(help="Write the page here, one HTML file.")]


def add_experiments(app: typer.Typer, *rooms: str) -> None:
    """Give a group of commands those of the experiments of `rooms`."""
    taken = {one.name for one in app.registered_commands}

    @app.command("list")
    def experiments_list() -> None:
        """List the experiments: name, number in the catalogue, what is asked, and about how long three seeds take."""
        from manyheads.evaluation import experiments

        table = Table("name", "#", "what is asked", "minutes")
        for room in rooms:
            for one in experiments(room).values():
                numbers = ", ".join(f"#{n}" for n in one.numbers)
                table.add_row(one.name, numbers, Text(one.question), f"{one.minutes:g}")
        terminal().print(table)

    @app.command("try" if "run" in taken else "run")
    def experiments_run(
        name: Name,
        seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds, from 0 on.")] = 3,
        quick: Annotated[bool, typer.Option("--quick", help="On less data, to see that it runs.")] = False,
        again: Annotated[bool, typer.Option("--again", help="Run anew what was run before.")] = False,
        out: Page = None,
        force: Force = False,
    ) -> None:
        """Run an experiment: each method on each data set with each seed, beside the baseline, and a verdict on each claim.

        Every run is kept when it is done (in the cache folder): an interrupted experiment goes on, and more seeds add to it.
        """
        refuse(out, force=force)
        from manyheads.progress import progressing

        room, one = _found(rooms, name)
        folder = _folder(room, name, quick)
        if again:
            (folder / "experiment.json").unlink(missing_ok=True)
        if not quick:
            terminal().print(Text(f"{name}: about {one.minutes * seeds / 3:.0f} minutes on two idle cores."))
        with progressing() as bar, keeping(folder):
            _show(one.run(seeds=range(seeds), quick=quick, folder=folder, bar=bar), out, force)

    @app.command("show")
    def experiments_show(
        name: Name,
        quick: Annotated[bool, typer.Option("--quick", help="The quick run.")] = False,
        out: Page = None,
        force: Force = False,
    ) -> None:
        """Show an experiment that was run, in the terminal and as a page."""
        refuse(out, force=force)
        room, one = _found(rooms, name)
        _show(one.kept(_folder(room, name, quick)), out, force)


def _found(rooms: tuple[str, ...], name: str):  # type: ignore[no-untyped-def]
    from manyheads.errors import InputError
    from manyheads.evaluation import experiments

    known = {one: (room, experiment) for room in rooms for one, experiment in experiments(room).items()}
    if name not in known:
        raise InputError(f"there is no experiment {name!r}; choose from {', '.join(known)}.")
    return known[name]


def _folder(room: str, name: str, quick: bool) -> Path:
    from manyheads.reference.fetching import model_home

    return model_home() / room / (f"{name}-quick" if quick else name)


def _show(tried: Tried, out: Path | None, force: bool) -> None:
    from manyheads.pages.experiment import values_table, verdicts_table

    terminal().print(values_table(tried))
    terminal().print(verdicts_table(tried))
    if out is not None:
        terminal().print(Text(f"Wrote {tried.report(out, force=force)}."))
