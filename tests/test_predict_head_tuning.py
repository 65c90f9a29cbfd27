"""Head tuning (#25): risk by width is exact on the construction, peaks at p = n there and on a trained model's states."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import manyheads as mh
from manyheads.errors import InputError
from manyheads.evaluation import experiments
from manyheads.predict.transfer.head_tuning import min_norm_head, ridge_head, risk_by_width, width_sweep
from manyheads.predict.transfer.small_sets import StateChain, belief_states, next_word_states


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_the_head_is_the_least_squares_solution_of_least_norm(seed, n, p, q):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((n, p)), rng.standard_normal((n, q))
    wanted = np.linalg.lstsq(X, Y, rcond=None)[0]
    np.testing.assert_allclose(min_norm_head(X, Y), wanted, atol=1e-6 * max(1, np.abs(wanted).max()))
    if p > n:
        np.testing.assert_allclose(X @ min_norm_head(X, Y), Y, atol=1e-6 * max(1, np.abs(wanted).max()))


def test_ridge_is_the_head_of_its_normal_equations():
    rng = np.random.default_rng(0)
    X, Y = rng.standard_normal((8, 5)), rng.standard_normal((8, 2))
    theta = ridge_head(X, Y, 0.3)
    np.testing.assert_allclose((X.T @ X + 0.3 * 8 * np.eye(5)) @ theta, X.T @ Y, atol=1e-10)


@pytest.mark.parametrize("mixing", ["nested", "mixed"])
def test_the_population_gives_a_heads_excess_risk_exactly(mixing):
    chain = StateChain(latent=6, width=9, blur=0.7, mixing=mixing, outputs=2, noise=0.0, seed=3)
    theta = np.random.default_rng(1).standard_normal((9, 2))
    rows, wanted = chain.population
    exact = np.square(rows @ theta - wanted).sum(1).mean()
    x, y = chain.sample(100_000, 0)  # without noise y is E[y|z]
    assert np.square(x @ theta - y).sum(1).mean() == pytest.approx(exact, rel=0.03)


def test_the_chain_is_stationary_and_remembers():
    x, _ = StateChain(latent=50, width=50, memory=0.5).sample(4000, 0)
    assert x.var() == pytest.approx(1, abs=0.02)
    assert (x[1:] * x[:-1]).mean() == pytest.approx(0.5, abs=0.02)


def test_risk_is_bias_and_variance():
    chain = StateChain(latent=80, width=80)
    table = risk_by_width(lambda i: chain.sample(20, i), chain.population, (0, 5, 19, 20, 40, 80), draws=7).table
    np.testing.assert_allclose(table["risk"], table["bias2"] + table["variance"], rtol=1e-9)
    assert table["bias2"][0] == pytest.approx(1) and table["variance"][0] == 0


def test_the_sheets_curve():
    """Risk rises over p = 0, 10, 30, 50; over 20 times that of p = 0 beside p = n = 60; under twice at p = 600."""
    chain = StateChain()
    sweep = risk_by_width(lambda i: chain.sample(60, i), chain.population, (0, 10, 30, 50, 58, 60, 62, 300, 600))
    risks = [sweep.risk(p) for p in (0, 10, 30, 50)]
    assert risks == sorted(set(risks)) and risks[0] == pytest.approx(1)
    assert sweep.risk(58) > 20 and sweep.risk(62) > 20 and sweep.peak == 60 and sweep.best == 0
    assert sweep.risk(600) < 1.2 < sweep.risk(300) < 2
    ridge = risk_by_width(lambda i: chain.sample(60, i), chain.population, (0, 58, 60, 62), head=ridge_head)
    assert ridge.table["risk"].max() < 1.5


def test_with_a_few_strong_features_the_best_width_is_not_zero():
    chain = StateChain(latent=3, width=200, signal=3, blur=0.5, mixing="mixed")
    sweep = risk_by_width(lambda i: chain.sample(60, i), chain.population, (0, 5, 10, 20, 59, 60, 61, 200))
    assert sweep.risk(10) < 0.2 * sweep.risk(0) and sweep.risk(10) < sweep.risk(59) and sweep.peak == 60


def test_states_of_ladon_show_the_peak():
    states, letters = next_word_states(mh.open_model(), 3, n=600)
    assert states.shape == (600, 256) and letters.shape == (600,) and (letters >= 1).all()
    sweep = width_sweep(states, letters, 40, (0, 10, 38, 40, 42, 120, 256), draws=8)
    assert sweep.peak == 40 and sweep.risk(40) > 10 * sweep.risk(256) and 0.7 < sweep.risk(0) < 1.4


@pytest.mark.parametrize("order", ["pca", "random", "given"])
def test_a_column_in_another_unit_changes_nothing(order):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 12))
    y = x[:, 0] + 0.1 * rng.standard_normal(200)
    one = width_sweep(x, y, 50, (3, 12), order=order, draws=3).table
    two = width_sweep(x * np.logspace(0, 3, 12) + 5, 10 * y, 50, (3, 12), order=order, draws=3).table
    np.testing.assert_allclose(one, two, rtol=1e-6)
    assert one["risk"].iloc[-1] < 0.05  # all columns are there in each order


def test_nothing_is_learned_of_targets_that_are_noise():
    rng = np.random.default_rng(0)
    sweep = width_sweep(rng.standard_normal((400, 20)), rng.standard_normal(400), 100, (0, 20))
    assert sweep.risk(20) > sweep.risk(0)


def test_beliefs_are_those_of_a_filter_and_the_experiment_is_registered():
    beliefs, target = belief_states(50, 6, 4)
    np.testing.assert_allclose(np.exp(beliefs).sum(1), 1, atol=1e-4)
    assert target.shape == (50,)
    assert {"head-tuning", "head-tuning-real"} <= set(experiments("predict"))


@pytest.mark.usefixtures("any_shape")
def test_what_cannot_be_swept_is_refused():
    x, y = np.ones((10, 3)), np.arange(10.0)
    with pytest.raises(InputError, match="too few for n = 9"):
        width_sweep(x, y, 9)
    with pytest.raises(InputError, match="same in every row"):
        width_sweep(x, np.ones(10), 4)
    with pytest.raises(InputError, match="NaN"):
        width_sweep(x, np.full(10, np.nan), 4)
    with pytest.raises(InputError, match="a width is 4"):
        width_sweep(x, y, 4, [4])
    with pytest.raises(InputError, match="mixing"):
        StateChain(mixing="no")
