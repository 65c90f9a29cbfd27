"""FLAD (#65): a bandit chooses which auxiliary data set feeds the next batch; its reward is how the gradients agree.

Albalak, Raffel and Wang, arXiv:2302.00674 (NeurIPS 2023). In round t an arm a of K is chosen and the step is taken with both
gradients, g_a of its batch and g of the target's. On the parameters of one partition only (by default the output matrix)

    reward  "cosine" <g_a, g> / |g_a||g|     "magnitude" 2 |g_a||g| / (|g_a|^2 + |g|^2)     "both" (cosine + 1) / 2 + magnitude
    EXP3    pi_t = (1 - K eps_t) softmax(eps_{t-1} R) + eps_t,   eps_t = min(1 / K, sqrt(ln K / K t));   R_a += r / pi_t(a)
    UCB1    a = argmax R_a + sqrt(2 ln t / n_a);   R_a <- (1 - beta) R_a + beta r, at first measured on several batches

A round costs one auxiliary batch however many arms there are. The state of a bandit is buffers, so an interrupted run resumes.
The reward uses the batches that are trained on, never test data. A batch is what the authors accumulate: the cosine is of whole
batches' gradients. Departures: their optimiser is Adafactor, ours is what `settings` say; their UCB1 initialises at beta = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number
from manyheads.learning import Trunk
from manyheads.progress import Bar
from manyheads.training import Progress, TrainSettings, fit, generator_of
from manyheads.training.batches import on_device

Reward = Literal["cosine", "magnitude", "both"]
Arms = Mapping[str, Callable[[int], Any]]
Loss = Callable[[nn.Module, Any], Tensor]


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


def agreement(a: Float[Tensor, "P"], b: Float[Tensor, "P"], kind: Reward = "cosine") -> float:
    """The reward for two gradients (formulas above); 0 for the cosine with a gradient that is zero."""
    norms = float(a.norm()), float(b.norm())
    cosine = float(a @ b) / max(norms[0] * norms[1], 1e-30)
    magnitude = 2 * norms[0] * norms[1] / max(norms[0] ** 2 + norms[1] ** 2, 1e-30)
    return {"cosine": cosine, "magnitude": magnitude, "both": (cosine + 1) / 2 + magnitude}[kind]


class MixedObjective(nn.Module):
    """The loss of a round: the target's batch and the chosen arm's. `forward` takes `(number, target batch)`."""

    def __init__(
        self, module: nn.Module, arms: Arms, bandit: Bandit, loss: Loss, partition: Sequence[nn.Parameter], kind: Reward
    ) -> None:
        super().__init__()
        self.module, self.bandit = module, bandit
        self.names, self.sources, self.loss, self.partition, self.kind = (
            list(arms),
            list(arms.values()),
            loss,
            partition,
            kind,
        )

    def forward(self, numbered: tuple[int, Any]) -> Float[Tensor, ""]:
        """Target plus auxiliary loss. The bandit learns the reward on the way."""
        number, batch = numbered
        arm = self.bandit.choose()
        both = [self.loss(self.module, self._batch(arm, number)), self.loss(self.module, batch)]
        self.bandit.update(arm, agreement(self._gradient(both[0]), self._gradient(both[1]), self.kind))
        return both[0] + both[1]

    def first_rewards(self, target: Callable[[int], Any], batches: int) -> list[float]:
        """Of every arm, over the mean gradients of several batches."""

        def mean(source: Callable[[int], Tensor]) -> Tensor:
            return torch.stack([self._gradient(source(i)) for i in range(batches)]).mean(0)

        wanted = mean(lambda i: self.loss(self.module, on_device(target(i), self.partition[0].device)))
        arms = (mean(lambda i, a=a: self.loss(self.module, self._batch(a, i))) for a in range(len(self.names)))  # type: ignore[misc]
        return [agreement(one, wanted, self.kind) for one in arms]

    def _batch(self, arm: int, number: int) -> Any:
        return on_device(self.sources[arm](number), self.partition[0].device)

    def _gradient(self, loss: Tensor) -> Tensor:
        found = torch.autograd.grad(loss, self.partition, retain_graph=True, materialize_grads=True)
        return torch.cat([one.flatten() for one in found]).detach()


@dataclass(frozen=True)
class Mixture:
    """How a run mixed: `table` has a row an arm, with rounds, share and mean reward; `progress` is `fit`'s."""

    table: pd.DataFrame
    progress: Progress

    def share(self, arm: str) -> float:
        """The share of rounds that an arm got."""
        return float(self.table.set_index("arm").loc[arm, "share"])


def mix(
    module: nn.Module,
    target: Callable[[int], Any],
    arms: Arms,
    settings: TrainSettings,
    *,
    loss: Loss,
    bandit: str | Bandit = "exp3",
    partition: Sequence[nn.Parameter] | None = None,
    reward: Reward = "cosine",
    first: int = 16,
    folder: str | Path | None = None,
    judge: Callable[[], float] | None = None,
    bar: Bar = Bar(),
) -> Mixture:
    """Train `module` in place on `target(i)` and on a batch of one of the `arms` in each step, chosen by a bandit.

    Both are functions of the batch number, as `fit` has them. `bandit` is "exp3", "ucb1", "uniform" or one of yours. UCB1
    measures every arm on `first` batches before it begins (the paper: about 1,000 examples). `partition` is what gradients
    are compared on; where the output matrix is tied to the embeddings, give other weights near the output, or each round
    runs backward once more.
    """
    check_choice(reward, "reward", ("cosine", "magnitude", "both"))
    if not arms:
        raise InputError("there are no auxiliary data sets; give at least one arm.")
    chosen = (
        BANDITS[check_choice(bandit, "bandit", BANDITS)](len(arms), settings.seed)
        if isinstance(bandit, str)
        else bandit
    )
    if chosen.arms != len(arms):
        raise InputError(
            f"the bandit has {chosen.arms} arms and there are {len(arms)} auxiliary data sets; give as many."
        )
    objective = MixedObjective(module, arms, chosen, loss, list(partition or _output(module)), reward)
    if isinstance(chosen, Ucb1):
        chosen.begin(objective.first_rewards(target, check_integer(first, "first", 1)))
    progress = fit(objective, lambda i: (i, target(i)), settings, folder, judge=judge, bar=bar)
    used, rewards = chosen.n_used.cpu(), chosen.rewards.cpu()
    table = {
        "arm": list(arms),
        "rounds": used.long(),
        "share": used / used.sum(),
        "reward": rewards / used.clamp_min(1),
    }
    return Mixture(pd.DataFrame(table), progress)


def _output(module: nn.Module) -> list[nn.Parameter]:
    """The output matrix, by Transformers' word or as the last matrix that learns."""
    unembedding = Trunk(module).unembedding
    weight = getattr(unembedding, "weight", None)
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim >= 2]
    if weight is None and not matrices:
        raise InputError(f"{type(module).__name__} has no matrix that learns; give the partition.")
    return [weight if isinstance(weight, nn.Parameter) and weight.requires_grad else matrices[-1]]
