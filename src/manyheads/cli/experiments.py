"""The commands of a room's experiments: list, run (called `try` where `run` is taken) and show. And `manyheads laws`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, ModelName, Opening, Seed, keeping, opens, refuse, terminal

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


lab_app = typer.Typer(
    cls=Commands,
    help="Models whose heads are known: what theory says of them, beside what is measured.",
    no_args_is_help=True,
)
add_experiments(lab_app, "lab")


@lab_app.command("watch")
def lab_watch(
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Updates.")] = 600,
    every: Annotated[int, typer.Option(min=1, max=10_000, help="Look at the heads after so many updates.")] = 20,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Layers of the model.")] = 2,
    heads: Annotated[int, typer.Option(min=1, max=16, help="Heads of a layer.")] = 4,
    without: Annotated[list[str] | None, typer.Option(help="What if this head never formed? For example L0H2.")] = None,
    seed: Seed = 0,
    out: Page = None,
    table: Annotated[Path | None, typer.Option(help="Write every head at every moment as Parquet.")] = None,
    force: Force = False,
) -> None:
    """Watch heads form in a small model that learns to repeat, with a slider over training time on the page."""
    for path in (out, table):
        refuse(path, force=force)
    from manyheads.files import write_atomically
    from manyheads.lab.formation.watching_heads import repeats_history
    from manyheads.pages.watching import history_table
    from manyheads.progress import progressing

    with progressing() as bar:
        found = repeats_history(
            layers=layers, heads=heads, steps=steps, every=every, without=without or (), seed=seed, bar=bar
        )
    for run in (found, found.other):
        if run is not None:
            terminal().print(history_table(run))
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))
    if table is not None:
        write_atomically(table, found.to_frame().to_parquet, force=force)
        terminal().print(Text(f"Wrote {table}."))


@opens()
def laws(
    model: ModelName = "ladon",
    facts: Annotated[Path | None, typer.Option(help="Your own facts: a CSV file with the columns a and b.")] = None,
    forward: Annotated[str, typer.Option(help="How to ask for b, with {a} in it.")] = "",
    backward: Annotated[str, typer.Option(help="How to ask for a, with {b} in it.")] = "",
    monofacts: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of the training's facts that were seen once, if known."),
    ] = None,
    n: Annotated[int, typer.Option(min=4, max=10_000, help="How many word lists.")] = 96,
    seed: Seed = 0,
    out: Page = None,
    table: Annotated[Path | None, typer.Option(help="Also write the table as Parquet into this new file.")] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Hold a model to behavioural laws: reversal curse, calibrated hallucination, embers of autoregression."""
    for path in (out, table):
        refuse(path, force=force, inputs=[model, facts])
    from manyheads.errors import InputError
    from manyheads.files import write_atomically
    from manyheads.lab.laws.relations import BUNDLED, TwoWay
    from manyheads.lab.laws.running import laws as held
    from manyheads.pages.laws import laws_table
    from manyheads.progress import progressing

    if facts is None and (forward or backward):
        raise InputError("--forward and --backward are how your own facts are put; give --facts FILE too.")
    chosen = BUNDLED if facts is None else (TwoWay.read(facts, forward, backward),)
    with progressing() as bar:
        found = held(opening(model), chosen, monofacts=monofacts, n=n, seed=seed, name=model, bar=bar)
    terminal().print(laws_table(found))
    for row in found.rows:
        terminal().print(Text(f"{row.law}, {row.on}: {row.says}."))
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))
    if table is not None:
        write_atomically(table, found.to_frame().to_parquet, force=force)
        terminal().print(Text(f"Wrote {table}."))
