"""Gaps in real series: TSPulse (#86) beside linear interpolation and the season's means, where nobody learned from.

    manyheads bench gaps                                       # elnino (statsmodels), three seeds, two to four minutes
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
from manyheads.forecast.core.frames import columns_of, panel_of, read_frame
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


def seasonal(gaps: pd.Series, learned: pd.Series, season: int) -> pd.Series:
    """The mean, over the first part, of the same step of the season: 12 months, 24 hours."""
    means = learned.groupby(np.arange(len(learned)) % season).mean().to_numpy()
    return gaps.fillna(pd.Series(means[(len(learned) + np.arange(len(gaps))) % season], index=gaps.index))


def measured(df: pd.DataFrame, seed: int, steps: int) -> tuple[float, ...]:
    """Scaled squared error in the gaps: ours, linear interpolation's, and that of the season's means."""
    season = panel_of(df, columns_of(df)).season
    groups = [part.reset_index(drop=True) for _, part in df.groupby("item_id", sort=False)]
    first = [part.iloc[: int(SHARE * len(part))] for part in groups]
    rest = [part.iloc[int(SHARE * len(part)) :] for part in groups]
    model = TSPulse(context=128, steps=steps, rows=64, patience=None, seed=seed)
    model.fit(pd.concat(first, ignore_index=True), validation=0)
    drawn = torch.Generator().manual_seed(seed)
    hybrid = TSPulse(context=128)
    found: list[list[float]] = [[], [], []]
    for learned, part in zip(first, rest, strict=True):
        windows = -(-len(part) // 128)
        hidden = hybrid.masks((windows, 128, 1), drawn).numpy().ravel()[: len(part)]
        hidden[[0, -1]] = False
        gaps = part.assign(target=part["target"].mask(hidden))
        size = float(learned["target"].std()) or 1.0
        truth = part["target"].to_numpy()
        given = gaps["target"]
        fills = (model.impute(gaps)["target"], interpolated(given), seasonal(given, learned["target"], season))
        for errors, filled in zip(found, fills, strict=True):
            errors.append(float(np.nanmean(((filled.to_numpy() - truth)[hidden] / size) ** 2)))
    return tuple(float(np.mean(errors)) for errors in found)


def main(
    path: Annotated[Path | None, typer.Argument(help="A wide table with a column date; default: elnino.")] = None,
    seeds: Annotated[int, typer.Option(help="How many seeds, from 0 on.")] = 3,
    steps: Annotated[int, typer.Option(help="Steps of training, 64 windows each.")] = 700,
) -> None:
    """Print the errors in gaps of each seed and their means."""
    torch.set_num_threads(1)
    df = long_frame(path)
    found = np.array([measured(df, seed, steps) for seed in range(seeds)])
    for name, errors in zip(("TSPulse", "linear", "season"), found.T, strict=True):
        print(f"{name:8} {errors.mean():.3f}  {np.round(errors, 3).tolist()}")
    print("TSPulse over linear", np.round(found[:, 0] / found[:, 1], 2).tolist())


if __name__ == "__main__":
    typer.run(main)
