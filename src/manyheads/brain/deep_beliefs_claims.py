"""Do local errors teach a network as well as backpropagation does (#43)? Scikit-learn's digits, 1,297 to learn, 500 to judge.

    local errors      `DeepBeliefs` 64-32-10, rate .3, batches of 32, 20 passes
    backpropagation   the same layers, start, batches and rate by gradient descent on the cross-entropy of ten yes-or-no answers
    linear            logistic regression

**Prediction** (the sheet gives none; written before a figure was seen): local errors come within .03 of backpropagation's
accuracy, and are not below the linear model. **Refuted** if not, on most seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from manyheads.brain.deep_beliefs import DeepBeliefs
from manyheads.data import real
from manyheads.evaluation import Claim, Experiment, register_experiment

SIZES, RATE, PASSES, ROWS, JUDGE = (64, 32, 10), 0.3, 20, 32, 500


def _digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = real.digits()
    x, y = torch.as_tensor(given.x, dtype=torch.float64).flatten(1), torch.as_tensor(given.y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    known, judged = order[JUDGE:], order[:JUDGE]
    return x[known], y[known], x[judged], y[judged]


def _backpropagated(x: Tensor, target: Tensor, seed: int) -> DeepBeliefs:
    """The same start and the same batches as `DeepBeliefs.learn`, by gradients of the whole loss."""
    net = DeepBeliefs(SIZES, binary=True, seed=seed)
    for w in net.weights:
        w.requires_grad_(True)
    draw = torch.Generator().manual_seed(seed)
    for _ in range(PASSES):
        for chosen in torch.randperm(len(x), generator=draw).split(ROWS):
            loss = torch.nn.functional.binary_cross_entropy(net.predict(x[chosen]), target[chosen], reduction="sum")
            for w, slope in zip(net.weights, torch.autograd.grad(loss / len(chosen), net.weights), strict=True):
                w.data -= RATE * slope
    for w in net.weights:
        w.requires_grad_(False)
    return net


def _run(method: str, _: None, seed: int) -> Mapping[str, float]:
    x, y, judged, known = _digits(seed)
    if method == _LINEAR:
        from sklearn.linear_model import LogisticRegression

        line = LogisticRegression(max_iter=2000).fit(x.numpy(), y.numpy())
        return {"accuracy": float(line.score(judged.numpy(), known.numpy()))}
    target = torch.nn.functional.one_hot(y, 10).double()
    if method == _LOCAL:
        net = DeepBeliefs(SIZES, binary=True, seed=seed).learn(
            x, target, rate=RATE, epochs=PASSES, rows=ROWS, seed=seed
        )
    else:
        net = _backpropagated(x, target, seed)
    return {"accuracy": (net.predict(judged).argmax(1) == known).double().mean().item()}


_LOCAL, _BACK, _LINEAR = "local errors", "backpropagation", "linear"
register_experiment(
    Experiment(
        "deep-beliefs",
        (43,),
        "2410.09206",
        "Do local errors teach a network as well as backpropagation does?",
        datasets=lambda quick: {"digits": None},
        methods={name: partial(_run, name) for name in (_LINEAR, _BACK, _LOCAL)},
        baseline=_LINEAR,
        claims=(
            Claim(
                "local errors lose at most .03 of backpropagation's accuracy",
                lambda v: v[_BACK, "accuracy"] - v[_LOCAL, "accuracy"],
                at_most=0.03,
                on="digits",
            ),
            Claim(
                "local errors are not below the linear model",
                lambda v: v[_LOCAL, "accuracy"] - v[_LINEAR, "accuracy"],
                at_least=0.0,
                on="digits",
            ),
        ),
        minutes=0.5,
        room="brain",
    )
)
