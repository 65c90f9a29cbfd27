"""FLAD (#65): a bandit chooses which auxiliary data set feeds the next batch; its reward is how the gradients agree.

Albalak, Raffel and Wang, arXiv:2302.00674 (NeurIPS 2023). In round t an arm a of K is chosen and the step is taken with both
gradients, g_a of its batch and g of the target's. On the parameters of one partition only (by default the output matrix)

    reward  "cosine" <g_a, g> / |g_a||g|     "magnitude" 2 |g_a||g| / (|g_a|^2 + |g|^2)     "both" (cosine + 1) / 2 + magnitude
    EXP3    pi_t = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t,   eps_t = min(1 / K, sqrt(ln K / K t));   R_a += r / pi_t(a)
    UCB1    a = argmax R_a + sqrt(2 ln t / n_a);   R_a <- (1 - beta) R_a + beta r, at first measured on several batches

The state of a bandit is buffers, so that a checkpoint holds it. `mixing` trains with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.inputs import check_integer, check_number
from manyheads.training import generator_of

Reward = Literal["cosine", "magnitude", "both"]


class Bandit(nn.Module):
    """Chooses one of `arms` by what rewards they gave. This one does not care: uniform mixing, the baseline."""

    n_used: Tensor
    rewards: Tensor

    def __init__(self, arms: int, seed: int = 0) -> None:
        super().__init__()
        self.arms, self.seed = check_integer(arms, "arms", 1), seed
        self.register_buffer("n_used", torch.zeros(arms, dtype=torch.float64))
        self.register_buffer("rewards", torch.zeros(arms, dtype=torch.float64))  # sums, for the report

    @property
    def round(self) -> int:
        """The number of the round to come, from 1."""
        return int(self.n_used.sum()) + 1

    @property
    def probabilities(self) -> Float[Tensor, "K"]:
        """How likely each arm is in this round."""
        return torch.full((self.arms,), 1 / self.arms, dtype=torch.float64)

    def choose(self) -> int:
        """The arm of this round: the same whenever it is asked."""
        return int(torch.multinomial(self.probabilities.cpu(), 1, generator=generator_of(self.seed, self.round)))

    def update(self, arm: int, reward: float) -> None:
        """Learn from the reward of this round's arm."""
        self.n_used[arm] += 1
        self.rewards[arm] += reward

    def begin(self, rewards: Sequence[float]) -> None:
        """Take a first measurement of every arm, where that is of use."""


class Exp3(Bandit):
    """The formula above. Rewards may be negative; the softmax is taken less its largest exponent."""

    totals: Tensor

    def __init__(self, arms: int, seed: int = 0) -> None:
        super().__init__(arms, seed)
        self.register_buffer("totals", torch.zeros(arms, dtype=torch.float64))

    def exploration(self, t: int) -> float:
        """eps_t; eps_0 is 1 / K."""
        log_arms = torch.tensor(float(self.arms), dtype=torch.float64).log().item()
        return min(1 / self.arms, (log_arms / (self.arms * t)) ** 0.5) if t else 1 / self.arms

    @property
    def probabilities(self) -> Float[Tensor, "K"]:
        """pi_t."""
        least = self.exploration(self.round)
        return (1 - self.arms * least) * (self.exploration(self.round - 1) * self.totals).softmax(0) + least

    def update(self, arm: int, reward: float) -> None:
        """R_a += r / pi_t(a)."""
        self.totals[arm] += reward / self.probabilities[arm]
        super().update(arm, reward)


class Ucb1(Bandit):
    """The formula above, with n_a counted from 1 for the first measurement. Without one, R is 0 for all."""

    averages: Tensor

    def __init__(self, arms: int, seed: int = 0, *, beta: float = 0.1) -> None:
        super().__init__(arms, seed)
        self.beta = check_number(beta, "beta", 0.0, 1.0)
        self.register_buffer("averages", torch.zeros(arms, dtype=torch.float64))

    @property
    def bounds(self) -> Float[Tensor, "K"]:
        """The upper confidence bound of each arm."""
        t = torch.tensor(float(self.round - 1 + self.arms), dtype=torch.float64)
        return self.averages + (2 * t.log() / (self.n_used + 1)).sqrt()

    @property
    def probabilities(self) -> Float[Tensor, "K"]:
        """1 for the arm with the highest bound."""
        return torch.nn.functional.one_hot(self.bounds.argmax(), self.arms).double()

    def update(self, arm: int, reward: float) -> None:
        """R_a <- (1 - beta) R_a + beta r."""
        self.averages[arm] += self.beta * (reward - self.averages[arm])
        super().update(arm, reward)

    def begin(self, rewards: Sequence[float]) -> None:
        """R from a first measurement."""
        self.averages.copy_(torch.tensor(rewards, dtype=torch.float64))


BANDITS: dict[str, type[Bandit]] = {"exp3": Exp3, "ucb1": Ucb1, "uniform": Bandit}


def gradient_agreement(a: Float[Tensor, "P"], b: Float[Tensor, "P"], kind: Reward = "cosine") -> float:
    """The reward for two gradients (formulas above); 0 for the cosine with a gradient that is zero."""
    norms = float(a.norm()), float(b.norm())
    cosine = float(a @ b) / max(norms[0] * norms[1], 1e-30)
    magnitude = 2 * norms[0] * norms[1] / max(norms[0] ** 2 + norms[1] ** 2, 1e-30)
    return {"cosine": cosine, "magnitude": magnitude, "both": (cosine + 1) / 2 + magnitude}[kind]
