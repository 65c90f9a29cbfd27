"""Linear attention over Hankel windows: the layer by hand, the least-squares baseline, training and roll-outs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.errors import InputError
from manyheads.lab.in_context.autoregression import (
    AutoregressiveSeries,
    HankelAttention,
    built_hankel,
    contraction,
    hankel,
    least_squares,
    rolled_out,
    trained_hankel,
)


def test_the_hankel_matrix_is_that_of_the_sheet():
    found = hankel(torch.tensor([[1.0, 2, 3, 4, 5]]), 2)[0]
    assert found.T.tolist() == [[1, 2, 3], [2, 3, 4], [3, 4, 5], [4, 5, 0]]


def test_layers_are_the_formula_with_whole_matrices():
    generator = torch.Generator().manual_seed(0)
    history, model = torch.randn(4, 9, generator=generator), HankelAttention(3, 2)
    with torch.no_grad():
        model.P.normal_(generator=generator)
        model.Q.normal_(generator=generator)
        for row, found in zip(history, model(history), strict=True):
            tokens = torch.stack([torch.cat([row, torch.zeros(1)])[j : j + 4] for j in range(7)], 1)
            mask = torch.diag(torch.tensor([1.0] * 6 + [0.0]))
            for p, q in zip(model.P, model.Q, strict=True):
                tokens = tokens + p @ tokens @ mask @ (tokens.T @ q @ tokens) / 6
            assert float(found) == pytest.approx(float(tokens[-1, -1]), rel=1e-4)


def test_with_softmax_the_query_column_takes_weight_and_is_left_out_afterwards():
    generator = torch.Generator().manual_seed(0)
    history, model = torch.randn(4, 9, generator=generator), HankelAttention(3, softmax=True)
    with torch.no_grad():
        model.P.normal_(generator=generator)
        model.Q.normal_(generator=generator)
        for row, found in zip(history, model(history), strict=True):
            columns = [torch.cat([row, torch.zeros(1)])[j : j + 4] for j in range(7)]
            weights = torch.stack([column @ model.Q[0] @ columns[-1] for column in columns]).softmax(0)
            read = sum(w * column for w, column in zip(weights[:-1], columns[:-1], strict=True))
            assert float(found) == pytest.approx(float((columns[-1] + model.P[0] @ read)[-1]), rel=1e-4)
    series, _ = AutoregressiveSeries(length=2000).draw(0)
    assert trained_hankel(series, 3, 8, softmax=True, length=2).softmax


def test_the_contraction_is_the_factor_of_a_step():
    for factor in (0.5, 0.9, 1.0):
        paths = rolled_out(lambda h, a=factor: a * h[:, -1], torch.tensor([[1.0], [-2.0]]), 100)
        assert contraction(paths) == pytest.approx(factor, rel=1e-3)
    assert np.isnan(contraction(torch.zeros(3, 100))) and np.isnan(contraction(torch.zeros(0, 100)))
    with pytest.raises(InputError, match="steps"):
        contraction(torch.ones(2, 10))


def test_the_layer_by_hand_is_its_formula_and_tends_to_least_squares():
    data = AutoregressiveSeries(length=20_000)
    series, _ = data.draw(0)
    rows = series.unfold(0, 3, 1)
    covariance = rows.T @ rows / len(rows)
    model, weights = built_hankel(covariance), least_squares(series, 3)
    window = series[:40]
    pairs = window.unfold(0, 4, 1)
    query = torch.linalg.solve(covariance, window[-3:])
    expected = (pairs[:, -1] * (pairs[:, :-1] @ query)).mean()
    with torch.no_grad():
        assert float(model(window[None])[0]) == pytest.approx(float(expected), abs=1e-5)
        errors = []
        for n in (30, 300, 3000):
            windows = series.unfold(0, n, 50)
            errors.append(float((model(windows) - windows[:, -3:] @ weights).square().mean()))
    assert errors[0] > 4 * errors[1] > 16 * errors[2]  # about 1 / n


def test_series_are_stationary_and_least_squares_finds_their_coefficients():
    for seed in range(3):
        data = AutoregressiveSeries(length=20_000)
        series, floor = data.draw(seed)
        a = data.coefficients(seed)
        found = least_squares(series, 3)
        np.testing.assert_allclose(found.numpy()[::-1], a, atol=0.03)
        rows = series.unfold(0, 4, 1)
        assert float((rows[:, :-1] @ found - rows[:, -1]).square().mean()) == pytest.approx(floor, rel=0.03)
        companion = np.vstack([a, np.eye(3)[:2]])
        assert np.abs(np.linalg.eigvals(companion)).max() < 1
        assert float(series.std()) == pytest.approx(1, abs=1e-3)


def test_a_trained_layer_comes_near_least_squares_and_does_not_beat_it():
    series, floor = AutoregressiveSeries(length=20_000).draw(0)
    losses = []
    for n in (8, 28):
        model, rows = trained_hankel(series, 3, n, length=200, rate=0.05), series.unfold(0, n + 1, 1)
        with torch.no_grad():
            losses.append(float((model(rows[:, :-1]) - rows[:, -1]).square().mean()))
    assert floor < losses[1] < losses[0] < 1.0


def test_a_forecast_joins_the_history_of_the_next():
    doubled = rolled_out(lambda h: 2 * h[:, -1], torch.tensor([[0.0, 1.0], [0.0, 0.0]]), 3)
    assert doubled.tolist() == [[2, 4, 8], [0, 0, 0]]
    away = rolled_out(lambda h: 50 * h[:, -1], torch.tensor([[1.0]]), 3)
    assert away.tolist() == [[50, torch.inf, torch.inf]]
    lengths = []
    rolled_out(lambda h: (lengths.append(h.shape[1]), h[:, -1])[1], torch.ones(1, 4), 3)
    assert lengths == [4, 5, 6]


def test_histories_that_are_too_short_are_refused():
    with pytest.raises(InputError, match="history"):
        trained_hankel(torch.zeros(100), 3, 3)
