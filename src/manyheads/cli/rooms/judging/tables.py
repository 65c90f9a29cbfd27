"""Commands of `manyheads judge` on a table of examples: how far rivals disagree, and which covariates to trust where."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, announce, refuse, terminal

if TYPE_CHECKING:
    import pandas as pd

    from manyheads.data.tables import TableRows
    from manyheads.judge.tables.covariates import CovariateSelector

File = Annotated[Path, typer.Argument(help="A .csv or .parquet file, one row an example.")]
Target = Annotated[str, typer.Option(help="The column to predict.")]
Out = Annotated[Path | None, typer.Option(help="Write a row an example as Parquet into this new file.")]


def read_rows(file: Path, target: str, without: Sequence[str] = ()) -> tuple[pd.DataFrame, TableRows]:
    """The table as it stands, and its complete rows; says how many were left out."""
    from manyheads.data.tables import read_table, table_rows

    frame = read_table(file)
    rows = table_rows(frame, target, without=without)
    if rows.left_out:
        announce(f"{rows.left_out} of {len(frame)} rows lack a value and are left out")
    return frame, rows


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
    from manyheads.errors import InputError
    from manyheads.judge.tables.multiplicity import MultiplicityClassifier
    from manyheads.progress import progressing

    _, rows = read_rows(file, target)
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
        write_rows(out, {"row": rows.rows, "probability": p, "lowest": ranges[:, 0], "highest": ranges[:, 1]}, force)


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

    from manyheads.data.tables import read_table
    from manyheads.errors import InputError
    from manyheads.judge.tables.covariates import CovariateSelector

    if out is not None and predict is None:
        raise InputError("--out is for predictions; give --predict FILE too.")
    frame, rows = read_rows(file, target, [environment])
    if not np.issubdtype(rows.y.dtype, np.number):
        raise InputError(f"{target!r} is no number; covariates are chosen for a number.")
    unknown = sorted(set(always or []) - set(rows.names))
    if unknown:
        raise InputError(f"--always names {unknown[0]!r}; the covariates are {', '.join(rows.names)}.")
    where = frame[environment].to_numpy()[rows.rows]
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
    whole, parts = frame.reset_index(names="row"), []
    frame = whole.dropna(subset=[*names, environment])
    if len(frame) < len(whole):
        announce(f"{len(whole) - len(frame)} of {len(whole)} rows to predict lack a value and are left out")
    for place, rows in frame.groupby(environment, sort=False):
        x = rows[list(names)].to_numpy(dtype=float)
        chosen = named[fitted.subsets_.index(fitted.choose(x))]
        uncertain = fitted.uncertain(x)
        doubt = ", too few rows or unlike all that was seen: the best set on average" if uncertain else ""
        terminal().print(Text(f"{place}: {chosen}{doubt}"))
        made = {"row": rows["row"], "prediction": fitted.predict(x), "covariates": chosen, "uncertain": uncertain}
        parts.append(pd.DataFrame(made, index=rows.index).assign(**{environment: place}))
    if not parts:
        raise InputError("there is no complete row to predict.")
    made_frame = pd.concat(parts).sort_index()
    if target in frame:
        _say_errors(fitted, frame[list(names)].to_numpy(dtype=float), frame[target], made_frame["prediction"], named)
    if out is not None:
        write_rows(out, made_frame, force)


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


def write_rows(out: Path, columns: object, force: bool) -> None:
    """Columns as a Parquet file; says where."""
    import pandas as pd

    from manyheads.files import write_atomically

    frame = columns if isinstance(columns, pd.DataFrame) else pd.DataFrame(columns)
    write_atomically(out, lambda path: frame.to_parquet(path, index=False), force=force)
    terminal().print(Text(f"Wrote {out}."))
