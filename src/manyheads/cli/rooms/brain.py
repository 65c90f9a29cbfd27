"""`manyheads brain`: filters that carry their own uncertainty, on a series of your own, and experiments with brains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, Seed, refuse, terminal
from manyheads.cli.experiments import add_experiments

brain_app = typer.Typer(
    cls=Commands,
    help="Brains: what to believe of a series and how surely; what comes, when, and how likely.",
    no_args_is_help=True,
)
add_experiments(brain_app, "brain")

_FEW_TRIALS = 200  # fewer leave the local rule far from its fixed point


@brain_app.command("filter")
def brain_filter(
    file: Annotated[Path, typer.Argument(help="A .csv or .parquet file, one row a step, in the order of time.")],
    column: Annotated[str, typer.Option(help="The column to filter.")],
    kind: Annotated[str, typer.Option(help="binary (zeros and ones) or continuous.")] = "continuous",
    levels: Annotated[
        int, typer.Option(min=2, max=3, help="2, or 3 for a belief about how volatility itself changes.")
    ] = 2,
    fit: Annotated[
        bool, typer.Option("--fit", help="Fit the network's numbers to the first part of the series.")
    ] = False,
    update: Annotated[str, typer.Option(help="How volatility is updated: unbounded, ehgf or standard.")] = "unbounded",
    gaps: Annotated[str | None, typer.Option(help="A column with the time since the row before.")] = None,
    held_out: Annotated[
        float, typer.Option(help="Which share of the steps, the last ones, methods are judged on.")
    ] = 0.3,
    out: Annotated[
        Path | None, typer.Option(help="Write beliefs, a row a step, as Parquet into this new file.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write a page with pictures here, one HTML file.")] = None,
    force: Force = False,
) -> None:
    """What should be believed of a series at each step, and how surely (#43)? Beside a Kalman filter and the last value."""
    refuse(out, force=force, inputs=[file], folder=False)
    refuse(page, force=force, inputs=[file], folder=False)
    import pandas as pd

    from manyheads.brain.belief_forecasts import filter_series
    from manyheads.data.tables import read_table
    from manyheads.errors import InputError
    from manyheads.files import write_atomically
    from manyheads.inputs import check_choice
    from manyheads.progress import progressing

    if out is not None and page is not None and out.absolute() == page.absolute():
        raise InputError("--out and --page name one file; give two names.")
    frame = read_table(file, "one row a step")
    for name in (column, *([] if gaps is None else [gaps])):
        if name not in frame:
            raise InputError(f"the table has no column {name!r}; it has {', '.join(map(str, frame.columns))}.")
        if not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(f"{name!r} is not a column of numbers; choose another.")
    check_choice(kind, "--kind", ("binary", "continuous"))
    with progressing() as bar:
        found = filter_series(
            frame[column].to_numpy(),
            name=column,
            kind=kind,  # type: ignore[arg-type]
            levels=levels,
            fit=fit,
            update=update,  # type: ignore[arg-type]
            gaps=None if gaps is None else frame[gaps].to_numpy(),
            held_out=held_out,
            bar=bar.step("passes over the series") if fit else bar,
        )
    table = Table(
        title=f"{column}: the last {found.held_out} of {len(found.values)} steps, one ahead", title_justify="left"
    )
    for i, title in enumerate(("method", "surprise, nats a step", "mean absolute error")):
        table.add_column(title, justify="left" if i == 0 else "right")
    for one, score in found.scores.items():
        table.add_row(one, f"{score:.4f}", f"{found.errors[one]:.4g}")
    terminal().print(table)
    numbers = {n: v for n, v in found.network.numbers().items() if n.startswith(("omega x", "kappa", "precision u"))}
    shown = ", ".join(
        f"{n} {v:.3g}" for n, v in numbers.items() if not (kind == "binary" and n.startswith("precision"))
    )
    terminal().print(Text(f"numbers ({'fitted' if fit else 'as they come; --fit fits them'}): {shown}"))
    if out is not None:
        columns = {"value": found.values, "expected": found.expected, "low": found.low, "high": found.high}
        columns |= {"state": found.state, "state_sd": found.state_sd, "surprise": found.surprise}
        columns |= {} if found.volatility is None else {"volatility": found.volatility}
        beliefs = pd.DataFrame(columns)
        write_atomically(out, lambda path: beliefs.to_parquet(path, index=False), force=force)
        terminal().print(Text(f"Wrote {out}."))
    if page is not None:
        terminal().print(Text(f"Wrote {found.report(page, force=force)}."))


@brain_app.command("timing")
def brain_timing(
    file: Annotated[
        Path, typer.Argument(help="A .csv or .parquet file, one row a trial: when each event came, empty if not.")
    ],
    events: Annotated[list[str] | None, typer.Option(help="Columns, one an event; default: all.")] = None,
    scale: Annotated[float, typer.Option(help="How many ms of the network one unit of the file's times is.")] = 1.0,
    rule: Annotated[str, typer.Option(help="local, or force: recursive least squares.")] = "local",
    width: Annotated[float, typer.Option(help="Width of an event's bump, ms of the network.")] = 20.0,
    averaged: Annotated[int, typer.Option(min=1, help="Of how many of the last trials readouts are averaged.")] = 100,
    page: Annotated[Path | None, typer.Option(help="Write a page with pictures here, one HTML file.")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """What comes after a cue, when, and how likely (#31)? A spiking network learns it, trial by trial."""
    refuse(page, force=force, inputs=[file], folder=False)
    import numpy as np
    import pandas as pd

    from manyheads.brain.reservoir import SpikingReservoir
    from manyheads.brain.timing import learn_timing
    from manyheads.data.tables import read_table
    from manyheads.errors import InputError
    from manyheads.inputs import check_number
    from manyheads.progress import progressing

    check_number(scale, "--scale", low=0.0, above=True)
    frame = read_table(file, "one row a trial")
    names = list(map(str, frame.columns)) if events is None else events
    for name in names:
        if name not in frame:
            raise InputError(f"the table has no column {name!r}; it has {', '.join(map(str, frame.columns))}.")
        if pd.api.types.is_bool_dtype(frame[name]) or not pd.api.types.is_numeric_dtype(frame[name]):
            raise InputError(f"{name!r} is no column of times; name the events with --events.")
    times = frame[names].to_numpy(dtype=float)
    with progressing() as bar:
        reservoir = SpikingReservoir(seed=seed)
        found = learn_timing(
            times * scale,
            names=names,
            reservoir=reservoir,
            rule=rule,  # type: ignore[arg-type]
            width=width,
            averaged=averaged,
            bar=bar,
        )
    table = Table(title=f"{len(times)} trials; readouts of the last {found.averaged}", title_justify="left")
    for i, title in enumerate(("event", "learned: when", "how likely", "counted: when", "how likely")):
        table.add_column(title, justify="left" if i == 0 else "right")
    late = times[-found.averaged :]
    for k, name in enumerate(names):
        came = ~np.isnan(late[:, k])
        when = f"{late[came, k].mean():.4g}" if came.any() else "n/a"
        table.add_row(name, f"{found.when[k] / scale:.4g}", f"{found.probability[k]:.2f}", when, f"{came.mean():.2f}")
    terminal().print(table)
    if rule == "local" and len(times) < _FEW_TRIALS:
        terminal().print(Text(f"The local rule learns slowly: with fewer than {_FEW_TRIALS} trials use --rule force."))
    if page is not None:
        terminal().print(Text(f"Wrote {found.report(page, force=force)}."))
