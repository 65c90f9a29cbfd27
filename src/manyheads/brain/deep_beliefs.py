"""A deep network of beliefs (#43): layers of value parents, whose weights learn from local errors, without backpropagation.

Legrand et al., arXiv:2410.09206. Layers 0 (the answer) to L (the input), means mu_l, and W_l from layer l + 1 to layer l:

    predict      mu^_L = x,  mu^_l = W_l g(mu^_{l+1}) + b_l
    observe      mu_0 = y;  delta_l = mu_l - mu^_l
    update       hidden layers, from below:  pi_l = pi^ + sum_j pi_j^ (W_jl^2 g'^2 - W_jl g'' delta_j),
                                             mu_l = mu^_l + sum_j W_jl g' pi_j^ delta_j / pi_l
    learn        W_l += rate * mean over the rows of (pi_l delta_l) g(mu_{l+1})^T     (no pi for binary answers)

g is tanh inside and linear at the input. Every hidden unit begins each row with precision pi^ = 1; an answer's noise has
precision 1. We differ in that rows are taken in batches, biases are learned as weights from a unit that is always 1, and pi_l
is kept at least pi^ where g'' would take it below (as later releases of pyhgf do).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed


class DeepBeliefs:
    """Layers of `sizes`, from the input to the answer; `binary` answers are probabilities."""

    def __init__(self, sizes: Sequence[int], *, binary: bool = False, seed: int = 0) -> None:
        if len(sizes) < 2:
            raise InputError("a deep network needs an input and an answer; give at least two sizes.")
        for size in sizes:
            check_integer(size, "a layer's size", 1, 1 << 16)
        draw = torch.Generator().manual_seed(check_seed(seed))
        self.sizes, self.binary = tuple(sizes), binary
        # weights[0] reads the input; each has a last column for the unit that is always 1
        self.weights = [
            torch.cat([torch.randn(b, a, generator=draw, dtype=torch.float64) / a**0.5, torch.zeros(b, 1).double()], 1)
            for a, b in pairwise(sizes)
        ]

    def predict(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Expected answers; probabilities if they are binary."""
        expected = self._down(self._checked(x, self.sizes[0]))[-1]
        return expected.sigmoid() if self.binary else expected

    def learn(
        self,
        x: Float[Tensor, "N D"],
        y: Float[Tensor, "N K"],
        *,
        rate: float = 0.1,
        epochs: int = 50,
        rows: int = 32,
        seed: int = 0,
    ) -> DeepBeliefs:
        """Learn from rows in random batches. `InputError` for shapes that do not fit and for weights that grow without end."""
        x, y = self._checked(x, self.sizes[0]), self._checked(y, self.sizes[-1])
        if len(x) != len(y):
            raise InputError(f"there are {len(x)} inputs and {len(y)} answers; give one answer a row.")
        if self.binary and not ((y == 0) | (y == 1)).all():
            raise InputError("binary answers are 0 or 1.")
        check_number(rate, "rate", low=0.0)
        draw = torch.Generator().manual_seed(check_seed(seed))
        for _ in range(check_integer(epochs, "epochs", 1, 1_000_000)):
            for chosen in torch.randperm(len(x), generator=draw).split(check_integer(rows, "rows", 1, 1 << 20)):
                self._step(x[chosen], y[chosen], rate)
            if not all(w.isfinite().all() for w in self.weights):
                raise InputError(f"the weights grow without end at a rate of {rate:g}; give a lower one.")
        return self

    def _step(self, x: Tensor, y: Tensor, rate: float) -> None:
        expected = self._down(x)
        answer = expected[-1].sigmoid() if self.binary else expected[-1]
        sure = answer * (1 - answer) if self.binary else torch.ones_like(answer)
        # What the layer above gets of each unit below: pi^ delta, which for binary ones is u - p itself.
        below, delta = (y - answer if self.binary else sure * (y - answer)), y - answer
        learned = [delta]
        means = list(expected)
        for i in range(len(self.weights) - 1, 0, -1):
            w, _, slope, bend = self.weights[i][:, :-1], *_tanh(expected[i])
            errors = delta if not self.binary or i < len(self.weights) - 1 else torch.zeros_like(delta)
            precision = 1.0 + ((sure @ w**2) * slope**2 - ((sure * errors) @ w) * bend).clamp_min(0.0)
            means[i] = expected[i] + slope * (below @ w) / precision
            delta = means[i] - expected[i]
            sure, below = torch.ones_like(delta), delta
            learned.insert(0, precision * delta)
        for i, w in enumerate(self.weights):
            w += rate * learned[i].T @ self._read(means[i], i) / len(x)

    def _down(self, x: Tensor) -> list[Tensor]:
        """Expected means of all layers, the input first."""
        found = [x]
        for i, w in enumerate(self.weights):
            found.append(self._read(found[-1], i) @ w.T)
        return found

    def _read(self, mean: Tensor, layer: int) -> Tensor:
        read = torch.tanh(mean) if layer else mean
        return torch.cat([read, torch.ones(len(read), 1, dtype=torch.float64)], 1)

    def _checked(self, given: Tensor, width: int) -> Tensor:
        found = torch.as_tensor(given, dtype=torch.float64)
        if found.ndim != 2 or found.shape[1] != width or not len(found) or not found.isfinite().all():
            raise InputError(f"rows have the shape {tuple(found.shape)}; give finite numbers [rows, {width}].")
        return found


def _tanh(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = x.tanh()
    return y, 1 - y**2, -2 * y * (1 - y**2)
