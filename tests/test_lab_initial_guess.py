"""Linear attention with a guess in the query's label: the built step, exact losses, and the best heads without a guess."""

from __future__ import annotations

import pytest
import torch

from manyheads.errors import InputError
from manyheads.lab.in_context.initial_guess import (
    GuessingAttention,
    PriorRegressions,
    built_guess,
    exact_loss,
    least_squares_heads,
    step_from,
    trained_guess,
)


def whole_layer(model, x, y):
    """E + (1 / C) sum_h V_h E M E^T K_h E of the paper, with whole matrices; the entry at the bottom right."""
    d, c = model.g.numel(), y.shape[1]
    found = []
    for inputs, labels in zip(x, y, strict=True):
        e = torch.cat([inputs, torch.cat([labels, (inputs[-1] @ model.g)[None]])[:, None]], 1).T
        mask = torch.diag(torch.cat([torch.ones(c), torch.zeros(1)]))
        out = e.clone()
        for v, k in zip(model.V, model.K, strict=True):
            matrix = torch.randn(d + 1, d + 1)  # its other rows must not matter
            matrix[-1] = v
            out = out + matrix @ e @ mask @ e.T @ k @ e / c
        found.append(out[-1, -1])
    return torch.stack(found)


def test_the_built_head_is_a_step_of_gradient_descent_from_any_start():
    tasks = PriorRegressions(4, 7)
    x, y = tasks.draw(20, 0)
    w0 = torch.randn(4, generator=torch.Generator().manual_seed(1))
    model = built_guess(w0, 0.7)
    with torch.no_grad():
        found, whole = model.predict(x, y[:, :-1]), whole_layer(model, x, y[:, :-1])
    w = w0.expand(20, 4).clone().requires_grad_()
    loss = 0.5 * (torch.einsum("bcd,bd->bc", x[:, :-1], w) - y[:, :-1]).square().mean(-1).sum()
    (gradient,) = torch.autograd.grad(loss, w)
    expected = ((w - 0.7 * gradient) * x[:, -1]).sum(-1).detach()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step_from(w0, 0.7, x, y[:, :-1]), expected, atol=1e-5, rtol=1e-5)


def test_several_heads_are_the_layer_of_the_paper():
    x, y = PriorRegressions(3, 5).draw(6, 0)
    model = GuessingAttention(3, 3, seed=2)
    with torch.no_grad():
        model.g.copy_(torch.tensor([0.5, -1.0, 2.0]))
        torch.testing.assert_close(model.predict(x, y[:, :-1]), whole_layer(model, x, y[:, :-1]), atol=1e-5, rtol=1e-5)


def test_the_exact_loss_is_the_closed_form_and_the_mean_over_draws():
    for tasks in (PriorRegressions(), PriorRegressions(3, 4, 2.0)):
        eta, loss = tasks.best
        assert exact_loss(built_guess(tasks.mean, eta), tasks) == pytest.approx(loss, rel=1e-5)
    assert PriorRegressions(10, 10).best[1] == pytest.approx(5.238, abs=5e-4)
    tasks = PriorRegressions(3, 4, 2.0)
    model = GuessingAttention(3, 2, seed=3)
    with torch.no_grad():
        model.V.add_(0.3)
        model.g.copy_(torch.tensor([0.2, -0.4, 0.6]))
        x, y = tasks.draw(200_000, 0)
        drawn = float((model.predict(x, y[:, :-1]) - y[:, -1]).square().mean())
    assert exact_loss(model, tasks) == pytest.approx(drawn, rel=0.02)


@pytest.mark.parametrize(
    ("square", "losses"),
    [
        (5.0, {1: 3.14, 2: 2.44, 3: 2.23, 4: 2.13, 5: 2.07, 6: 2.07, 7: 2.07}),
        (20.0, {1: 6.48, 2: 4.10, 4: 2.89, 5: 2.64, 6: 2.64}),
    ],
)
def test_the_best_heads_without_a_guess_have_the_losses_of_the_sheet(square, losses):
    tasks = PriorRegressions(square=square)
    found = {heads: exact_loss(least_squares_heads(tasks, heads, rounds=100), tasks) for heads in losses}
    assert found == pytest.approx(losses, rel=0.03)


def test_without_a_mean_all_numbers_of_heads_tie():
    tasks = PriorRegressions(square=0.0)
    for heads in (1, 2, 6):
        assert exact_loss(least_squares_heads(tasks, heads, rounds=60, starts=1), tasks) == pytest.approx(
            1.875, rel=0.01
        )


def test_a_trained_guess_becomes_the_mean_of_the_tasks():
    tasks = PriorRegressions(3, 6, 6.0)
    model = trained_guess(tasks, length=300, rate=0.04)
    assert exact_loss(model, tasks) < 1.03 * tasks.best[1]
    torch.testing.assert_close(model.g.detach(), tasks.mean, atol=0.2, rtol=0)
    without = trained_guess(tasks, guess=False, length=200, rate=0.03)
    assert exact_loss(without, tasks) > 1.3 * tasks.best[1] and not without.g.any()


@pytest.mark.slow
def test_a_trained_guess_reaches_the_step_within_2_percent():
    for square in (5.0, 20.0):
        tasks = PriorRegressions(square=square)
        assert exact_loss(trained_guess(tasks), tasks) < 1.02 * 1.875


def test_wrong_sizes_are_refused():
    with pytest.raises(InputError, match="inputs"):
        PriorRegressions(11)
