"""Classes of real series: VSFormer (#55) beside nearest neighbours and ridge regressions, on sets of UCR and UEA.

    manyheads bench classification --out FOLDER                # four sets that ship with aeon, three seeds; resumes
    manyheads bench classification --sets JapaneseVowels,OSULeaf --methods "ridge, convolutions;VSFormer"

Accuracy on the test part as the archives split it. Needs the files of aeon: pip install --no-deps aeon. A run that was cut
short goes on from FOLDER.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from manyheads.data.series import classified_series
from manyheads.evaluation.experiment import Experiment
from manyheads.forecast.representations.classify import ConvolutionRidge, NearestSeries, RawRidge
from manyheads.forecast.representations.vsformer import VSFormer, VSFormerSettings

SETS = ("BasicMotions", "ItalyPowerDemand", "ArrowHead", "GunPoint")
METHODS: dict[str, Callable[[int], Any]] = {
    "nearest, Euclid": lambda seed: NearestSeries(),
    "nearest, DTW": lambda seed: NearestSeries(0.1),
    "ridge, values": lambda seed: RawRidge(),
    "ridge, convolutions": lambda seed: ConvolutionRidge(seed=seed),
    "VSFormer": lambda seed: VSFormer(VSFormerSettings(seed=seed)),
    "shapes alone": lambda seed: VSFormer(VSFormerSettings(seed=seed, branches=("shape",))),
    "values alone": lambda seed: VSFormer(VSFormerSettings(seed=seed, branches=("value",))),
}


def tried(make: Callable[[int], Any]) -> Callable[[str, int], dict[str, float]]:
    def run(name: str, seed: int) -> dict[str, float]:
        train, test = classified_series(name)
        return {"accuracy": make(seed).fit(train.x, train.y).score(test.x, test.y)}

    return run


def main(
    sets: Annotated[str, typer.Option(help="Names, separated by commas.")] = ",".join(SETS),
    methods: Annotated[str, typer.Option(help="Names, separated by semicolons. Default: all.")] = ";".join(METHODS),
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    out: Annotated[Path | None, typer.Option(help="A folder in which runs are kept.")] = None,
) -> None:
    """Print the accuracy of each method on each set: mean and standard error over seeds."""
    torch.set_num_threads(1)
    chosen = {name: tried(METHODS[name]) for name in methods.split(";")}
    made = Experiment(
        "classification",
        (29, 55),
        "",
        "",
        lambda quick: {one: one for one in sets.split(",")},
        chosen,
        next(iter(chosen)),
        (),
    )
    found = made.run(seeds=range(seeds), folder=out).to_frame()
    for name in ("mean", "stderr"):
        print(f"\naccuracy, {name}")
        print(found.pivot(index="method", columns="dataset", values=name).loc[list(chosen)].round(3).to_string())


if __name__ == "__main__":
    typer.run(main)
