"""Softmax attention trained on random regressions becomes two opposite heads that do one debiased gradient step (#48).

Zhang et al., arXiv:2503.12734. Of a prompt of L tokens z_l = (x_l, y_l) and a query z_q = (x_q, 0), with x ~ N(0, I_d),
y = beta . x + e, beta ~ N(0, I_d / d) and noise of variance s2 (also on the target), one layer without positions or residual says

    yhat = sum_h OV_h . Z softmax(Z^T KQ_h z_q)          KQ [d + 1, d + 1] holds the 1 / sqrt(d + 1), OV [d + 1]

**Claim.** Training finds KQ_h = diag(omega_h I_d, *) and OV_h = (0, .., 0, mu_h), with one |omega| and sum_h mu_h = 0.
**Theory.** With such weights the loss is about (exp by entries)

    1 + s2 - 2 mu . omega + mu^T (omega omega^T + (1 + s2) / L exp(d omega omega^T)) mu

One head: omega = 1 / sqrt(d), mu = sqrt(d) / (1 + e (1 + s2) d / L). Two or more: omega -> 0 and mu . omega -> eta =
1 / (1 + (1 + s2) d / L), which predicts (eta / L) sum_l y_l (x_l - mean x) . x_q. **Refuted by** a correlation with that step
below .99, or by two heads whose loss is above .26 at d = 5, L = 40, s2 = .1 (one head has about .4). With Cov(x) = S the step
is preconditioned, eta I becoming (S (1 + 1 / L) + (tr S + d s2) / L I)^-1 (derived for the step that is not debiased).

We train KQ and OV themselves, from KQ = +-.1 I and small noise: heads that begin with
one sign need long to leave one head's loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, Together, register_experiment
from manyheads.inputs import check_integer, check_number
from manyheads.training import ADAM, fit_seeds, generator_of

UNSEEN = 10**6 - 1  # the number of the tasks that nobody trains on


@dataclass(frozen=True)
class NoisyRegressions:
    """Regressions of the formula above: `inputs` d, `examples` L, `noise` s2, and Cov(x) with entries `correlation`^|i - j|."""

    inputs: int = 5
    examples: int = 40
    noise: float = 0.1
    correlation: float = 0.0

    def __post_init__(self) -> None:
        check_integer(self.inputs, "inputs", 1)
        check_integer(self.examples, "examples", 2)
        check_number(self.noise, "noise", 0.0)
        if not -1 < check_number(self.correlation, "correlation") < 1:
            raise InputError(f"correlation is {self.correlation}; give a number between -1 and 1.")

    @property
    def covariance(self) -> Float[Tensor, "d d"]:
        """Cov(x)."""
        place = torch.arange(self.inputs)
        return torch.as_tensor(self.correlation) ** (place[:, None] - place).abs()

    def draw(self, n: int, number: int, seed: int = 0) -> tuple[Float[Tensor, "B L1 d"], Float[Tensor, "B L1"]]:
        """Inputs and labels of `n` tasks, the query last. `number` and `seed` decide which."""
        generator = generator_of(seed, number)
        beta = torch.randn(n, self.inputs, generator=generator) / self.inputs**0.5
        x = torch.randn(n, self.examples + 1, self.inputs, generator=generator)
        x = x @ torch.linalg.cholesky(self.covariance).T
        y = (x @ beta[..., None]).squeeze(-1)
        return x, y + self.noise**0.5 * torch.randn(y.shape, generator=generator)

    @property
    def eta(self) -> float:
        """The best debiased step, for inputs without correlation."""
        return 1 / (1 + (1 + self.noise) * self.inputs / self.examples)

    @property
    def preconditioner(self) -> Float[Tensor, "d d"]:
        """What eta I becomes for inputs with correlation (formula above)."""
        covariance, n = self.covariance, self.examples
        ridge = (covariance.trace() + self.inputs * self.noise) / n
        return torch.linalg.inv(covariance * (1 + 1 / n) + ridge * torch.eye(self.inputs))


class SoftmaxRegressor(nn.Module):
    """The layer of the formula above: `KQ` [H, d + 1, d + 1] and `OV` [H, d + 1]. Half the heads begin with KQ = -.1 I."""

    def __init__(self, inputs: int, heads: int = 2, *, seed: int = 0) -> None:
        super().__init__()
        check_integer(heads, "heads", 1)
        generator = torch.Generator().manual_seed(seed)
        sign = torch.tensor([1.0, -1.0]).repeat(heads)[:heads]
        noise = 0.02 * torch.randn(heads, inputs + 2, inputs + 1, generator=generator)
        self.KQ = nn.Parameter(0.1 * sign[:, None, None] * torch.eye(inputs + 1) + noise[:, 1:])
        self.OV = nn.Parameter(noise[:, 0].clone())

    def pattern(self, x: Float[Tensor, "B L1 d"], y: Float[Tensor, "B L"]) -> Float[Tensor, "B H L"]:
        """How much each head attends to each example from the query."""
        z = torch.cat([x[:, :-1], y[..., None]], -1)
        asked = x[:, -1] @ self.KQ[:, :, :-1].transpose(1, 2)  # [H, B, d + 1]; the query's label is 0
        return (asked.transpose(0, 1) @ z.transpose(1, 2)).softmax(-1)

    def writes(self, x: Float[Tensor, "B L1 d"], y: Float[Tensor, "B L"]) -> Float[Tensor, "B H"]:
        """What each head adds to the prediction."""
        z = torch.cat([x[:, :-1], y[..., None]], -1)
        return (self.pattern(x, y) @ z * self.OV).sum(-1)

    def predict(self, x: Float[Tensor, "B L1 d"], y: Float[Tensor, "B L"]) -> Float[Tensor, "B"]:
        """The prediction for the last input."""
        return self.writes(x, y).sum(-1)

    @property
    def omega(self) -> Float[Tensor, "H"]:
        """The mean of KQ's diagonal, over the inputs."""
        return self.KQ.detach()[:, :-1, :-1].diagonal(dim1=1, dim2=2).mean(-1)

    @property
    def mu(self) -> Float[Tensor, "H"]:
        """What each head makes of labels."""
        return self.OV.detach()[:, -1]


def built_regressor(omega: Float[Tensor, "H"], mu: Float[Tensor, "H"], inputs: int) -> SoftmaxRegressor:
    """The layer of the theory, with KQ_h = diag(omega_h I, 0) and OV_h = (0, mu_h)."""
    model = SoftmaxRegressor(inputs, len(omega))
    with torch.no_grad():
        model.KQ.zero_()
        model.KQ[:, :-1, :-1] = omega[:, None, None] * torch.eye(inputs)
        model.OV.zero_()
        model.OV[:, -1] = mu
    return model


def surrogate(omega: Float[Tensor, "H"], mu: Float[Tensor, "H"], tasks: NoisyRegressions) -> Float[Tensor, ""]:
    """The loss of such a layer, in theory (formula above)."""
    label = 1 + tasks.noise
    both = omega[:, None] * omega
    return label - 2 * mu @ omega + mu @ (both + label / tasks.examples * (tasks.inputs * both).exp()) @ mu


def best_surrogate(
    tasks: NoisyRegressions, start: Float[Tensor, "H"]
) -> tuple[float, Float[Tensor, "H"], Float[Tensor, "H"]]:
    """The least loss in theory, with its omega and mu, descending from omega = `start` with the best mu for each omega."""
    omega = start.double().requires_grad_()
    optimizer = torch.optim.LBFGS([omega], max_iter=200, line_search_fn="strong_wolfe")

    def best_mu() -> Tensor:
        both = omega[:, None] * omega
        return torch.linalg.solve(both + (1 + tasks.noise) / tasks.examples * (tasks.inputs * both).exp(), omega)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = surrogate(omega, best_mu(), tasks)
        value.backward()
        return value

    optimizer.step(loss)
    mu = best_mu().detach()
    return float(surrogate(omega.detach(), mu, tasks)), omega.detach(), mu


def debiased_step(
    x: Float[Tensor, "B L1 d"], y: Float[Tensor, "B L"], step: Float[Tensor, "d d"]
) -> Float[Tensor, "B"]:
    """(1 / L) sum_l y_l (x_l - mean x) . `step` x_q; eta I is the step of the theory."""
    seen = x[:, :-1] - x[:, :-1].mean(1, keepdim=True)
    asked = x[:, -1] @ step.T
    found: Tensor = torch.einsum("bl,bld,bd->b", y, seen, asked) / y.shape[1]
    return found


def trained_regressor(
    tasks: NoisyRegressions, heads: int = 2, *, seed: int = 0, length: int = 4000, rate: float = 0.01
) -> SoftmaxRegressor:
    """The layer trained on fresh batches of 256 tasks."""
    return trained_regressors(tasks, heads, seeds=(seed,), length=length, rate=rate)[0]


def trained_regressors(
    tasks: NoisyRegressions, heads: int = 2, *, seeds: Sequence[int] = (0,), length: int = 4000, rate: float = 0.01
) -> list[SoftmaxRegressor]:
    """The same with several seeds at once."""
    models = [SoftmaxRegressor(tasks.inputs, heads, seed=seed) for seed in seeds]
    settings = replace(ADAM, steps=length, rate=rate, decay=0.4, floor=0.02)

    def loss(module: Any, batch: tuple[Tensor, Tensor]) -> Float[Tensor, ""]:
        x, y = batch
        return (module.predict(x, y[:, :-1]) - y[:, -1]).square().mean()

    fit_seeds(models, [partial(tasks.draw, 256, seed=seed) for seed in seeds], settings, loss=loss)
    return [model.eval() for model in models]


def squared_error(
    model: SoftmaxRegressor, tasks: NoisyRegressions, *, without: int | None = None, n: int = 10_000, seed: int = 1
) -> float:
    """The mean squared error on unseen tasks, with noise on the target; `without` a head if asked."""
    x, y = tasks.draw(n, UNSEEN, seed)
    with torch.no_grad():
        writes = model.writes(x, y[:, :-1])
    if without is not None:
        writes[:, without] = 0
    return float((writes.sum(-1) - y[:, -1]).square().mean())


def head_signs(model: SoftmaxRegressor, tasks: NoisyRegressions, *, n: int = 2000, seed: int = 2) -> Float[Tensor, "H"]:
    """Which heads attend to inputs like the query (towards 1) and which to unlike ones (towards -1): no weight is looked at.

    The mean over tasks of the correlation over examples between attention and x_l . x_q.
    """
    x, y = tasks.draw(n, UNSEEN, seed)
    with torch.no_grad():
        pattern = model.pattern(x, y[:, :-1])
    alike = torch.einsum("bld,bd->bl", x[:, :-1], x[:, -1])[:, None]
    pattern, alike = pattern - pattern.mean(-1, keepdim=True), alike - alike.mean(-1, keepdim=True)
    return torch.cosine_similarity(pattern, alike, dim=-1).mean(0)


def _tried(heads: int) -> Together:
    def run(tasks: NoisyRegressions, seeds: Sequence[int]) -> list[dict[str, float]]:
        quick = tasks.examples < 40
        settings = {"length": 1000, "rate": 0.02} if quick else {}
        models = trained_regressors(tasks, heads, seeds=seeds, **settings)  # type: ignore[arg-type]
        return [_measured(tasks, model, seed) for model, seed in zip(models, seeds, strict=True)]

    return Together(run)


def _measured(tasks: NoisyRegressions, model: SoftmaxRegressor, seed: int) -> dict[str, float]:
    omega, mu, kq = model.omega, model.mu, model.KQ.detach()[:, :-1, :-1]
    x, y = tasks.draw(10_000, UNSEEN, 1)  # the tasks of `squared_error`
    with torch.no_grad():
        said, step = model.predict(x, y[:, :-1]), debiased_step(x, y[:, :-1], tasks.preconditioner)
    signs = head_signs(model, tasks)
    alone = [squared_error(model, tasks, without=h) for h in range(len(mu))]
    theory = [float(surrogate(*_without(omega, mu, h), tasks)) for h in range(len(mu))]
    found = (mu[:, None, None] * kq).sum(0)
    return {
        "loss": squared_error(model, tasks),
        "untrained": squared_error(SoftmaxRegressor(tasks.inputs, len(mu), seed=seed), tasks),
        "loss of the step": float((step - y[:, -1]).square().mean()),
        "longer prompts": squared_error(model, replace(tasks, examples=8 * tasks.examples)),
        "correlation with the step": float(torch.corrcoef(torch.stack([said, step]))[0, 1]),
        "theory": best_surrogate(tasks, torch.tensor([0.3, -0.3])[: len(mu)])[0],
        "mu . omega": float(mu @ omega),
        "eta": tasks.eta,
        "sum of mu": float(mu.sum().abs() / mu.norm()),
        "diagonal": float((kq.diagonal(dim1=1, dim2=2).std(-1) / omega.abs()).max()),
        "off the diagonal": float((kq - torch.diag_embed(kq.diagonal(dim1=1, dim2=2))).abs().max()),
        "most positive head": float(signs.max()),
        "most negative head": float(signs.min()),
        "signs agree": float((signs.sign() == omega.sign()).all()),
        "without a head": sum(alone) / len(mu),
        "without a head, theory": sum(theory) / len(mu),
        "distance to the preconditioner": float((found - tasks.preconditioner).norm() / tasks.preconditioner.norm()),
        "distance to a multiple of I": _spread(tasks.preconditioner),
    }


def _without(omega: Tensor, mu: Tensor, head: int) -> tuple[Tensor, Tensor]:
    kept = [h for h in range(len(mu)) if h != head]
    return omega[kept], mu[kept]


def _spread(matrix: Tensor) -> float:
    """How far the best multiple of I is from a matrix, as a share of its norm: what a step without preconditioner misses."""
    plain = matrix.diagonal().mean() * torch.eye(len(matrix))
    return float((plain - matrix).norm() / matrix.norm())


def _data(quick: bool) -> dict[str, NoisyRegressions]:
    plain = NoisyRegressions(4, 24) if quick else NoisyRegressions()
    return {"independent inputs": plain, "correlated inputs": replace(plain, correlation=0.5)}


def _claim(says: str, method: str, value: Any, *, on: str = "independent inputs", **bound: float) -> Claim:
    return Claim(says, lambda v: value(lambda metric: v[method, metric]), on=on, **bound)


_TWO, _ONE = "two heads", "one head"
register_experiment(
    Experiment(
        "softmax-regression",
        (48,),
        "2503.12734",
        "Do two trained softmax heads become an opposite pair that does one debiased gradient step?",
        datasets=_data,
        methods={_ONE: _tried(1), _TWO: _tried(2)},
        baseline=_ONE,
        claims=(
            _claim(
                "two heads' loss is within 15 % of the theory's", _TWO, lambda m: m("loss") / m("theory"), at_most=1.15
            ),
            _claim(
                "and within 3 % of the debiased step's", _TWO, lambda m: m("loss") / m("loss of the step"), at_most=1.03
            ),
            Claim(
                "and at most .7 of one head's",
                lambda v: v[_TWO, "loss"] / v[_ONE, "loss"],
                at_most=0.7,
                on="independent inputs",
            ),
            _claim(
                "predictions correlate with the step by .99",
                _TWO,
                lambda m: m("correlation with the step"),
                at_least=0.99,
            ),
            _claim("one head's by no more than .95", _ONE, lambda m: m("correlation with the step"), at_most=0.95),
            _claim("mu . omega is eta, within 5 %", _TWO, lambda m: abs(m("mu . omega") / m("eta") - 1), at_most=0.05),
            _claim("|sum mu| is below .02 |mu|", _TWO, lambda m: m("sum of mu"), at_most=0.02),
            _claim("the diagonal's spread is below 5 % of omega", _TWO, lambda m: m("diagonal"), at_most=0.05),
            _claim("entries off the diagonal are below .02", _TWO, lambda m: m("off the diagonal"), at_most=0.02),
            _claim(
                "one head attends to inputs like the query, by .9",
                _TWO,
                lambda m: m("most positive head"),
                at_least=0.9,
            ),
            _claim("the other to inputs unlike it", _TWO, lambda m: m("most negative head"), at_most=-0.9),
            _claim(
                "without either head the loss is what the theory says, within 15 %",
                _TWO,
                lambda m: abs(m("without a head") / m("without a head, theory") - 1),
                at_most=0.15,
            ),
            _claim(
                "prompts eight times as long have a lower loss",
                _TWO,
                lambda m: m("longer prompts") / m("loss"),
                at_most=0.7,
            ),
            _claim(
                "with correlated inputs the step is preconditioned, within 10 %",
                _TWO,
                lambda m: m("distance to the preconditioner"),
                on="correlated inputs",
                at_most=0.1,
            ),
        ),
        minutes=3,
        lower=frozenset({"loss"}),
        room="lab",
    )
)
