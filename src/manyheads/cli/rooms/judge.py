"""`manyheads judge`: predictors judged. One command for each question, on a table of your own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Commands, Force, Seed, announce, listed, refuse, terminal
from manyheads.cli.experiments import add_experiments

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.judge.tables.covariates import CovariateSelector

judge_app = typer.Typer(
    cls=Commands,
    help="Predictors judged: how far good models disagree, whom to trust where, what more data would bring.",
    no_args_is_help=True,
)
add_experiments(judge_app, "judge")

File = Annotated[Path, typer.Argument(help="A .csv or .parquet file, one row an example.")]
Target = Annotated[str, typer.Option(help="The column to predict.")]
Out = Annotated[Path | None, typer.Option(help="Write a row an example as Parquet into this new file.")]


@judge_app.command("multiplicity")
def judge_multiplicity(
    file: File,
    target: Target,
    epsilon: Annotated[float, typer.Option(help="How much more loss a rival model may have, nats a row.")] = 0.01,
    delta: Annotated[float, typer.Option(help="From which change of a probability on models conflict.")] = 0.1,
    exact: Annotated[bool, typer.Option("--exact", help="Bound the discrepancy by mixed-integer programs.")] = False,
    seconds: Annotated[float, typer.Option(min=1, max=86_400, help="How long --exact may take.")] = 60.0,
    out: Out = None,
    force: Force = False,
) -> None:
    """How far do models that fit as well disagree, row by row (#112)? For linear models of two classes, exactly."""
    refuse(out, force=force, inputs=[file], folder=False)
    from manyheads.data.tables import read_table, table_rows
    from manyheads.errors import InputError
    from manyheads.judge.tables.multiplicity import MultiplicityClassifier
    from manyheads.progress import progressing

    rows = table_rows(read_table(file), target)
    kinds = sorted(set(rows.y.tolist()), key=str)
    if len(kinds) != 2:
        raise InputError(
            f"{target!r} has {len(kinds)} values, and multiplicity is of two classes; choose another column."
        )
    fitted = MultiplicityClassifier(epsilon).fit(rows.x, rows.y)
    with progressing() as bar:
        ranges = fitted.viable_range(rows.x, bar=bar)
    found = fitted.discrepancy(rows.x, delta, exact=exact, seconds=seconds)
    p = fitted.predict_proba(rows.x)[:, 1]
    table = Table(
        "", "", title=f"{file.name}: {len(p)} rows, {rows.x.shape[1]} columns", title_justify="left", show_header=False
    )
    table.add_row("loss of the best model", f"{fitted.loss_:.4f} nats; rivals up to {fitted.loss_ + epsilon:.4f}")
    table.add_row("mean width of a row's range", f"{(ranges[:, 1] - ranges[:, 0]).mean():.3f}")
    ambiguity = found.at_most if not exact else fitted.ambiguity(rows.x, delta)
    table.add_row(f"ambiguity: rows that some rival moves by {delta:g}", f"{ambiguity:.2f}")
    bound = f" to {found.at_most:.2f}" if found.at_most > found.value + 1e-9 else ""
    table.add_row("discrepancy: the same, by one rival", f"{found.value:.2f}{bound}")
    flips = ((ranges[:, 0] < 0.5) & (ranges[:, 1] > 0.5)).mean()
    table.add_row("rows whose class depends on the model", f"{flips:.2f}")
    terminal().print(table)
    if out is not None:
        _write(out, {"probability": p, "lowest": ranges[:, 0], "highest": ranges[:, 1]}, force)


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

    from manyheads.data.tables import read_table, table_rows
    from manyheads.errors import InputError
    from manyheads.inputs import check_number
    from manyheads.judge.market import market_price
    from manyheads.judge.market_classifier import MarketClassifier

    check_number(test, "--test", 0.05, 0.9)
    rows = table_rows(read_table(file), target)
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
        _write(out, {**{kind: p[:, k] for k, kind in enumerate(kinds)}, "bet on": ~held}, force)


@judge_app.command("covariates")
def judge_covariates(
    file: File,
    target: Target,
    environment: Annotated[str, typer.Option(help="The column that names each row's environment.")],
    predict: Annotated[
        Path | None, typer.Option(help="Predict these rows, an environment at a time; no target needed.")
    ] = None,
    always: Annotated[
        list[str] | None, typer.Option(help="Covariates that are in every set, such as known causes.")
    ] = None,
    out: Out = None,
    force: Force = False,
) -> None:
    """Which covariates should predict where (#123)? A set for each environment, by what its unlabelled rows look like."""
    refuse(out, force=force, inputs=[file, predict], folder=False)
    import numpy as np

    from manyheads.data.tables import read_table, table_rows
    from manyheads.errors import InputError
    from manyheads.judge.tables.covariates import CovariateSelector

    if out is not None and predict is None:
        raise InputError("--out is for predictions; give --predict FILE too.")
    frame = read_table(file)
    rows = table_rows(frame, target, without=[environment])
    if not np.issubdtype(rows.y.dtype, np.number):
        raise InputError(f"{target!r} is no number; covariates are chosen for a number.")
    unknown = sorted(set(always or []) - set(rows.names))
    if unknown:
        raise InputError(f"--always names {unknown[0]!r}; the covariates are {', '.join(rows.names)}.")
    where = frame.dropna()[environment].to_numpy()
    fitted = CovariateSelector(always=[rows.names.index(name) for name in always or []])
    fitted.fit(rows.x, rows.y.astype(float), where)
    named = [", ".join(rows.names[i] for i in chosen) or "none" for chosen in fitted.subsets_]
    table = Table(
        "covariates", "best in", "mean squared error", title=f"{len(fitted.best_)} environments", title_justify="left"
    )
    order = np.argsort(fitted.errors_.mean(0))
    for j in order[:10]:
        table.add_row(named[j], str(int((fitted.best_ == j).sum())), f"{fitted.errors_[:, j].mean():.3f}")
    if len(order) > 10:
        rest = int(np.isin(fitted.best_, order[10:]).sum())
        table.add_row(f"{len(order) - 10} more sets", str(rest), f"up to {fitted.errors_.mean(0).max():.3f}")
    terminal().print(table)
    if predict is not None:
        _predict_covariates(fitted, rows.names, named, read_table(predict), target, environment, out, force)


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


@judge_app.command("advise")
def judge_advise(
    file: File,
    target: Target,
    bad: Annotated[str, typer.Option(help="The value of the target that is the bad one.")],
    rows: Annotated[str, typer.Option(help="Advise on these rows of the file, from 0: one, or from-to.")] = "0-9",
    fixed: Annotated[
        str | None, typer.Option(help="Columns that cannot be changed, by comma. Columns of words never are.")
    ] = None,
    up: Annotated[str | None, typer.Option(help="Columns that can only rise.")] = None,
    down: Annotated[str | None, typer.Option(help="Columns that can only fall.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write a JSON line a row into this new file.")] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Who is at risk, why, and what is the smallest change that would help (#111)? By boosted trees, checked on other rows."""
    refuse(out, force=force, inputs=[file], folder=False)
    import json
    import re

    import numpy as np
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold

    from manyheads.data.tables import read_table, table_rows
    from manyheads.errors import InputError
    from manyheads.evaluation.metrics import auc
    from manyheads.files import write_atomically
    from manyheads.judge.tables.prescriptions import Prescriber, tuned_threshold

    span = re.fullmatch(r"(\d+)(?:-(\d+))?", rows.strip())
    frame = read_table(file)
    table = table_rows(frame, target)
    y = table.y.astype(str) == bad
    if not y.any() or y.all():
        raise InputError(
            f"{target!r} has no {bad!r} beside others; it has {', '.join(sorted(set(table.y.astype(str)))[:5])}."
        )
    first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
    if first > last or last >= len(y):
        raise InputError(f"--rows is {rows!r}; give one row, or from-to, up to {len(y) - 1} (complete rows count).")
    if min(y.sum(), (~y).sum()) < 10:
        raise InputError(
            f"{target!r} has fewer than 10 rows of {bad!r} or of the others; that is too few to learn from."
        )
    words = [name for name in table.names if name not in frame]  # one column a value: they belong together
    split = [tuple(listed(None if given is None else [given]) or ()) for given in (fixed, up, down)]
    # A row is advised by a model that did not see it: the risk of a training row says little.
    held, models = np.zeros(len(y)), []
    for train, test in StratifiedKFold(5, shuffle=True, random_state=seed).split(table.x, y):
        small = HistGradientBoostingClassifier(max_leaf_nodes=7, learning_rate=0.05, random_state=seed)
        models.append((small.fit(table.x[train], y[train]), train, set(test.tolist())))
        held[test] = small.predict_proba(table.x[test])[:, 1]
    rules: dict[str, Any] = {
        "fixed": (*split[0], *words),
        "up": split[1],
        "down": split[2],
        "threshold": tuned_threshold(held, y),
    }

    def advisor_of(i: int) -> Prescriber:
        model, train, _ = next(one for one in models if i in one[2])
        return Prescriber(lambda x: model.predict_proba(x)[:, 1], table.x[train], table.names, **rules)

    announce(
        f"rows are advised by models that did not see them; these tell the bad from the others with an AUC of {auc(held, y):.2f}"
    )
    lines = []
    for i in range(first, last + 1):
        found = advisor_of(i).prescribe(table.x[i], seed=seed)
        terminal().print(Text(f"{i}: {found.text()}"))
        changes = [{"to": dict(one.to), "risk": one.risk, "cost": one.cost} for one in found.changes]
        facts = {"row": i, "risk": found.risk, "threshold": found.threshold, "reasons": dict(found.reasons)}
        lines.append(json.dumps(facts | {"changes": changes, "text": found.text()}, ensure_ascii=False))
    if out is not None:
        text = "\n".join(lines) + "\n"
        write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
        terminal().print(Text(f"Wrote {out}."))


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


@judge_app.command("compare")
def judge_compare(
    file: File,
    target: Target,
    block: Annotated[
        str | None, typer.Option(help="A column that names what belongs together: a site, a person. It is no input.")
    ] = None,
    coordinates: Annotated[
        str | None,
        typer.Option(help="Two columns, such as lon,lat, by which rows are put into patches. They are no inputs."),
    ] = None,
    patches: Annotated[int, typer.Option(min=2, max=1000, help="How many, with --coordinates.")] = 10,
    models: Annotated[
        str | None,
        typer.Option(help="Beside the linear model, by comma. Default: neighbours,forest,boosted trees,network."),
    ] = None,
    folds: Annotated[int, typer.Option(min=2, max=50, help="How many folds judge.")] = 5,
    out: Annotated[
        Path | None, typer.Option(help="Write scores, importance and curves as Parquet into this folder.")
    ] = None,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Does machine learning predict better than a linear model here, and what may one conclude (#35)?"""
    refuse(out, force=force, inputs=[file], folder=True)
    import numpy as np

    from manyheads.data.tables import read_table, table_rows
    from manyheads.errors import InputError
    from manyheads.files import write_folder_atomically
    from manyheads.judge.tables.model_comparison import RIVALS, compare_predictors, spatial_blocks
    from manyheads.progress import progressing

    places = [] if coordinates is None else [one.strip() for one in coordinates.split(",")]
    if coordinates is not None and len(places) != 2:
        raise InputError(f"--coordinates is {coordinates!r}; give two columns, such as lon,lat.")
    if block is not None and places:
        raise InputError("--block and --coordinates both say what belongs together; give one.")
    frame = read_table(file)
    rows = table_rows(frame, target, without=[*places, *([block] if block else [])])
    kept = frame.dropna()
    groups = kept[block].to_numpy() if block else None
    if places:
        if not all(np.issubdtype(kept[name].dtype, np.number) for name in places):
            raise InputError(f"--coordinates {coordinates} are no numbers.")
        groups = spatial_blocks(kept[places].to_numpy(dtype=np.float64), patches, seed=seed)
    with progressing() as bar:
        found = compare_predictors(
            rows.x,
            rows.y,
            columns=rows.names,
            blocks=groups,
            models=listed(None if models is None else [models]) or RIVALS,
            folds=folds,
            seed=seed,
            bar=bar,
        )
    score = "R²" if found.kind == "number" else "accuracy"
    title = f"{file.name}: {len(rows.y)} rows, {folds} folds of {found.folds}"
    shown = Table(
        "model",
        f"{score} ± spread",
        "gap to training",
        "q beside linear",
        "random folds add",
        title=title,
        title_justify="left",
    )
    promised = found.promised
    for name, row in found.summary.iterrows():
        more = f"{promised[name]:.2f}" if name in promised else ""
        q = "" if np.isnan(row["q"]) else f"{row['q']:.2g}"
        shown.add_row(str(name), f"{row['score']:.3f} ± {row['spread']:.3f}", f"{row['gap']:.3f}", q, more)
    terminal().print(shown)
    best = next(name for name in found.summary.index if name != "none")
    used = found.importance[found.importance["model"] == best].sort_values("loss", ascending=False)[:10]
    importance = Table("column", f"{score} lost when permuted", title=f"what {best} uses", title_justify="left")
    for one in used.itertuples():
        importance.add_row(str(one.column), f"{one.loss:.3f} ± {one.stderr:.3f}")
    terminal().print(importance)
    for remark in found.remarks:
        terminal().print(Text(remark))
    if out is not None:
        tables = {
            "scores": found.scores,
            "importance": found.importance,
            "together": found.together,
            "curves": found.curves,
        }

        def write(folder: Path) -> None:
            for name, table in tables.items():
                table.to_parquet(folder / f"{name}.parquet", index=False)

        terminal().print(Text(f"Wrote {write_folder_atomically(out, write, force=force)}."))


def _predict_covariates(
    fitted: CovariateSelector,
    names: tuple[str, ...],
    named: list[str],
    frame: pd.DataFrame,
    target: str,
    environment: str,
    out: Path | None,
    force: bool,
) -> None:
    import pandas as pd

    from manyheads.errors import InputError

    missing = [name for name in (*names, environment) if name not in frame]
    if missing:
        raise InputError(f"the rows to predict have no column {missing[0]!r}.")
    frame, parts = frame.dropna(subset=list(names)), []
    for place, rows in frame.groupby(environment, sort=False):
        x = rows[list(names)].to_numpy(dtype=float)
        chosen = named[fitted.subsets_.index(fitted.choose(x))]
        uncertain = fitted.uncertain(x)
        doubt = ", too few rows or unlike all that was seen: the best set on average" if uncertain else ""
        terminal().print(Text(f"{place}: {chosen}{doubt}"))
        made = {"prediction": fitted.predict(x), "covariates": chosen, "uncertain": uncertain}
        parts.append(pd.DataFrame(made, index=rows.index).assign(**{environment: place}))
    if not parts:
        raise InputError("there is no complete row to predict.")
    made_frame = pd.concat(parts).sort_index()
    if target in frame:
        _say_errors(fitted, frame[list(names)].to_numpy(dtype=float), frame[target], made_frame["prediction"], named)
    if out is not None:
        _write(out, made_frame, force)


def _say_errors(fitted: CovariateSelector, x: Any, truth: pd.Series, selected: pd.Series, named: list[str]) -> None:
    """Where the truth is known: the error beside that of fixed sets."""
    y = truth.to_numpy(dtype=float)
    fixed = {
        fitted.overall_: "the best set on average",
        max(range(len(named)), key=lambda j: len(fitted.subsets_[j])): "all",
    }
    table = Table("covariates", "mean squared error")
    table.add_row("chosen by environment", f"{((selected.loc[truth.index].to_numpy() - y) ** 2).mean():.3f}")
    for j, said in fixed.items():
        error = ((fitted.models_[j].predict(x[:, list(fitted.subsets_[j])]) - y) ** 2).mean()
        table.add_row(f"{said}: {named[j]}", f"{error:.3f}")
    terminal().print(table)


def _write(out: Path, columns: object, force: bool) -> None:
    import pandas as pd

    from manyheads.files import write_atomically

    frame = columns if isinstance(columns, pd.DataFrame) else pd.DataFrame(columns)
    write_atomically(out, lambda path: frame.to_parquet(path, index=False), force=force)
    terminal().print(Text(f"Wrote {out}."))
