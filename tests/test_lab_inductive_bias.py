"""#80: tails that are known are found, and where the fitted law is not the true one the estimate is seen to be off."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.stats import binom, ncx2

from manyheads.errors import InputError
from manyheads.lab.laws.inductive_bias import (
    KernelSpace,
    LossLaw,
    boolean_functions,
    class_errors,
    counted_bits,
    decision_lists,
    loss_law,
    network_losses,
    sankaran,
    spread_errors,
    tail_of_squares,
)

KNOWN = LossLaw(20.0, 10.0, 0.05)


def test_a_probability_of_1e_8_is_found_within_15_percent_where_counting_says_infinity():
    assert KNOWN.log_cdf(0.1254) == pytest.approx(-18.42, abs=0.005)
    losses = 0.05 * np.random.default_rng(0).noncentral_chisquare(20, 10, 10_000)
    law = loss_law(losses)
    assert law.log_cdf(0.1254) == pytest.approx(-18.42, rel=0.15)
    assert counted_bits(losses, 0.1254) == math.inf
    assert law.distance < 0.015 and abs(law.tail) < 0.3


def test_bits_fall_as_the_target_rises_also_across_the_change_to_the_saddle_point():
    law = LossLaw(60.0, 10.0, 0.01)
    targets = np.geomspace(1e-8, 1.0, 200)
    bits = np.array([law.bits(t) for t in targets])
    assert (np.diff(bits) < 0).all() and bits[0] > 700 and law.bits(0.0) == math.inf
    assert bits[-1] == pytest.approx(0, abs=0.5)


def test_the_saddle_point_is_the_law_where_it_is_known_and_sankarans_normal_is_9_percent_off():
    for df, nc, x in ((20, 10, 2.508), (3, 1, 0.01), (200, 50, 100.0), (20.5, 1e-6, 3.0)):
        one = tail_of_squares(np.array([1.0]), np.array([float(df)]), np.array([float(nc)]), x)
        assert one == pytest.approx(math.log(ncx2.cdf(x, df, nc)), abs=0.05)
    true = math.log(ncx2.cdf(2.508, 20, 10))
    assert 0.90 < sankaran(2.508, 20, 10) / true < 0.92
    assert sankaran(31.0, 20, 10) == pytest.approx(math.log(ncx2.cdf(31, 20, 10)), abs=0.01)


def test_the_saddle_point_of_different_squares_is_what_draws_say():
    rng = np.random.default_rng(0)
    values, counts = np.array([1.0, 0.3, 0.05]), np.array([1.0, 2.0, 4.0])
    nc = np.array([0.5, 0.0, 2.0])
    sums = sum(
        v * rng.noncentral_chisquare(c, max(n, 1e-12), 400_000) for v, c, n in zip(values, counts, nc, strict=True)
    )
    for x in (0.3, 0.6, 1.2):
        assert tail_of_squares(values, counts, nc, x) == pytest.approx(math.log((sums <= x).mean()), abs=0.05)
    with pytest.raises(InputError, match="below the mean"):
        tail_of_squares(values, counts, nc, 100.0)


def test_a_law_of_many_degrees_is_fitted_where_the_bessel_function_is_0():
    rng = np.random.default_rng(0)
    losses = 0.01 * rng.noncentral_chisquare(2000, 500, 2000)
    law = loss_law(losses)
    assert law.distance < 0.03
    assert law.log_cdf(21.0) == pytest.approx(math.log(ncx2.cdf(2100, 2000, 500)), rel=0.3)
    for wrong in (np.ones(100), -losses, losses[:10], np.append(losses, np.nan)):
        with pytest.raises(InputError):
            loss_law(wrong)


def problem(seed=0, inputs=2):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, inputs)), rng.normal(size=(40, 2))
    return x[:20], y[:20], x[20:], y[20:]


def test_kernel_draws_are_those_of_the_process_that_fits_the_training_data():
    """Beside Matheron's rule: draws of the whole process, moved by what they miss on the training data. Means within 2 %."""
    x, y, held, true = problem()
    space = KernelSpace.given(x, y, held, true)
    losses = space.losses(4000)
    expected = (2 * np.trace(space.covariance) + ((space.mean - true) ** 2).sum()) / true.size
    assert losses.mean() == pytest.approx(expected, rel=0.02)
    every = np.vstack([x, held])
    kernel = np.exp(-((every[:, None] - every) ** 2).sum(-1) / 2) + 1e-8 * np.eye(40)
    prior = np.linalg.cholesky(kernel) @ np.random.default_rng(1).normal(size=(4000, 40, 2))
    moved = prior[:, 20:] + kernel[20:, :20] @ np.linalg.solve(kernel[:20, :20], y - prior[:, :20])
    direct = ((moved - true) ** 2).mean((1, 2))
    assert losses.mean() == pytest.approx(direct.mean(), rel=0.02)
    assert losses.std() == pytest.approx(direct.std(), rel=0.1)


def test_the_tail_of_kernel_space_is_what_draws_say_where_they_reach():
    space = KernelSpace.given(*problem(1))
    losses = space.losses(40_000)
    for share in (0.001, 0.01, 0.1):
        assert space.log_cdf(float(np.quantile(losses, share))) == pytest.approx(math.log(share), abs=0.25)


def test_a_good_fit_of_the_draws_is_no_good_fit_of_the_far_tail():
    """Why the distance is not enough: kernel space has squares of different sizes, the fitted law has equal ones."""
    values, counts = 1.0 / np.arange(1, 41), np.full(40, 10.0)
    rng = np.random.default_rng(0)
    law = loss_law(sum(v * rng.chisquare(10, 4000) for v in values))
    assert law.distance < 0.02
    assert law.log_cdf(8.0) / tail_of_squares(values, counts, np.zeros(40), 8.0) < 0.8


def test_networks_fit_what_they_are_trained_on_and_differ_where_they_are_not():
    x, y, held, true = problem(2)
    trained, tested = network_losses(x, y, held, true, n=30, hidden=64, steps=400, rate=1e-2)
    assert trained.max() < 0.5 * y.var() and len(np.unique(tested)) == 30
    alone, _ = network_losses(x, y, held, true, n=30, hidden=64, steps=1, rate=0.0)
    assert alone.min() > trained.max()
    again, _ = network_losses(x, y, held, true, n=30, hidden=64, steps=400, rate=1e-2)
    np.testing.assert_allclose(again, trained)


def test_all_boolean_functions_have_binomial_errors_and_a_bit_for_each_input_not_seen():
    found = boolean_functions(3)
    assert found.shape == (256, 8) and len({tuple(row) for row in found.tolist()}) == 256
    truth = found[91]
    for n in (0, 3, 7):
        errors = class_errors(found, truth, np.arange(n))
        assert counted_bits(errors, 0.0) == 8 - n
        for wrong in range(8 - n + 1):
            expected = -math.log2(binom.cdf(wrong, 8 - n, 0.5))
            assert counted_bits(errors, wrong / (8 - n)) == pytest.approx(expected)


def test_decision_lists_are_all_there_and_say_what_they_say():
    two = decision_lists(2)
    assert len(two) == 2 * (1 + 2 * 4 + 2 * 16) and len(decision_lists(3)) == 986
    functions = {tuple(row) for row in two.tolist()}
    parity = {row for row in product((False, True), repeat=4) if row[0] == row[3] != row[1] == row[2]}
    assert functions == set(product((False, True), repeat=4)) - parity  # all but exclusive or, and its opposite
    seen = np.array([0, 1, 2])  # where the truth is False: that it stays so is likelier than by a coin
    assert counted_bits(class_errors(two, np.array([False] * 4), seen), 0.0) < 0.5
    assert counted_bits(class_errors(two, np.array([False] * 3 + [True]), seen), 0.0) > 2.0


def test_spread_errors_keep_the_probability_of_every_error():
    errors = np.repeat([0.0, 0.25, 0.5], [10, 30, 60])
    moved = spread_errors(errors, 0.25)
    for t in (0.0, 0.25, 0.5):
        assert (moved <= t + 0.25).mean() == (errors <= t).mean()
    with pytest.raises(InputError, match="0 hypotheses fit"):
        class_errors(decision_lists(2), np.array([False, True, True, False]), np.arange(4))
