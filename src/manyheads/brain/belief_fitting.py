"""Fit the numbers of a network of beliefs (omega, kappa, noise) to series (#43), by gradients through the filter.

    loss = sum_t predictive surprise  +  sum_i (theta_i - theta_i0)^2 / (2 spread^2)

theta_0 are the numbers that the network comes with: a wide normal prior, so that a number of which the series says nothing stays
where it was. Precisions are fitted as their logarithms. L-BFGS with a line search, since there are few numbers, all losses are
smooth, and one pass over a series is what costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.brain.beliefs import Beliefs, checked_series, filter_beliefs, run_filter
from manyheads.brain.network import BeliefNetwork
from manyheads.errors import InputError
from manyheads.inputs import check_number
from manyheads.progress import Bar

STEP = 1e-5  # of central differences
_BROKEN = 1e12  # nats


@dataclass(frozen=True)
class FittedBeliefs:
    """`numbers` are the fitted ones by name, `[]` for all series together or `[B]`; `losses` those of the search, nats."""

    network: BeliefNetwork
    numbers: dict[str, Float[Tensor, "..."]]
    losses: tuple[float, ...]

    def filter(self, values: Any, gaps: Any = None) -> Beliefs:
        """Filter series with the fitted numbers."""
        return filter_beliefs(self.network, values, gaps=gaps, numbers=self.numbers)

    @property
    def fitted(self) -> BeliefNetwork:
        """The network with its new numbers. `InputError` if each series has its own."""
        if any(value.ndim for value in self.numbers.values()):
            raise InputError("each series has numbers of its own; use `numbers`.")
        return self.network.replaced({name: float(value) for name, value in self.numbers.items()})


def fit_beliefs(
    network: BeliefNetwork,
    values: Any,
    names: Sequence[str] | None = None,
    *,
    gaps: Any = None,
    each: bool = False,
    spread: float = 4.0,
    steps: int = 30,
    bar: Bar = Bar(),
) -> FittedBeliefs:
    """Fit the numbers called `names` (default: every omega of hidden nodes, and the noise of continuous leaves).

    One set for all series, or with `each` one for each. `values` and `gaps` as in `filter_beliefs`; so are the errors.
    """
    check_number(spread, "spread", low=0.0, above=True)
    observed, seen, time = checked_series(network, values, gaps)
    known = network.numbers()
    hidden = [f"omega {node.name}" for node in network.nodes if node.kind == "hidden"]
    noise = [f"precision {leaf.name}" for leaf in network.leaves if leaf.kind == "continuous"]
    chosen = [*hidden, *noise] if names is None else list(names)
    for name in chosen:
        if name not in known:
            raise InputError(f"the network has no number {name!r}; it has {', '.join(known)}.")
    logs = [name.startswith("precision ") for name in chosen]
    first = torch.tensor([known[name] for name in chosen], dtype=torch.float64)
    first = torch.where(torch.tensor(logs), first.clamp_min(1e-12).log(), first)
    theta = (first[:, None].repeat(1, len(observed)) if each else first.clone()).requires_grad_()
    prior = first[:, None] if each else first
    search = torch.optim.LBFGS(
        [theta], max_iter=steps, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )
    losses: list[float] = []

    def named(at: Tensor) -> dict[str, Tensor]:
        return {name: at[i].exp() if logs[i] else at[i] for i, name in enumerate(chosen)}

    def loss_at(at: Tensor) -> Tensor:
        found = run_filter(network, observed, seen, time, named(at)).predictive.sum()
        loss = found + ((at - prior) ** 2).sum() / (2 * spread**2)
        # Where a belief broke a far too large loss sends the line search back.
        return loss if loss.isfinite() else _BROKEN + (at**2).sum()

    def closure() -> Tensor:
        search.zero_grad()
        if len(observed) == 1:
            loss, theta.grad = _differences(loss_at, theta.detach())
        else:
            loss = loss_at(theta)
            loss.backward()
        losses.append(float(loss.detach()))
        bar(1, note=f"loss {losses[-1]:.2f}")
        return loss

    with torch.enable_grad():
        search.step(closure)
    return FittedBeliefs(network, {name: value.detach() for name, value in named(theta).items()}, tuple(losses))


@torch.no_grad()
def _differences(loss_at: Callable[[Tensor], Tensor], theta: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and gradient by central differences: one series runs on floats, where 2 P passes cost less than one backward pass."""
    gradient = torch.zeros_like(theta)
    for i in range(theta.numel()):
        moved = torch.zeros_like(theta)
        moved.view(-1)[i] = STEP
        gradient.view(-1)[i] = (loss_at(theta + moved) - loss_at(theta - moved)) / (2 * STEP)
    return loss_at(theta), gradient
