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
            help="A model (a folder or a hub id; ladon is the bundled one), the folder of an atlas, or a table of lab watch."
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
    if Path(target).suffix == ".parquet":
        layers, heads = history_shape(Path(target))
        about = {"name": Path(target).stem, "layers": layers, "heads": heads, "behaviours": [], "fingerprint": None}
        _alone(overview(about, atlases=atlases, history=Path(target)), out, force, prompt)
        return
    _live(target, opening, atlases, history, labels, drafter, edit or [], port, browser, prompt or [], out, force)


def _alone(found: dict[str, object], out: Path | None, force: bool, prompt: list[str] | None) -> None:
    """A page of what was measured before: no model is open."""
    from manyheads.errors import InputError
    from manyheads.explorer.page import page_alone
    from manyheads.files import write_atomically

    if out is None:
        raise InputError(
            "without a model there is nothing to ask: give --out FILE to write the page, or the model with --atlas FOLDER."
        )
    if prompt:
        raise InputError("a prompt needs the model; name it, and give the atlas with --atlas FOLDER.")
    text = page_alone(found)
    write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
    terminal().print(Text(f"Wrote {out}; open it in a browser."))


def _live(
    target: str,
    opening: Opening,
    atlases: list[Atlas],
    history: Path | None,
    labels: Path | None,
    drafter: Path | None,
    edits: list[Path],
    port: int | None,
    browser: bool,
    prompts: list[str],
    out: Path | None,
    force: bool,
) -> None:
    from manyheads.errors import InputError, MismatchError

    try:
        from manyheads.explorer.serving import serve
        from manyheads.explorer.workbench import Workbench
    except ModuleNotFoundError as error:
        raise InputError(f"the explorer needs {error.name}: pip install 'manyheads[explorer]'.") from None
    from manyheads.draft.core.trunk import DraftTrunk
    from manyheads.draft.files.saving import load_drafter
    from manyheads.explorer.kept import answered
    from manyheads.explorer.labels import LabelFile
    from manyheads.explorer.overview import overview
    from manyheads.explorer.page import page_alone
    from manyheads.files import write_atomically
    from manyheads.model.editing.head_edit import HeadEdit
    from manyheads.progress import progressing

    model = opening(target)
    for one in atlases[:1]:
        made_of = one.card.get("fingerprint")
        if made_of not in (None, model.fingerprint):
            raise MismatchError(f"the atlas is of the model {made_of}, not of this one, {model.fingerprint}.")
    bench = Workbench(model, Path(target).name if Path(target).exists() else target)
    if drafter is not None:
        bench.drafter, bench.drafted_by = load_drafter(drafter, DraftTrunk(model)).drafter, drafter.name
    for folder in edits:
        found = HeadEdit.load(folder)
        found.check(model)
        bench.edits[folder.name] = found
    kept = LabelFile(labels, model.fingerprint)
    shown = {
        "atlases": atlases,
        "history": history,
        "labels": kept.json()["labels"],
        "label_file": labels,
    }
    if out is not None:
        with progressing() as bar:
            answers = answered(bench, prompts, bar=bar)
        text = page_alone(overview(bench.about, prompts=answers, **shown))  # type: ignore[arg-type]
        write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
        terminal().print(Text(f"Wrote {out}; open it in a browser."))
        return
    serve(
        bench,
        overview(bench.about, can_ask=True, **shown),  # type: ignore[arg-type]
        kept,
        port=port,
        browser=browser,
        announce=lambda address: announce(f"The explorer is at {address} (Ctrl-C ends it)."),
    )
