"""A field of two halves (#58): waves that are known from the past, and noise. CogDPM beside uniform guidance and persistence."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.fields.cogdpm import PAPER, CogDPM
from manyheads.forecast.fields.planted_fields import smooth_noise

SIZE, TRAINED, TESTED = (8, 16), 600, 18


def two_regions(seed: int, length: int) -> Float[np.ndarray, "T 1 I J"]:
    """West: three waves that go east, each at a speed of its own. East: smooth noise, new at each step. Both of variance 1."""
    rng = np.random.default_rng([58, seed])
    half, t = SIZE[1] // 2, np.arange(length)[:, None, None]
    row, column = np.arange(SIZE[0])[:, None], np.arange(half)
    west = np.zeros((length, SIZE[0], half))
    for k, turns in enumerate((0.031, 0.047, 0.083), 1):
        phase = rng.uniform(0, 2 * np.pi)
        west += np.sqrt(2 / 3) * np.sin(2 * np.pi * (k * column / half + (k - 2) * row / SIZE[0] - turns * t) + phase)
    east = smooth_noise(rng, length, (SIZE[0], half), 1.0)
    return np.concatenate([west, east], -1)[:, None].astype(np.float32)


@cache
def _trained(steps: int, seed: int) -> CogDPM:
    """Learned once for both ways to guide."""
    return CogDPM(steps=steps, seed=seed).fit(two_regions(seed, TRAINED + TESTED)[:TRAINED])


def _learned(*, uniform: bool) -> Callable[[int, int], dict[str, float]]:
    def run(steps: int, seed: int) -> dict[str, float]:
        values = two_regions(seed, TRAINED + TESTED)
        made = _trained(steps, seed)
        made.uniform = uniform  # it changes how samples are drawn, not what was learned
        test = values[TRAINED:]
        row = made.skill(test, start=TRAINED, changes=made.training_changes(values[:TRAINED]), seed=seed).iloc[0]
        half, u = SIZE[1] // 2, []
        for i in range(0, 16, 5):
            u.append(made.predict_with_uncertainty(history=test[i : i + 2], start=TRAINED + i)[1])
        ratio = np.mean(u, 0)[..., half:].mean() / np.mean(u, 0)[..., :half].mean()
        return {name: float(row[name]) for name in ("crps", "persistence", "rmse", "rank")} | {"ratio": float(ratio)}

    return run


register_experiment(
    Experiment(
        "cogdpm",
        (58,),
        PAPER,
        "Does diffusion know where it does not know, and does guidance by that help?",
        datasets=lambda quick: {"two regions": 20 if quick else 300},
        methods={"uniform guidance": _learned(uniform=True), "cogdpm": _learned(uniform=False)},
        baseline="uniform guidance",
        claims=(
            Claim(
                "U of the noisy half is at least twice that of the known half",
                lambda v: v["cogdpm", "ratio"],
                at_least=2.0,
            ),
            Claim(
                "U and the squared error have a rank correlation of at least .4",
                lambda v: v["cogdpm", "rank"],
                at_least=0.4,
            ),
            Claim(
                "its CRPS is no worse than with uniform guidance",
                lambda v: v["cogdpm", "crps"] / v["uniform guidance", "crps"],
                at_most=1.0,
            ),
            Claim(
                "nor than that of persistence with the spread of its residuals (ours)",
                lambda v: v["cogdpm", "crps"] / v["cogdpm", "persistence"],
                at_most=1.0,
            ),
        ),
        minutes=3,
        lower=frozenset({"crps", "persistence", "rmse"}),
        room="forecast",
    )
)
