"""`manyheads atlas`: what does every attention head do?"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from manyheads.cli.common import (
    MANY,
    DefaultCommands,
    Force,
    Opening,
    Seed,
    announce,
    keeping,
    listed,
    opens,
    refuse,
    terminal,
)
from manyheads.version import __version__


class _AtlasCommands(DefaultCommands):
    DEFAULT = "survey"


atlas_app = typer.Typer(
    cls=_AtlasCommands,
    help="What does every attention head do? `manyheads atlas [MODEL]` surveys a model; more below.",
    no_args_is_help=False,
)

Behaviours = Annotated[
    list[str] | None, typer.Option("--behaviours", "-b", help="Only these, separated by commas. Default: all.")
]

Minutes = Annotated[
    float,
    typer.Option(
        "--budget",
        min=0.0,
        max=1e6,
        help="Minutes that the survey may take: with less time, fewer examples and fewer heads ablated. 0: no limit.",
    ),
]


@atlas_app.command()
@opens()
def survey(
    model: Annotated[str | None, typer.Argument(help="A folder or a hub id. Default: the bundled model.")] = None,
    behaviours: Behaviours = None,
    out: Annotated[
        Path | None, typer.Option(help="Write scores, checks, report.html and explorer.html into this new folder.")
    ] = None,
    force: Force = False,
    checks: Annotated[bool, typer.Option(help="Check each claim by ablation against random heads.")] = True,
    n: Annotated[
        int, typer.Option(min=2, max=MANY, help="Rows of repeated tokens, and as many texts or prompts.")
    ] = 32,
    n_random: Annotated[int, typer.Option(min=20, max=MANY, help="Random head sets a check.")] = 20,
    seed: Seed = 0,
    seeds: Annotated[
        int,
        typer.Option(min=1, max=1000, help="How many times to score, each on fresh inputs, to see whether they agree."),
    ] = 1,
    budget: Minutes = 15.0,
    opening: Opening = Opening(),
) -> None:
    """Find out what every attention head does, and check it. With --out the same call goes on where it was interrupted."""
    refuse(out, force=force, inputs=[model], folder=True)
    from manyheads.atlas.surveys.run import survey as survey_model
    from manyheads.explorer.overview import about_atlas, overview
    from manyheads.explorer.page import page_alone
    from manyheads.files import working_folder
    from manyheads.pages.atlas_tables import summary_table
    from manyheads.progress import progressing

    opened = opening(model)
    settings: dict[str, Any] = {"checks": checks, "n": n, "n_random": n_random, "seed": seed, "seeds": seeds}
    settings["budget"] = budget or None
    names = listed(behaviours)
    console = terminal()
    if budget:
        announce(
            f"Planned for {budget:g} minutes (--budget): where that is short, heads are screened and fewer prompts read."
        )
    if out is None:
        with progressing() as bar:
            result = survey_model(opened, names, **settings, bar=bar)
        console.print(summary_table(result))
        console.print(Text("Add --out FOLDER to keep the scores and the report.", style="dim"))
        return
    request = {"model": opened.fingerprint, "behaviours": names, **settings, "version": __version__}
    work = out.with_name(f"{out.name}.work")
    with keeping(work), working_folder(work, request, advice="remove it, or give another --out") as folder:
        with progressing() as bar:
            result = survey_model(opened, names, **settings, folder=folder, bar=bar)
        result.card["command"] = shlex.join(["manyheads", *sys.argv[1:]])
        shown = page_alone(overview(about_atlas(result), atlases=[result]))
        result.save(
            out, report=True, also=lambda into: (into / "explorer.html").write_text(shown, "utf-8"), force=force
        )
    console.print(summary_table(result))
    console.print(
        Text(
            f"Wrote {out / 'explorer.html'} to look at, report.html to read, and the scores beside them "
            f"({result.card['seconds']} s)."
        )
    )


@atlas_app.command()
def roles(
    atlas: Annotated[Path, typer.Argument(help="A folder that `manyheads atlas --out` wrote.")],
) -> None:
    """Print what each head was found to do, a line a head."""
    from manyheads.atlas.core.result import Atlas
    from manyheads.pages.atlas_tables import roles_table

    terminal().print(roles_table(Atlas.load(atlas)))


@atlas_app.command()
@opens()
def diff(
    a: Annotated[str, typer.Argument(help="An atlas folder, or a model to survey.")],
    b: Annotated[str, typer.Argument(help="The other: an atlas folder, or a model.")],
    behaviours: Behaviours = None,
    out: Annotated[Path | None, typer.Option(help="Write the tables and diff.html into this new folder.")] = None,
    force: Force = False,
    seed: Seed = 0,
    budget: Minutes = 15.0,
    opening: Opening = Opening(),
) -> None:
    """Compare the heads of two models or checkpoints: scores, roles and causal effects side by side."""
    refuse(out, force=force, inputs=[a, b], folder=True)
    from manyheads.atlas.core.result import Atlas
    from manyheads.atlas.surveys.diff import diff as compare
    from manyheads.atlas.surveys.run import survey as survey_model
    from manyheads.pages.atlas_tables import diff_table
    from manyheads.progress import progressing

    def read(name: str) -> Atlas:
        if (Path(name) / "atlas.json").is_file():
            return Atlas.load(name)
        opened = opening(name)
        with progressing() as bar:
            return survey_model(opened, listed(behaviours), seed=seed, budget=budget or None, bar=bar)

    result = compare(read(a), read(b), listed(behaviours))
    console = terminal()
    console.print(diff_table(result))
    if out is not None:
        result.save(out, force=force)
        console.print(Text(f"Wrote {out / 'diff.html'} and the tables beside it."))


@atlas_app.command()
@opens()
def influence(
    files: Annotated[list[Path], typer.Argument(help="Text (a document a line), JSONL or Parquet files.")],
    out: Annotated[Path, typer.Option(help="Write the scores to this new Parquet file.")],
    model: Annotated[str | None, typer.Option(help="A folder or a hub id. Default: the bundled model.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Heads to mask, such as L3H6,L3H7. Default: top 5 % by retrieval.")
    ] = None,
    text_column: Annotated[str, typer.Option(help="Where JSONL and Parquet keep the text.")] = "text",
    domain_column: Annotated[str | None, typer.Option(help="Rank within the domains that this column names.")] = None,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of each domain to select.")] = 0.2,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, max=10_000_000, help="How many tokens of each document to read. Default: all.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, max=10_000_000, help="Tokens of one forward pass.")] = 4096,
    seed: Seed = 0,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Score documents by how much harder they get without the retrieval heads (#17). Goes on where it was interrupted."""
    refuse(out, force=force, inputs=[*files, model], folder=False)
    from manyheads.atlas.retrieval_heads.influence_files import influence_files
    from manyheads.progress import progressing

    opened = opening(model)
    chosen = None if heads is None else listed([heads])
    with keeping(out.with_name(f".{out.name}.parts")), progressing() as bar:
        written = influence_files(
            opened,
            files,
            out,
            heads=chosen,
            text_column=text_column,
            domain_column=domain_column,
            keep=keep,
            max_tokens=max_tokens,
            batch_tokens=batch_tokens,
            seed=seed,
            force=force,
            bar=bar.step("documents", None),
        )
    terminal().print(Text(f"Wrote {written}."))
