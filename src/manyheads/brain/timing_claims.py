"""What, when and how likely, and learning anew after a change (#31), on planted trials.

Two events 200 and 350 ms after a cue come with probabilities .8 and .3, drawn apart; after 300 trials the probabilities are
swapped, and 150 trials follow. The reservoir, and what comes, are drawn by the seed. Errors are those of the forecast before each
trial, against what came. **Prediction:** ridge reaches a normalised error of .15; by the local rule bumps stand in the ratio of
probabilities (2.1 to 3.3) before the swap, and 100 to 150 trials after it the error is at most 1.1 of what it was in the last 100
trials before, where least squares without forgetting is still at 1.25. **Refuted** if not, on most seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float

from manyheads.brain.reservoir import SpikingReservoir
from manyheads.brain.timing import TimingRule, learn_timing
from manyheads.evaluation import Claim, Experiment, register_experiment

DELAYS = (200.0, 350.0)


@dataclass(frozen=True)
class SwappedEvents:
    """Probabilities before the swap, and trials before and after it."""

    probabilities: tuple[float, float] = (0.8, 0.3)
    before: int = 300
    after: int = 150


def swapped_trials(data: SwappedEvents, seed: int) -> Float[np.ndarray, "R 2"]:
    """When each event came in each trial, ms after the cue; NaN where it did not."""
    draw = np.random.default_rng([seed, 31])
    p = np.repeat([data.probabilities, data.probabilities[::-1]], (data.before, data.after), axis=0)
    return np.where(draw.random(p.shape) < p, np.array(DELAYS), np.nan)


def _run(rule: TimingRule, data: SwappedEvents, seed: int) -> Mapping[str, float]:
    times, reservoir = swapped_trials(data, seed), SpikingReservoir(seed=seed)
    found = learn_timing(times, reservoir=reservoir, rule=rule)
    late = slice(data.before - 100, data.before)
    before = learn_timing(times[: data.before], reservoir=reservoir, rule=rule)
    heights = found.heights[late].mean(0)
    return {
        "height, likely event": float(heights[0]),
        "height, unlikely event": float(heights[1]),
        "ratio of heights": float(heights[0] / heights[1]),
        "ms off": float(np.abs(before.when - DELAYS).mean()),
        "error before": float(found.errors[late].mean()),
        "error after the swap / before": float(found.errors[data.before + 100 :].mean() / found.errors[late].mean()),
        "error of ridge": found.ridge_error,
    }


def _data(quick: bool) -> Mapping[str, SwappedEvents]:
    return {"two events": SwappedEvents()}


_AFTER = "error after the swap / before"
register_experiment(
    Experiment(
        "timing",
        (31,),
        "2510.14382",
        "Does a local rule on a spiking reservoir learn what comes, when, and how likely, and learn it anew?",
        datasets=_data,
        methods={rule: partial(_run, rule) for rule in ("force", "local")},  # type: ignore[arg-type]
        baseline="force",
        claims=(
            Claim(
                "ridge on the traces has a normalised error of at most .15",
                lambda v: v["local", "error of ridge"],
                at_most=0.15,
            ),
            Claim(
                "heights of .8 and .3 stand in a ratio of at least 2.1",
                lambda v: v["local", "ratio of heights"],
                at_least=2.1,
            ),
            Claim("and of at most 3.3", lambda v: v["local", "ratio of heights"], at_most=3.3),
            Claim(
                "100 trials after the swap the local rule's error is at most 1.1 of before",
                lambda v: v["local", _AFTER],
                at_most=1.1,
            ),
            Claim(
                "that of least squares without forgetting is at least 1.25", lambda v: v["force", _AFTER], at_least=1.25
            ),
        ),
        minutes=0.5,
        lower=frozenset({"ms off", "error before", _AFTER, "error of ridge"}),
        room="brain",
    )
)
