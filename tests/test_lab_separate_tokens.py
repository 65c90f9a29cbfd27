"""Inputs and labels in tokens of their own: built copying is exact, and training does not need it built."""

from __future__ import annotations

import torch

from manyheads.lab.in_context.gradient_descent import RegressionTasks, descended, half_error
from manyheads.lab.in_context.separate_tokens import CopyThenDescend, built_copying, partner_attention, trained_copying


def test_the_built_layers_copy_inputs_to_labels_and_then_do_one_step():
    tasks = RegressionTasks(5, 8, a=1.0)
    x, y = tasks.draw(50, 0)
    expected = descended(x, y[:, :-1], torch.tensor([1.7]))
    model = built_copying(5, 8, 1.7)
    torch.testing.assert_close(model.predict(x, y[:, :-1]), expected, atol=1e-5, rtol=1e-5)
    assert partner_attention(model, tasks)[0] > 1 - 1e-6
    blunt = built_copying(5, 8, 1.7, sharpness=1.0)
    assert partner_attention(blunt, tasks)[0] < 0.3
    assert float((blunt.predict(x, y[:, :-1]) - expected).detach().abs().max()) > 0.1


def test_tokens_alternate_and_the_query_is_last():
    x, y = RegressionTasks(2, 3).draw(4, 0)
    tokens = CopyThenDescend(2).tokens(x, y[:, :-1])
    assert tokens.shape == (4, 7, 13)
    torch.testing.assert_close(tokens[:, ::2, :2], x)
    torch.testing.assert_close(tokens[:, 1::2, 2], y[:, :-1, 0])
    assert not tokens[:, ::2, 2].any() and not tokens[:, 1::2, :2].any()


def test_without_copying_a_layer_cannot_learn_and_with_it_it_does():
    tasks = RegressionTasks(1, 4, a=1.0)
    nothing = 1 / 6
    assert half_error(trained_copying(tasks, length=250, rate=1e-2), tasks) < 0.8 * nothing
    assert half_error(trained_copying(tasks, copying=False, length=100, rate=1e-2), tasks) > 0.9 * nothing
