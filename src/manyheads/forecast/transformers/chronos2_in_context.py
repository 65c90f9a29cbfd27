"""Does a forecast get better by reading the other series of its group? The answer is in a covariate, its slope in the context.

Each task is y = a x + b + .1 noise over 64 + 16 steps, with x an autoregression (.7) of unit variance that is known ahead, |a| in
[.5, 2.5] of either sign, b from N(0, 1), and another such series that has nothing to do with it. The slope differs from task to
task, so that it can only be had from the context (#52's sheet).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.forecast.core.heads import LEVELS, TARGET, pinball
from manyheads.forecast.transformers.chronos2_model import Chronos2Config, Chronos2Model, row_scale
from manyheads.learning import Attached, MultiHead, Trunk
from manyheads.training import ADAM

CONTEXT, AHEAD, HELD_OUT = 64, 16, 2000


def slope_tasks(n: int, seed: int | tuple[int, ...]) -> Float[Tensor, "N C T"]:
    """Tasks as above: y, x and the other series over context and horizon."""
    rng = np.random.default_rng(seed)
    steps = CONTEXT + AHEAD
    x = np.empty((2, n, steps))
    x[..., 0], noise = rng.normal(size=(2, n)), rng.normal(size=(2, n, steps)) * 0.51**0.5
    for t in range(1, steps):
        x[..., t] = 0.7 * x[..., t - 1] + noise[..., t]
    slope = rng.uniform(0.5, 2.5, (n, 1)) * rng.choice([-1, 1], (n, 1))
    y = slope * x[0] + rng.normal(size=(n, 1)) + 0.1 * rng.normal(size=(n, steps))
    return torch.from_numpy(np.stack([y, *x], 1)).float()


def _batch(tasks: Float[Tensor, "N C T"]) -> tuple[dict[str, Tensor], Float[Tensor, "N 1"], Float[Tensor, "N 1"]]:
    """What the network reads, and mean and standard deviation of y's context."""
    mean, std = (part.view(len(tasks), -1, 1) for part in row_scale(tasks[..., :CONTEXT].flatten(0, 1)))
    scaled = torch.asinh((tasks - mean) / std)
    past, ahead = scaled[..., :CONTEXT], scaled[..., CONTEXT:]
    ones = torch.ones_like(ahead[:, :1])
    batch = {"past_values": past.mT, "future_covariates": ahead[:, 1:].mT, "future": ahead[:, :1], "counted": ones}
    return batch | {"scale": ones[..., 0]}, mean[:, 0], std[:, 0]


def _heads(seed: int, mixes: bool) -> MultiHead:
    config = Chronos2Config(
        48, 16, 3, 192, 3, 8, LEVELS, CONTEXT, AHEAD, CONTEXT, AHEAD, 0.0, initializer_factor=1.0, mixes=mixes
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Chronos2Model(config)
    model.head.settings = replace(model.head.settings, targets=1)
    return MultiHead(Trunk(model, frozen=False), {"quantiles": Attached(model.head, TARGET, pool="tokens")})


@torch.no_grad()
def _measured(heads: MultiHead, seed: int) -> dict[str, float]:
    tasks = slope_tasks(HELD_OUT, (seed, 1 << 20))
    batch, mean, std = _batch(tasks)
    found = torch.sinh(heads(batch)["quantiles"][:, 0]) * std[..., None] + mean[..., None]
    y = tasks[:, 0, CONTEXT:]
    return {
        "mse": float((found[..., len(LEVELS) // 2] - y).square().mean()),
        "wql": float(pinball(y, found, torch.tensor(LEVELS)).mean() / y.abs().mean()),
    }


def _learned(mixes: bool) -> Callable[[int, int], dict[str, float]]:
    def run(steps: int, seed: int) -> dict[str, float]:
        heads = _heads(seed, mixes)
        settings = replace(ADAM, steps=steps, rate=1e-3, warmup=50, decay=0.25, clip=1.0)
        heads.fit(lambda i: _batch(slope_tasks(32, (seed, i)))[0], settings, log_every=steps)
        found = _measured(heads, seed)
        if mixes:  # the same weights, every series by itself
            heads.trunk.module.config.mixes = False
            found |= {f"{name} alone": value for name, value in _measured(heads, seed).items()}
        return found

    return run


register_experiment(
    Experiment(
        "chronos2",
        (52,),
        "2510.15821",
        "Does Chronos-2 learn to read the slope of a covariate from the context of its group?",
        datasets=lambda quick: {"slopes": 40 if quick else 1500},
        methods={"grouped": _learned(True), "alone": _learned(False)},
        baseline="alone",
        claims=(
            Claim(
                "grouped, the squared error is at most .8 of that of the same network with every series by itself",
                lambda v: v["grouped", "mse"] / v["alone", "mse"],
                at_most=0.8,
            ),
            Claim(
                "grouped, so is the weighted quantile loss (reference: .269 to .338)",
                lambda v: v["grouped", "wql"] / v["alone", "wql"],
                at_most=0.8,
            ),
            Claim(
                "the grouped weights with every series by itself are no better than weights that learned so",
                lambda v: v["grouped", "mse alone"] / v["alone", "mse"],
                at_least=1.0,
            ),
        ),
        minutes=6,
        lower=frozenset({"mse", "wql", "mse alone", "wql alone"}),
        room="forecast",
    )
)
