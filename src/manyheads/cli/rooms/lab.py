"""`manyheads lab`: experiments on models whose heads are known, and heads watched while they form. And `manyheads laws`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Commands, Force, ModelName, Opening, Seed, listed, opens, refuse, terminal
from manyheads.cli.experiments import Page, add_experiments
from manyheads.cli.rooms.lab_tuning import lab_reverse, lab_tune

if TYPE_CHECKING:
    from manyheads.heads import HeadScores
    from manyheads.lab.formation.watching_heads import HeadHistory, Look
    from manyheads.model.headmodel import HeadModel

Behaviours = Annotated[
    list[str] | None,
    typer.Option("--behaviours", "-b", help="Behaviours of the atlas to watch too, by comma: induction,ngram_2."),
]
Moments = Annotated[Path | None, typer.Option(help="Write every head at every moment as Parquet.")]

lab_app = typer.Typer(
    cls=Commands,
    help="Models whose heads are known: what theory says of them, beside what is measured.",
    no_args_is_help=True,
)
add_experiments(lab_app, "lab")
lab_app.command("tune")(lab_tune)
lab_app.command("reverse")(lab_reverse)


@lab_app.command("watch")
def lab_watch(
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Updates.")] = 600,
    every: Annotated[int, typer.Option(min=1, max=10_000, help="Look at the heads after so many updates.")] = 20,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Layers of the model.")] = 2,
    heads: Annotated[int, typer.Option(min=1, max=16, help="Heads of a layer.")] = 4,
    without: Annotated[list[str] | None, typer.Option(help="What if this head never formed? For example L0H2.")] = None,
    behaviours: Behaviours = None,
    vocabulary: Annotated[int, typer.Option(min=4, max=10_000, help="Different tokens of the rows.")] = 32,
    seed: Seed = 0,
    out: Page = None,
    table: Moments = None,
    force: Force = False,
) -> None:
    """Watch heads form in a small model that learns to repeat, with a slider over training time on the page."""
    for path in (out, table):
        refuse(path, force=force)
    from manyheads.lab.formation.watching_heads import repeats_history
    from manyheads.progress import progressing

    with progressing() as bar:
        found = repeats_history(
            layers=layers,
            heads=heads,
            steps=steps,
            every=every,
            vocabulary=vocabulary,
            without=without or (),
            more=_look(behaviours, seed),
            seed=seed,
            bar=bar,
        )
    _write_history(found, out, table, force)


@lab_app.command("checkpoints")
@opens()
def lab_checkpoints(
    models: Annotated[
        list[str], typer.Argument(help="Folders, or NAME@REVISION of the hub; the last number of each is its step.")
    ],
    behaviours: Behaviours = None,
    texts: Annotated[
        Path | None, typer.Option(help="Text for the loss. Default: prose that comes with Python.")
    ] = None,
    seed: Seed = 0,
    out: Page = None,
    table: Moments = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """See heads form in a training that is over: score its checkpoints, with a slider over them on the page."""
    for path in (out, table):
        refuse(path, force=force, inputs=[*models, texts])
    from manyheads.inputs import read_text
    from manyheads.lab.formation.checkpoints import checkpoints_history, steps_of
    from manyheads.progress import progressing

    steps, prose = steps_of(models), None if texts is None else [read_text(texts)]
    with progressing() as bar:
        found = checkpoints_history(
            models, opening, steps=steps, texts=prose, more=_look(behaviours, seed), seed=seed, bar=bar
        )
    _write_history(found, out, table, force)


def _look(names: list[str] | None, seed: int) -> Look | None:
    """What scores these behaviours of the atlas at each moment."""
    wanted = listed(names)
    if wanted is None:
        return None
    from manyheads.atlas.core.registry import behaviours, score_all
    from manyheads.errors import InputError
    from manyheads.inputs import check_choice

    for name in wanted:
        check_choice(name, "--behaviours", behaviours())

    def look(model: HeadModel) -> dict[str, HeadScores]:
        found, skipped = score_all(model, wanted, n=32, seed=seed)
        for name, reason in skipped.items():
            raise InputError(f"{name} cannot be watched in this model: {reason}")
        return found

    return look


def _write_history(found: HeadHistory, out: Path | None, table: Path | None, force: bool) -> None:
    from manyheads.files import write_atomically
    from manyheads.pages.watching import history_table

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
    n: Annotated[int, typer.Option(min=4, max=10_000, help="How many word lists.")] = 192,
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
