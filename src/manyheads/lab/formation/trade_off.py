"""What the data must be like for a network to read its prompt and not its memory (#51): a sweep of the data's four properties.

Reddy, arXiv:2312.03002, figure 2. The network and the sequences of `abrupt.py`, with classes that stay the same (`fresh` = 0): an
answer can come from the context, which shows the target's class, or from the weights, which can remember K classes. Accuracies on
new sequences, in [0, 1]:

    in context    fresh classes: only the context helps
    swapped       known classes whose labels in the context are the next ones; the answer is the context's
    in weights    a known class that the context does not show: only memory helps

**Claim.** Many classes K, contexts in bursts Bu and noise eps within classes lead to reading the context. Where classes are as
frequent as k^-alpha with alpha near 1, one network does both. **Refuted by** accuracies that do not move so, or by a network
whose first layer cannot look at other tokens, and which answers fresh classes better than a guess between the labels shown.

Departures: N = 4 pairs, L = 16 labels, D = 32 features and 16 positions in place of 8, 32, 63 and 65; Adam at 3e-3 for 1,500
updates, so that a run takes half a minute; Bu is 1 or 2. K and the number of updates were chosen on seed 100.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer
from manyheads.lab.formation.abrupt import HELD_OUT, LEARNING, ItemLabelTask, Kind, TwoLayers, abrupt_run

TESTS: tuple[Kind, ...] = ("in context", "swapped", "in weights")
SMALL = ItemLabelTask(classes=16, labels=16, pairs=4, features=32, positions=16, fresh=0.0)
UPDATES = 1500


def accuracies_by_test(
    model: torch.nn.Module, task: ItemLabelTask, *, n: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Accuracy of the three tests above, each on `n` new sequences."""
    check_integer(n, "n", 1)
    out: dict[str, float] = {}
    for kind in TESTS:
        given = task.draw(n, HELD_OUT - 1, seed, kind)
        with torch.no_grad():
            out[kind] = float((model(given).argmax(-1) == given.answers).float().mean())
    return out


def trade_off(
    task: ItemLabelTask = SMALL, *, updates: int = UPDATES, held: bool = False, seed: int = 0
) -> dict[str, float]:
    """Train a network on `task`, of which `seed` draws classes, weights and sequences, and test it (accuracies above).

    With `held` layer 1's tokens attend to themselves alone. About 25 seconds on one core for 1,500 updates.
    """
    task = replace(task, seed=seed)
    model = TwoLayers(task, held=held, seed=seed)
    settings = replace(LEARNING, steps=updates, rate=3e-3)
    abrupt_run(task, model, settings=settings, every=updates, looked_at=10, seed=seed)
    return accuracies_by_test(model, task, seed=seed)


def _tried(held: bool = False, **changed: Any) -> Any:
    def run(data: tuple[ItemLabelTask, int], seed: int) -> dict[str, float]:
        task, updates = data
        return trade_off(replace(task, **changed), updates=updates, held=held, seed=seed)

    return run


def _rises(metric: str, low: str, high: str) -> Any:
    return lambda v: v[high, metric] - v[low, metric]


def _of(method: str, metric: str) -> Any:
    return lambda v: v[method, metric]


def _both(method: str, other: str | None = None) -> Any:
    """The smaller of both accuracies, or how much larger it is than with `other`."""

    def value(v: Any) -> float:
        one, two = (
            min(v[name, "in context"], v[name, "in weights"]) if name else 0.0 for name in (method, other or "")
        )
        return float(one - two)

    return value


register_experiment(
    Experiment(
        "trade-off",
        (51,),
        "2312.03002",
        "Which data teach a network to read its prompt, and which to remember?",
        datasets=lambda quick: {"N = 4, L = 16": (SMALL, 20 if quick else UPDATES)},
        methods={
            "K = 16": _tried(),
            "K = 128": _tried(classes=128),
            "K = 256": _tried(classes=256),
            "K = 1024": _tried(classes=1024),
            "K = 256, Bu = 2": _tried(classes=256, burst=2),
            "K = 256, eps = 1": _tried(classes=256, noise=1.0),
            "K = 1024, no bursts": _tried(classes=1024, bursty=0.0),
            "K = 1024, alpha = 1": _tried(classes=1024, zipf=1.0),
            "K = 1024, alpha = 2": _tried(classes=1024, zipf=2.0),
            "K = 1024, layer 1 held": _tried(held=True, classes=1024),
        },
        baseline="K = 16",
        claims=(
            Claim(
                "1,024 classes in place of 16: in context more by .5",
                _rises("in context", "K = 16", "K = 1024"),
                at_least=0.5,
            ),
            Claim("in weights less by .5", _rises("in weights", "K = 1024", "K = 16"), at_least=0.5),
            Claim("swapped labels are followed with 1,024 classes", _of("K = 1024", "swapped"), at_least=0.8),
            Claim("and not with 16", _of("K = 16", "swapped"), at_most=0.1),
            Claim(
                "with 256 classes bursts of 2 add .1 in context",
                _rises("in context", "K = 256", "K = 256, Bu = 2"),
                at_least=0.1,
            ),
            Claim(
                "with 256 classes noise of 1 in place of .1 adds .1 in context",
                _rises("in context", "K = 256", "K = 256, eps = 1"),
                at_least=0.1,
            ),
            Claim(
                "without bursts swapped labels are not followed (1,024 classes)",
                _of("K = 1024, no bursts", "swapped"),
                at_most=0.1,
            ),
            Claim("with alpha = 1 both are at least .3", _both("K = 1024, alpha = 1"), at_least=0.3),
            Claim(
                "the smaller of both is .2 above that with alpha = 0",
                _both("K = 1024, alpha = 1", "K = 1024"),
                at_least=0.2,
            ),
            Claim("and with alpha = 2", _both("K = 1024, alpha = 1", "K = 1024, alpha = 2"), at_least=0.2),
            Claim(
                "with layer 1 held fresh classes are guessed, at most .35",
                _of("K = 1024, layer 1 held", "in context"),
                at_most=0.35,
            ),
        ),
        minutes=8,
        room="lab",
    )
)
