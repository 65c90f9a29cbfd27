"""Two tasks of fev-bench, rebuilt from ETTh1.csv and ETTh2.csv: our methods beside seasonal naive and the published figures.

    python benchmarks/forecast/fev_ett.py FOLDER --task ETT_1H --out runs      # or: manyheads bench fev_ett FOLDER

ETT_1H: hourly, 168 steps ahead, 20 windows, season 24. ETT_1W: means of weeks with all 168 hours, 13 ahead, 5 windows, season 1.
Seven targets, two series. A method learns once, from what comes before the first window, on one thread. `--fev` runs them also
through the package fev (0.10), which gives the same figures. A finished run is kept in `--out` and not done again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.forecast.backtest import backtest
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.fev import fev_predictions
from manyheads.progress import progressing

TARGETS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
TASKS = {"ETT_1H": (168, 20, 24), "ETT_1W": (13, 5, 1)}  # horizon, windows, season
PUBLISHED = {  # SQL
    "ETT_1H": {"TS-ICL": 0.854, "TiRex-2": 0.865, "Chronos-2": 0.883, "TFT": 0.951, "PatchTST": 0.952, "DeepAR": 0.992},
    "ETT_1W": {
        "Toto-2": 2.286,
        "TiRex-2": 2.292,
        "Chronos-2": 2.320,
        "AutoARIMA": 2.442,
        "PatchTST": 2.570,
        "TFT": 2.804,
    },
}
# Chosen by SQL on the ten windows before the first window of the task, among four sizes of OLinear and their means.
OLINEAR: dict[str, Any] = {"context": 336, "layers": 2, "epochs": 4, "decay": 1.0, "patience": 2, "stride": 2}
FIRST = {"width": 128, "embedding": 4, "dropout": 0.2, "output_dropout": 0.2, "rate": 5e-4, **OLINEAR}
SECOND = {"width": 192, "embedding": 2, "dropout": 0.5, "rate": 3e-4, "mixes": False, "seed": 3, **OLINEAR}
METHODS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "ETT_1H": {
        "linear": ("linear", {"context": 336, "epochs": 5, "patience": 3}),
        "olinear": ("olinear", FIRST),
        "ensemble": ("ensemble", {"members": (("olinear", FIRST), ("olinear", SECOND))}),
    },
    "ETT_1W": {
        "theta": ("theta", {}),
        "ets": ("ets", {}),
        "arima": ("arima", {}),
        "ensemble": ("ensemble", {"members": (("seasonal_naive", {"season": 1}), ("ets", {}), ("arima", {}))}),
    },
}


def panel(folder: Path, task: str) -> Panel:
    """The two series, of hours or of weeks."""
    parts = []
    for name in ("ETTh1", "ETTh2"):
        path = folder / f"{name}.csv"
        if not path.is_file():
            raise InputError(f"there is no {path}; give a folder with ETTh1.csv and ETTh2.csv.")
        table = pd.read_csv(path, parse_dates=["date"]).set_index("date")[TARGETS].astype("float32")
        if task == "ETT_1W":
            weeks = table.resample("W-SUN")
            table = weeks.mean()[weeks.size() == 168]
        parts.append(table.rename_axis("timestamp").reset_index().assign(id=name))
    df = pd.concat(parts, ignore_index=True)
    return panel_of(df, columns_of(df, item="id", target=TARGETS))


def made(task: str, name: str) -> Forecaster:
    """A method with its settings here."""
    kind, settings = METHODS[task][name]
    return FORECASTERS[kind](horizon=TASKS[task][0], **settings)


def measured(task: str, name: str, data: Panel) -> dict[str, float]:
    """The scores of a method, and its processor seconds."""
    horizon, windows, season = TASKS[task]
    started = time.process_time()
    with progressing() as bar:
        found = backtest({name: made(task, name)}, data, horizon=horizon, windows=windows, season=season, bar=bar)
    rows = found.scores().set_index("method")
    row = rows.loc[name if name in rows.index else "seasonal_naive"]
    keep = ["MASE", "SQL", "WAPE", "WQL", "coverage", "parameters"]
    return {**{key: float(row[key]) for key in keep}, "processor seconds": time.process_time() - started}


def by_fev(task: str, name: str, data: Panel, folder: Path) -> dict[str, float]:
    """The same through the package fev."""
    import fev

    horizon, windows, season = TASKS[task]
    rows = [
        {"id": one.name, "timestamp": one.times.to_numpy().astype("datetime64[ms]")}
        | {t: one.values[v].astype(np.float32) for v, t in enumerate(TARGETS)}
        for one in data.series
    ]
    path = folder / f"{task}.parquet"
    pd.DataFrame(rows).to_parquet(path)
    levels = [round(0.1 * i, 1) for i in range(1, 10)]
    given = fev.Task(
        dataset_path=str(path),
        horizon=horizon,
        num_windows=windows,
        seasonality=season,
        eval_metric="SQL",
        extra_metrics=["MASE", {"name": "WAPE", "epsilon": 1.0}, {"name": "WQL", "epsilon": 1.0}],
        quantile_levels=levels,
        target=TARGETS,
    )
    predictions, seconds = fev_predictions(given, made(task, name))
    found = given.evaluation_summary(predictions, model_name=name, **seconds)
    return {key: found[key] for key in ("MASE", "SQL", "WAPE", "WQL")}


def main(
    folder: Annotated[Path, typer.Argument(help="A folder with ETTh1.csv and ETTh2.csv.")],
    task: Annotated[str, typer.Option(help="ETT_1H or ETT_1W.")] = "ETT_1H",
    only: Annotated[str, typer.Option(help="Only these methods, separated by commas.")] = "",
    out: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("fev-ett"),
    fev: Annotated[bool, typer.Option("--fev", help="Also through the package fev.")] = False,
) -> None:
    """Run the methods that were not run yet, and print the table."""
    torch.set_num_threads(1)
    data, record = panel(folder, task), out / f"{task}.json"
    kept: dict[str, dict[str, float]] = json.loads(record.read_text("utf-8")) if record.exists() else {}
    METHODS[task]["seasonal_naive"] = ("seasonal_naive", {"season": TASKS[task][2]})
    for name in only.split(",") if only else METHODS[task]:
        work: dict[str, Callable[[], dict[str, float]]] = {name: lambda name=name: measured(task, name, data)}
        if fev:
            work[f"{name}, by fev"] = lambda name=name: by_fev(task, name, data, out)
        for label, run in work.items():
            if label not in kept:
                kept[label] = run()
                out.mkdir(parents=True, exist_ok=True)
                text = json.dumps(kept, indent=1)
                write_atomically(record, lambda file, text=text: file.write_text(text, "utf-8"), force=True)
    table = Table("method", "MASE", "SQL", "WAPE", "WQL", "coverage", "parameters", "processor s", title=task)
    for label, row in sorted(kept.items(), key=lambda item: item[1]["SQL"]):
        cells = [f"{row[key]:.4f}" if key in row else "" for key in ("MASE", "SQL", "WAPE", "WQL", "coverage")]
        sizes = [f"{row['parameters']:,.0f}", f"{row['processor seconds']:.0f}"] if "parameters" in row else ["", ""]
        table.add_row(label, *cells, *sizes)
    for label, value in PUBLISHED[task].items():
        table.add_row(f"published: {label}", "", f"{value:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
