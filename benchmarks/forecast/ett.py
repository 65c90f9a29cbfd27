"""ETTh1 and ETTh2 as papers measure them: MSE and MAE of OLinear and SOFTS beside their papers' tables and a linear layer.

    python benchmarks/forecast/ett.py run FOLDER --out ett       # FOLDER holds ETTh1.csv and ETTh2.csv
    python benchmarks/forecast/ett.py table --out ett            # or: manyheads bench ett table --out ett

Look-back 96. The first 8,640 hours train and give the scale, the next 2,880 say when to stop ("judged MSE" is of them), the 2,880
after them are the test, all of whose windows are kept (drop_last=False). Errors are in the scale of the training part. Settings
are the papers' in the first place; `--tried-first 2` also tries those without one of their parts. A finished run is kept in
`--out` and not done again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer
from rich.console import Console
from rich.table import Table

from manyheads.files import write_atomically
from manyheads.forecast.core.forecaster import FORECASTERS
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.network import POINT, NetworkForecaster
from manyheads.forecast.core.panel import Panel
from manyheads.progress import progressing

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
TARGETS = ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
TRAINED, JUDGED, ALL = 8640, 11520, 14400
CONTEXT = 96
PAPERS = {  # MSE, MAE; from memory, but their means over horizons are the published ones
    ("olinear", "ETTh1"): {96: (0.360, 0.382), 192: (0.416, 0.414), 336: (0.457, 0.438), 720: (0.463, 0.462)},
    ("olinear", "ETTh2"): {96: (0.284, 0.329), 192: (0.360, 0.379), 336: (0.409, 0.415), 720: (0.415, 0.431)},
    ("softs", "ETTh1"): {96: (0.381, 0.399), 192: (0.435, 0.431), 336: (0.480, 0.452), 720: (0.499, 0.488)},
    ("softs", "ETTh2"): {96: (0.297, 0.347), 192: (0.373, 0.394), 336: (0.410, 0.426), 720: (0.411, 0.433)},
}


def settings(method: str, dataset: str, horizon: int) -> list[dict[str, Any]]:
    """What is tried: first the papers' settings, with a rate that falls to 0 in a line; OLinear is smaller, for less time."""
    first = dataset == "ETTh1"
    if method == "softs":
        size = {"width": 256, "core": 256, "hidden": 256 if horizon < 336 else 512, "layers": 1}
        size = size if first else {"width": 128, "core": 64, "hidden": 128, "layers": 2}
        some = {**size, "rate": 3e-4, "epochs": 20, "decay": 1.0, "patience": 3}
        return [some | {"calendar": True}, some]
    if method == "olinear":
        rate = (5e-4 if horizon < 720 else 1.5e-4) if first else 2e-4
        size = {"width": 256, "embedding": 4, "layers": 2 if first else 3, "dropout": 0.2}
        some = {**size, "rate": rate, "epochs": 6, "decay": 1.0, "patience": 3}
        return [some | {"output_dropout": 0.2}, some]
    return [{"rate": 1e-3, "epochs": 15, "decay": 1.0, "patience": 3}]


def panel(path: Path) -> Panel:
    """The hours that the papers use."""
    frame = pd.read_csv(path, nrows=ALL).rename(columns={"date": "timestamp"})
    return panel_of(frame, columns_of(frame, target=TARGETS))


@torch.no_grad()
def tested(forecaster: NetworkForecaster, hours: Panel, first: int, end: int) -> tuple[float, float]:
    """MSE and MAE over all windows whose forecasts are of the hours from `first` to before `end`."""
    heads = forecaster.heads_
    assert heads is not None
    windows = forecaster._windows(hours)  # in the scale of the training part
    places = windows.places([(0, range(first, end - forecaster.horizon + 1))])
    batches = [forecaster._batch(windows, places[i : i + 256]) for i in range(0, len(places), 256)]
    found = heads.evaluate(batches).set_index(["head", "metric"])["value"]
    return float(found[POINT, "mse"]), float(found[POINT, "mae"])


def tried(hours: Panel, method: str, horizon: int, given: dict[str, Any], seed: int, bar: Any) -> dict[str, Any]:
    """One run: trained on the training part, stopped by the validation part, tested."""
    made = FORECASTERS[method](context=CONTEXT, horizon=horizon, objective="point", levels=(), seed=seed, **given)
    assert isinstance(made, NetworkForecaster)
    started, spent = time.perf_counter(), time.process_time()
    made.fit_panel(hours.without_last(ALL - JUDGED), validation=JUDGED - TRAINED, bar=bar)
    seconds, processor = time.perf_counter() - started, time.process_time() - spent
    judged = tested(made, hours, TRAINED, JUDGED)
    mse, mae = tested(made, hours, JUDGED, ALL)
    return {
        "mse": mse,
        "mae": mae,
        "judged mse": judged[0],
        "judged mae": judged[1],
        "epochs": len(made.run_.progress.judged),
        "seconds": seconds,
        "processor": processor,
        "parameters": sum(t.numel() for t in made._tensors().values()),
    }


class Kept:
    """Finished runs, on disk."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "ett.json"
        self.runs: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.exists() else []

    def has(self, key: dict[str, Any]) -> bool:
        """Whether a run was finished."""
        return any(all(run[name] == value for name, value in key.items()) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Keep a run."""
        self.runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: file.write_text(json.dumps(self.runs, indent=1)), force=True)


@app.command()
def run(
    folder: Annotated[Path, typer.Argument(help="The folder with ETTh1.csv and ETTh2.csv.")],
    out: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("ett"),
    sets: Annotated[str, typer.Option(help="Data sets.")] = "ETTh1,ETTh2",
    horizons: Annotated[str, typer.Option(help="Horizons.")] = "96,192,336,720",
    methods: Annotated[str, typer.Option(help="Methods.")] = "linear,softs,olinear",
    seeds: Annotated[str, typer.Option(help="Seeds.")] = "0",
    tried_first: Annotated[int, typer.Option(help="How many of the settings are tried.")] = 1,
    threads: Annotated[int, typer.Option(help="Threads. One: processor time is measured.")] = 1,
) -> None:
    """Train and test what is not kept yet."""
    torch.set_num_threads(threads)
    kept = Kept(out)
    for horizon in map(int, horizons.split(",")):
        for dataset in sets.split(","):
            hours = panel(folder / f"{dataset}.csv")
            for method in methods.split(","):
                for seed in map(int, seeds.split(",")):
                    for given in settings(method, dataset, horizon)[:tried_first]:
                        key = {
                            "dataset": dataset,
                            "method": method,
                            "horizon": horizon,
                            "seed": seed,
                            "settings": given,
                        }
                        if not kept.has(key):
                            with progressing() as bar:
                                kept.add(key | tried(hours, method, horizon, given, seed, bar))
                            print(kept.runs[-1], flush=True)
    table(out)


@app.command()
def table(out: Annotated[Path, typer.Option(help="Where finished runs are kept.")] = Path("ett")) -> None:
    """What was measured, the mean over seeds, beside the papers' tables. Settings after the papers' say what differs."""
    rows = Table(title="ETT, look-back 96, every window of the test (drop_last=False), scaled by the training part")
    for title in ("set", "horizon", "method", "seeds", "judged MSE", "MSE", "MAE", "paper's", "ratios", "processor s"):
        rows.add_column(title, justify="left" if title in ("set", "method") else "right")
    runs = pd.DataFrame(Kept(out).runs).assign(differs=lambda found: found.apply(_differs, axis=1))
    for (dataset, horizon, method, differs), part in runs.groupby(["dataset", "horizon", "method", "differs"]):
        found = part[["judged mse", "mse", "mae", "processor"]].mean()
        paper = PAPERS.get((method, dataset), {}).get(horizon)
        stated = " / ".join(f"{p:.3f}" for p in paper) if paper else ""
        ratios = " / ".join(f"{found[m] / p:.3f}" for m, p in zip(("mse", "mae"), paper, strict=True)) if paper else ""
        errors = [f"{found[m]:.4f}" for m in ("judged mse", "mse", "mae")]
        name = f"{method} {differs}".strip()
        rows.add_row(dataset, f"{horizon}", name, f"{len(part)}", *errors, stated, ratios, f"{found['processor']:.0f}")
    Console(width=150).print(rows)


def _differs(run: pd.Series) -> str:
    first, own = settings(run["method"], run["dataset"], run["horizon"])[0], run["settings"]
    return ", ".join(f"{name}={own.get(name)}" for name in first if own.get(name) != first[name])


if __name__ == "__main__":
    app()
