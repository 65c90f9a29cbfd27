"""What AutoTCL (#29) should know: which part of a series informs, and series that go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from manyheads.data.series import series_frame
from manyheads.evaluation.experiment import Claim, Experiment, Values, register_experiment
from manyheads.forecast.representations.autotcl import AutoTCL, AutoTCLClassifier, AutoTCLSettings
from manyheads.forecast.representations.classify import RawRidge, RidgeProbe

STEPS, CLASSES, HELD = 128, 4, 200
CONTEXT, AHEAD = 64, 12
REAL = ("elnino", "co2")


def informative_quarter(
    n: int, seed: int
) -> tuple[Float[np.ndarray, "N T C"], Int[np.ndarray, "N"], Bool[np.ndarray, "N T"]]:
    """Noise of deviation .5; in one quarter, anywhere, a wave of the class: 2, 3, 4 or 5 turns. And where that is."""
    rng, m = np.random.default_rng([29, seed]), STEPS // 4
    y, x, inside = (
        rng.permutation(np.arange(n) % CLASSES),
        0.5 * rng.normal(size=(n, STEPS, 1)),
        np.zeros((n, STEPS), bool),
    )
    for i, at in enumerate(rng.integers(0, STEPS - m + 1, n)):
        wave = np.sin(2 * np.pi * ((2 + y[i]) * np.arange(m) / m + rng.random()))
        x[i, at : at + m, 0] += 1.5 * wave
        inside[i, at : at + m] = True
    return x, y, inside


def windows_ahead(values: Float[np.ndarray, "T C"], first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows [N, CONTEXT, C] and the AHEAD steps after each, [N, AHEAD x C], both less the last step of the window."""
    cuts = range(first + CONTEXT, end - AHEAD + 1)
    last = [values[t - 1] for t in cuts]
    x = np.stack([values[t - CONTEXT : t] - at for t, at in zip(cuts, last, strict=True)])
    y = np.stack([(values[t : t + AHEAD] - at).ravel() for t, at in zip(cuts, last, strict=True)])
    return x.astype(np.float32), y


def forecast_error(values: Float[np.ndarray, "T C"], settings: AutoTCLSettings | None) -> float:
    """Mean squared error on the last 30 %, over that of repeating the last value; None: a ridge on the windows themselves."""
    cut = int(0.7 * len(values))
    (x, y), (held, truth) = windows_ahead(values, 0, cut), windows_ahead(values, cut - CONTEXT, len(values))
    if settings is None:
        rows = [torch.from_numpy(part.reshape(len(part), -1)) for part in (x, held)]
    else:
        model = AutoTCL(settings).fit(x)
        rows = [torch.from_numpy(model.embed(part, pool="last")) for part in (x, held)]
    said = RidgeProbe().fit(rows[0], torch.from_numpy(y)).predict(rows[1]).numpy()
    return float(((said - truth) ** 2).mean() / (truth**2).mean())


def _series(name: str) -> Float[np.ndarray, "T C"]:
    values: Float[np.ndarray, "T"] = series_frame(name)["target"].interpolate().to_numpy()
    return values[:, None]


def _tried(made: Callable[[int], AutoTCLSettings] | None) -> Callable[[tuple[str, int], int], dict[str, float]]:
    def run(data: tuple[str, int], seed: int) -> dict[str, float]:
        name, n = data
        settings = None if made is None else made(seed)
        if name in REAL:
            return {"mse": forecast_error(_series(name)[-n:], settings)}
        x, y, _ = informative_quarter(n, seed)
        held, truth, inside = informative_quarter(HELD, 1000 + seed)
        model = RawRidge() if settings is None else AutoTCLClassifier(settings)
        found = {"accuracy": model.fit(x, y).score(held, truth)}
        if (
            isinstance(model, AutoTCLClassifier)
            and settings is not None
            and settings.steps
            and settings.augmenter == "learned"
        ):
            mask = model.model.mask(held)
            found |= {"inside_over_outside": float(mask[inside].mean() / mask[~inside].mean())}
            found |= {"near_1": float((mask > 0.9).mean()), "kept": float(mask.mean())}
        return found

    return run


def _settings(**changed: Any) -> Callable[[int], AutoTCLSettings]:
    return lambda seed: AutoTCLSettings(seed=seed, **changed)


def _over(other: str) -> Callable[[Values], float]:
    return lambda v: v["autotcl", "mse"] / v[other, "mse"]


register_experiment(
    Experiment(
        "autotcl",
        (29,),
        "2402.10434",
        "Does a learned augmentation find what informs, and are the representations better for it?",
        datasets=lambda quick: (
            {"quarter": ("quarter", 48 if quick else 240)} | {name: (name, 300 if quick else 3000) for name in REAL}
        ),
        methods={
            "raw ridge": _tried(None),
            "untrained": _tried(_settings(steps=0)),
            "fixed augmentation": _tried(_settings(augmenter="fixed")),
            "autotcl": _tried(_settings()),
            "bounded gates": _tried(_settings(gate="bounded")),
        },
        baseline="untrained",
        claims=(
            Claim(
                "the mean gate inside of what informs is at least 1.5 times that outside",
                lambda v: v["autotcl", "inside_over_outside"],
                at_least=1.5,
                on="quarter",
            ),
            Claim(
                "at least .05 of all gates are near 1", lambda v: v["autotcl", "near_1"], at_least=0.05, on="quarter"
            ),
            Claim("and at most .95", lambda v: v["autotcl", "near_1"], at_most=0.95, on="quarter"),
            *(
                Claim(
                    f"its squared error on {name} is at most that {of}",
                    _over(other),
                    at_most=1.0,
                    on=name,
                )
                for name in REAL
                for other, of in (
                    ("untrained", "of the encoder as drawn"),
                    ("fixed augmentation", "after a fixed augmentation"),
                    ("raw ridge", "of a ridge on the windows"),
                )
            ),
        ),
        minutes=8,
        lower=frozenset({"mse"}),
        room="forecast",
    )
)
