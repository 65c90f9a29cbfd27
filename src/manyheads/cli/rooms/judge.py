"""`manyheads judge`: predictors judged. One command for each question, on a table of your own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, Seed, refuse, terminal
from manyheads.cli.experiments import add_experiments
from manyheads.cli.rooms.judging.models import judge_advise, judge_compare
from manyheads.cli.rooms.judging.tables import (
    File,
    Out,
    Target,
    judge_covariates,
    judge_multiplicity,
    read_rows,
    write_rows,
)

judge_app = typer.Typer(
    cls=Commands,
    help="Predictors judged: how far good models disagree, whom to trust where, what more data would bring.",
    no_args_is_help=True,
)
add_experiments(judge_app, "judge")
judge_app.command("multiplicity")(judge_multiplicity)
judge_app.command("covariates")(judge_covariates)
judge_app.command("compare")(judge_compare)
judge_app.command("advise")(judge_advise)


@judge_app.command("market")
def judge_market(
    file: File,
    target: Target,
    betting: Annotated[
        str, typer.Option(help="How they bet: constant, linear, aggressive, or logistic (two classes).")
    ] = "constant",
    test: Annotated[float, typer.Option(help="The share of rows that judge and are not bet on.")] = 0.3,
    out: Out = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Who should be believed (#36)? Four kinds of models bet on each other's rows; prices are probabilities."""
    refuse(out, force=force, inputs=[file], folder=False)
    import numpy as np

    from manyheads.errors import InputError
    from manyheads.inputs import check_number
    from manyheads.judge.market import market_price
    from manyheads.judge.market_classifier import MarketClassifier

    check_number(test, "--test", 0.05, 0.9)
    _, rows = read_rows(file, target)
    kinds, labels = np.unique(rows.y.astype(str), return_inverse=True)
    if not 2 <= len(kinds) <= 50 or np.bincount(labels).min() < 5:
        raise InputError(
            f"{target!r} has {len(kinds)} values; a market is on 2 to 50 classes, with 5 rows of each at least."
        )
    held = np.random.default_rng(seed).permutation(len(labels)) < test * len(labels)
    if len(np.unique(labels[~held])) < len(kinds):
        raise InputError(f"a class of {target!r} is not among the rows that are bet on; leave it out, or lower --test.")
    market = MarketClassifier(betting=betting, random_state=seed).fit(rows.x[~held], labels[~held])  # type: ignore[arg-type]
    beliefs, known = market.beliefs(rows.x[held]), labels[held]

    def scored(p: Any) -> tuple[str, str]:
        right = np.maximum(p[np.arange(len(known)), known], 1e-12)
        return f"{-np.log(right).mean():.3f}", f"{(p.argmax(1) != known).mean():.3f}"

    title = f"{file.name}: {int((~held).sum())} rows to bet on, {int(held.sum())} to judge"
    table = Table("", "budget", "log loss", "error", title=title, title_justify="left")
    names = ("linear model", "naive Bayes", "neighbours", "forest")
    for name, budget, p in zip(names, market.budgets_, beliefs, strict=True):
        table.add_row(name, f"{budget:.2f}", *scored(p))
    table.add_row("their mean", "", *scored(beliefs.mean(0)))
    table.add_row("the market", "", *scored(market_price(market.budgets_, beliefs, betting, prior=market.prior_)))  # type: ignore[arg-type]
    table.add_row("the commonest class", "", *scored(np.tile(market.prior_, (len(known), 1))))
    terminal().print(table)
    if out is not None:
        p = market.predict_proba(rows.x)
        write_rows(out, {"row": rows.rows, **{kind: p[:, k] for k, kind in enumerate(kinds)}, "bet on": ~held}, force)


@judge_app.command("curve")
def judge_curve(
    file: Annotated[Path, typer.Argument(help="A .csv or .parquet file, one row a size.")],
    size: Annotated[str, typer.Option(help="The column with the number of training rows.")] = "size",
    score: Annotated[str, typer.Option(help="The column with the score.")] = "score",
    at: Annotated[
        float | None, typer.Option(help="Tell the score at so many rows. Default: twice the last size.")
    ] = None,
    most: Annotated[float, typer.Option(help="The best score there can be: 100 for per cent, 1 for shares.")] = 100.0,
    loss: Annotated[bool, typer.Option("--loss", help="Lower is better, and 0 is the best there can be.")] = False,
    tau: Annotated[float, typer.Option(help="Stop when the asymptote moves by less.")] = 0.1,
    anchor: Annotated[float, typer.Option(help="How much the previous asymptote weighs, in observations.")] = 0.0,
    page: Annotated[Path | None, typer.Option(help="Draw the curve and its trend on this page, one HTML file.")] = None,
    force: Force = False,
) -> None:
    """What would more data bring, and could one have stopped (#28)?"""
    refuse(page, force=force, inputs=[file], folder=False)
    import numpy as np

    from manyheads.data.tables import read_table
    from manyheads.errors import InputError
    from manyheads.inputs import check_number
    from manyheads.judge.curves import LearningCurve, bayesian_curve, power_law

    if at is not None:
        check_number(at, "--at", 0.0, above=True)
    frame = read_table(file, "one row a size")
    for name in (size, score):
        if name not in frame or not np.issubdtype(frame[name].dtype, np.number):
            raise InputError(
                f"the table has no column {name!r} of numbers; it has {', '.join(map(str, frame.columns))}."
            )
    rows = frame[[size, score]].dropna().groupby(size, sort=True)[score].mean()
    sign = -1.0 if loss else 1.0
    curve = LearningCurve(
        rows.index.to_numpy(dtype=float), sign * rows.to_numpy(dtype=float), 0.0 if loss else most, anchor
    )
    far = 2 * float(curve.sizes[-1]) if at is None else at
    trend = curve.trace[-1]
    table = Table(
        "",
        "",
        title=f"{file.name}: {len(rows)} sizes up to {curve.sizes[-1]:,.0f}",
        title_justify="left",
        show_header=False,
    )
    table.add_row("last score", f"{sign * curve.scores[-1]:.4g}")
    if curve.level is None:
        table.add_row(
            "trend", f"goes to {sign * trend.c:.4g}, beyond the best there can be: too few sizes to believe it"
        )
    else:
        table.add_row(
            f"trend at {far:,.0f} rows", f"{sign * curve.predict(far):.4g}, with endless data {sign * trend.c:.4g}"
        )
        table.add_row("asymptote moved at the last size by", f"{curve.proximity:.3g}")
        stopped = curve.stops(tau)
        said = "not yet" if stopped is None else f"at {curve.sizes[stopped - 1]:,.0f} rows"
        table.add_row(f"could have stopped (moves by less than {tau:g})", said)
    if len(rows) > 3:
        told = bayesian_curve(curve, far)
        low, high = sorted((sign * told.low, sign * told.high))
        table.add_row("average of all such curves", f"{sign * told.mean:.4g} ({low:.4g} to {high:.4g})")
    table.add_row("if errors fell to none", f"{sign * float(power_law(curve).at(far)):.4g}")
    terminal().print(table)
    if page is not None:
        from manyheads.report import write

        terminal().print(Text(f"Wrote {write(curve, page, force=force)}."))


@judge_app.command("trial")
def judge_trial(
    file: Annotated[
        Path,
        typer.Argument(help="A .csv or .parquet file: forecaster, arm, question, forecast, outcome; skill if known."),
    ],
    control: Annotated[str, typer.Option(help="The arm that others are compared with.")],
    scored: Annotated[str, typer.Option(help="What was forecast: number, or probability (by Brier score).")] = "number",
    out: Annotated[Path | None, typer.Option(help="Write the four tables as Parquet into this new folder.")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Did advice make forecasters better, and does one question carry it all (#7)?"""
    refuse(out, force=force, inputs=[file], folder=True)
    from manyheads.data.tables import read_table
    from manyheads.files import write_folder_atomically
    from manyheads.judge.advice import advice_trial

    found = advice_trial(read_table(file, "one row a forecast"), control=control, scored=scored, seed=seed)  # type: ignore[arg-type]
    shown = Table(
        "arm", "forecasters", "error", "less error than control", "p", "q", title=file.name, title_justify="left"
    )
    for row in found.effects.itertuples():
        interval = f"{row.effect:.0%} ({row.low:.0%} to {row.high:.0%})"
        shown.add_row(str(row.arm), str(row.forecasters), f"{row.score:.3f}", interval, f"{row.p:.2g}", f"{row.q:.2g}")
    terminal().print(shown)
    if len(found.without):
        table = found.without.pivot(index="question", columns="arm", values="effect")
        leaving = Table("without question", *map(str, table.columns))
        for question, values in table.iterrows():
            leaving.add_row(str(question), *(f"{value:.0%}" for value in values))
        terminal().print(leaving)
    crowds = Table("arm", "error of its median", "spread beside control")
    for row in found.crowds.itertuples():
        crowds.add_row(str(row.arm), f"{row.error:.3f} ± {row.stderr:.3f}", f"{row.spread:.2f}")
    terminal().print(crowds)
    for arm in found.effects["arm"]:
        question = found.carried_by(arm)
        if question is not None:
            terminal().print(
                Text(f"One question carries the effect of {arm}: without {question} less than half is left.")
            )
    if len(found.halves):
        halves = Table("arm", "by", "effect, lower half", "upper half", "p")
        for arm, by, low, high, p in found.halves.itertuples(index=False):
            halves.add_row(str(arm), by, f"{low:.0%}", f"{high:.0%}", f"{p:.2g}")
        terminal().print(halves)
    if out is not None:
        tables = {"effects": found.effects, "without": found.without, "crowds": found.crowds, "halves": found.halves}

        def write(folder: Path) -> None:
            for name, table in tables.items():
                table.to_parquet(folder / f"{name}.parquet", index=False)

        terminal().print(Text(f"Wrote {write_folder_atomically(out, write, force=force)}."))
