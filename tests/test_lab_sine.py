"""#54, sines: the built network is a step of descent on the MLP's last layer, and training needs the MLP."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from manyheads.errors import InputError
from manyheads.lab.in_context.gradient_descent import half_error
from manyheads.lab.in_context.sine import (
    FeatureDescent,
    MeanLabel,
    SineAttention,
    SineTasks,
    built_sine,
    prediction_correlation,
    trained_sine,
)


def features(hidden=158, outputs=39):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(1, hidden), nn.GELU(), nn.Linear(hidden, outputs))


def test_the_built_network_is_a_step_of_torchs_own_gradient_on_the_last_layer():
    tasks, mlp = SineTasks(7), features()
    x, y = tasks.draw(20, 0)
    found = built_sine(mlp, 0.7, 7).predict(x, y[:, :-1])
    for b in range(20):
        w = torch.zeros(39, requires_grad=True)
        loss = 0.5 * (mlp(x[b, :-1]) @ w - y[b, :-1, 0]).square().mean()
        (gradient,) = torch.autograd.grad(loss, w)
        expected = float((-0.7 * gradient @ mlp(x[b, -1])).detach())
        assert float(found[b, 0]) == pytest.approx(expected, abs=1e-5)
    other = y.clone()
    other[:, -1] += 1  # the query's label is not told
    torch.testing.assert_close(built_sine(mlp, 0.7, 7).predict(x, other[:, :-1]), found)
    for wrong in (features(159), features(outputs=40), nn.Sequential(nn.Linear(1, 4))):
        with pytest.raises(InputError, match="features"):
            built_sine(wrong, 0.7, 7)


def test_the_descent_on_features_starts_at_its_w0():
    tasks, model = SineTasks(5), FeatureDescent()
    x, y = tasks.draw(10, 0)
    with torch.no_grad():
        model.w0.normal_()
        start = model.features(x[:, -1]) @ model.w0.T
        model.eta.zero_()
        torch.testing.assert_close(model.predict(x, y[:, :-1]), start, atol=1e-5, rtol=1e-4)
        assert prediction_correlation(model, model, tasks, n=50) == pytest.approx(1, abs=1e-5)


def test_sines_are_as_drawn_and_the_mean_label_is_nearly_as_good_as_nothing():
    x, y = SineTasks(50).draw(2000, 0)
    height = y.abs().amax((1, 2))
    assert float(x.min()) >= -5 and float(x.max()) <= 5 and float(height.min()) > 0.09 and float(height.max()) <= 0.5
    assert bool((SineTasks(50).draw(3, 1)[1] != SineTasks(50).draw(3, 2)[1]).any())
    tasks = SineTasks()
    _, labels = tasks.draw(10_000, 10**6 - 1, 1)
    nothing = float(0.5 * labels[:, -1].square().mean())
    assert nothing * 0.9 < half_error(MeanLabel(), tasks) < nothing * 1.2


def test_a_short_training_with_an_mlp_beats_one_without():
    tasks = SineTasks()
    with_mlp = half_error(trained_sine(SineAttention(), tasks, length=200), tasks)
    without = half_error(trained_sine(SineAttention(mlp=False), tasks, length=60), tasks)
    assert with_mlp < 0.9 * without
