"""A series filtered through a network of beliefs, with the forecasts that could embarrass it beside (#43).

Numbers are fitted on the first part of the series; every method then forecasts the rest one step ahead, and is judged by the
surprise of what came: nats a step, lower is better.

    continuous    beliefs of 2 or 3 levels; a Kalman filter of a random walk (the same filter, no belief about volatility); the
                  last value, with the spread of past steps
    binary        beliefs of 2 or 3 levels; Rescorla and Wagner's rule p += a (u - p) with a fitted; the share of ones so far

A continuous series is shifted to begin at 0 and divided by the size of its steps in the first part, so that networks of the
same numbers suit series of any unit; what is returned is in the series' own unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from manyheads.brain.belief_fitting import fit_beliefs
from manyheads.brain.beliefs import Beliefs, filter_beliefs
from manyheads.brain.network import BeliefNetwork, BeliefUpdate, binary_beliefs, continuous_beliefs
from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_number
from manyheads.progress import Bar
from manyheads.report import Reported

FEWEST = 20  # observations on either side
LARGEST_VALUE = 1e100  # of a series: squares stay finite
NINE_TENTHS = 1.6448536269514722  # standard deviations to either side hold nine tenths of a normal variable


@dataclass(frozen=True)
class FilteredSeries(Reported):
    """One series: `expected` `[T]` is what was forecast, `low` and `high` where nine of ten values were expected, `state` and
    `state_sd` the belief after each observation (of a binary series log-odds), `volatility` that about the logarithm of the
    variance gained a step, or None for two levels of a binary series. `scores` are nats a step over `held_out` last steps, by
    method; `errors` mean absolute errors, in the series' unit. `network` is what was used, for the scaled series.
    """

    name: str
    kind: Literal["binary", "continuous"]
    values: Float[np.ndarray, "T"]
    expected: Float[np.ndarray, "T"]
    low: Float[np.ndarray, "T"]
    high: Float[np.ndarray, "T"]
    state: Float[np.ndarray, "T"]
    state_sd: Float[np.ndarray, "T"]
    volatility: Float[np.ndarray, "T"] | None
    surprise: Float[np.ndarray, "T"]
    scores: dict[str, float]
    errors: dict[str, float]
    held_out: int
    network: BeliefNetwork


def filter_series(
    values: Any,
    *,
    name: str = "u",
    kind: Literal["binary", "continuous"] = "continuous",
    levels: int = 2,
    fit: bool = True,
    update: BeliefUpdate = "unbounded",
    gaps: Any = None,
    held_out: float = 0.3,
    bar: Bar = Bar(),
) -> FilteredSeries:
    """Filter a series `[T]` (NaN: missing) and judge it on its last part, `held_out` of all steps, beside the baselines.

    Without `fit` the network keeps the usual numbers (omega -3); baselines are always fitted. `InputError` for a series of fewer
    than twenty observations on either side, one without any change, and what `filter_beliefs` refuses.
    """
    check_choice(kind, "kind", ("binary", "continuous"))
    check_number(held_out, "held_out", low=0.05, high=0.9)
    try:
        u = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError(f"{name!r} is not a series of numbers; choose another column.") from None
    if u.ndim != 1:
        raise InputError(f"the series has the shape {u.shape}; give one series [T].")
    cut = len(u) - max(1, round(held_out * len(u)))
    seen = ~np.isnan(u)
    if (np.abs(u[seen]) > LARGEST_VALUE).any():
        raise InputError(f"{name!r} holds values beyond {LARGEST_VALUE:g}; mend or scale them.")
    if seen[:cut].sum() < FEWEST or seen[cut:].sum() < FEWEST:
        raise InputError(
            f"{name!r} has {seen[:cut].sum()} observations to learn from and {seen[cut:].sum()} to be judged on; "
            f"give at least {FEWEST} of each."
        )
    shift, scale = (0.0, 1.0) if kind == "binary" else _unit(u[:cut], name)
    scaled = (u - shift) / scale
    time = np.ones(len(u)) if gaps is None else np.asarray(gaps, dtype=np.float64)
    if time.shape != u.shape:
        raise InputError(f"there are {time.size} gaps and {len(u)} steps; give one a step.")
    network = _network(kind, levels, update)

    def run(one: BeliefNetwork, fitted: bool) -> tuple[BeliefNetwork, Beliefs]:
        done = fit_beliefs(one, scaled[:cut], gaps=time[:cut], bar=bar).fitted if fitted else one
        return done, filter_beliefs(done, scaled, gaps=time)

    network, found = run(network, fit)
    label = f"beliefs, {levels} levels"
    forecasts = {label: (found.of("u", "expected_mean")[0].numpy(), found.predictive[0].numpy())}
    if kind == "continuous":
        _, kalman = run(continuous_beliefs(1, omega=-1.0, precision=10.0), True)
        forecasts["random-walk Kalman"] = kalman.of("u", "expected_mean")[0].numpy(), kalman.predictive[0].numpy()
        forecasts["last value"] = _last_value(scaled, time, cut)
    else:
        forecasts["Rescorla-Wagner"] = _rescorla_wagner(u, cut)
        forecasts["share of ones"] = _share_of_ones(u)
    judged = seen & (np.arange(len(u)) >= cut)
    scores = {one: float(s[judged].mean() + math.log(scale)) for one, (_, s) in forecasts.items()}
    errors = {one: float(np.abs(u - (e * scale + shift))[judged].mean()) for one, (e, _) in forecasts.items()}
    first = "x1" if kind == "continuous" else "x2"
    expected = forecasts[label][0] * scale + shift
    if kind == "continuous":
        variance = 1 / found.of(first, "expected_precision")[0] + 1 / found.of("u", "expected_precision")[0]
        half = NINE_TENTHS * variance.sqrt().numpy() * scale
        low, high = expected - half, expected + half
    else:
        mean = found.of(first, "expected_mean")[0]
        spread = NINE_TENTHS * found.of(first, "expected_precision")[0] ** -0.5
        low, high = torch.sigmoid(mean - spread).numpy(), torch.sigmoid(mean + spread).numpy()
    volatility = _volatility(network, found, first)
    return FilteredSeries(
        name,
        kind,
        u,
        expected,
        low,
        high,
        found.of(first)[0].numpy() * scale + shift,
        found.of(first, "precision")[0].numpy() ** -0.5 * scale,
        None if volatility is None else volatility + 2 * math.log(scale),
        found.predictive[0].numpy() + math.log(scale) * seen,
        scores,
        errors,
        len(u) - cut,
        network,
    )


def _network(kind: str, levels: int, update: BeliefUpdate) -> BeliefNetwork:
    if levels not in (2, 3):
        raise InputError(f"levels are {levels}; give 2 or 3.")
    if kind == "binary":
        return binary_beliefs(levels, update=update)
    return continuous_beliefs(levels, omega=-3.0, precision=10.0, update=update).replaced({"omega x1": -1.0})


def _unit(u: Float[np.ndarray, "T"], name: str) -> tuple[float, float]:
    """The first value, and the root mean square of steps."""
    known = u[~np.isnan(u)]
    spread = float(np.sqrt((np.diff(known) ** 2).mean()))
    if spread == 0:
        raise InputError(f"{name!r} does not change in its first {len(u)} steps, so nothing can be learned of it.")
    return float(known[0]), spread


def _volatility(network: BeliefNetwork, found: Beliefs, first: str) -> Float[np.ndarray, "T"] | None:
    """The logarithm of the variance gained a step: omega + kappa mu of the volatility parent."""
    up = network.edges_up(first, "volatility")
    if not up:
        return None
    return network[first].omega + up[0].strength * found.of(up[0].parent)[0].numpy()


_Forecast = tuple[Float[np.ndarray, "T"], Float[np.ndarray, "T"]]


def _last_value(u: Float[np.ndarray, "T"], gaps: Float[np.ndarray, "T"], cut: int) -> _Forecast:
    """The last value that was seen, with a variance that grows with the time since, as in the first part."""
    expected, since, last, passed = np.zeros(len(u)), np.zeros(len(u)), 0.0, 0.0
    for t, value in enumerate(u):
        passed += gaps[t]
        expected[t], since[t] = last, passed
        if not np.isnan(value):
            last, passed = value, 0.0
    inside = (np.arange(len(u)) < cut) & ~np.isnan(u)
    inside[0] = False
    variance = since * np.mean((u - expected)[inside] ** 2 / since[inside])
    return expected, 0.5 * (math.log(2 * math.pi) + np.log(variance) + (u - expected) ** 2 / variance)


def _rescorla_wagner(u: Float[np.ndarray, "T"], cut: int) -> _Forecast:
    """The rate is the best of two hundred on the first part."""
    rates = np.linspace(0.0025, 0.5, 200)
    p, trail = np.full(len(rates), 0.5), []
    for value in u:
        trail.append(p)
        p = p if np.isnan(value) else p + rates * (value - p)
    every = np.clip(np.array(trail), 1e-6, 1 - 1e-6)
    surprise = _binary_surprise(u[:, None], every)
    best = int(np.nanmean(surprise[:cut], 0).argmin())
    return every[:, best], surprise[:, best]


def _share_of_ones(u: Float[np.ndarray, "T"]) -> _Forecast:
    """One of each is counted before the first."""
    seen, ones = np.cumsum(~np.isnan(u)), np.cumsum(np.nan_to_num(u))
    p = np.concatenate([[0.5], (ones[:-1] + 1) / (seen[:-1] + 2)])
    return p, _binary_surprise(u, p)


def _binary_surprise(u: Float[np.ndarray, "..."], p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return -np.log(np.where(u == 1, p, 1 - p)) + 0 * u  # NaN where nothing was seen
