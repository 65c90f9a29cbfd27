"""The fewest parameters that learn in context as abruptly as a network (#51): two of attention, and a flow of three numbers.

Reddy, arXiv:2312.03002. On the sequences of `abrupt.py` (contents c_j, target c_q):

    layer 1   pattern_j: logit beta1 for the token before, 0 for the others      s_j = what j reads of contents
    layer 2   logit alpha (c_q . s_j) + beta2 [j is a label]                     read = what the target reads of contents
    answer    MLP(c_q, read)                                                     two parameters: beta2 = 0

The token at position j has j others to look at besides the one before: its attention there is e^beta1 / (e^beta1 + j). The flow
has no sequences, only what they do on average, with xi the gain of the answer (our reconstruction of the paper's loss):

    p = sigmoid(beta1 - ln N)     q = e^(alpha p) / (e^(alpha p) + N - 1)
    loss = -ln [ e^(xi q) / (e^(xi q) + (N - 1) e^(xi (1 - q) / (N - 1)) + L - N) ]         in nats

Claim: d(beta1, alpha, xi) / dt = -gradient, from 0, falls slowly while xi grows, and drops when alpha and beta1 have grown
together. Where L = N the gradient at 0 is exactly 0: it never leaves. Refuted by a flow that falls like an exponential, or one
that leaves there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.evaluation import Claim, Experiment, Together, register_experiment
from manyheads.evaluation.experiment import Values
from manyheads.inputs import check_integer, check_number
from manyheads.lab.formation.abrupt import (
    LEARNING,
    AbruptRun,
    ItemLabels,
    ItemLabelTask,
    TwoLayers,
    abrupt_run,
    abrupt_runs,
    three_layers,
)

FLOW = ("beta1", "alpha", "xi")
DESCENT = replace(
    LEARNING, steps=2000, optimizer="sgd", rate=1.0
)  # Adam would move the two logits whatever their slope


class MinimalHead(nn.Module):
    """beta1 and alpha from 0, and an MLP (formula above); with `three` beta2 is learned too. `patterns` as in `TwoLayers`."""

    def __init__(self, task: ItemLabelTask, *, three: bool = False, hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(3 if three else 2))
        self.mlp = three_layers(2 * task.features, hidden, task.labels, seed)

    def forward(self, given: ItemLabels) -> Float[Tensor, "B L"]:
        """Logits of the target's label."""
        beta1, alpha, beta2 = F.pad(self.weights, (0, 3 - len(self.weights)))
        content, target = given.content, given.content[:, -1]
        length = content.shape[1]
        before = torch.ones(length - 1).diag(-1)
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        lower = (beta1 * before).masked_fill(later, -torch.inf).softmax(-1)
        match = ((lower @ content) @ target[..., None])[..., 0]
        is_label = torch.arange(length) % 2
        upper = (alpha * match + beta2 * is_label).softmax(-1)
        self.patterns = lower.detach().expand(len(content), -1, -1), upper.detach()
        logits: Tensor = self.mlp(torch.cat([target, (upper[:, None] @ content)[:, 0]], -1))
        return logits


def reduced_loss(theta: Float[Tensor, "3"], pairs: int, labels: int) -> Float[Tensor, ""]:
    """The loss of (beta1, alpha, xi), in nats (formula above)."""
    beta1, alpha, xi = theta
    others = pairs - 1
    p = (beta1 - math.log(pairs)).sigmoid()
    q = 1 / (1 + others * (-alpha * p).exp())
    terms = [xi * q, xi * (1 - q) / others + math.log(others)]
    if labels > pairs:
        terms.append(torch.full_like(xi, math.log(labels - pairs)))
    return torch.stack(terms).logsumexp(0) - xi * q


def reduced_flow(
    pairs: int, labels: int, *, speed: float = 1.0, time: float = 200.0, step: float = 0.05, start: float = 0.0
) -> pd.DataFrame:
    """The flow of the formula above in float64, by Euler's method: t, beta1, alpha, xi, loss, and attention p and q.

    xi moves `speed` times as fast as its gradient: a classifier of many weights is quicker than two logits.
    """
    check_integer(pairs, "pairs", 2)
    check_integer(labels, "labels", pairs)
    check_number(speed, "speed", 0.0, above=True)
    speeds = torch.tensor([1.0, 1.0, speed], dtype=torch.float64)
    theta = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    rows = []
    for i in range(round(time / step) + 1):
        loss = reduced_loss(theta, pairs, labels)
        rows.append((i * step, *theta.tolist(), loss.item()))
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - step * speeds * gradient).detach().requires_grad_()
    frame = pd.DataFrame(rows, columns=["t", *FLOW, "loss"])
    p = 1 / (1 + pairs * np.exp(-frame["beta1"]))
    return frame.assign(p=p, q=1 / (1 + (pairs - 1) * np.exp(-frame["alpha"] * p)))


def likeness(run: AbruptRun, flow: pd.DataFrame, *, until: float = 1.5) -> float:
    """Correlation of the run's losses with the flow's, in time scaled so that both drops (below ln N / 2) are at 1.

    Nothing else is fitted. NaN where one of them has no drop.
    """
    half = run.task.guess / 2
    if run.drop is None or not (flow["loss"] < half).any():
        return math.nan
    time = run.updates / run.drop
    theory = np.interp(time, flow["t"] / flow["t"][(flow["loss"] < half).idxmax()], flow["loss"])
    return float(np.corrcoef(theory[time <= until], run["loss"][time <= until])[0, 1])


def exponential(task: ItemLabelTask) -> pd.DataFrame:
    """What is not abrupt: a loss that falls from ln L by half in equal times, as a flow."""
    t = np.linspace(0, 20, 2001)
    return pd.DataFrame({"t": t, "loss": math.log(task.labels) * 2.0**-t})


def _metrics(run: AbruptRun) -> dict[str, float]:
    task, (plateau, best) = run.task, run.plateau
    out = {"drop": math.nan if run.drop is None else run.drop, "accuracy": run["accuracy"][-1], "fall": run.fall}
    out |= {"plateau": plateau, "accuracy there": best, "from ln N": abs(run["loss"] - task.guess).max()}
    for name in ("ILA1", "TILA2"):
        before, after = run.around_drop(name)
        out[f"{name} grows"] = after / before
    before, after = run.around_drop("CLA")
    flow = reduced_flow(task.pairs, task.labels, time=100.0)
    out |= {"CLA moves": abs(after - before), "like the flow": likeness(run, flow)}
    return out | {
        "flow from ln N": abs(flow["loss"].iloc[-1] - task.guess),
        "like an exponential": likeness(run, exponential(task)),
    }


def _network(held: bool) -> Any:
    def run(task: ItemLabelTask, seed: int) -> dict[str, float]:
        task = replace(task, seed=seed)
        settings = replace(LEARNING, steps=_quick(task), rate=3e-3) if _quick(task) else LEARNING
        return _metrics(abrupt_run(task, TwoLayers(task, held=held, seed=seed), settings=settings, seed=seed))

    return run


def _minimal(task: ItemLabelTask, seeds: Sequence[int]) -> list[dict[str, float]]:
    tasks = [replace(task, seed=seed) for seed in seeds]
    models = [MinimalHead(own, seed=seed) for own, seed in zip(tasks, seeds, strict=True)]
    settings = replace(DESCENT, steps=2 * _quick(task) // 3) if _quick(task) else DESCENT
    return [_metrics(run) for run in abrupt_runs(tasks, models, settings=settings, seeds=seeds)]


def _tasks(quick: bool) -> dict[str, ItemLabelTask]:
    """Quick: fewer features and places to look at, so that seven hundred updates are enough."""
    small = {"features": 32, "positions": 16} if quick else {}
    return {
        name: ItemLabelTask(classes=labels, labels=labels, pairs=4, **small)  # type: ignore[arg-type]
        for name, labels in (("L > N", 16), ("L = N", 4))
    }


def _quick(task: ItemLabelTask) -> int:
    """Updates of a quick run; 0 if it is none."""
    return 0 if task.positions == 65 else 700 if task.labels > task.pairs else 300


def _of(method: str, metric: str) -> Any:
    def value(v: Values) -> float:
        return v[method, metric]

    return value


register_experiment(
    Experiment(
        "abrupt",
        (51,),
        "2312.03002",
        "Is in-context classification learned all at once, by two heads together?",
        datasets=_tasks,
        methods={"network": _network(False), "layer 1 held": _network(True), "minimal head": Together(_minimal)},
        baseline="layer 1 held",
        claims=(
            Claim(
                "the loss waits within .15 of ln N, with CLA >= .98, for 100 updates",
                _of("network", "plateau"),
                at_least=100,
                on="L > N",
            ),
            Claim("then the network answers .97", _of("network", "accuracy"), at_least=0.97, on="L > N"),
            Claim(
                "ILA1 doubles within the 600 updates around the drop",
                _of("network", "ILA1 grows"),
                at_least=2,
                on="L > N",
            ),
            Claim("so does TILA2", _of("network", "TILA2 grows"), at_least=2, on="L > N"),
            Claim("and CLA moves by less than .03", _of("network", "CLA moves"), at_most=0.03, on="L > N"),
            Claim(
                "with L = N the loss stays within .01 of ln N", _of("network", "from ln N"), at_most=0.01, on="L = N"
            ),
            Claim(
                "with layer 1 held to itself no more than the labels shown is learned (accuracy)",
                _of("layer 1 held", "accuracy"),
                at_most=0.45,
                on="L > N",
            ),
            Claim("two parameters of attention answer .97", _of("minimal head", "accuracy"), at_least=0.97, on="L > N"),
            Claim(
                "they fall from 90 % to 10 % in a quarter of the time to the drop",
                _of("minimal head", "fall"),
                at_most=0.25,
                on="L > N",
            ),
            Claim(
                "with L = N their loss stays within .01 of ln N",
                _of("minimal head", "from ln N"),
                at_most=0.01,
                on="L = N",
            ),
            Claim("and their accuracy at chance, .25", _of("minimal head", "accuracy"), at_most=0.3, on="L = N"),
            Claim(
                "the flow's loss correlates with the network's, drops aligned",
                _of("network", "like the flow"),
                at_least=0.95,
                on="L > N",
            ),
            Claim(
                "more than an exponential's does",
                lambda v: v["network", "like the flow"] - v["network", "like an exponential"],
                at_least=0.0,
                on="L > N",
            ),
            Claim(
                "with L = N the flow never leaves ln N",
                _of("network", "flow from ln N"),
                at_most=1e-12,
                on="L = N",
            ),
        ),
        minutes=11,
        lower=frozenset({"from ln N", "fall"}),
        room="lab",
    )
)
