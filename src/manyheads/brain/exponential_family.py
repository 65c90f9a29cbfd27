"""Exponential-family nodes (#43): beliefs about a distribution, kept as expected sufficient statistics.

Mathys and Weber's update, as in Legrand et al., arXiv:2410.09206. With T(u) the sufficient statistics of an observation,

    xi <- xi + (T(u) - xi) / (1 + nu)

`nu` counts how many observations the belief is worth: large, and it moves slowly. Fixed, or implied by a network of beliefs that
tracks each statistic: there the change of what is expected is the error times pi_leaf / pi, so

    nu = mean over statistics of pi / pi_leaf

the ratio of error to change of expectation, which stays finite where the error is 0. In pyhgf 0.2.12 the nodes that hold the
statistics also add to what they held before, so its implied nu is another one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.brain.beliefs import checked_series, run_filter
from manyheads.brain.network import BeliefNetwork, continuous_beliefs
from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_number

Family = Literal["normal", "bernoulli", "poisson", "exponential"]
_STATISTICS: dict[str, tuple[Callable[[Tensor], list[Tensor]], tuple[float, ...]]] = {
    "normal": (lambda u: [u, u * u], (0.0, 1.0)),
    "bernoulli": (lambda u: [u], (0.5,)),
    "poisson": (lambda u: [u], (1.0,)),
    "exponential": (lambda u: [u], (1.0,)),
}


def track_statistics(
    values: Any, family: Family = "normal", *, nu: float | None = 3.0, tracker: BeliefNetwork | None = None
) -> Float[Tensor, "B T S"]:
    """Expected sufficient statistics after each observation of series `[T]` or `[B, T]`; NaN is missing and changes nothing.

    S is 2 for "normal" (mean of u and of u^2, from 0 and 1 on), else 1 (mean of u). With `nu=None` a `tracker` of each statistic
    implies it (default: two levels, noise of precision 1). `InputError` for values that the family cannot have.
    """
    check_choice(family, "family", _STATISTICS)
    network = tracker or continuous_beliefs(2, precision=1.0)
    if [leaf.kind for leaf in network.leaves] != ["continuous"]:
        raise InputError("the tracker needs one continuous leaf; use continuous_beliefs(...).")
    observed, seen, gaps = checked_series(network, values)
    u, is_seen = observed[..., 0], seen[..., 0]
    low = {"normal": -float("inf")}.get(family, 0.0)
    whole = family != "poisson" or bool((u == u.round()).all())
    if (u[is_seen] < low).any() or not whole or (family == "bernoulli" and not ((u == 0) | (u == 1)).all()):
        raise InputError(f"the series holds values that no {family} variable has; choose another family.")
    of, first = _STATISTICS[family]
    statistics = torch.stack(of(u), -1)
    if nu is None:
        counts = _implied(network, statistics, is_seen, gaps)
    else:
        counts = torch.full_like(u, check_number(nu, "nu", low=0.0))
    xi = torch.tensor(first, dtype=torch.float64).expand(len(u), -1)
    trail = []
    for t in range(u.shape[1]):
        moved = xi + (statistics[:, t] - xi) / (1.0 + counts[:, t, None])
        xi = torch.where(is_seen[:, t, None], moved, xi)
        trail.append(xi)
    return torch.stack(trail, 1)


def _implied(network: BeliefNetwork, statistics: Tensor, seen: Tensor, gaps: Tensor) -> Tensor:
    """What the tracker's gain at each step is worth as a number of observations."""
    leaf = network.leaves[0].name
    parent = network.edges_up(leaf, "value")[0].parent
    each = []
    for i in range(statistics.shape[-1]):
        found = run_filter(network, statistics[..., i : i + 1], seen[..., None], gaps, {})
        each.append(found.of(parent, "precision") / found.of(leaf, "expected_precision"))
    counts = torch.stack(each).mean(0)
    if not (counts.isfinite() & (counts > 0)).all():
        raise InputError("the tracker's belief breaks on these values; give it less precision or a lower omega.")
    return counts
