"""How far good models disagree: closed forms, bootstrap inside the exact ranges, brute force, and the face of scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.datasets import load_breast_cancer
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.tables.multiplicity import MultiplicityClassifier, pool_multiplicity


def drawn(n=200, seed=0, weights=(1.0, -1.0, 0.5), bias=-0.3):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, len(weights)))
    return X, rng.random(n) < expit(X @ np.array(weights) + bias), rng


@pytest.mark.parametrize(
    "p, epsilon, low, high",
    [(0.5, 0.1, 0.28712, 0.71288), (0.5, 0.01, 0.42964, 0.57036), (0.2, 0.05, 0.09519, 0.34354)],
)
def test_without_covariates_the_range_is_where_the_divergence_is_at_most_epsilon(p, epsilon, low, high):
    y = np.arange(1000) < 1000 * p
    ((found_low, found_high),) = (
        MultiplicityClassifier(epsilon).fit(np.zeros((1000, 1)), y).viable_range(np.zeros((1, 1)))
    )
    assert (found_low, found_high) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


@pytest.mark.parametrize("epsilon, wider, near", [(0.01, 1.12, 0.015), (0.05, 1.35, None)])
def test_exact_ranges_hold_bootstrap_models_and_are_wider(epsilon, wider, near):
    X, y, rng = drawn()
    fitted = MultiplicityClassifier(epsilon).fit(X, y)
    exact = fitted.viable_range(X)
    signs, kept = np.where(y, 1, -1), []
    for _ in range(120):
        rows = rng.integers(len(X), size=len(X))
        refit = LogisticRegression(C=np.inf, tol=1e-8).fit(X[rows], y[rows])
        scores = refit.decision_function(X)
        if np.logaddexp(0, -signs * scores).mean() <= fitted.loss_ + epsilon:
            kept.append(expit(scores))
    low, high = np.min(kept, 0), np.max(kept, 0)
    assert (low >= exact[:, 0] - 1e-7).all() and (high <= exact[:, 1] + 1e-7).all()
    assert (exact[:, 1] - exact[:, 0]).mean() >= wider * (high - low).mean()
    # The ellipsoid of the Hessian is close for a small slack only.
    rows, w0 = np.column_stack([X, np.ones(len(X))]), np.r_[fitted.coef_, fitted.intercept_]
    p = expit(rows @ w0)
    hessian = (rows.T * (p * (1 - p))) @ rows / len(rows)
    reach = np.sqrt(2 * epsilon * np.einsum("nd,dn->n", rows, np.linalg.solve(hessian, rows.T)))
    off = np.abs(np.stack([expit(rows @ w0 - reach), expit(rows @ w0 + reach)], 1) - exact).max()
    assert off < near if near else off > 0.04


def test_a_range_ends_where_a_constrained_fit_uses_up_the_slack():
    from scipy.optimize import minimize

    X, y, _ = drawn(60, 3)
    epsilon, signs = 0.03, np.where(y, 1, -1)
    fitted = MultiplicityClassifier(epsilon).fit(X, y)
    rows = np.column_stack([X, np.ones(len(X))])

    def loss(w):
        return np.logaddexp(0, -signs * (rows @ w)).mean()

    for i in (0, 7, 31):
        found = minimize(
            lambda w, i=i: -rows[i] @ w,
            np.r_[fitted.coef_, fitted.intercept_],
            constraints={"type": "ineq", "fun": lambda w: fitted.loss_ + epsilon - loss(w)},
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert expit(rows[i] @ found.x) == pytest.approx(fitted.viable_range(X[i : i + 1])[0, 1], abs=1e-4)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.005, 0.02, 0.08]), st.sampled_from([0.05, 0.1, 0.3]))
def test_ranges_grow_with_epsilon_and_one_model_conflicts_less_than_many(seed, epsilon, delta):
    X, y, _ = drawn(50, seed, (1.0, -0.5))
    if len(np.unique(y)) < 2:
        return
    small, large = (MultiplicityClassifier(e, C=100).fit(X, y) for e in (epsilon, epsilon + 0.01))
    inner, outer = small.viable_range(X), large.viable_range(X)
    assert (outer[:, 0] <= inner[:, 0] + 1e-9).all() and (outer[:, 1] >= inner[:, 1] - 1e-9).all()
    p = small.predict_proba(X)[:, 1]
    assert (inner[:, 0] <= p + 1e-9).all() and (inner[:, 1] >= p - 1e-9).all()
    if epsilon == 0:
        assert np.ptp(inner, 1) == pytest.approx(0)
    found = small.discrepancy(X, delta)
    assert found.value <= small.ambiguity(X, delta) == found.at_most
    assert small.ambiguity(X, delta) >= small.ambiguity(X, delta + 0.1)


def test_the_programs_meet_what_a_search_over_all_models_finds():
    X, y, rng = drawn(30, 0, (1.0, -1.0))
    fitted = MultiplicityClassifier(0.05).fit(X, y)
    found = fitted.discrepancy(X, 0.1, exact=True, seconds=20)
    assert found.value == pytest.approx(found.at_most)
    rows, w0, signs = np.column_stack([X, np.ones(30)]), np.r_[fitted.coef_, fitted.intercept_], np.where(y, 1, -1)
    p = expit(rows @ w0)
    spread = np.linalg.cholesky(np.linalg.inv((rows.T * (p * (1 - p))) @ rows / 30))
    directions = rng.normal(size=(100_000, 3))
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    tried = w0 + (directions * np.sqrt(0.1) * rng.uniform(0.6, 1.6, (100_000, 1))) @ spread.T
    tried = tried[np.logaddexp(0, -signs * (tried @ rows.T)).mean(1) <= fitted.loss_ + 0.05]
    searched = (np.abs(expit(tried @ rows.T) - p) >= 0.1).mean(1).max()
    assert found.value >= searched - 1e-9 and found.value - searched <= 1.5 / 30
    moved = np.abs(expit(rows @ found.weights) - p) >= 0.1 - 1e-5
    assert moved.mean() == pytest.approx(found.value)


def test_on_real_cancer_data_retraining_sees_only_a_part_of_it():
    data = load_breast_cancer()
    X, y = data.data[:, :4], data.target
    fitted = MultiplicityClassifier(0.01).fit(X, y)
    exact = fitted.ambiguity(X, 0.1)
    rng, models = (
        np.random.default_rng(0),
        [LogisticRegression(C=np.inf, max_iter=2000).fit((X - X.mean(0)) / X.std(0), y)],
    )
    scaled = (X - X.mean(0)) / X.std(0)
    for _ in range(30):
        rows = rng.integers(len(X), size=len(X))
        models.append(LogisticRegression(C=np.inf, max_iter=2000).fit(scaled[rows], y[rows]))
    pool = pool_multiplicity(models, scaled, y, epsilon=0.01, delta=0.1)
    assert pool.ambiguity < exact and pool.discrepancy <= pool.ambiguity
    assert (pool.ranges[:, 0] >= fitted.viable_range(X)[:, 0] - 1e-4).all()


def test_forests_of_other_seeds_are_rivals_too():
    X, y, _ = drawn(300)
    forests = [RandomForestClassifier(30, min_samples_leaf=5, random_state=seed).fit(X, y) for seed in range(4)]
    found = pool_multiplicity(forests, X, y, epsilon=0.05, delta=0.05)
    assert found.rivals[0] and 0 < found.discrepancy <= found.ambiguity <= 1
    with pytest.raises(InputError, match="two at least"):
        pool_multiplicity(forests[:1], X, y)
    other = RandomForestClassifier(5, random_state=0).fit(X, np.where(y, "a", "b"))
    with pytest.raises(InputError, match="same two classes"):
        pool_multiplicity([forests[0], other], X, y)


@parametrize_with_checks([MultiplicityClassifier()])
@pytest.mark.filterwarnings("ignore:a line tells")
def test_it_is_an_estimator(estimator, check):
    check(estimator)


def test_two_classes_that_a_line_tells_apart_are_said():
    X = np.arange(20.0)[:, None]
    with pytest.warns(UserWarning, match="a line tells"):
        MultiplicityClassifier().fit(X, X[:, 0] > 9)


def test_the_command_prints_how_far_models_disagree_and_writes_the_rows(tmp_path):
    X, y, _ = drawn(120)
    frame = pd.DataFrame(X, columns=["a", "b", "c"]).assign(
        kind=np.where(X[:, 0] > 0, "x", "z"), y=np.where(y, "yes", "no")
    )
    frame.loc[[0, 7], "a"] = np.nan
    frame.to_csv(tmp_path / "data.csv", index=False)
    out = tmp_path / "rows.parquet"
    told = [
        "judge",
        "multiplicity",
        str(tmp_path / "data.csv"),
        "--target",
        "y",
        "--epsilon",
        "0.02",
        "--out",
        str(out),
    ]
    found = CliRunner().invoke(app, told)
    assert found.exit_code == 0, found.output
    table = pd.read_parquet(out)
    assert (
        table["row"].tolist() == [row for row in range(120) if row not in (0, 7)]
        and (table["lowest"] <= table["probability"]).all()
        and (table["highest"] >= table["probability"]).all()
    )
    assert "2 of 120 rows lack a value" in found.output
    share = (np.maximum(table["highest"] - table["probability"], table["probability"] - table["lowest"]) >= 0.1).mean()
    assert f"{share:.2f}" in found.output
    for bad, said in [
        (["--target", "none"], "no column"),
        (["--target", "a"], "two classes"),
        (["--epsilon", "-1"], "epsilon"),
    ]:
        failed = CliRunner().invoke(app, [*told[:-2], *bad])
        assert failed.exit_code == 2 and said in failed.output, failed.output
