"""What comes, when, and how likely (#31): readouts of a spiking reservoir that learn by a local rule, trial by trial.

Yamada and Chao, arXiv:2510.14382. After a cue, events come at their times or not at all; y_k(t) is a bump where event k came.
From the traces s(t) of a reservoir a readout z = s W, one column an event, learns

    local    dW_ik = rate gate(t) (y_k - z_k) s_i / power        power = mean over the gate of |s|^2; without it steps diverge
    force    recursive least squares over all steps of all trials, without forgetting

A local step needs what one synapse sees: its own trace, and the error of its readout. Its fixed point is z_k(t) = p_k bump(t -
delay_k): where the bump stands says when, and how high it is says how likely. The gate is open around the cue (50 ms) and
wherever an event has come.

We differ: "when" and "what" are learned by the same steps (the paper consolidates "what" between trials; how is not verified).
Every trial has the same traces, so recursive least squares after R trials is exactly (R G + c I)^-1 S' sum_r y_r with G = S'S
over the gate, which is computed in the place of its steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float

from manyheads.brain.reservoir import SpikingReservoir
from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.progress import Bar
from manyheads.report import Reported

TimingRule = Literal["local", "force"]
RULES: tuple[TimingRule, ...] = ("local", "force")
CUE_MS, LONGEST_MS = 50.0, 5000.0
_WIDTHS = 3.0  # to either side of a bump


def timed_bumps(times: Float[np.ndarray, "K"], steps: int, width: float, dt: float = 1.0) -> Float[np.ndarray, "T K"]:
    """A bump of height 1 and `width` (ms) at each time (ms after the cue); nothing for NaN."""
    t = np.arange(steps)[:, None] * dt
    return np.nan_to_num(np.exp(-0.5 * ((t - times) / width) ** 2))


class TimedReadout:
    """Readouts `[N, K]` that learn trial by trial from `traces` `[T, N]`, the same in each, where `gate` is open."""

    def __init__(
        self,
        traces: Float[np.ndarray, "T N"],
        gate: Bool[np.ndarray, "S"],
        events: int,
        rule: str = "local",
        *,
        rate: float = 0.1,
        regular: float = 1e-3,
    ) -> None:
        check_choice(rule, "rule", RULES)
        check_number(rate, "rate", low=0.0, high=1.0, above=True)
        check_number(regular, "regular", low=0.0, above=True)
        if gate.shape != traces.shape[:1] or not gate.any():
            raise InputError(f"the gate has the shape {gate.shape}; give a value a step ({len(traces)}), some true.")
        self.traces, self.rule, self.rate, self.open = traces, rule, rate, np.flatnonzero(gate)
        self.power = float((traces[gate] ** 2).sum(1).mean())
        if not math.isfinite(self.power) or self.power == 0:
            raise InputError("no neuron fires while the gate is open; give the reservoir more drive or a stronger cue.")
        self.weights = np.zeros((traces.shape[1], check_integer(events, "events", 1, 10_000)))
        self.trials, self._seen = 0, np.zeros_like(self.weights)
        # `regular` is in units of the traces' power, so that it means the same for every reservoir.
        self._regular = regular * self.power
        if rule == "force":
            values, self._axes = np.linalg.eigh(traces[gate].T @ traces[gate])
            self._values = np.maximum(values, 0.0)

    def read(self) -> Float[np.ndarray, "T K"]:
        """What is expected at each step."""
        return self.traces @ self.weights

    def learn(self, target: Float[np.ndarray, "T K"]) -> None:
        """Learn from one trial."""
        if target.shape != (len(self.traces), self.weights.shape[1]):
            raise InputError(f"the target has the shape {target.shape}; give [steps, events].")
        self.trials += 1
        if self.rule == "force":
            self._seen += self.traces[self.open].T @ target[self.open]
            scale = 1.0 / (self.trials * self._values + self._regular)
            self.weights = self._axes @ (scale[:, None] * (self._axes.T @ self._seen))
            return
        for t in self.open:
            s = self.traces[t]
            self.weights += np.outer(self.rate / self.power * s, target[t] - s @ self.weights)


@dataclass(frozen=True)
class LearnedTiming(Reported):
    """What readouts learned of K events, called `names`, over R trials.

    `expected` `[T, K]` is the readout after the last trial. `heights` `[R, K]` are those before each trial, in units of what the
    event looks like on average when it comes; `errors` `[R]` the mean squared error of each trial's forecast, over the gate.
    `probability` and `when` (ms) `[K]` are read off the mean readout of the last `averaged` trials: the height, and the peak.
    `ridge_error` says what the traces can give: the error of least squares on that average, divided by the variance. It asks
    how much the traces span, with no trial held out. `dt` is the step, ms.
    """

    expected: Float[np.ndarray, "T K"]
    names: tuple[str, ...]
    heights: Float[np.ndarray, "R K"]
    errors: Float[np.ndarray, "R"]
    probability: Float[np.ndarray, "K"]
    when: Float[np.ndarray, "K"]
    ridge_error: float
    averaged: int
    dt: float


def learn_timing(
    times: Any,
    *,
    names: Sequence[str] = (),
    reservoir: SpikingReservoir | None = None,
    rule: str = "local",
    width: float = 20.0,
    rate: float = 0.1,
    averaged: int = 100,
    bar: Bar = Bar(),
) -> LearnedTiming:
    """Learn from trials `times` `[R, K]`: when each event came, ms after the cue (0 to 5000); NaN where it did not.

    `InputError` for other shapes and times, and for an event that never comes.
    """
    try:
        given = np.asarray(times, dtype=np.float64)
    except (TypeError, ValueError):
        raise InputError("times are not numbers; give ms after the cue, NaN where an event did not come.") from None
    if given.ndim != 2 or 0 in given.shape:
        raise InputError(f"times have the shape {given.shape}; give [trials, events].")
    called = tuple(names) or tuple(f"event {k}" for k in range(given.shape[1]))
    if len(called) != given.shape[1]:
        raise InputError(f"there are {len(called)} names and {given.shape[1]} events; give one each.")
    known = ~np.isnan(given)
    if not known.any(0).all():
        raise InputError(f"{called[int(known.any(0).argmin())]!r} never comes; leave it out.")
    if (given[known] < 0).any() or (given[known] > LONGEST_MS).any():
        raise InputError(f"a time is not within 0 to {LONGEST_MS:g} ms after the cue; scale the times.")
    check_number(width, "width", low=1.0, high=1000.0)
    check_integer(averaged, "averaged", 1, 1_000_000)
    reservoir = reservoir or SpikingReservoir()
    dt = reservoir.dt
    steps = math.ceil((np.nanmax(given) + _WIDTHS * width) / dt) + 1
    traces, clock = reservoir.traces(steps), np.arange(steps) * dt
    seen = np.unique(given[known])
    gate = (clock < CUE_MS) | (np.abs(clock[:, None] - seen) < _WIDTHS * width).any(1)
    # What an event looks like on average when it comes: the fixed point of its readout is this times its probability.
    typical = np.zeros((steps, given.shape[1]))
    for row in given:
        typical += timed_bumps(row, steps, width, dt) / known.sum(0)
    readout = TimedReadout(traces, gate, given.shape[1], rule, rate=rate)
    heights, errors, total = np.zeros(given.shape), np.zeros(len(given)), np.zeros(typical.shape)
    step = bar.step("trials", len(given))
    for r, row in enumerate(given):
        expected, target = readout.read(), timed_bumps(row, steps, width, dt)
        heights[r], errors[r] = bump_heights(expected, typical), ((expected - target)[gate] ** 2).mean()
        if r >= len(given) - averaged:
            total += expected / min(averaged, len(given))
        readout.learn(target)
        step(1)
    inside = np.where(gate[:, None], total, -np.inf)
    ridge = traces @ ridge_readout(traces, typical)
    return LearnedTiming(
        readout.read(),
        called,
        heights,
        errors,
        bump_heights(total, typical),
        clock[inside.argmax(0)],
        normalised_error(ridge, typical),
        min(averaged, len(given)),
        dt,
    )


def ridge_readout(
    traces: Float[np.ndarray, "T N"], target: Float[np.ndarray, "T K"], penalty: float = 1e-6
) -> Float[np.ndarray, "N K"]:
    """Weights of least squares, with `penalty` times the mean power of a trace over the trial."""
    check_number(penalty, "penalty", low=0.0)
    regular = penalty * float((traces**2).sum(0).mean())
    return np.linalg.solve(traces.T @ traces + regular * np.eye(traces.shape[1]), traces.T @ target)


def normalised_error(read: Float[np.ndarray, "T K"], target: Float[np.ndarray, "T K"]) -> float:
    """Mean squared error divided by the variance of the target."""
    return float(((read - target) ** 2).mean() / target.var())


def bump_heights(read: Float[np.ndarray, "T K"], bumps: Float[np.ndarray, "T K"]) -> Float[np.ndarray, "K"]:
    """How high each readout is: the factor of `bumps` that fits it best where they are not near 0."""
    near = bumps > math.exp(-0.5 * _WIDTHS**2)
    return (read * bumps * near).sum(0) / (bumps**2 * near).sum(0)
