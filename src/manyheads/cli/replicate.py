"""`manyheads replicate`: try the claims of the catalogue's systems again, and write the table of verdicts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Force, announce, keeping, refuse, terminal

if TYPE_CHECKING:
    from manyheads.evaluation.replication import Replication


def replicate(
    numbers: Annotated[list[int] | None, typer.Argument(help="Numbers of the catalogue. Default: all 125.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=100, help="How many seeds of each experiment, from 0 on.")] = 3,
    full: Annotated[bool, typer.Option("--full", help="Whole experiments, not their quick form: hours.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Try anew what was kept.")] = False,
    kept: Annotated[bool, typer.Option("--kept", help="Run nothing; show what the folder keeps.")] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep results here; what is there is not run again. Default: the cache folder.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Write all that the folder keeps: a page of Markdown (.md), or verdicts by number (.json)."),
    ] = None,
    force: Force = False,
) -> None:
    """Try each system's claim again: quick experiments over seeds, or the tests that show it; with verdicts and seconds.

    All of it takes hours; every number is kept when it is done, and an interrupted run goes on.
    """
    from manyheads.errors import InputError
    from manyheads.evaluation.replication import kept_replications
    from manyheads.evaluation.replication import replicate as tried
    from manyheads.files import write_atomically
    from manyheads.pages.catalogue.replication import replication_markdown, replication_table
    from manyheads.progress import progressing
    from manyheads.reference.fetching import model_home

    refuse(out, force=force, folder=False)
    if out is not None and out.suffix not in (".md", ".json"):
        raise InputError(f"--out is {out}; give a name that ends in .md or .json.")
    place = folder or model_home() / "replication"
    refuse(place, force=True, folder=True)
    if not kept:
        announce(f"results are kept in {place}")
        with progressing() as bar, keeping(place):
            found = tried(numbers or (), place, seeds=seeds, quick=not full, again=again, bar=bar)
    else:
        found = [row for row in kept_replications(place) if not numbers or row.number in numbers]
        if not found:
            raise InputError(f"{place} keeps no result of these systems; run `manyheads replicate` first.")
    terminal().print(replication_table(found))
    if out is not None:
        every = kept_replications(place)
        text = replication_markdown(every) if out.suffix == ".md" else verdicts_json(every)
        write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
        terminal().print(Text(f"Wrote {out}."))


def verdicts_json(rows: list[Replication]) -> str:
    """How many claims of each system got which verdict."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        one = found.setdefault(str(row.number), {})
        one[row.verdict] = one.get(row.verdict, 0) + 1
    return json.dumps(found, indent=1) + "\n"
