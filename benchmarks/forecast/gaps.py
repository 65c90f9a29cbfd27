"""Gaps in real series: TSPulse (#86) beside linear interpolation, on a part of each series that nobody learned from.

    manyheads bench gaps                                       # elnino (statsmodels), three seeds, two minutes
    manyheads bench gaps FOLDER/ETTh1.csv                      # the seven columns of ETTh1, each a series, a few minutes

Learned from the first 70 % of each series. Of the rest, points are hidden as in training (up to 30 %, a fifth of them as whole
patches of 8 steps), and filled from what is left. Squared errors over the square of the standard deviation of the first part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import torch
import typer

from manyheads.data.series import series_frame
from manyheads.forecast.core.frames import read_frame
from manyheads.forecast.representations.tspulse import TSPulse

SHARE = 0.7


def long_frame(path: Path | None) -> pd.DataFrame:
    """item_id, timestamp, target; a column of a wide file is a series."""
    if path is None:
        return series_frame("elnino")
    wide = read_frame(path).rename(columns={"date": "timestamp"})
    return wide.melt("timestamp", var_name="item_id", value_name="target")


def interpolated(values: pd.Series) -> pd.Series:
    return values.interpolate().ffill().bfill()


def measured(df: pd.DataFrame, seed: int, steps: int, dual: bool) -> tuple[float, float]:
    """Scaled squared error in the gaps: ours, and linear interpolation's."""
    groups = [part.reset_index(drop=True) for _, part in df.groupby("item_id", sort=False)]
    first = [part.iloc[: int(SHARE * len(part))] for part in groups]
    rest = [part.iloc[int(SHARE * len(part)) :] for part in groups]
    model = TSPulse(context=128, steps=steps, rows=64, patience=None, seed=seed, dual=dual)
    model.fit(pd.concat(first, ignore_index=True), validation=0)
    drawn = torch.Generator().manual_seed(seed)
    hybrid = TSPulse(context=128)
    ours, plain = [], []
    for learned, part in zip(first, rest, strict=True):
        windows = -(-len(part) // 128)
        hidden = hybrid.masks((windows, 128, 1), drawn).numpy().ravel()[: len(part)]
        hidden[[0, -1]] = False
        gaps = part.assign(target=part["target"].mask(hidden))
        size = float(learned["target"].std()) or 1.0
        truth = part["target"].to_numpy()
        for found, filled in ((ours, model.impute(gaps)["target"]), (plain, interpolated(gaps["target"]))):
            found.append(np.nanmean(((filled.to_numpy() - truth)[hidden] / size) ** 2))
    return float(np.mean(ours)), float(np.mean(plain))


def main(
    path: Annotated[Path | None, typer.Argument(help="A wide table with a column date; default: elnino.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of training, 64 windows each.")] = 700,
) -> None:
    """Print the errors in gaps of each seed and their means."""
    torch.set_num_threads(1)
    df = long_frame(path)
    for name, dual in (("both views", True), ("time alone", False)):
        found = np.array([measured(df, seed, steps, dual) for seed in range(seeds)])
        ratio = found[:, 0] / found[:, 1]
        print(
            f"{name:12} error {found[:, 0].mean():.3f}, linear {found[:, 1].mean():.3f}, "
            f"ratio {ratio.mean():.2f} ± {ratio.std(ddof=1) if seeds > 1 else float('nan'):.2f}  {np.round(ratio, 2).tolist()}"
        )


if __name__ == "__main__":
    typer.run(main)
