"""`manyheads vision`: prediction heads on pictures, their experiments, and what they see in files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, refuse, sentence, terminal
from manyheads.cli.experiments import add_experiments

vision_app = typer.Typer(
    cls=Commands,
    help="Prediction heads on pictures: poses, boxes, masks, and representations of views.",
    no_args_is_help=True,
)
add_experiments(vision_app, "vision")


@vision_app.command("predict")
def vision_predict(
    name: Annotated[str, typer.Argument(help="Which system.")],
    files: Annotated[list[Path], typer.Argument(help="Pictures of your own.")],
    out: Annotated[
        Path, typer.Option(help="Write what was found, and the picture with it drawn in, into this folder.")
    ],
    weights: Annotated[Path | None, typer.Option(help="A folder with weights that were trained elsewhere.")] = None,
    force: Force = False,
) -> None:
    """What does a trained system see in these pictures? A file that cannot be read stops none of the others."""
    import json
    from functools import partial

    from manyheads.errors import InputError
    from manyheads.files import write_atomically
    from manyheads.progress import progressing
    from manyheads.vision import predictor, read_picture
    from manyheads.vision.core.pictures import as_picture

    refuse(out, force=True, inputs=[weights], folder=True)
    names = [file.stem for file in files]
    twice = sorted({one for one in names if names.count(one) > 1})
    if twice:
        raise InputError(
            f"two pictures are called {twice[0]!r}, and would be written over each other; name them apart."
        )
    for one in names:
        for suffix in (".json", ".png"):
            refuse(out / f"{one}{suffix}", force=force, inputs=list(files), folder=False)
    seeing = predictor(name, weights)
    out.mkdir(parents=True, exist_ok=True)
    table, failed = Table("picture", "found", ""), 0
    with progressing() as bar:
        step = bar.step("pictures", len(files))
        for file in files:
            try:
                seen = seeing(read_picture(file))
                text = json.dumps({"system": name, "found": seen.rows, "notes": seen.notes}, indent=1) + "\n"
                write_atomically(out / f"{file.stem}.json", partial(Path.write_text, data=text), force=force)
                drawn = as_picture(seen.drawn)
                write_atomically(out / f"{file.stem}.png", partial(drawn.save, format="PNG"), force=force)
                table.add_row(Text(str(file)), str(len(seen.rows)), Text(" ".join(seen.notes)))
            except InputError as error:
                failed += 1
                table.add_row(Text(str(file)), "-", Text(sentence(error)))
            step(1)
    terminal().print(table)
    if failed:
        raise typer.Exit(1)
