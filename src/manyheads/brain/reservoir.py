"""A spiking reservoir (#31): Izhikevich neurons with fixed random weights, whose course after a cue can be timed.

Yamada and Chao, arXiv:2510.14382; neurons as Izhikevich's own program has them. With a step of `dt` ms

    v' = 0.04 v^2 + 5 v + 140 - u + I,   u' = a (b v - u),   at v >= 30 mV: v = c, u += d
    excitatory, r ~ U(0, 1)     a = .02, b = .2, c = -65 + 15 r^2, d = 8 - 6 r^2
    inhibitory                  a = .02 + .08 r, b = .25 - .05 r, c = -65, d = 2
    s' = -s / tau + spikes / tau

Our readings, which the paper leaves open: 400 neurons, 80 % excitatory, each reads 5 % of the others; every trial begins in the
same state, so that the course after the cue is the same and can be timed. Noise, which lets it wander, is an option and
destroys timing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from manyheads.inputs import check_integer, check_number, check_seed

_FLOOR = -90.0  # mV: inhibition moves no neuron below


@dataclass(frozen=True)
class SpikingReservoir:
    """`neurons` of which a share `excitatory`; each reads the share `density` of the others.

    `gain` scales recurrent weights. The cue drives a third of the neurons with `cue` for `cue_ms`; all the time each neuron gets
    a constant current of its own, between 0 and `drive`. `tau` (ms) filters spikes; every trace has its own, from a quarter of
    `tau` to `tau`. `noise` is the spread of a current drawn at each step.
    """

    neurons: int = 400
    excitatory: float = 0.8
    density: float = 0.05
    gain: float = 2.0
    cue: float = 15.0
    cue_ms: float = 50.0
    drive: float = 6.0
    tau: float = 80.0
    noise: float = 0.0
    dt: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_integer(self.neurons, "neurons", 10, 20_000)
        check_seed(self.seed)
        for name, low, high in (
            ("excitatory", 0.0, 1.0),
            ("density", 0.0, 1.0),
            ("gain", 0.0, 1e3),
            ("cue", 0.0, 1e3),
            ("cue_ms", 0.0, 1e5),
            ("drive", 0.0, 1e3),
            ("noise", 0.0, 1e3),
        ):
            check_number(getattr(self, name), name, low=low, high=high)
        check_number(self.tau, "tau", low=1.0, high=1e5)
        check_number(self.dt, "dt", low=0.05, high=1.0)

    def spikes(self, steps: int, *, trial: int = 0) -> Bool[np.ndarray, "T N"]:
        """Which neuron fires when, from the cue on. Without noise all trials are equal."""
        check_integer(steps, "steps", 1, 1_000_000)
        draw = np.random.default_rng(self.seed)
        n = self.neurons
        excites = np.arange(n) < round(self.excitatory * n)
        r = draw.random(n)
        a = np.where(excites, 0.02, 0.02 + 0.08 * r)
        b = np.where(excites, 0.2, 0.25 - 0.05 * r)
        c = np.where(excites, -65 + 15 * r**2, -65)
        d = np.where(excites, 8 - 6 * r**2, 2)
        weights = draw.random((n, n)) * (draw.random((n, n)) < self.density)
        weights *= np.where(excites, 0.5, -1.0)[None] * self.gain * 40 / max(1.0, self.density * n)
        np.fill_diagonal(weights, 0)
        drive = self.drive * draw.random(n)
        cued = np.where(draw.random(n) < 1 / 3, self.cue, 0.0)
        v, u = np.full(n, -65.0), b * -65.0
        fired = np.zeros(n, dtype=bool)
        trail = np.zeros((steps, n), dtype=bool)
        noise = np.random.default_rng([self.seed, trial])
        for t in range(steps):
            current = drive + weights @ fired + (cued if t * self.dt < self.cue_ms else 0.0)
            if self.noise:
                current = current + self.noise * noise.normal(size=n)
            for _ in range(2):  # half steps, for numerical stability, as Izhikevich does
                v = np.minimum(v + 0.5 * self.dt * (0.04 * v * v + 5 * v + 140 - u + current), 30.0)
                v = np.maximum(v, _FLOOR)
            u = u + self.dt * a * (b * v - u)
            fired = v >= 30.0
            v, u = np.where(fired, c, v), np.where(fired, u + d, u)
            trail[t] = fired
        return trail

    def traces(self, steps: int, *, trial: int = 0) -> Float[np.ndarray, "T N"]:
        """Filtered spikes, 1 / ms."""
        spikes = self.spikes(steps, trial=trial)
        taus = self.tau * (0.25 + 0.75 * np.random.default_rng([self.seed, 1]).random(self.neurons))
        keep = np.exp(-self.dt / taus)
        found, s = np.zeros(spikes.shape), np.zeros(self.neurons)
        for t, fired in enumerate(spikes):
            s = keep * s + fired / taus
            found[t] = s
        return found
