"""Chronos-2 from scratch on ETTh1: do the other channels help a forecast, as targets or as past-only covariates?

    manyheads bench chronos FOLDER/ETTh1.csv --out chronos        # about 5 processor minutes; a finished run is not done again
    manyheads bench chronos --out chronos                         # the table alone
    manyheads bench chronos --cost                                # seconds of a pass by the number of groups, half a minute

The first 14,400 hours; 168 ahead, 17 windows one after the other, the network trained on what comes before the first one.
Look-back 336 (two weeks), patches of a day. All methods are the same network of two blocks with the same steps and rows a batch:

    alone         seven targets, each its own group           targets       seven targets as one group
    OT alone      OT without the others                       covariates    OT, the others as past-only covariates

SQL and MASE are fev's (`forecast.core.metrics`), MSE is in the scale of the training part. Beside them seasonal naive.

The cost is the time of a pass over G series of three channels, each its own group, over that of the same series as one group, the
least of interleaved rounds. The released code computes the latter, with a mask, whatever the groups are.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from _measuring import timed
from rich.console import Console
from rich.table import Table

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.forecast.backtest import NAIVE, backtest
from manyheads.forecast.core.frames import columns_of, panel_of, read_frame
from manyheads.forecast.core.metrics import scores
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.transformers.chronos2 import Chronos2
from manyheads.forecast.transformers.chronos2_model import Chronos2Config, Chronos2Model
from manyheads.progress import progressing

CHANNELS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
HOURS, AHEAD, WINDOWS = 14400, 168, 17
METHODS: dict[str, dict[str, Any]] = {
    "alone": {"target": CHANNELS, "mixes": False},
    "targets": {"target": CHANNELS, "mixes": True},
    "OT alone": {"target": ["OT"], "past": ()},
    "covariates": {"target": ["OT"], "past": CHANNELS[:-1]},
}


def panel(path: Path, target: list[str], past: list[str] | tuple[()] = ()) -> Panel:
    df = read_frame(path)[["date", *CHANNELS]].iloc[:HOURS]
    learned = df[CHANNELS].iloc[: HOURS - WINDOWS * AHEAD]
    df[CHANNELS] = (df[CHANNELS] - learned.mean()) / learned.std(ddof=0)
    return panel_of(df, columns_of(df, time="date", target=target, past=past))


def measured(path: Path, method: str, seed: int, steps: int) -> list[dict[str, Any]]:
    """A row a target: of the network, and of seasonal naive."""
    given = dict(METHODS[method])
    made = panel(path, given.pop("target"), given.pop("past", ()))
    network = Chronos2(
        horizon=AHEAD,
        context=336,
        patch=24,
        width=32,
        n_heads=4,
        head_dim=8,
        hidden=128,
        blocks=2,
        steps=steps,
        rate=2e-3,
        decay=0.5,
        seed=seed,
        **given,
    )
    started = time.process_time()
    with progressing() as bar:
        found = backtest({method: network}, made, windows=WINDOWS, bar=bar)
    seconds = time.process_time() - started
    by = scores(found.table, by=["method", "target_name"])
    rows = by[["method", "target_name", "SQL", "MASE", "MSE"]].to_dict("records")
    return [row | {"seed": seed, "seconds": seconds, "parameters": found.parameters[method]} for row in rows]


def _shown(rows: list[dict[str, Any]]) -> Table:
    """Mean over targets, then mean and spread over seeds; below, of OT alone."""
    df = pd.DataFrame(rows)
    table = Table("", "of", "SQL", "MASE", "MSE", "seeds", "processor s", "parameters")
    for of, part in (("all seven", df[df["method"].isin(["alone", "targets"])]), ("OT", df[df["target_name"] == "OT"])):
        naive = df[(df["method"] == NAIVE) & ((df["target_name"] == "OT") | (of != "OT"))]
        naive = naive.drop_duplicates("target_name")
        table.add_row(NAIVE, of, *(f"{naive[name].mean():.3f}" for name in ("SQL", "MASE", "MSE")), "", "", "")
        for method, some in part[part["method"] != NAIVE].groupby("method", sort=False):
            each = some.groupby("seed")[["SQL", "MASE", "MSE"]].mean()
            cells = [f"{each[name].mean():.3f} ± {each[name].std():.3f}" for name in each]
            size, seconds = int(some["parameters"].iloc[0]), some["seconds"].mean()
            table.add_row(str(method), of, *cells, str(len(each)), f"{seconds:.0f}", f"{size:,}")
    return table


def _worse(rows: list[dict[str, Any]]) -> str:
    """Targets on which a method's MASE, the mean over seeds, is more than 5 % above seasonal naive's."""
    by = pd.DataFrame(rows).groupby(["method", "target_name"])["MASE"].mean().unstack("method")
    over = by.drop(columns=NAIVE).div(by[NAIVE], axis=0).stack()
    said = [f"{method} on {target} {100 * (v - 1):.0f} %" for (target, method), v in over[over > 1.05].items()]
    return f"More than 5 % above seasonal naive's MASE: {', '.join(said) or 'none'}."


def cost(rounds: int = 5) -> Table:
    """A network of the default size, look-back 512, one patch ahead."""
    torch.manual_seed(0)
    trunk = Chronos2Model(Chronos2Config(64, 16, 4, 256, 3, prediction_length=16)).eval().trunk
    table = Table("series", "each a group, s", "all one group, s", "ratio")

    @torch.no_grad()
    def run(values: torch.Tensor, across: bool) -> None:
        trunk.across = across
        trunk(values)

    for n in (4, 16, 64, 256):
        values = torch.randn(n, 512, 3)
        apart, whole = timed(rounds, lambda x=values: run(x, False), lambda x=values: run(x, True))
        table.add_row(str(n), f"{apart:.3f}", f"{whole:.3f}", f"{whole / apart:.2f}")
    return table


def main(
    path: Annotated[Path | None, typer.Argument(help="ETTh1.csv; without it the table of what was run.")] = None,
    out: Annotated[Path, typer.Option(help="Keep results in this folder.")] = Path("chronos"),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    costs: Annotated[bool, typer.Option("--cost", help="Only the time of a pass.")] = False,
) -> None:
    torch.set_num_threads(1)
    if costs:
        Console(width=130).print(cost())
        return
    kept = out / "results.json"
    rows: list[dict[str, Any]] = json.loads(kept.read_text("utf-8")) if kept.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    for seed in range(seeds) if path is not None else ():
        for method in METHODS:
            if (method, seed) not in done and path is not None:
                rows += measured(path, method, seed, steps)
                text = json.dumps(rows, default=float)
                out.mkdir(parents=True, exist_ok=True)
                write_atomically(kept, lambda file, text=text: file.write_text(text, "utf-8"), force=True)  # type: ignore[misc]
    if not rows:
        raise InputError(f"nothing was run in {out}; give the path of ETTh1.csv.")
    Console(width=130).print(_shown(rows), _worse(rows), sep="\n")


if __name__ == "__main__":
    typer.run(main)
