"""The commands of a room's experiments: list, run (called `try` where `run` is taken) and show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, keeping, refuse, sentence, terminal

if TYPE_CHECKING:
    from manyheads.evaluation import Experiment, Tried
    from manyheads.progress import Bar

PAGE = "page.html"

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
        name: Annotated[str | None, typer.Argument(help="Which experiment; `list` has them.")] = None,
        every: Annotated[bool, typer.Option("--all", help="Every experiment of this list, one after another.")] = False,
        seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds, from 0 on.")] = 3,
        quick: Annotated[bool, typer.Option("--quick", help="On less data, to see that it runs.")] = False,
        again: Annotated[bool, typer.Option("--again", help="Run anew what was run before.")] = False,
        folder: Annotated[
            Path | None,
            typer.Option(
                help="Keep runs, results.parquet, verdicts.json and page.html here; with --all a folder each."
            ),
        ] = None,
        out: Page = None,
        force: Force = False,
    ) -> None:
        """Run an experiment: each method on each data set with each seed, beside the baseline, and a verdict on each claim.

        Every run is kept when it is done (in --folder, or the cache folder): an interrupted experiment goes on, and more seeds
        add to it. With --all one that fails does not stop the others; the exit code is then 1.
        """
        from manyheads.errors import InputError

        refuse(out, force=force)
        if every == (name is not None):
            raise InputError("give the name of one experiment, or --all.")
        if every and out is not None:
            raise InputError(
                "--out is the page of one experiment; with --all give --folder, and each has its page there."
            )
        _refuse_file(folder)
        if every:
            failed = _run_all(rooms, seeds=seeds, quick=quick, again=again, folder=folder)
            if failed:
                raise typer.Exit(1)
            return
        room, one = _found(rooms, str(name))
        if not quick:
            terminal().print(Text(f"{name}: about {one.minutes * seeds / 3:.0f} minutes on two idle cores."))
        _show(_run(room, one, seeds=seeds, quick=quick, again=again, folder=folder), out, force)

    @app.command("show")
    def experiments_show(
        name: Name,
        quick: Annotated[bool, typer.Option("--quick", help="The quick run.")] = False,
        folder: Annotated[Path | None, typer.Option(help="Where it was kept, if not in the cache folder.")] = None,
        out: Page = None,
        force: Force = False,
    ) -> None:
        """Show an experiment that was run, in the terminal and as a page."""
        refuse(out, force=force)
        room, one = _found(rooms, name)
        _show(one.kept(folder or _folder(room, name, quick)), out, force)


def _run(
    room: str, one: Experiment, *, seeds: int, quick: bool, again: bool, folder: Path | None, bar: Bar | None = None
) -> Tried:
    """Run an experiment in a folder, which has its page too if it is one that was asked for."""
    from manyheads.evaluation.experiment import RESULTS, VERDICTS
    from manyheads.evaluation.run_record import RECORD
    from manyheads.progress import progressing

    kept = folder or _folder(room, one.name, quick)
    page = None if folder is None else kept / PAGE
    if again and (kept / RECORD).exists():
        for file in (RECORD, RESULTS, VERDICTS):
            (kept / file).unlink(missing_ok=True)
    elif not (kept / RECORD).exists():
        refuse(page, force=False)
    with progressing(bar is None) as shown, keeping(kept):
        tried = one.run(seeds=range(seeds), quick=quick, folder=kept, bar=bar or shown)
        if page is not None:
            tried.report(page, force=True)
    return tried


def _run_all(rooms: tuple[str, ...], *, seeds: int, quick: bool, again: bool, folder: Path | None) -> int:
    """Run every experiment of some rooms, and print a row for each. How many failed."""
    from manyheads.evaluation import experiments
    from manyheads.pages.experiment import tried_table
    from manyheads.progress import progressing

    found = [(room, one) for room in rooms for one in experiments(room).values()]
    rows: list[tuple[Experiment, Tried | str]] = []
    with progressing() as bar:
        done = bar.step("experiments", len(found))
        for room, one in found:
            own = None if folder is None else folder / one.name
            try:
                rows.append((one, _run(room, one, seeds=seeds, quick=quick, again=again, folder=own, bar=bar)))
            except Exception as error:
                rows.append((one, sentence(error)))
            done(1, note=one.name)
    terminal().print(tried_table(rows))
    return sum(isinstance(what, str) for _, what in rows)


def _refuse_file(folder: Path | None) -> None:
    """`InputError` where a file stands in place of a folder, or nothing can be written."""
    refuse(folder, force=True, folder=True)


def _found(rooms: tuple[str, ...], name: str) -> tuple[str, Experiment]:
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
