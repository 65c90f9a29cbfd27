"""The command line: `manyheads <command>`. A command is a function below; what is heavy it imports when it is called.

Exit codes: 0 done; 2 the input was wrong, and one sentence says how; 130 interrupted; 3 `check` found an
error; 1 an error of ours.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manyheads.catalogue import STATES, Room, State
from manyheads.cli.common import MANY, Commands, Force, announce, refuse, say
from manyheads.cli.explore import explore
from manyheads.cli.first_steps import check, demo, fetch
from manyheads.cli.plan import plan
from manyheads.cli.replicate import replicate
from manyheads.cli.rooms.atlas import atlas_app
from manyheads.cli.rooms.audio import audio_app
from manyheads.cli.rooms.brain import brain_app
from manyheads.cli.rooms.control import control_app
from manyheads.cli.rooms.draft import draft_app
from manyheads.cli.rooms.edit import edit_app
from manyheads.cli.rooms.forecast import forecast_app
from manyheads.cli.rooms.judge import judge_app
from manyheads.cli.rooms.lab import lab_app, laws
from manyheads.cli.rooms.predict import predict_app
from manyheads.cli.rooms.shrink import shrink
from manyheads.cli.rooms.trace import trace, why
from manyheads.cli.rooms.vision import vision_app
from manyheads.errors import InputError
from manyheads.version import __version__

_STATE_STYLE = {"ready": "green", "partial": "yellow", "absent": "dim"}

app = typer.Typer(
    name="manyheads",
    cls=Commands,
    help="The workbench for the heads of transformer models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        version()
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback of an error.")] = False,
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def methods(
    query: Annotated[
        list[str] | None, typer.Argument(help="What you need, in your own words. Without it all are listed.")
    ] = None,
    room: Annotated[Room | None, typer.Option(help="Only this room.", case_sensitive=False)] = None,
    state: Annotated[State | None, typer.Option(help="Only methods in this state.", case_sensitive=False)] = None,
    top: Annotated[int, typer.Option(min=1, max=MANY, help="Show at most this many of those that answer a need.")] = 10,
    by: Annotated[
        str | None, typer.Option(help="How to rank: meaning, tfidf or words. Default: the best that is installed.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    page: Annotated[
        Path | None, typer.Option(help="Write a page of all methods here, one HTML file, searched while you type.")
    ] = None,
    force: Force = False,
) -> None:
    """Search the catalogue of methods: number, state, room, what each is for, what to type and where to read."""
    from manyheads import catalogue

    if page is not None:
        _methods_page(page, force)
        return
    need = " ".join(query or [])
    found = [
        m
        for m in catalogue.find_methods(need, by=by)
        if (room is None or m.room == room) and (state is None or m.state == state)
    ]
    found = found[:top] if need else found
    if as_json:
        print(json.dumps([asdict(m) | {"command": m.command} for m in found], indent=2, ensure_ascii=False))
        return
    if not found:
        say("no method of the catalogue matches; try other words, or `manyheads methods` for the whole list")
        return
    counts = ", ".join(f"{sum(m.state == s for m in found)} {s}" for s in STATES)
    best_first = ", best first" if need else ""
    table = Table(caption=f"{len(found)} methods{best_first}: {counts}", caption_justify="left")
    table.add_column("#", justify="right")
    for title in ("method", "room", "state", "what it does, what to type, where to read"):
        table.add_column(title, overflow="fold")
    for m in found:
        what = Text(m.what)
        if m.reason:
            what.append(f"\n{m.reason}", style="dim")
        if m.command:
            what.append(f"\n{m.command}", style="bold")
        if m.docs:
            what.append(f"\n{m.docs}")
        table.add_row(str(m.number), Text(m.name), m.room, Text(m.state, style=_STATE_STYLE[m.state]), what)
    Console().print(table)


def _methods_page(path: Path, force: bool) -> None:
    refuse(path, force=force, folder=False)
    from manyheads.files import write_atomically
    from manyheads.pages.catalogue.page import catalogue_page

    text = catalogue_page()
    write_atomically(path, lambda file: file.write_text(text, "utf-8", newline="\n"), force=force)
    announce(f"wrote {path}")


app.command()(demo)
app.command()(explore)
app.command()(trace)
app.command()(why)
app.command()(check)
app.command()(fetch)
app.command()(laws)
app.command()(shrink)
app.command()(replicate)
app.command()(plan)
app.add_typer(atlas_app, name="atlas")
app.add_typer(edit_app, name="edit")
app.add_typer(draft_app, name="draft")
app.add_typer(predict_app, name="predict")
app.add_typer(forecast_app, name="forecast")
app.add_typer(lab_app, name="lab")
app.add_typer(judge_app, name="judge")
app.add_typer(brain_app, name="brain")
app.add_typer(control_app, name="control")
app.add_typer(audio_app, name="audio")
app.add_typer(vision_app, name="vision")


@app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
def bench(
    name: Annotated[str, typer.Argument(help="Which benchmark: the name of a file in benchmarks/.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Passed on to it.")] = None,
) -> None:
    """Run a benchmark of the source checkout: our figures beside a named baseline's, in one run."""
    import runpy

    folder = Path(__file__).parents[3] / "benchmarks"
    found = sorted(folder.rglob("*.py"), key=lambda path: path.stem)
    known = {path.stem: path for path in found if not path.stem.startswith("_")}
    if name not in known:
        raise InputError(
            f"there is no benchmark {name!r}; choose from {', '.join(known)}."
            if known
            else "benchmarks come with the source checkout; install it with pip install -e '.[bench]'."
        )
    sys.argv = [name, *(arguments or [])]
    sys.path[:0] = [str(known[name].parent), str(folder)]  # as for any script: benchmarks share a module
    runpy.run_path(str(known[name]), run_name="__main__")


@app.command()
def version() -> None:
    """Print the version."""
    print(f"manyheads {__version__}")
