"""Filter a series through a network of beliefs (#43): what was believed at each step, how surely, and how surprising it was.

Legrand et al., arXiv:2410.09206; the equations stand in `belief_updates`. After each observation every node holds a mean and a
precision. The surprise is -log of the density (or probability) that was given to the observation before it came:

    continuous    (log(2 pi) - log pi^ + pi^ (u - mu^)^2) / 2, nats, with the prediction of the hidden state that is observed
    binary        -log p or -log(1 - p), nats

As in pyhgf the surprise of a continuous series leaves the noise of the observation out. `predictive` has it in: it is what a
forecast is judged by, 1/pi^ with the noise's variance added. Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.brain.belief_arithmetic import FloatArithmetic, TensorArithmetic
from manyheads.brain.belief_updates import BeliefState, BeliefStep
from manyheads.brain.network import BeliefNetwork
from manyheads.errors import InputError

_LOG_2PI = math.log(2 * math.pi)
_STATES = ("mean", "precision", "expected_mean", "expected_precision")


@dataclass(frozen=True)
class Beliefs:
    """Beliefs `[B, T, N]` about the N nodes `names` after each of T observations of B series; the `expected_` ones before it.

    `surprise` and `predictive` are `[B, T]`, nats, summed over leaves, 0 where nothing was observed.
    """

    names: tuple[str, ...]
    mean: Float[Tensor, "B T N"]
    precision: Float[Tensor, "B T N"]
    expected_mean: Float[Tensor, "B T N"]
    expected_precision: Float[Tensor, "B T N"]
    surprise: Float[Tensor, "B T"]
    predictive: Float[Tensor, "B T"]

    def of(self, name: str, what: str = "mean") -> Float[Tensor, "B T"]:
        """One node's `mean`, `precision`, `expected_mean` or `expected_precision`."""
        if name not in self.names:
            raise InputError(f"there is no node {name!r}; the nodes are {', '.join(self.names)}.")
        if what not in _STATES:
            raise InputError(f"beliefs have no {what!r}; choose from {', '.join(_STATES)}.")
        return getattr(self, what)[..., self.names.index(name)]


def filter_beliefs(
    network: BeliefNetwork,
    values: Any,
    *,
    gaps: Any = None,
    numbers: Mapping[str, Any] | None = None,
) -> Beliefs:
    """Filter series `[T]`, `[B, T]` or `[B, T, I]` (of I leaves, in their order); NaN is missing.

    `gaps` `[T]` or `[B, T]` is the time since the observation before (default 1 each). `numbers` replaces some of the network's
    numbers by name; a tensor `[]` or `[B]` (one a series) lets gradients through.

    `InputError` for shapes that do not fit, infinite values, gaps that are not above 0, binary values other than 0 and 1, and
    where a belief stops being one: its precision falls below zero ("standard" and "ehgf" can) or a number leaves float64.
    """
    observed, seen, time = _given(network, values, gaps)
    found = run_filter(network, observed, seen, time, numbers or {})
    _check(found)
    return found


def run_filter(
    network: BeliefNetwork,
    values: Float[Tensor, "B T I"],
    seen: Bool[Tensor, "B T I"],
    gaps: Float[Tensor, "B T"],
    numbers: Mapping[str, Any],
) -> Beliefs:
    """The same on what was checked, without a look at what comes out: numbers may be NaN or infinite."""
    known: dict[str, Any] = dict(network.numbers())
    for name in numbers:
        if name not in known:
            raise InputError(f"the network has no number {name!r}; it has {', '.join(known)}.")
    known |= {name: value if isinstance(value, Tensor) else float(value) for name, value in numbers.items()}
    tensors = [value for value in known.values() if isinstance(value, Tensor)]
    for name, value in known.items():
        if isinstance(value, Tensor) and tuple(value.shape) not in ((), (len(values),)):
            raise InputError(f"{name} has the shape {tuple(value.shape)}; give one number, or one for each series.")
    graded = torch.is_grad_enabled() and any(value.requires_grad for value in tensors)
    if len(values) == 1 and not graded:
        plain = {name: float(value) for name, value in known.items()}
        try:
            return _collected(network, *_floats(network, values, seen, gaps, plain), width=1)
        except (ArithmeticError, ValueError):
            pass  # a belief broke; tensors say where
    whole = {
        name: (v if isinstance(v, Tensor) else torch.tensor(v)).to(torch.float64).expand(len(values))
        for name, v in known.items()
    }
    return _collected(network, *_tensors(network, values, seen, gaps, whole), width=len(values))


def checked_series(
    network: BeliefNetwork, values: Any, gaps: Any = None
) -> tuple[Float[Tensor, "B T I"], Bool[Tensor, "B T I"], Float[Tensor, "B T"]]:
    """Values (0 where missing), whether they were seen, and gaps, of what a caller gave. Errors as in `filter_beliefs`."""
    return _given(network, values, gaps)


def _given(network: BeliefNetwork, values: Any, gaps: Any) -> tuple[Tensor, Tensor, Tensor]:
    leaves = len(network.leaves)
    try:
        found = torch.tensor(np.asarray(values, dtype=np.float64))
    except (TypeError, ValueError):
        raise InputError("the series is not made of numbers; give an array, with NaN where one is missing.") from None
    if found.ndim == 1:
        found = found[None]
    if found.ndim == 2:
        found = found[..., None]
    if found.ndim != 3 or found.shape[-1] != leaves or 0 in found.shape:
        raise InputError(
            f"values have the shape {np.shape(values)}; give [T], [B, T] or [B, T, {leaves}], none of them 0."
        )
    seen = ~found.isnan()
    if found.isinf().any():
        raise InputError("the series holds infinite values; mend them, or give NaN for missing ones.")
    found = found.nan_to_num(0.0)
    for i, leaf in enumerate(network.leaves):
        if leaf.kind == "binary" and not ((found[..., i] == 0) | (found[..., i] == 1)).all():
            raise InputError(f"{leaf.name!r} is binary, and the series holds other values than 0 and 1.")
    time = torch.ones(found.shape[:2], dtype=torch.float64)
    if gaps is not None:
        given = torch.tensor(np.asarray(gaps, dtype=np.float64))
        if given.shape not in (found.shape[1:2], found.shape[:2]):
            raise InputError(f"gaps have the shape {tuple(given.shape)}; give one a step, {tuple(found.shape[:2])}.")
        if not (given.isfinite() & (given > 0)).all():
            raise InputError("a time gap is not above 0; sort the series by time and join rows of one moment.")
        time = given.expand(found.shape[:2])
    return found, seen, time


_Trail = tuple[dict[str, list[Any]], list[Any], list[Any]]


def _floats(network: BeliefNetwork, values: Tensor, seen: Tensor, gaps: Tensor, numbers: dict[str, float]) -> _Trail:
    step = BeliefStep(network, numbers, FloatArithmetic())
    rows = zip(values[0].tolist(), seen[0].tolist(), gaps[0].tolist(), strict=True)
    return _walk(step, rows)


def _tensors(network: BeliefNetwork, values: Tensor, seen: Tensor, gaps: Tensor, numbers: dict[str, Tensor]) -> _Trail:
    step = BeliefStep(network, numbers, TensorArithmetic())
    rows = zip(
        (row.unbind(1) for row in values.unbind(1)),
        (row.unbind(1) for row in seen.unbind(1)),
        gaps.unbind(1),
        strict=True,
    )
    return _walk(step, rows)


def _walk(step: BeliefStep, rows: Any) -> _Trail:
    state = step.start()
    trail: dict[str, list[Any]] = {name: [] for name in _STATES}
    surprise, predictive = [], []
    for values, seen, gap in rows:
        step.predict(state, gap)
        of_state, of_forecast = _surprises(step, state, values, seen)
        step.observe(state, values, seen, gap)
        for name in _STATES:
            trail[name].append(tuple(getattr(state, name)))
        surprise.append(of_state)
        predictive.append(of_forecast)
    return trail, surprise, predictive


def _surprises(step: BeliefStep, state: BeliefState, values: Sequence[Any], seen: Sequence[Any]) -> tuple[Any, Any]:
    maths, of_state, of_forecast = step.maths, 0.0, 0.0
    for leaf, u, is_seen in zip(step.leaves, values, seen, strict=True):
        expected = state.expected_mean[leaf]
        if step.kinds[leaf] == "binary":
            found = -maths.log(maths.where(u == 1.0, expected, 1.0 - expected))
            both = (found, found)
        else:
            variance = 0.0
            for _, b, alpha, shape in step.values_up[leaf]:
                slope = alpha * step._shape(state.expected_mean[b], shape)[1]
                variance = variance + slope * slope / state.expected_precision[b]
            error = (u - expected) * (u - expected)
            noisy = variance + 1.0 / state.expected_precision[leaf]
            both = tuple(0.5 * (_LOG_2PI + maths.log(v) + error / v) for v in (variance, noisy))  # type: ignore[assignment]
        of_state = of_state + maths.where(is_seen, both[0], 0.0)
        of_forecast = of_forecast + maths.where(is_seen, both[1], 0.0)
    return of_state, of_forecast


def _collected(
    network: BeliefNetwork, trail: dict[str, list[Any]], surprise: list[Any], predictive: list[Any], *, width: int
) -> Beliefs:
    def stacked(rows: list[Any]) -> Tensor:
        if not isinstance(rows[0][0], Tensor):
            return torch.tensor(rows, dtype=torch.float64)[None]
        return torch.stack([torch.stack([torch.as_tensor(x).expand(width) for x in row], -1) for row in rows], 1)

    def line(rows: list[Any]) -> Tensor:
        return torch.stack(rows, 1) if isinstance(rows[0], Tensor) else torch.tensor(rows, dtype=torch.float64)[None]

    mean, precision, expected_mean, expected_precision = (stacked(trail[name]) for name in _STATES)
    names = tuple(node.name for node in network.nodes)
    return Beliefs(names, mean, precision, expected_mean, expected_precision, line(surprise), line(predictive))


def _check(found: Beliefs) -> None:
    fine = found.mean.isfinite() & found.precision.isfinite() & (found.precision > 0)
    fine &= found.expected_precision > 0
    if fine.all():
        return
    series, step, node = (~fine).nonzero()[0].tolist()
    where = f" of series {series}" if len(found.mean) > 1 else ""
    raise InputError(
        f"the belief about {found.names[node]!r} breaks at step {step}{where}: its precision is no number above 0; "
        "use update 'unbounded', or give a lower omega."
    )
