"""What TSPulse (#86) claims, on series of two sines: gaps against interpolation and twins, and which periods a series has."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.forecast.representations.tspulse import TSPulse

PERIODS = (5, 7, 10, 14, 20, 28)
PAIRS = list(combinations(range(len(PERIODS)), 2))
CONTEXT, HELD = 128, 200


def two_sines(n: int, steps: int, seed: int) -> tuple[pd.DataFrame, Int[np.ndarray, "N"]]:
    """Series of two sines with periods of six, at random phases, with noise of .05; and which pair of periods each has."""
    rng = np.random.default_rng(seed)
    pair, phase = rng.integers(len(PAIRS), size=n), rng.random((n, 2, 1))
    period = np.array(PERIODS)[np.array(PAIRS)[pair]][..., None]
    values = np.sin(2 * np.pi * (np.arange(steps) / period + phase)).sum(1) + 0.05 * rng.normal(size=(n, steps))
    frame = {"item_id": np.repeat(np.arange(n), steps), "timestamp": np.tile(np.arange(steps), n)}
    return pd.DataFrame(frame | {"target": values.ravel()}), pair


def precision_at_3(rows: Float[np.ndarray, "N D"], labels: Int[np.ndarray, "N"]) -> float:
    """The share of a row's three nearest others that have its label, by Euclidean distance."""
    far = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    np.fill_diagonal(far, np.inf)
    return float((labels[np.argsort(far, 1)[:, :3]] == labels[:, None]).mean())


def _held(seed: int) -> tuple[pd.DataFrame, Any, Any, Any]:
    """Series that nobody learned from: whole, as rows, under a hybrid mask, with their pairs."""
    frame, pairs = two_sines(HELD, CONTEXT, 1000 + seed)
    hidden = TSPulse(context=CONTEXT).masks((HELD, CONTEXT, 1), torch.Generator().manual_seed(seed))[..., 0].numpy()
    hidden[:, [0, -1]] = False  # so that interpolation has two ends
    return frame, frame["target"].to_numpy().reshape(HELD, CONTEXT), hidden, pairs


def _trained(**settings: Any) -> Callable[[int, int], dict[str, float]]:
    def run(steps: int, seed: int) -> dict[str, float]:
        frame, _ = two_sines(300, CONTEXT + 48, seed)
        model = TSPulse(context=CONTEXT, steps=steps, rows=64, patience=None, seed=seed, **settings)
        model.fit(frame, validation=0)
        held, rows, hidden, pairs = _held(seed)
        filled = model.impute(held.assign(target=held["target"].mask(hidden.ravel())))["target"].to_numpy()
        off = (filled.reshape(rows.shape) - rows)[hidden]
        found = {"mse": float((off**2).mean()), "prec_3": precision_at_3(model.embed(held).to_numpy(), pairs)}
        if model.dual:
            found["signature_prec_3"] = precision_at_3(model.embed(held, by="signature").to_numpy(), pairs)
        return found

    return run


def _plain(steps: int, seed: int) -> dict[str, float]:
    """Linear interpolation of each gap, and series as they are."""
    _, rows, hidden, pairs = _held(seed)
    t = np.arange(CONTEXT)
    filled = np.stack([np.interp(t, t[~gone], row[~gone]) for row, gone in zip(rows, hidden, strict=True)])
    return {"mse": float(((filled - rows)[hidden] ** 2).mean()), "prec_3": precision_at_3(rows, pairs)}


def _spectrum(steps: int, seed: int) -> dict[str, float]:
    """What needs no training: the log magnitudes of the spectrum."""
    _, rows, _, pairs = _held(seed)
    return {"prec_3": precision_at_3(np.log1p(np.abs(np.fft.rfft(rows))), pairs)}


register_experiment(
    Experiment(
        "tspulse",
        (86,),
        "2505.13033",
        "Do a second view and hybrid masks fill gaps better, and do registers know what a series is made of?",
        datasets=lambda quick: {"two sines": 60 if quick else 700},
        methods={
            "plain": _plain,
            "log spectrum": _spectrum,
            "tspulse": _trained(),
            "block masks": _trained(whole_patches=1.0),
            "time alone": _trained(dual=False),
        },
        baseline="plain",
        claims=(
            Claim(
                "its error in gaps is at most .35 of linear interpolation's",
                lambda v: v["tspulse", "mse"] / v["plain", "mse"],
                at_most=0.35,
            ),
            Claim(
                "it is at most .3 of that of a twin that learned from whole patches alone",
                lambda v: v["tspulse", "mse"] / v["block masks", "mse"],
                at_most=0.3,
            ),
            Claim(
                "it is at most .85 of that of a twin without the spectrum",
                lambda v: v["tspulse", "mse"] / v["time alone", "mse"],
                at_most=0.85,
            ),
            Claim("PREC@3 of the registers is at least .8", lambda v: v["tspulse", "prec_3"], at_least=0.8),
            Claim(
                "it is .1 above that of the series as they are",
                lambda v: v["tspulse", "prec_3"] - v["plain", "prec_3"],
                at_least=0.1,
            ),
            Claim(
                "PREC@3 of the signature, which is read off the registers, is at least .8",
                lambda v: v["tspulse", "signature_prec_3"],
                at_least=0.8,
            ),
            Claim(
                "and at least that of the log spectrum, which needs no training",
                lambda v: v["tspulse", "signature_prec_3"] - v["log spectrum", "prec_3"],
                at_least=0.0,
            ),
        ),
        minutes=8,
        lower=frozenset({"mse"}),
        room="forecast",
    )
)
