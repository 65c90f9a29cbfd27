"""`manyheads trace`: which components made one answer?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import MANY, Force, Opening, opens, refuse, terminal


@opens()
def trace(
    model: Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")],
    prompt: Annotated[str, typer.Argument(help="The text that the model goes on from.")],
    answer: Annotated[str | None, typer.Option(help="The answer to explain. Default: the model's own.")] = None,
    against: Annotated[str | None, typer.Option(help="What to compare it with. Default: the next best.")] = None,
    method: Annotated[
        str, typer.Option(help="How components are scored; a name that is not known lists them all.")
    ] = "direct",
    corrupted: Annotated[
        str | None, typer.Option(help="A prompt of as many tokens with another answer, to patch from.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=MANY, help="How many components to print.")] = 15,
    out: Annotated[Path | None, typer.Option(help="Write trace.html and circuit.json into this new folder.")] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Say which heads and MLPs made one answer."""
    refuse(out, force=force, inputs=[model], folder=True)
    from manyheads.pages.tracing.explanation_tables import explanation_table
    from manyheads.trace.explaining import way
    from manyheads.trace.explanation import explain

    way(method)
    opened = opening(model)
    found = explain(opened, prompt, answer, against, method=method, corrupted=corrupted)
    console = terminal()
    console.print(explanation_table(found, top))
    if out is None:
        console.print(Text("Add --out FOLDER to keep the scores and the picture.", style="dim"))
        return
    found.save(out, force=force)
    console.print(Text(f"Wrote {out / 'trace.html'} and the circuit beside it."))


@opens()
def why(
    model: Annotated[str, typer.Argument(help="A folder or a hub id; ladon is the bundled model.")],
    prompt: Annotated[str, typer.Argument(help="The text that the head reads.")],
    head: Annotated[str, typer.Argument(help="The head, for example L3H4.")],
    query: Annotated[int, typer.Option(help="The token that looks, counted from 0, or from the end if negative.")] = -1,
    key: Annotated[
        int | None, typer.Option(help="The token that it looks at. Default: the one it attends to most.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=MANY, help="How many writers to print.")] = 10,
    table: Annotated[
        Path | None, typer.Option(help="Write all pairs of writers as Parquet into this new file.")
    ] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Why does a head look there? Its attention score, split over what wrote the query and what wrote the key."""
    refuse(table, force=force, inputs=[model])
    from manyheads.files import write_atomically
    from manyheads.heads import Head
    from manyheads.pages.tracing.score_tables import attention_score_table
    from manyheads.trace.positions.attention_score import attention_score

    one = Head.parse(head)
    found = attention_score(opening(model), prompt, one, query, key)
    terminal().print(attention_score_table(found, top))
    if table is not None:
        write_atomically(table, found.to_frame().to_parquet, force=force)
        terminal().print(Text(f"Wrote {table}."))
