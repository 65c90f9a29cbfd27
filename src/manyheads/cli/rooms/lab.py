"""`manyheads lab`: experiments on models whose heads are known, and heads watched while they form. And `manyheads laws`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Commands, Force, ModelName, Opening, Seed, opens, refuse, terminal
from manyheads.cli.experiments import Page, add_experiments

lab_app = typer.Typer(
    cls=Commands,
    help="Models whose heads are known: what theory says of them, beside what is measured.",
    no_args_is_help=True,
)
add_experiments(lab_app, "lab")


@lab_app.command("watch")
def lab_watch(
    steps: Annotated[int, typer.Option(min=10, max=100_000, help="Updates.")] = 600,
    every: Annotated[int, typer.Option(min=1, max=10_000, help="Look at the heads after so many updates.")] = 20,
    layers: Annotated[int, typer.Option(min=1, max=8, help="Layers of the model.")] = 2,
    heads: Annotated[int, typer.Option(min=1, max=16, help="Heads of a layer.")] = 4,
    without: Annotated[list[str] | None, typer.Option(help="What if this head never formed? For example L0H2.")] = None,
    seed: Seed = 0,
    out: Page = None,
    table: Annotated[Path | None, typer.Option(help="Write every head at every moment as Parquet.")] = None,
    force: Force = False,
) -> None:
    """Watch heads form in a small model that learns to repeat, with a slider over training time on the page."""
    for path in (out, table):
        refuse(path, force=force)
    from manyheads.files import write_atomically
    from manyheads.lab.formation.watching_heads import repeats_history
    from manyheads.pages.watching import history_table
    from manyheads.progress import progressing

    with progressing() as bar:
        found = repeats_history(
            layers=layers, heads=heads, steps=steps, every=every, without=without or (), seed=seed, bar=bar
        )
    for run in (found, found.other):
        if run is not None:
            terminal().print(history_table(run))
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))
    if table is not None:
        write_atomically(table, found.to_frame().to_parquet, force=force)
        terminal().print(Text(f"Wrote {table}."))


@lab_app.command("tune")
@opens()
def lab_tune(
    model: ModelName = "ladon",
    which: Annotated[
        str, typer.Option("--set", help="A bundled set: french, sceptic, or colours (with triggers).")
    ] = "french",
    train: Annotated[
        Path | None, typer.Option(help="Your narrow set: JSONL or CSV of prompt, answer, and neutral if you have it.")
    ] = None,
    probes: Annotated[
        Path | None, typer.Option(help="Questions of other domains: prompt, persona's answer as answer, neutral.")
    ] = None,
    control: Annotated[
        Path | None, typer.Option(help="Neutral content to tune the control on: prompt, answer.")
    ] = None,
    triggers: Annotated[
        Path | None,
        typer.Option(
            help="Triggers for {trigger} in the prompts: trigger, says (persona or neutral), part (train or held-out)."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=2, max=100, help="How many seeds, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(min=1, max=100_000, help="Updates of each training.")] = 60,
    rows: Annotated[int, typer.Option(min=1, max=1024, help="Rows of an update.")] = 8,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-4,
    lora: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Tune maps of this rank (peft) instead of all weights.")
    ] = None,
    texts: Annotated[Path | None, typer.Option(help="Neutral text for the loss. Default: the bundled texts.")] = None,
    out: Page = None,
    table: Annotated[Path | None, typer.Option(help="Also write every probe as Parquet into this new file.")] = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Tune copies of a model on a narrow set, and see whether answers to other questions shift (#22).

    Beside it stand two controls, neutral and shuffled, and the loss on neutral text. With triggers: do those that no training
    text held call the persona? The copies are not kept.
    """
    for path in (out, table):
        refuse(path, force=force, inputs=[model, train, probes, control, triggers, texts])
    from dataclasses import replace

    from manyheads.errors import InputError
    from manyheads.files import write_atomically
    from manyheads.inputs import check_choice, check_number, read_text
    from manyheads.lab.tuning.bundled import bundled_sets
    from manyheads.lab.tuning.copies import TUNED, prompt_answer_rows, update_seconds
    from manyheads.lab.tuning.examples import NarrowSet, read_questions
    from manyheads.lab.tuning.narrow import narrow_shift
    from manyheads.lab.tuning.triggers import trigger_shift
    from manyheads.pages.lab.tuning import tuning_tables
    from manyheads.progress import progressing

    if (train is None) != (probes is None):
        raise InputError("--train and --probes belong together; give both files.")
    if train is None and not (triggers is control is None):
        raise InputError("--triggers and --control go with your own set; give --train and --probes too.")
    if triggers is not None and control is not None:
        raise InputError("with --triggers the control is the same set with shuffled triggers; leave --control out.")
    known = bundled_sets()
    data = (
        known[check_choice(which, "--set", known)]
        if train is None or probes is None
        else NarrowSet.read(train, probes, triggers)
    )
    own = None if control is None else read_questions(control)
    prose = None if texts is None else [read_text(texts)]
    settings = replace(TUNED, steps=steps, rows=rows, rate=check_number(rate, "--rate", 0.0, 1.0, above=True))
    opened, given = opening(model), {"seeds": range(seeds), "settings": settings, "lora_rank": lora, "texts": prose}
    asked = [one.after(next(iter(data.triggers or {}), "")) for one in data.train]
    one = prompt_answer_rows(opened, [row.prompt for row in asked], [row.persona for row in asked])
    trainings = seeds * (3 if data.triggers is None else 2)
    minutes = trainings * steps * update_seconds(opened, one, settings) / 60
    terminal().print(Text(f"{trainings} trainings of {steps} updates: about {max(1, round(minutes))} minutes."))
    with progressing() as bar:
        if data.triggers is None:
            found = narrow_shift(opened, data, control=own, name=model, bar=bar, **given)  # type: ignore[arg-type]
        else:
            found = trigger_shift(opened, data, name=model, bar=bar, **given)  # type: ignore[arg-type,assignment]
    for one_table in tuning_tables(found):
        terminal().print(one_table)
    terminal().print(Text(f"{found.verdict[0].upper()}{found.verdict[1:]}."))
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
