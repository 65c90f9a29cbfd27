"""A product of three learned factors (#45, the toy): why a circuit of parts forms abruptly, and earlier if parts are given.

Singh et al., arXiv:2404.07129. Vectors a, b, c of n numbers learn a rank-one tensor by plain gradient descent,

    loss = 1/2 mean_ijk (a_i b_j c_k - a*_i b*_j c*_k)^2        dimensionless

from unit normal starts; c, or b and c, may be clamped to their true values throughout. A run has learned when its loss is
below a tenth of the *unclamped* run's first loss, so that all conditions have the same target. The gradient needs no tensor:

    d loss / d a = (a |b|^2 |c|^2 - a* (b* . b) (c* . c)) / n^3
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError

FACTORS = "abc"
LEARNED = 0.1


def triple_loss(found: Float[Tensor, "3 ... n"], true: Float[Tensor, "3 ... n"]) -> Float[Tensor, "..."]:
    """The loss above, of the three vectors stacked."""
    own, cross, aim = (_inner(x, y).prod(0) for x, y in ((found, found), (found, true), (true, true)))
    return (own - 2 * cross + aim) / (2 * found.shape[-1] ** 3)


def triple_gradient(found: Float[Tensor, "3 ... n"], true: Float[Tensor, "3 ... n"]) -> Float[Tensor, "3 ... n"]:
    """The gradient of `triple_loss` in `found` (formula above)."""
    own, cross = _inner(found, found), _inner(found, true)
    others = [[j for j in range(3) if j != i] for i in range(3)]
    own_rest, cross_rest = (torch.stack([x[rest].prod(0) for rest in others]) for x in (own, cross))
    return (found * own_rest[..., None] - true * cross_rest[..., None]) / found.shape[-1] ** 3


def triple_product(
    clamped: Collection[str] = "",
    *,
    size: int = 20,
    runs: int = 25,
    steps: int = 2000,
    rate: float = 1.0,
    seed: int = 0,
) -> Float[np.ndarray, "runs steps"]:
    """The loss before each step, of `runs` runs with different truths and starts; the same for every condition of one `seed`.

    Raises:
        InputError: if a clamped factor is none of a, b, c, or a number is not positive.
    """
    if set(clamped) - set(FACTORS):
        raise InputError(f'clamped is {clamped!r}; give some of "a", "b" and "c".')
    if min(size, runs, steps) < 1 or rate <= 0:
        raise InputError(f"got size {size}, {runs} runs, {steps} steps, rate {rate}; give numbers above 0.")
    true, found = torch.randn(2, 3, runs, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    free = torch.tensor([name not in clamped for name in FACTORS])[:, None, None]
    found = torch.where(free, found, true)
    curve = []
    for _ in range(steps):
        curve.append(triple_loss(found, true))
        found = found - rate * free * triple_gradient(found, true)
    return np.asarray(torch.stack(curve, -1))


def steps_to_learn(
    clamped: Collection[str] = "",
    *,
    size: int = 20,
    runs: int = 25,
    steps: int = 2000,
    rate: float = 1.0,
    seed: int = 0,
) -> Int[np.ndarray, " runs"]:
    """Steps until each run has learned; `steps` for one that has not. The ratio of medians is a clamp's speed-up."""
    start = triple_product("", size=size, runs=runs, steps=1, rate=rate, seed=seed)
    learned = triple_product(clamped, size=size, runs=runs, steps=steps, rate=rate, seed=seed) < LEARNED * start
    return np.where(learned.any(1), learned.argmax(1), steps)


def _inner(x: Float[Tensor, "3 ... n"], y: Float[Tensor, "3 ... n"]) -> Float[Tensor, "3 ..."]:
    return (x * y).sum(-1)
