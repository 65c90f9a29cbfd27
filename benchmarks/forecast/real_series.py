"""What `manyheads forecast` would take on real series that install with statsmodels, beside seasonal naive: MASE on the past.

    python benchmarks/forecast/real_series.py --out real_series.json        # or: manyheads bench real_series

Every series is forecast from 5 windows (12 steps ahead, 26 weeks of co2, 11 years of sunspots) by the methods that are tried when
nobody names one. Finished series are kept in `--out`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from manyheads.data.series import SERIES, series_frame
from manyheads.files import write_atomically
from manyheads.forecast.backtest import backtest
from manyheads.forecast.choosing import forecaster_named, methods_for
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.progress import progressing

HORIZONS = {"co2": 26, "sunspots": 11}


def measured(name: str) -> dict[str, dict[str, float]]:
    """MASE, SQL and coverage of each method."""
    df = series_frame(name)
    panel, horizon = panel_of(df, columns_of(df)), HORIZONS.get(name, 12)
    methods = {one: forecaster_named(one, panel, horizon) for one in methods_for(panel, horizon)}
    started = time.process_time()
    with progressing() as bar:
        rows = backtest(methods, panel, horizon=horizon, windows=5, bar=bar).scores().set_index("method")
    found = {one: {key: float(row[key]) for key in ("MASE", "SQL", "coverage")} for one, row in rows.iterrows()}
    return found | {"": {"seconds": time.process_time() - started}}


def main(out: Annotated[Path, typer.Option(help="Where finished series are kept.")] = Path("real_series.json")) -> None:
    """Measure what was not measured yet, and print the table."""
    torch.set_num_threads(1)
    kept = json.loads(out.read_text("utf-8")) if out.exists() else {}
    for name in SERIES:
        if name not in kept:
            kept[name] = measured(name)
            write_atomically(out, lambda file: file.write_text(json.dumps(kept, indent=1), "utf-8"), force=True)
    names = list(dict.fromkeys(method for found in kept.values() for method in found if method))
    table = Table(
        "series", *names, "taken", "over 5 % worse than naive", title="MASE; in brackets coverage of .1 to .9"
    )
    for name, found in kept.items():
        rows = {method: row for method, row in found.items() if method}
        naive = rows["seasonal_naive"]["MASE"]
        cells = [f"{rows[m]['MASE']:.3f} ({rows[m]['coverage']:.2f})" if m in rows else "" for m in names]
        worse = [method for method, row in rows.items() if row["MASE"] > 1.05 * naive]
        table.add_row(name, *cells, min(rows, key=lambda m: rows[m]["SQL"]), ", ".join(worse))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)
