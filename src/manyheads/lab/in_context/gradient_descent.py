"""One layer of linear self-attention is one step of gradient descent (#54), built by hand and found by training.

von Oswald et al., arXiv:2212.07677, proposition 1. Tokens are (x_i, y_i) of N examples, then the query (x_q, -W0 x_q). A layer
reads the examples alone and has no softmax, bias or norm:

    e_j <- e_j + P sum_i (W_V e_i) (W_K e_i . W_Q e_j)
    built:  W_K = W_Q = diag(I_d, 0),   W_V = [[0, 0], [W0, -I]],   P = eta / N on the labels' rows
    then    y_j <- y_j - dW x_j,        dW = -(eta / N) sum_i (W0 x_i - y_i) x_i^T

so that minus the query's label is the prediction of W0 + dW; the same layer again is the next step. GD++ moves the inputs too,
x_j <- x_j - (gamma / N) sum_i x_i (x_i . x_j), which deeper trained models do. Tasks are w ~ N(0, I_d), x ~ U(-a, a)^d, without
noise; the loss is half the mean squared error. With v = a^2 / 3, m = a^4 / 5 and s = (m + (d + N - 2) v^2) / N the best eta of
one step is v / s, and its loss v d (1 - v^2 / s) / 2 (derived in closed form).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.evaluation import Claim, Experiment, Together, register_experiment
from manyheads.inputs import check_integer, check_number
from manyheads.training import ADAM, fit_seeds, generator_of

CLIP = 10.0  # of activations, in training of several layers, as in the released code


@runtime_checkable
class DrawsTasks(Protocol):
    """Tasks that can be drawn: inputs [B, N + 1, d] and labels [B, N + 1, o] of `n`, the query last."""

    def draw(self, n: int, number: int, seed: int = 0) -> tuple[Tensor, Tensor]:
        """`number` and `seed` decide which."""
        ...


@dataclass(frozen=True)
class RegressionTasks:
    """Linear regressions without noise: `inputs` d, `examples` N, inputs from -`a` to `a`, weights of deviation `scale`."""

    inputs: int = 10
    examples: int = 10
    outputs: int = 1
    a: float = 0.5
    scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("inputs", "examples", "outputs"):
            check_integer(getattr(self, name), name, 1)
        for name in ("a", "scale"):
            check_number(getattr(self, name), name, 0.0, above=True)

    def draw(self, n: int, number: int, seed: int = 0) -> tuple[Float[Tensor, "B N1 d"], Float[Tensor, "B N1 o"]]:
        """Inputs and labels of `n` tasks, the query last. `number` and `seed` decide which."""
        generator = generator_of(seed, number)
        w = self.scale * torch.randn(n, self.inputs, self.outputs, generator=generator)
        x = self.a * (2 * torch.rand(n, self.examples + 1, self.inputs, generator=generator) - 1)
        return x, x @ w

    @property
    def best(self) -> tuple[float, float]:
        """The best step of plain descent from 0, and its loss (formula above), for one output."""
        d, n, v, m = self.inputs, self.examples, self.a**2 / 3, self.a**4 / 5
        s = (m + (d + n - 2) * v**2) / n
        return v / s, 0.5 * self.scale**2 * v * d * (1 - v**2 / s)


class LinearSelfAttention(nn.Module):
    """Layers of the formula above over tokens [B, N + 1, d + o]; with `shared` one layer is repeated. Weights begin small."""

    def __init__(self, width: int, layers: int = 1, *, shared: bool = True, seed: int = 0) -> None:
        super().__init__()
        check_integer(layers, "layers", 1)
        generator = torch.Generator().manual_seed(seed)
        self.layers = layers
        size = (0.002 / layers / width) ** 0.5
        drawn = [size * torch.randn(4, width, width, generator=generator) for _ in range(1 if shared else layers)]
        self.weights = nn.Parameter(torch.stack(drawn))  # [layers or 1, (K, Q, V, P), W, W]

    def forward(self, tokens: Float[Tensor, "B N1 W"]) -> Float[Tensor, "B N1 W"]:
        """The tokens after all layers; the last one is the query, and nothing reads it."""
        for layer in range(self.layers):
            key, query, value, out = self.weights[layer % len(self.weights)]
            seen = tokens[:, :-1]
            read = (tokens @ query.T) @ ((seen @ key.T).transpose(1, 2) @ (seen @ value.T))
            tokens = tokens + read @ out.T
            tokens = tokens.clamp(-CLIP, CLIP) if self.layers > 1 else tokens
        return tokens

    def predict(self, x: Float[Tensor, "B N1 d"], y: Float[Tensor, "B N o"]) -> Float[Tensor, "B o"]:
        """What it says of the last input, of which it is not told the label."""
        query = torch.zeros_like(y[:, :1])
        tokens = torch.cat([x, torch.cat([y, query], 1)], -1)
        out: Tensor = -self(tokens)[:, -1, x.shape[-1] :]
        return out


def built_descent(
    eta: float, examples: int, w0: Float[Tensor, "o d"], *, gamma: float = 0.0, layers: int = 1
) -> LinearSelfAttention:
    """The layer that is a step of descent from `w0`, repeated `layers` times (formula above); with `gamma` one of GD++.

    The query's label must then be -W0 x_q; `predict` gives 0, so W0 = 0.
    """
    outputs, inputs = w0.shape
    width = inputs + outputs
    model = LinearSelfAttention(width, layers)
    with torch.no_grad():
        model.weights.zero_()
        key, query, value, out = model.weights[0]
        for one in (key, query):
            one[:inputs, :inputs] = torch.eye(inputs)
        value[inputs:, :inputs], value[inputs:, inputs:] = w0, -torch.eye(outputs)
        out[inputs:, inputs:] = eta / examples * torch.eye(outputs)
        if gamma:
            value[:inputs, :inputs] = torch.eye(inputs)
            out[:inputs, :inputs] = -gamma / examples * torch.eye(inputs)
    return model


def descended(
    x: Float[Tensor, "B N1 d"],
    y: Float[Tensor, "B N o"],
    etas: Float[Tensor, "K"],
    gammas: Float[Tensor, "K"] | None = None,
    w0: Float[Tensor, "o d"] | None = None,
) -> Float[Tensor, "B o"]:
    """The prediction of W after K steps of descent on the examples, each with its own eta, and of GD++ with `gammas`."""
    n = x.shape[1] - 1
    start = 0.0 if w0 is None else x @ w0.T
    seen, residual = x, torch.cat([y, torch.zeros_like(y[:, :1])], 1) - start  # y - W x of examples; -W x of the query
    for k in range(len(etas)):
        inner = seen @ seen[:, :-1].transpose(1, 2)  # [B, N + 1, N]
        residual = residual - etas[k] / n * inner @ residual[:, :-1]
        if gammas is not None:
            seen = seen - gammas[k] / n * inner @ seen[:, :-1]
    return -residual[:, -1]


class _Steps(nn.Module):
    """eta and gamma of K steps, shared by all."""

    def __init__(self, steps: int, eta: float, plus: bool) -> None:
        super().__init__()
        self.steps, self.plus = steps, plus
        self.eta, self.gamma = nn.Parameter(torch.tensor(eta)), nn.Parameter(torch.zeros(()))

    def predict(self, x: Tensor, y: Tensor) -> Tensor:
        gammas = self.gamma.expand(self.steps) if self.plus else None
        return descended(x, y, self.eta.expand(self.steps), gammas)


def half_error(model: Any, tasks: DrawsTasks, *, n: int = 10_000, seed: int = 1) -> float:
    """Half the mean squared error on tasks that nobody trained on."""
    x, y = tasks.draw(n, 10**6 - 1, seed)
    with torch.no_grad():
        return float(0.5 * (model.predict(x, y[:, :-1]) - y[:, -1]).square().mean())


def best_descent(tasks: RegressionTasks, steps: int, *, plus: bool = False, seed: int = 0, length: int = 600) -> Any:
    """Descent of so many steps whose eta (and gamma, of GD++), the same in every step, were learned on tasks."""
    return best_descents(tasks, steps, plus=plus, seeds=(seed,), length=length)[0]


def best_descents(
    tasks: RegressionTasks, steps: int, *, plus: bool = False, seeds: Sequence[int] = (0,), length: int = 600
) -> list[Any]:
    """The same with several seeds at once."""
    models = [_Steps(steps, tasks.best[0], plus) for _ in seeds]
    fit_seeds(models, _draws(tasks, seeds), replace(ADAM, steps=length, rate=0.1, decay=0.5), loss=_loss)
    return models


def trained_attention(
    tasks: RegressionTasks, layers: int = 1, *, seed: int = 0, length: int = 1000, rate: float = 1e-3
) -> LinearSelfAttention:
    """Linear self-attention trained on tasks, with one layer's weights for all layers."""
    return trained_attentions(tasks, layers, seeds=(seed,), length=length, rate=rate)[0]


def trained_attentions(
    tasks: RegressionTasks, layers: int = 1, *, seeds: Sequence[int] = (0,), length: int = 1000, rate: float = 1e-3
) -> list[LinearSelfAttention]:
    """The same with several seeds at once."""
    models = [LinearSelfAttention(tasks.inputs + tasks.outputs, layers, seed=seed) for seed in seeds]
    clip = None if layers == 1 else 10.0
    settings = replace(ADAM, steps=length, rate=rate, betas=(0.9, 0.98), clip=clip, decay=0.3)
    fit_seeds(models, _draws(tasks, seeds), settings, loss=_loss)
    return [model.eval() for model in models]


def _draws(tasks: RegressionTasks, seeds: Sequence[int], n: int = 2048) -> list[Any]:
    return [partial(tasks.draw, n, seed=seed) for seed in seeds]


def _loss(model: Any, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
    x, y = batch
    return 0.5 * (model.predict(x, y[:, :-1]) - y[:, -1]).square().mean()


def alignment(model: Any, other: Any, tasks: RegressionTasks, *, n: int = 1000, seed: int = 2) -> float:
    """The mean cosine of how both predictions change with the query's input."""
    x, y = tasks.draw(n, 10**6 - 2, seed)
    found = []
    for one in (model, other):
        query = x[:, -1:].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(one.predict(torch.cat([x[:, :-1], query], 1), y[:, :-1]).sum(), query)
        found.append(gradient[:, 0])
    return float(torch.cosine_similarity(found[0], found[1], dim=-1).mean())


def _one_layer(tasks: RegressionTasks, seeds: Sequence[int]) -> list[dict[str, float]]:
    models = trained_attentions(tasks, seeds=seeds, length=200 if tasks.examples < 10 else 1500)
    steps = best_descents(tasks, 1, seeds=seeds)
    return [_measured(tasks, model, step, step) for model, step in zip(models, steps, strict=True)]


def _two_layers(tasks: RegressionTasks, seed: int) -> dict[str, float]:
    """One seed at a time: several in one run are no faster here (`manyheads bench many_seeds`)."""
    model = trained_attention(tasks, 2, seed=seed, length=200 if tasks.examples < 10 else 5000)
    plain, plus = (best_descent(tasks, 2, plus=plus, seed=seed) for plus in (False, True))
    return _measured(tasks, model, plain, plus)


def _measured(tasks: RegressionTasks, model: Any, plain: Any, plus: Any) -> dict[str, float]:
    out = {"loss": half_error(model, tasks), "descent": half_error(plain, tasks), "GD++": half_error(plus, tasks)}
    out["cosine"] = alignment(model, plus, tasks)
    for name, other in (("wider inputs", replace(tasks, a=0.75)), ("larger weights", replace(tasks, scale=3.0))):
        out[name] = half_error(model, other) / half_error(plain, other)
    return out | {"theory": tasks.best[1]}


register_experiment(
    Experiment(
        "in-context-descent",
        (54,),
        "2212.07677",
        "Does a trained layer of linear attention do a step of gradient descent?",
        datasets=lambda quick: {"regression": RegressionTasks(4, 6) if quick else RegressionTasks()},
        methods={"one layer": Together(_one_layer), "two layers": _two_layers},
        baseline="one layer",
        claims=(
            Claim(
                "one trained layer's loss is at most 1.01 of one step's with the best eta",
                lambda v: v["one layer", "loss"] / v["one layer", "descent"],
                at_most=1.01,
            ),
            Claim("and its cosine with that step is at least .998", lambda v: v["one layer", "cosine"], at_least=0.998),
            Claim(
                "the step's loss is what the closed form says, within 3 %",
                lambda v: abs(v["one layer", "descent"] / v["one layer", "theory"] - 1),
                at_most=0.03,
            ),
            Claim(
                "with inputs 1.5 times as wide both losses agree within 3 %",
                lambda v: abs(v["one layer", "wider inputs"] - 1),
                at_most=0.03,
            ),
            Claim(
                "with weights 3 times as large they agree within 3 %",
                lambda v: abs(v["one layer", "larger weights"] - 1),
                at_most=0.03,
            ),
            Claim(
                "two trained layers are at least 20 % below two steps of plain descent",
                lambda v: v["two layers", "loss"] / v["two layers", "descent"],
                at_most=0.8,
            ),
            Claim(
                "and within 5 % of two steps of GD++",
                lambda v: v["two layers", "loss"] / v["two layers", "GD++"],
                at_most=1.05,
            ),
        ),
        minutes=5,
        lower=frozenset({"loss"}),
        room="lab",
    )
)
