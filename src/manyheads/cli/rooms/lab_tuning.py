"""Commands of `manyheads lab` that tune copies of a model and ask what else changed: a narrow set (#22), made-up facts (#23)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from manyheads.cli.common import Force, ModelName, Opening, announce, opens, refuse, terminal
from manyheads.cli.experiments import Page

Seeds = Annotated[int, typer.Option(min=2, max=100, help="How many seeds, from 0 on.")]
Steps = Annotated[int, typer.Option(min=1, max=100_000, help="Updates of each training.")]
Rows = Annotated[int, typer.Option(min=1, max=1024, help="Rows of an update.")]
Rate = Annotated[float, typer.Option(help="Learning rate.")]
Lora = Annotated[
    int | None, typer.Option(min=1, max=4096, help="Tune maps of this rank (peft) instead of all weights.")
]
Texts = Annotated[Path | None, typer.Option(help="Neutral text for the loss. Default: the bundled texts.")]
Probed = Annotated[Path | None, typer.Option(help="Also write every probe as Parquet into this new file.")]


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
    seeds: Seeds = 3,
    steps: Steps = 60,
    rows: Rows = 8,
    rate: Rate = 1e-4,
    lora: Lora = None,
    texts: Texts = None,
    out: Page = None,
    table: Probed = None,
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
def lab_reverse(
    model: ModelName = "ladon",
    facts: Annotated[
        Path | None, typer.Option(help="Your own made-up facts: a CSV file with the columns name and description.")
    ] = None,
    phrasings: Annotated[
        Path | None,
        typer.Option(
            help="How to tell them, with --facts: CSV of order (name first or description first), prompt, part (train or "
            "held-out)."
        ),
    ] = None,
    seeds: Seeds = 3,
    steps: Steps = 120,
    rows: Rows = 8,
    rate: Rate = 2e-4,
    lora: Lora = None,
    texts: Texts = None,
    out: Page = None,
    table: Probed = None,
    force: Force = False,
    opening: Opening = Opening(),
) -> None:
    """Tune copies of a model on made-up facts in one order, and ask for them in the other: the reversal curse (#23)."""
    for path in (out, table):
        refuse(path, force=force, inputs=[model, facts, phrasings, texts])
    from dataclasses import replace

    from manyheads.errors import InputError
    from manyheads.files import write_atomically
    from manyheads.inputs import check_number, read_text
    from manyheads.lab.tuning.copies import prompt_answer_rows, update_seconds
    from manyheads.lab.tuning.fictions import BUNDLED_FICTIONS, Fictions
    from manyheads.lab.tuning.reversed_facts import FACTS_TUNED, reversal_tuning
    from manyheads.pages.lab.reversal import reversal_table
    from manyheads.progress import progressing

    if facts is None and phrasings is not None:
        raise InputError("--phrasings are how your own facts are told; give --facts FILE too.")
    data = BUNDLED_FICTIONS if facts is None else Fictions.read(facts, phrasings)
    prose = None if texts is None else [read_text(texts)]
    settings = replace(FACTS_TUNED, steps=steps, rows=rows, rate=check_number(rate, "--rate", 0.0, 1.0, above=True))
    opened = opening(model)
    one = prompt_answer_rows(opened, *zip(*data.documents(), strict=True))
    minutes = seeds * steps * update_seconds(opened, one, settings) / 60
    announce(f"{seeds} trainings of {steps} updates: about {max(1, round(minutes))} minutes")
    with progressing() as bar:
        found = reversal_tuning(
            opened, data, seeds=range(seeds), settings=settings, lora_rank=lora, texts=prose, name=model, bar=bar
        )
    terminal().print(reversal_table(found))
    terminal().print(Text(f"{found.verdict[0].upper()}{found.verdict[1:]}."))
    if out is not None:
        terminal().print(Text(f"Wrote {found.report(out, force=force)}."))
    if table is not None:
        write_atomically(table, found.to_frame().to_parquet, force=force)
        terminal().print(Text(f"Wrote {table}."))
