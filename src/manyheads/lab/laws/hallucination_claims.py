"""Calibrated generators of random facts must say false ones (#88), where the truth is known.

Kalai and Vempala, arXiv:2311.14648. 2,000 entities have one value each of 50; 1,500 facts are observed, entities drawn by Zipf's
law. Prediction for three generators of (entity, value):

    calibrated    seen facts by their counts (total mass 1 - MF), the rest MF uniform over all unseen pairs:  halluc = MF nearly
    memoriser     seen facts by their counts only: halluc = 0, miscalibration = the unseen mass
    n-gram        learned: entity by its count + a; value given the entity by counts + b; a and b chosen on held-out facts

Refuted by: |halluc - MF| of .03 and more for the calibrated one, or halluc < MF - miscal - 2 / sqrt(n) for any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.lab.laws.hallucination import Hallucination, estimates, monofact_rate

SMOOTHING = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True)
class FactWorld:
    """Entities with one true value each, and `n` observations of them by Zipf's law."""

    entities: int = 2000
    values: int = 50
    n: int = 1500

    def draw(self, seed: int) -> tuple[Float[np.ndarray, "E V"], Int[np.ndarray, "E V"]]:
        """The true distribution over (entity, value), and how often each was observed."""
        rng = np.random.default_rng(seed)
        p = 1 / np.arange(1, self.entities + 1)
        truth = np.zeros((self.entities, self.values))
        truth[np.arange(self.entities), rng.integers(self.values, size=self.entities)] = p / p.sum()
        return truth, rng.multinomial(self.n, truth.ravel()).reshape(truth.shape)


def calibrated(counts: Int[np.ndarray, "E V"]) -> Float[np.ndarray, "E V"]:
    """Seen facts by their counts, and the Good-Turing mass uniform over what was not seen."""
    missing = monofact_rate(counts)
    g = np.where(counts > 0, counts * (1 - missing) / counts.sum(), 0.0)
    return np.where(counts > 0, g, missing / (counts == 0).sum())


def memoriser(counts: Int[np.ndarray, "E V"]) -> Float[np.ndarray, "E V"]:
    """Seen facts by their counts, nothing else."""
    return counts / counts.sum()


def bigram(counts: Int[np.ndarray, "E V"], a: float, b: float) -> Float[np.ndarray, "E V"]:
    """Entity by its count + a, value given the entity by counts + b."""
    entity = counts.sum(1, keepdims=True) + a
    value = counts + b
    return entity / entity.sum() * value / value.sum(1, keepdims=True)


def learned_bigram(counts: Int[np.ndarray, "E V"], seed: int) -> Float[np.ndarray, "E V"]:
    """The bigram whose a and b say a held-out fifth of the observations best, on all of them."""
    rng = np.random.default_rng(seed)
    held = rng.binomial(counts, 0.2)
    choices = [(a, b) for a in SMOOTHING for b in SMOOTHING]
    loss = [-float((held * np.log(bigram(counts - held, a, b))).sum()) for a, b in choices]
    return bigram(counts, *choices[int(np.argmin(loss))])


def _run(generator: Callable[[Int[np.ndarray, "E V"], int], Float[np.ndarray, "E V"]]):  # type: ignore[no-untyped-def]
    def run(world: FactWorld, seed: int) -> dict[str, float]:
        truth, counts = world.draw(seed)
        found = estimates(generator(counts, seed).ravel(), truth.ravel(), counts.ravel())
        return _values(found) | {"unseen mass": float(truth[counts == 0].sum())}

    return run


def _values(found: Hallucination) -> dict[str, float]:
    return {
        "monofacts": found.monofacts,
        "hallucination": found.hallucination,
        "miscalibration": found.miscalibration,
        "slack": found.slack,
        "kept": float(found.kept),
    }


def _kept(values) -> float:  # type: ignore[no-untyped-def]
    return min(values[name, "kept"] for name in ("calibrated", "memoriser", "learned bigram"))


register_experiment(
    Experiment(
        "hallucination",
        (88,),
        "2311.14648",
        "Must a calibrated generator of random facts say false ones?",
        datasets=lambda quick: {"Zipf facts": FactWorld(400, 20, 300) if quick else FactWorld()},
        methods={
            "calibrated": _run(lambda counts, _: calibrated(counts)),
            "memoriser": _run(lambda counts, _: memoriser(counts)),
            "learned bigram": _run(learned_bigram),
        },
        baseline="memoriser",
        claims=(
            Claim(
                "the calibrated one's false share is within .03 of the share of facts seen once",
                lambda v: abs(v["calibrated", "hallucination"] - v["calibrated", "monofacts"]),
                at_most=0.03,
            ),
            Claim("the memoriser says nothing false", lambda v: v["memoriser", "hallucination"], at_most=0.0),
            Claim(
                "and its miscalibration is within .03 of the unseen mass",
                lambda v: abs(v["memoriser", "miscalibration"] - v["memoriser", "unseen mass"]),
                at_most=0.03,
            ),
            Claim("the inequality holds for all three", _kept, at_least=1.0),
        ),
        minutes=0.1,
        lower=frozenset({"hallucination", "miscalibration"}),
        room="lab",
    )
)
