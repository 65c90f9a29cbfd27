"""Training on a target and on auxiliary data that a bandit chooses, FLAD (#65).

Albalak, Raffel and Wang, arXiv:2302.00674 (NeurIPS 2023). In each round a bandit (`bandits`) chooses one of K auxiliary sets, and
the step is taken with the sum of two gradients: of the target's batch, and of one batch of that set. Its reward is how the two
agree on one partition of the weights, by default the output matrix.

A round costs one auxiliary batch however many sets there are, and two backward passes into the partition, which are short
where it is the output matrix. An interrupted run resumes as it was. The reward uses the batches that are trained on, never
test data. A batch is what the authors accumulate: the cosine is of whole batches' gradients. Departures: their optimiser is
Adafactor, ours is what `settings` say. For one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer
from manyheads.learning import Trunk
from manyheads.predict.transfer.bandits import BANDITS, Bandit, Reward, Ucb1, gradient_agreement
from manyheads.progress import Bar
from manyheads.training import Progress, TrainSettings, fit
from manyheads.training.batches import on_device

Arms = Mapping[str, Callable[[int], Any]]
Loss = Callable[[nn.Module, Any], Tensor]


class MixedObjective(nn.Module):
    """The loss of a round: the target's batch and the chosen arm's. `forward` takes `(number, target batch)`."""

    def __init__(
        self, module: nn.Module, arms: Arms, bandit: Bandit, loss: Loss, partition: Sequence[nn.Parameter], kind: Reward
    ) -> None:
        super().__init__()
        self.module, self.bandit, self.loss = module, bandit, loss
        self.sources, self.partition, self.kind = list(arms.values()), partition, kind

    def forward(self, numbered: tuple[int, Any]) -> Float[Tensor, ""]:
        """Target plus auxiliary loss. The bandit learns the reward on the way."""
        number, batch = numbered
        arm = self.bandit.choose()
        both = [self._loss(self.sources[arm](number)), self._loss(batch)]
        self.bandit.update(arm, gradient_agreement(self._gradient(both[0]), self._gradient(both[1]), self.kind))
        return both[0] + both[1]

    def first_rewards(self, target: Callable[[int], Any], batches: int) -> list[float]:
        """Of every arm, over the mean gradients of several batches."""

        def mean(source: Callable[[int], Any]) -> Tensor:
            total = torch.zeros((), device=self.partition[0].device)
            for i in range(batches):  # one gradient at a time: an output matrix is large
                total = total + self._gradient(self._loss(source(i))) / batches
            return total

        wanted = mean(target)
        return [gradient_agreement(mean(source), wanted, self.kind) for source in self.sources]

    def _loss(self, batch: Any) -> Tensor:
        return self.loss(self.module, on_device(batch, self.partition[0].device))

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
