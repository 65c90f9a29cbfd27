"""What VSFormer (#55) should know of planted series: classes that differ in a shape alone, and in a variance alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.representations.classify import ConvolutionRidge, NearestSeries
from manyheads.forecast.representations.vsformer import VSFormer, VSFormerSettings

STEPS, LENGTH, HELD = 128, 20, 200


def class_shapes() -> Float[np.ndarray, "2 m"]:
    """A chirp and itself backwards, of mean 0, deviation 1 and no slope: same statistics, another shape."""
    t = np.linspace(0, 1, LENGTH)
    chirp = np.sin(2 * np.pi * (0.5 * t + 2.5 * t**2))
    chirp -= np.polyval(np.polyfit(t, chirp, 1), t)
    return np.stack([chirp, chirp[::-1]]) / chirp.std()


def planted_motifs(n: int, seed: int, strength: float = 2.0) -> tuple[Float[np.ndarray, "N T C"], Int[np.ndarray, "N"]]:
    """Noise of deviation 1, to which the shape of the class is added at a random place."""
    rng = np.random.default_rng([55, seed])
    y, x = rng.permutation(np.arange(n) % 2), rng.normal(size=(n, STEPS, 1))
    for row, shape, at in zip(x, class_shapes()[y], rng.integers(0, STEPS - LENGTH + 1, n), strict=True):
        row[at : at + LENGTH, 0] += strength * shape
    return x, y


def planted_variances(n: int, seed: int) -> tuple[Float[np.ndarray, "N T C"], Int[np.ndarray, "N"]]:
    """Noise of deviation 1, and of 1.6 in the second quarter (class 0) or the third (class 1)."""
    rng = np.random.default_rng([56, seed])
    y, x = rng.permutation(np.arange(n) % 2), rng.normal(size=(n, STEPS, 1))
    quarter = STEPS // 4
    for row, k in zip(x, y, strict=True):
        row[(1 + k) * quarter : (2 + k) * quarter] *= 1.6
    return x, y


PLANTED: dict[str, Callable[..., Any]] = {"motif": planted_motifs, "variance": planted_variances}


def _tried(make: Callable[[int], Any]) -> Callable[[tuple[str, int], int], dict[str, float]]:
    def run(data: tuple[str, int], seed: int) -> dict[str, float]:
        name, n = data
        model = make(seed).fit(*PLANTED[name](n, seed))
        return {"accuracy": model.score(*PLANTED[name](HELD, 1000 + seed))}

    return run


def _vsformer(**settings: Any) -> Callable[[tuple[str, int], int], dict[str, float]]:
    return _tried(lambda seed: VSFormer(VSFormerSettings(seed=seed, **settings)))


register_experiment(
    Experiment(
        "vsformer",
        (55,),
        "2412.16515",
        "Do shapes, values and priors each know what the others do not?",
        datasets=lambda quick: {name: (name, 24 if quick else 120) for name in PLANTED},
        methods={
            "nearest": _tried(lambda seed: NearestSeries(0.1)),
            "convolutions": _tried(lambda seed: ConvolutionRidge(seed=seed)),
            "vsformer": _vsformer(),
            "shapes alone": _vsformer(branches=("shape",)),
            "values alone": _vsformer(branches=("value",)),
            "no priors": _vsformer(priors="none"),
            "shuffled priors": _vsformer(priors="shuffled"),
        },
        baseline="convolutions",
        claims=(
            Claim(
                "its accuracy on planted motifs is at least .9",
                lambda v: v["vsformer", "accuracy"],
                at_least=0.9,
                on="motif",
            ),
            Claim("and on planted variances", lambda v: v["vsformer", "accuracy"], at_least=0.9, on="variance"),
            Claim(
                "values alone reach at most .7 on motifs",
                lambda v: v["values alone", "accuracy"],
                at_most=0.7,
                on="motif",
            ),
            Claim(
                "shapes alone at most .7 on variances",
                lambda v: v["shapes alone", "accuracy"],
                at_most=0.7,
                on="variance",
            ),
            Claim(
                "priors of shuffled classes give no gain over none (at most .02)",
                lambda v: v["shuffled priors", "accuracy"] - v["no priors", "accuracy"],
                at_most=0.02,
            ),
            Claim(
                "priors of the classes are no worse than none",
                lambda v: v["vsformer", "accuracy"] - v["no priors", "accuracy"],
                at_least=0.0,
            ),
            Claim(
                "it is no worse than a ridge on random convolutions",
                lambda v: v["vsformer", "accuracy"] - v["convolutions", "accuracy"],
                at_least=0.0,
            ),
        ),
        minutes=6,
        room="forecast",
    )
)
