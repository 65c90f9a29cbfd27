"""Softmax attention on regressions: the theory's minimum, the layer with the theory's weights, and trained layers."""

from __future__ import annotations

import math

import pytest
import torch

from manyheads.errors import InputError
from manyheads.lab.in_context.softmax_regression import (
    NoisyRegressions,
    SoftmaxRegressor,
    best_surrogate,
    built_regressor,
    debiased_step,
    head_signs,
    squared_error,
    surrogate,
    trained_regressor,
)

TASKS = NoisyRegressions()


def test_the_least_loss_in_theory_is_that_of_the_sheet():
    loss, omega, mu = best_surrogate(TASKS, torch.tensor([0.2]))
    assert (loss, float(omega), float(mu)) == pytest.approx((0.372, 0.447, 1.628), rel=0.01)
    assert float(omega) == pytest.approx(1 / math.sqrt(5), rel=1e-3)
    assert float(mu) == pytest.approx(math.sqrt(5) / (1 + math.e * 1.1 * 5 / 40), rel=1e-3)
    loss, omega, mu = best_surrogate(TASKS, torch.tensor([0.3, -0.25]))
    assert (loss, float(omega @ mu)) == pytest.approx((0.221, 0.879), rel=0.01)
    assert abs(float(mu.sum())) < 0.01 * float(mu.norm())
    assert TASKS.eta == pytest.approx(0.879, abs=5e-4)


def test_the_layer_is_the_formula_token_by_token():
    tasks = NoisyRegressions(3, 6)
    model = SoftmaxRegressor(3, 3, seed=4).double()
    x, y = (one.double() for one in tasks.draw(5, 0))
    for b in range(5):
        expected = 0.0
        for kq, ov in zip(model.KQ, model.OV, strict=True):
            query = torch.cat([x[b, -1], torch.zeros(1)])
            tokens = [torch.cat([x[b, i], y[b, i : i + 1]]) for i in range(6)]
            weights = [float((token @ kq @ query).exp()) for token in tokens]
            expected += sum(w * float(ov @ token) for w, token in zip(weights, tokens, strict=True)) / sum(weights)
        assert float(model.predict(x, y[:, :-1])[b]) == pytest.approx(expected, abs=1e-10)


def test_two_small_opposite_heads_are_the_debiased_step():
    """The softmax is linear as omega goes to 0, and its constant part cancels: the error falls with omega squared."""
    x, y = (one.double() for one in TASKS.draw(200, 0))
    expected = debiased_step(x, y[:, :-1], TASKS.eta * torch.eye(5, dtype=torch.float64))
    errors = []
    for size in (1e-2, 1e-3):
        omega = torch.tensor([size, -size])
        model = built_regressor(omega, TASKS.eta / 2 / omega, 5).double()
        errors.append(float((model.predict(x, y[:, :-1]) - expected).abs().max()))
    assert errors[1] < 1e-5 < errors[0] and errors[0] / errors[1] == pytest.approx(100, rel=0.2)


def test_the_theory_foretells_the_loss_of_a_built_layer():
    """At long prompts, where the theory's neglected terms vanish."""
    tasks = NoisyRegressions(5, 640)
    omega, mu = torch.tensor([0.15, -0.15]), torch.tensor([2.0, -2.0])
    model = built_regressor(omega, mu, 5)
    assert squared_error(model, tasks, n=4000) == pytest.approx(float(surrogate(omega, mu, tasks)), rel=0.06)
    assert head_signs(model, tasks, n=200).tolist() == pytest.approx([1, -1], abs=0.1)
    assert squared_error(model, tasks, without=1, n=1000) > 1.5 * squared_error(model, tasks, n=1000)


def test_trained_heads_become_an_opposite_pair_and_one_head_cannot():
    tasks = NoisyRegressions(3, 20)
    pair = trained_regressor(tasks, 2, length=500, rate=0.03)
    single = trained_regressor(tasks, 1, length=300, rate=0.03)
    assert squared_error(pair, tasks) < 0.8 * squared_error(single, tasks)
    assert sorted(head_signs(pair, tasks).sign().tolist()) == [-1, 1]
    assert float(pair.mu.sum().abs()) < 0.1 * float(pair.mu.norm())
    x, y = tasks.draw(2000, 7)
    with torch.no_grad():
        both = torch.stack([pair.predict(x, y[:, :-1]), debiased_step(x, y[:, :-1], torch.eye(3))])
    assert float(torch.corrcoef(both)[0, 1]) > 0.97


@pytest.mark.slow
def test_trained_layers_have_the_losses_of_the_sheet():
    pair, single = trained_regressor(TASKS, 2), trained_regressor(TASKS, 1)
    assert squared_error(pair, TASKS) <= 0.26 and squared_error(single, TASKS) >= 0.38
    assert squared_error(pair, NoisyRegressions(5, 320)) < 0.15


def test_inputs_with_correlation_have_their_covariance():
    tasks = NoisyRegressions(3, 50, correlation=0.5)
    x = tasks.draw(2000, 0)[0].reshape(-1, 3)
    torch.testing.assert_close(torch.cov(x.T), tasks.covariance, atol=0.03, rtol=0)
    assert float(tasks.covariance[0, 2]) == 0.25
    with pytest.raises(InputError, match="between -1 and 1"):
        NoisyRegressions(correlation=1.0)
