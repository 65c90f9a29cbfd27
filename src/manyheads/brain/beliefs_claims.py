"""What a belief about volatility is worth (#43), on random walks whose steps are known.

    switching    steps of spread 0.1 and 1.0 in turns of 60, seen with noise of spread 0.1; 720 observations
    constant     steps of spread 0.5, the same noise

Both are fitted on the first 70 % and judged on the rest. **Prediction:** where steps switch, beliefs of two levels are
less surprised than a Kalman filter by at least 0.05 nats a step, and their volatility tells the two kinds of stretches apart;
where nothing switches they lose at most 0.02. **Refuted** if not, on most seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Bool, Float

from manyheads.brain.belief_forecasts import filter_series
from manyheads.evaluation import Claim, Experiment, register_experiment

TURN, TURNS = 60, 12


@dataclass(frozen=True)
class PlantedWalk:
    """The spread of steps in quiet and in wild stretches."""

    quiet: float
    wild: float


def planted_walk(walk: PlantedWalk, seed: int) -> tuple[Float[np.ndarray, "T"], Bool[np.ndarray, "T"]]:
    """A series, and where its steps are wild."""
    draw = np.random.default_rng(seed)
    wild = np.repeat(np.arange(TURNS) % 2 == 1, TURN)
    steps = draw.normal(size=len(wild)) * np.where(wild, walk.wild, walk.quiet)
    return steps.cumsum() + 0.1 * draw.normal(size=len(wild)), wild


def _run(method: str, walk: PlantedWalk, seed: int) -> Mapping[str, float]:
    series, wild = planted_walk(walk, seed)
    found = filter_series(series, levels=2)
    metrics = {"nats a step": found.scores[method], "error": found.errors[method]}
    if method.startswith("beliefs") and found.volatility is not None:
        late = np.arange(len(series)) >= len(series) - found.held_out
        high, low = found.volatility[late & wild], found.volatility[late & ~wild]
        metrics["volatility tells stretches apart"] = float((high[:, None] > low[None]).mean())
    return metrics


def _data(quick: bool) -> Mapping[str, PlantedWalk]:
    return {"switching": PlantedWalk(0.1, 1.0)} | ({} if quick else {"constant": PlantedWalk(0.5, 0.5)})


_BELIEFS, _KALMAN = "beliefs, 2 levels", "random-walk Kalman"
register_experiment(
    Experiment(
        "beliefs",
        (43,),
        "2410.09206",
        "Is a filter that also believes something about volatility less surprised?",
        datasets=_data,
        methods={name: partial(_run, name) for name in (_KALMAN, _BELIEFS)},
        baseline=_KALMAN,
        claims=(
            Claim(
                "where steps switch it saves at least .05 nats a step",
                lambda v: v[_KALMAN, "nats a step"] - v[_BELIEFS, "nats a step"],
                at_least=0.05,
                on="switching",
            ),
            Claim(
                "its volatility is higher in a wild step than in a quiet one in at least .8 of pairs",
                lambda v: v[_BELIEFS, "volatility tells stretches apart"],
                at_least=0.8,
                on="switching",
            ),
            Claim(
                "where nothing switches it loses at most .02 nats a step",
                lambda v: v[_BELIEFS, "nats a step"] - v[_KALMAN, "nats a step"],
                at_most=0.02,
                on="constant",
            ),
        ),
        minutes=0.3,
        lower=frozenset({"nats a step", "error"}),
        room="brain",
    )
)
