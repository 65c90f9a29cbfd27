"""FLAD (#65), its claims: on regressions whose best auxiliary set is known, and on a table of patients.

Known: the target is a linear function of 40 numbers with 20 noisy examples. Of ten auxiliary sets one has the target's own
function, eight have others, one its negative. Real: 20 patients of the breast cancer table and their diagnosis, by the ten
means of their cells. The auxiliary sets are the other 20 columns, each as above or below its median, for patients without a
diagnosis here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import table
from manyheads.evaluation import Claim, Experiment, auc, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.predict.transfer.mixing import Mixture, mix
from manyheads.training import ADAM, TrainSettings, drawn_rows, fit, generator_of

WAYS = ("exp3", "ucb1", "uniform", "target only")
FLOW = TrainSettings(rate=0.003, warmup=1, decay=0.0, optimizer="sgd", weight_decay=0.0, clip=None, precision="fp32")
ALIGNED, OPPOSED = "aligned", "opposed"
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class FewShotTask:
    """A target of few examples, auxiliary sets by name, the module to train and its loss."""

    module: nn.Module
    target: Pair
    arms: dict[str, Pair]
    loss: Callable[[Tensor, Tensor], Tensor]

    def tuned(self, way: str, settings: TrainSettings, rows: int = 16) -> Mixture | None:
        """Train the module by one of the ways; "target only" has no mixture."""

        def loss(module: nn.Module, batch: Pair) -> Tensor:
            return self.loss(module(batch[0])[:, 0], batch[1])

        def arm(number: int, data: Pair) -> Callable[[int], Pair]:
            def batch(i: int) -> Pair:
                drawn = drawn_rows(len(data[1]), rows, i, 1000 * settings.seed + number)
                return data[0][drawn], data[1][drawn]

            return batch

        if way == "target only":
            fit(self.module, lambda i: self.target, settings, loss=loss)
            return None
        arms = {name: arm(i, data) for i, (name, data) in enumerate(self.arms.items())}
        return mix(self.module, lambda i: self.target, arms, settings, loss=loss, bandit=way, first=60)


def regressions(seed: int, d: int = 40, examples: int = 20, noise: float = 0.5) -> tuple[FewShotTask, Tensor]:
    """The constructed task, and the target's true weights [d], of norm 1."""
    draw = generator_of(seed, 0)
    weights = F.normalize(torch.randn(9, d, generator=draw), dim=1)

    def data(w: Tensor, n: int) -> Pair:
        x = torch.randn(n, d, generator=draw)
        return x, x @ w + noise * torch.randn(n, generator=draw)

    target = data(weights[0], examples)
    arms = {ALIGNED: data(weights[0], 1000)} | {f"other {i}": data(w, 1000) for i, w in enumerate(weights[1:])}
    arms[OPPOSED] = data(-weights[0], 1000)
    model = nn.Linear(d, 1, bias=False)
    nn.init.zeros_(model.weight)
    return FewShotTask(model, target, arms, F.mse_loss), weights[0]


def patients(seed: int, examples: int = 20) -> tuple[FewShotTask, Pair]:
    """The real task, and held-out patients with their diagnosis."""
    found = table("breast_cancer")
    x = torch.from_numpy((found.x - found.x.mean(0)) / found.x.std(0))
    y = torch.from_numpy(1.0 - found.y).float()  # 1: malignant
    means, others = x[:, :10], (x[:, 10:] > x[:, 10:].median(0).values).float()
    order = torch.randperm(len(x), generator=generator_of(seed, 0))
    few, helping, held = order[:examples], order[examples:300], order[300:]
    arms = {f"column {10 + i}": (means[helping], others[helping, i]) for i in range(20)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    task = FewShotTask(model, (means[few], y[few]), arms, F.binary_cross_entropy_with_logits)
    return task, (means[held], y[held])


def _known(way: str, steps: int, seed: int) -> dict[str, float]:
    task, truth = regressions(seed)
    settings = replace(FLOW, steps=steps, seed=seed)
    mixture = task.tuned(way, settings)
    error = (task.module.weight[0].detach() - truth).square().sum()  # type: ignore[union-attr, index, operator]
    shares = (
        np.nan if mixture is None else mixture.share(ALIGNED),
        np.nan if mixture is None else mixture.share(OPPOSED),
    )
    most = np.nan if mixture is None else float(mixture.table["share"].idxmax() == 0)
    return {"loss": float(error), "aligned": shares[0], "opposed": shares[1], "aligned is most used": most}


def _table(way: str, steps: int, seed: int) -> dict[str, float]:
    task, (x, y) = patients(seed)
    task.tuned(way, replace(ADAM, steps=steps, rate=1e-3, seed=seed))
    with torch.no_grad():
        logits = task.module(x)[:, 0]
    accuracy = ((logits > 0) == (y > 0.5)).float().mean()
    ranked = auc(logits.numpy(), y.numpy() > 0.5)
    return {"loss": float(task.loss(logits, y)), "accuracy": float(accuracy), "AUC": ranked}


def _over(way: str, other: str = "uniform") -> Callable[[Values], float]:
    return lambda v: v[way, "loss"] / v[other, "loss"]


def _methods(run: Callable[..., dict[str, float]]) -> dict[str, Any]:
    return {way: partial(run, way) for way in WAYS}


register_experiment(
    Experiment(
        "flad",
        (65,),
        "2302.00674",
        "Does a bandit find the auxiliary set that has the target's own function?",
        datasets=lambda quick: {"regressions": 500},
        methods=_methods(_known),
        baseline="uniform",
        claims=(
            Claim("EXP3 uses the aligned set most", lambda v: v["exp3", "aligned is most used"], at_least=0.9),
            Claim("UCB1 uses the aligned set most", lambda v: v["ucb1", "aligned is most used"], at_least=0.9),
            Claim("EXP3 gives it a share of 0.2", lambda v: v["exp3", "aligned"], at_least=0.2),
            Claim("UCB1 gives it a share of 0.17", lambda v: v["ucb1", "aligned"], at_least=0.17),
            Claim("EXP3's test loss is 0.65 of uniform mixing's", _over("exp3"), at_most=0.65),
            Claim("UCB1's test loss is 0.85 of uniform mixing's", _over("ucb1"), at_most=0.85),
        ),
        minutes=1.0,
        lower=frozenset({"loss", "opposed"}),
    )
)
register_experiment(
    Experiment(
        "flad-real",
        (65,),
        "2302.00674",
        "Does it help 20 patients with a diagnosis more than uniform mixing, or than no auxiliary sets?",
        datasets=lambda quick: {"breast cancer": 100 if quick else 500},
        methods=_methods(_table),
        baseline="uniform",
        claims=(
            Claim("EXP3's test loss is below uniform mixing's", _over("exp3"), at_most=1),
            Claim("UCB1's test loss is below uniform mixing's", _over("ucb1"), at_most=1),
            Claim("EXP3's test loss is below that without auxiliary sets", _over("exp3", "target only"), at_most=1),
        ),
        minutes=1.0,
        lower=frozenset({"loss"}),
    )
)
