"""Inputs and labels in tokens of their own: a softmax layer copies each input to its label, then a linear one descends (#54).

von Oswald et al., arXiv:2212.07677, section 5. A prompt is x_1, y_1, .., x_N, y_N, x_q: tokens (x, 0, p_t) and (0, y, p_t), where
p_t are sines and cosines of the position. Two layers with residual, the second of `gradient_descent`:

    softmax:  e_t <- e_t + P sum_s softmax_s(W_K e_s . W_Q e_t) W_V e_s          over all tokens s
    built:    W_K reads p_s, W_Q turns p_t back by one position, times `sharpness`; P W_V copies x
    linear:   one step of gradient descent

A label's token then holds (x_i, y_i). Tokens of inputs copy from labels, whose x is 0, and their own label is 0: they add nothing
to the step. **Claim.** Training finds both: tokens attend to their partner, labels to the input before them or inputs to the
label after them, and the loss is that of one step or below, since softmax layers can do more. **Refuted by** attention to the
partner below .8 both ways, or by a loss more than 10 % above one step's. A linear layer alone cannot pair labels with inputs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.evaluation import Claim, Experiment, register_experiment
from manyheads.inputs import check_integer, check_number
from manyheads.lab.in_context.gradient_descent import (
    LinearSelfAttention,
    RegressionTasks,
    alignment,
    best_descent,
    built_descent,
    half_error,
)
from manyheads.training import ADAM, fit

WAVES = 5  # ten entries of a token say where it stands


def positions(n: int) -> Float[Tensor, "n 10"]:
    """Sines, then cosines, of n positions at `WAVES` frequencies."""
    angle = torch.arange(n)[:, None] * _frequencies()
    return torch.cat([angle.sin(), angle.cos()], -1)


def _frequencies() -> Tensor:
    return torch.logspace(0, -2, WAVES)


class CopyThenDescend(nn.Module):
    """Both layers, for `inputs` and one label. Without `copying` the softmax layer is left out."""

    def __init__(self, inputs: int, *, copying: bool = True, seed: int = 0) -> None:
        super().__init__()
        width = inputs + 1 + 2 * WAVES
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(4, width, width, generator=generator) / width**0.5
        self.inputs, self.copying = inputs, copying
        self.softmax = nn.Parameter(drawn)  # K, Q, V, P
        self.linear = LinearSelfAttention(width, seed=seed)
        with torch.no_grad():
            self.linear.weights.copy_(0.3 * torch.randn(1, 4, width, width, generator=generator) / width**0.5)

    def tokens(self, x: Float[Tensor, "B N1 d"], y: Float[Tensor, "B N 1"]) -> Float[Tensor, "B T W"]:
        """x_1, y_1, .., x_q, each with its position."""
        b, n, d = x.shape
        both = x.new_zeros(b, 2 * n - 1, d + 1)
        both[:, ::2, :d] = x
        both[:, 1::2, d:] = y
        return torch.cat([both, positions(2 * n - 1).to(x).expand(b, -1, -1)], -1)

    def pattern(self, tokens: Float[Tensor, "B T W"]) -> Float[Tensor, "B T T"]:
        """What the softmax layer attends to."""
        key, query, _, _ = self.softmax
        return ((tokens @ query.T) @ (tokens @ key.T).transpose(1, 2)).softmax(-1)

    def predict(self, x: Float[Tensor, "B N1 d"], y: Float[Tensor, "B N 1"]) -> Float[Tensor, "B 1"]:
        """What it says of the last input: minus the label's entry of the last token."""
        tokens = self.tokens(x, y)
        if self.copying:
            _, _, value, out = self.softmax
            tokens = tokens + self.pattern(tokens) @ tokens @ value.T @ out.T
        found: Tensor = -self.linear(tokens)[:, -1, self.inputs : self.inputs + 1]
        return found


def built_copying(inputs: int, examples: int, eta: float, *, sharpness: float = 100.0) -> CopyThenDescend:
    """The two layers that are one step of gradient descent from 0, as sharpness grows."""
    check_number(sharpness, "sharpness", 0.0, above=True)
    model = CopyThenDescend(inputs)
    at, cos, sin = inputs + 1, _frequencies().cos().diag(), _frequencies().sin().diag()
    with torch.no_grad():
        model.softmax.zero_()
        key, query, value, out = model.softmax
        key[at:, at:] = torch.eye(2 * WAVES)
        query[at:, at:] = sharpness * torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
        for one in (value, out):
            one[:inputs, :inputs] = torch.eye(inputs)
        model.linear.weights.zero_()
        step = built_descent(eta, examples, torch.zeros(1, inputs))
        model.linear.weights[:, :, :at, :at] = step.weights
    return model


def trained_copying(
    tasks: RegressionTasks,
    *,
    copying: bool = True,
    seed: int = 0,
    length: int = 1500,
    rows: int = 512,
    rate: float = 3e-3,
) -> CopyThenDescend:
    """Both layers trained on fresh batches of `rows` tasks; the paper's are 10,000 batches of 2,048."""
    check_integer(rows, "rows", 1)
    model = CopyThenDescend(tasks.inputs, copying=copying, seed=seed)
    settings = replace(ADAM, steps=length, rate=rate, warmup=100, decay=0.5, clip=1.0, seed=seed)

    def loss(module: Any, number: int) -> Float[Tensor, ""]:
        x, y = tasks.draw(rows, number, seed)
        return 0.5 * (module.predict(x, y[:, :-1]) - y[:, -1]).square().mean()

    fit(model, lambda i: i, settings, loss=loss, device="cpu")
    return model.eval()


def partner_attention(
    model: CopyThenDescend, tasks: RegressionTasks, *, n: int = 500, seed: int = 3
) -> tuple[float, float]:
    """The mean attention of labels to the input before them, and of inputs to the label after them."""
    x, y = tasks.draw(n, 10**6 - 1, seed)
    with torch.no_grad():
        pattern = model.pattern(model.tokens(x, y[:, :-1]))
    before, after = pattern.diagonal(-1, 1, 2)[:, ::2], pattern.diagonal(1, 1, 2)[:, ::2]
    return float(before.mean()), float(after.mean())


def _tried(copying: bool) -> Any:
    def run(tasks: RegressionTasks, seed: int) -> dict[str, float]:
        model, untrained = trained_copying(tasks, copying=copying, seed=seed), CopyThenDescend(tasks.inputs, seed=seed)
        step = best_descent(tasks, 1, seed=seed, length=200)
        return {
            "loss": half_error(model, tasks),
            "one step": half_error(step, tasks),
            "nothing": 0.5 * tasks.scale**2 * tasks.inputs * tasks.a**2 / 3,
            "cosine": alignment(model, step, tasks),
            "labels to inputs": partner_attention(model, tasks)[0],
            "inputs to labels": partner_attention(model, tasks)[1],
            "untrained": max(partner_attention(untrained, tasks)),
        }

    return run


register_experiment(
    Experiment(
        "separate-tokens",
        (54,),
        "2212.07677",
        "Does training find a softmax layer that copies inputs to labels, and a step of gradient descent after it?",
        datasets=lambda quick: {"regression": RegressionTasks(2 if quick else 3, 4 if quick else 6, a=1.0)},
        methods={"softmax, then linear": _tried(True), "linear alone": _tried(False)},
        baseline="linear alone",
        claims=(
            Claim(
                "tokens attend to their partner by .8, one way or the other",
                lambda v: max(v["softmax, then linear", one] for one in ("labels to inputs", "inputs to labels")),
                at_least=0.8,
            ),
            Claim(
                "the loss is at most 1.1 of one step's",
                lambda v: v["softmax, then linear", "loss"] / v["softmax, then linear", "one step"],
                at_most=1.1,
            ),
            Claim(
                "a linear layer alone stays within 5 % of predicting 0",
                lambda v: v["linear alone", "loss"] / v["linear alone", "nothing"],
                at_least=0.95,
            ),
        ),
        minutes=3,
        lower=frozenset({"loss"}),
        room="lab",
    )
)
