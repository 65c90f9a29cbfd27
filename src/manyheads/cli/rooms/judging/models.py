"""Commands of `manyheads judge` that fit several models to a table: which of them is better, and what to advise by them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from manyheads.cli.common import Force, Seed, announce, listed, refuse, terminal
from manyheads.cli.rooms.judging.tables import File, Target, read_rows

if TYPE_CHECKING:
    from manyheads.judge.tables.model_comparison import PredictorComparison


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

    from manyheads.errors import InputError
    from manyheads.files import write_folder_atomically
    from manyheads.judge.tables.model_comparison import RIVALS, compare_predictors, spatial_blocks
    from manyheads.progress import progressing

    places = [] if coordinates is None else [one.strip() for one in coordinates.split(",")]
    if coordinates is not None and len(places) != 2:
        raise InputError(f"--coordinates is {coordinates!r}; give two columns, such as lon,lat.")
    if block is not None and places:
        raise InputError("--block and --coordinates both say what belongs together; give one.")
    frame, rows = read_rows(file, target, [*places, *([block] if block else [])])
    kept = frame.iloc[rows.rows]
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
    _show_comparison(found, f"{file.name}: {len(rows.y)} rows, {folds} folds of {found.folds}")
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


def _show_comparison(found: PredictorComparison, title: str) -> None:
    import numpy as np

    score = "R²" if found.kind == "number" else "accuracy"
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

    from manyheads.errors import InputError
    from manyheads.evaluation.metrics import auc
    from manyheads.files import write_atomically
    from manyheads.judge.tables.prescriptions import cross_advisors

    frame, table = read_rows(file, target)
    span = re.fullmatch(r"(\d+)(?:-(\d+))?", rows.strip())
    first, last = (int(span[1]), int(span[2] or span[1])) if span else (1, 0)
    if first > last or last >= len(frame):
        raise InputError(f"--rows is {rows!r}; give one row, or from-to, up to {len(frame) - 1}.")
    places = {int(row): i for i, row in enumerate(table.rows)}
    asked = [row for row in range(first, last + 1) if row in places]
    if not asked:
        raise InputError(f"--rows is {rows!r}, and each of these rows lacks a value; there is nothing to advise on.")
    y = table.y.astype(str) == bad
    if not y.any() or y.all():
        raise InputError(
            f"{target!r} has no {bad!r} beside others; it has {', '.join(sorted(set(table.y.astype(str)))[:5])}."
        )
    words = [name for name in table.names if name not in frame]  # one column a value: they belong together
    split = [tuple(listed(None if given is None else [given]) or ()) for given in (fixed, up, down)]
    advisors = cross_advisors(table.x, y, table.names, seed=seed, fixed=(*split[0], *words), up=split[1], down=split[2])
    announce(
        "rows are advised by models that did not see them; these tell the bad from the others with an AUC of "
        f"{auc(advisors.risk, y):.2f}"
    )
    lines = []
    for row in asked:
        found = advisors.of(places[row]).prescribe(table.x[places[row]], seed=seed)
        terminal().print(Text(f"{row}: {found.text()}"))
        changes = [{"to": dict(one.to), "risk": one.risk, "cost": one.cost} for one in found.changes]
        facts = {"row": row, "risk": found.risk, "threshold": found.threshold, "reasons": dict(found.reasons)}
        lines.append(json.dumps(facts | {"changes": changes, "text": found.text()}, ensure_ascii=False))
    if out is not None:
        text = "\n".join(lines) + "\n"
        write_atomically(out, lambda path: path.write_text(text, "utf-8"), force=force)
        terminal().print(Text(f"Wrote {out}."))
