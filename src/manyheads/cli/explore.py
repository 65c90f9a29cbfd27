"""`manyheads explore`: look at the heads of a model, ask it and change it, on a page in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Force, Opening, announce, opens, refuse, terminal

if TYPE_CHECKING:
    from manyheads.atlas.core.result import Atlas


@opens()
def explore(
    target: Annotated[
        str,
        typer.Argument(
            help="A model (a folder or a hub id; ladon is the bundled one), the folder of an atlas or of a forecast, or a "
            "table of lab watch."
        ),
    ] = "ladon",
    atlas: Annotated[
        list[Path] | None, typer.Option(help="The folder of an atlas of this model; twice to compare two.")
    ] = None,
    history: Annotated[Path | None, typer.Option(help="Heads over training: a table of `lab watch --table`.")] = None,
    labels: Annotated[Path | None, typer.Option(help="Keep your labels of heads in this file.")] = None,
    drafter: Annotated[
        Path | None, typer.Option(help="A trained drafter for the decoding view. Default: prompt lookup.")
    ] = None,
    edit: Annotated[list[Path] | None, typer.Option(help="The folder of a head edit, for the edit desk.")] = None,
    sae: Annotated[list[Path] | None, typer.Option(help="The folder of a trained autoencoder of a layer.")] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="Documents to look through for those that need a head: .txt, .jsonl or .parquet."),
    ] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="The port; 0 takes any free one.")] = None,
    browser: Annotated[bool, typer.Option(help="Open a browser, if there is one.")] = True,
    prompt: Annotated[
        list[str] | None, typer.Option(help="With --out: a prompt whose answer stands on the page.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the page as one file that needs no server, and leave.")
    ] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Look at the heads of a model on a page in your browser: ask it, see why, edit heads. It listens on this machine only."""
    refuse(out, force=force, inputs=[target, labels, history, *(atlas or [])])
    from manyheads.atlas.core.result import Atlas
    from manyheads.errors import InputError
    from manyheads.explorer.overview import about_atlas, history_shape, overview

    if prompt and out is None:
        raise InputError("--prompt puts answers on a page that is written; give --out FILE too, or ask on the page.")
    atlases: list[Atlas] = [Atlas.load(folder) for folder in atlas or []]
    if len(atlases) > 2:
        raise InputError(f"{len(atlases)} atlases were given; two can be compared.")
    if (Path(target) / "atlas.json").exists():
        atlases = [Atlas.load(target), *atlases][:2]
        _alone(overview(about_atlas(atlases[0]), atlases=atlases, history=history), out, force, prompt)
        return
    if (Path(target) / "forecast.parquet").exists():
        from manyheads.explorer.forecasts import forecast_numbers

        about = {"name": Path(target).name, "layers": 0, "heads": 0, "behaviours": [], "fingerprint": None}
        _alone(overview(about, forecast=forecast_numbers(Path(target))), out, force, prompt)
        return
    if Path(target).suffix == ".parquet":
        layers, heads = history_shape(Path(target))
        about = {"name": Path(target).stem, "layers": layers, "heads": heads, "behaviours": [], "fingerprint": None}
        _alone(overview(about, atlases=atlases, history=Path(target)), out, force, prompt)
        return
    try:
        from manyheads.explorer.given import Given
        from manyheads.explorer.serving import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the explorer needs {error.name}: pip install 'manyheads[explorer]'.") from None
    from manyheads.explorer.labels import LabelFile

    given = Given(atlases, history, labels, drafter, edit or [], sae or [], texts)
    model = opening(target)
    bench = given.bench(model, Path(target).name if Path(target).exists() else target)
    kept = LabelFile(labels, model.fingerprint)
    if out is not None:
        from manyheads.explorer.kept import answered
        from manyheads.progress import progressing

        with progressing() as bar:
            answers = answered(bench, prompt or [], bar=bar)
        _write(given.overview(bench, kept, prompts=answers), out, force)
        return
    serve(
        bench,
        given.overview(bench, kept, can_ask=True),
        kept,
        port=port,
        browser=browser,
        announce=lambda address: announce(f"The explorer is at {address} (Ctrl-C ends it)."),
    )


def _alone(found: dict[str, object], out: Path | None, force: bool, prompt: list[str] | None) -> None:
    """A page of what was measured before: no model is open."""
    from manyheads.errors import InputError

    if out is None:
        raise InputError(
            "without a model there is nothing to ask: give --out FILE to write the page, or the model with --atlas FOLDER."
        )
    if prompt:
        raise InputError("a prompt needs the model; name it, and give the atlas with --atlas FOLDER.")
    _write(found, out, force)


def _write(found: dict[str, object], out: Path, force: bool) -> None:
    from manyheads.explorer.page import page_alone
    from manyheads.files import write_atomically

    text = page_alone(found)
    write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
    terminal().print(Text(f"Wrote {out}; open it in a browser."))
