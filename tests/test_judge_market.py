"""Markets: prices by closed forms and by the solver, budgets conserved, specialists, forests, and scikit-learn's own checks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_breast_cancer, load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.utils.estimator_checks import parametrize_with_checks
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.market import bets_on, market_price, settle_bets, solved_price
from manyheads.judge.market_claims import specialists
from manyheads.judge.market_classifier import ForestMarket, MarketClassifier, Specialist


def drawn(seed, m=4, n=6, k=3, silent=0.3):
    draw = np.random.default_rng(seed)
    beliefs = draw.dirichlet(np.ones(k), (m, n))
    beliefs[draw.random((m, n)) < silent] = 0
    beliefs[0] = np.where(beliefs.sum(0).sum(-1)[:, None] == 0, 1 / k, beliefs[0])
    return draw.dirichlet(np.ones(m)), beliefs, draw.integers(k, size=n)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 5))
def test_prices_are_the_closed_forms_and_the_general_solver_agrees(seed, k):
    budgets, beliefs, _ = drawn(seed, k=k)
    held = np.einsum("m,mnk->nk", budgets, beliefs)
    constant = market_price(budgets, beliefs)
    assert constant == pytest.approx(held / held.sum(1, keepdims=True), abs=1e-12)
    assert solved_price(budgets, beliefs, "constant") == pytest.approx(constant, abs=1e-8)
    linear = market_price(budgets, beliefs, "linear")
    assert solved_price(budgets, beliefs, "linear") == pytest.approx(linear, abs=1e-8)
    if k == 2:
        assert linear[:, 1] == pytest.approx(held[:, 1] ** 0.5 / (held**0.5).sum(1), abs=1e-8)
    for betting in ("constant", "linear", "aggressive"):
        price = market_price(budgets, beliefs, betting)
        assert price.sum(1) == pytest.approx(1)
        bets = (
            beliefs
            * {"constant": 1, "linear": 1 - price, "aggressive": np.clip((beliefs - price) / 0.01, 0, 1)}[betting]
        )
        staked = np.einsum("m,mnk->nk", budgets, bets)
        assert staked == pytest.approx(price * staked.sum(1, keepdims=True), abs=1e-6), "paid out is what was staked"


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["constant", "linear", "aggressive", "logistic"]), st.floats(0.05, 1))
def test_what_one_wins_others_lose(seed, betting, eta):
    budgets, beliefs, y = drawn(seed, k=2, n=40)
    after = settle_bets(budgets, beliefs, y, betting, eta=eta)
    assert after.sum() == pytest.approx(1, abs=1e-9 if betting != "aggressive" else 1e-5) and (after >= -1e-12).all()
    gains = bets_on(budgets, beliefs, y, betting).gains
    assert budgets @ gains == pytest.approx(0, abs=1e-9 if betting != "aggressive" else 1e-4)


def test_an_aggressive_believer_alone_drives_the_price_to_its_belief():
    beliefs = np.array([[[0.7, 0.3]]])
    assert market_price(np.ones(1), beliefs, "aggressive") == pytest.approx(beliefs[0], abs=1e-3)
    assert market_price(np.ones(1), beliefs, "linear")[0, 0] == pytest.approx(0.7**0.5 / (0.7**0.5 + 0.3**0.5))


def test_logistic_bets_pool_log_odds():
    budgets, beliefs, _ = drawn(3, k=2, silent=0)
    odds = np.log(beliefs[..., 1] / beliefs[..., 0])
    assert market_price(budgets, beliefs, "logistic")[:, 1] == pytest.approx(1 / (1 + np.exp(-budgets @ odds)))
    with pytest.raises(InputError, match="two classes"):
        market_price(*drawn(0)[:2], "logistic")


def test_where_nobody_bets_the_price_is_the_prior():
    beliefs = np.zeros((2, 1, 3))
    assert market_price(np.ones(2) / 2, beliefs) == pytest.approx(np.full((1, 3), 1 / 3))
    assert market_price(np.ones(2) / 2, beliefs, "linear", prior=np.array([0.5, 0.3, 0.2]))[0] == pytest.approx(
        [0.5, 0.3, 0.2]
    )
    for wrong in (np.full((2, 1, 3), 0.5), np.full((2, 1, 3), -0.1), np.full((2, 1, 3), np.nan)):
        with pytest.raises(InputError, match="beliefs are"):
            market_price(np.ones(2), wrong)
    with pytest.raises(InputError, match="give each a budget"):
        market_price(np.array([-1.0, 2.0]), beliefs)


@pytest.mark.parametrize("betting, most", [("constant", 0.50), ("linear", 0.65)])
def test_specialists_become_rich_and_are_believed_where_they_speak(betting, most):
    (beliefs, y), (test, labels) = specialists(2000, 0), specialists(5000, 1)
    budgets = np.full(15, 1 / 15)
    before, likelihood = market_price(budgets, test, betting), []
    for _ in range(50):
        likelihood.append(np.log(bets_on(budgets, beliefs, y, betting).price).mean())
        budgets = settle_bets(budgets, beliefs, y, betting)
    after, rows = market_price(budgets, test, betting), np.arange(5000)
    assert budgets[:5].sum() > 0.95
    assert -np.log(after[rows, labels]).mean() <= most and (after.argmax(1) != labels).mean() <= 0.12
    assert (before.argmax(1) != labels).mean() > 0.28
    if betting == "constant":
        assert (np.diff(likelihood) >= -1e-12).all()


def test_leaves_with_equal_budgets_are_the_forest():
    X, y = load_digits(return_X_y=True)
    rest, held, labels, known = train_test_split(X, y, test_size=0.5, random_state=0)
    forest = RandomForestClassifier(50, random_state=0, n_jobs=1).fit(rest, labels)
    market = ForestMarket(forest)
    assert market.predict_proba(held) == pytest.approx(forest.predict_proba(held), abs=1e-6)
    a, b, u, v = train_test_split(held, known, test_size=0.5, random_state=0)
    before = -np.log(np.maximum(market.predict_proba(b)[np.arange(len(v)), v], 1e-12)).mean()
    after = market.settle(a, u, passes=20).predict_proba(b)
    assert -np.log(np.maximum(after[np.arange(len(v)), v], 1e-12)).mean() < before
    assert market.budgets_.sum() == pytest.approx(1)


def test_a_classifier_of_markets_believes_the_better_and_learns_online():
    X, y = load_breast_cancer(return_X_y=True)
    noise = np.random.default_rng(0).normal(size=(len(X), 2))
    wide = np.column_stack([noise, X])
    good, blind = (
        LogisticRegression(max_iter=5000),
        Specialist(LogisticRegression(), lambda X: np.asarray(X)[:, 0] > 10),
    )
    poor = Specialist(LogisticRegression(), lambda X: np.asarray(X)[:, 0] > -10)
    poor.set_params(estimator=RandomForestClassifier(1, max_depth=1, random_state=0))
    market = MarketClassifier([good, poor, blind]).fit(wide[:400], y[:400])
    assert market.budgets_[0] > 0.6 > market.budgets_[1] and market.budgets_.sum() == pytest.approx(1)
    assert (market.beliefs(wide)[2] == 0).all(), "who never saw a row of its own stays silent"
    assert (np.diff(market.log_likelihood_) >= -1e-12).all()
    before = market.budgets_.copy()
    market.settle(wide[400:], 1 - y[400:])  # the world turns round
    assert market.budgets_[0] < before[0] and market.budgets_.sum() == pytest.approx(1)
    with pytest.raises(InputError, match="no class"):
        market.settle(wide[:2], np.array([0, 7]))


@parametrize_with_checks([MarketClassifier([LogisticRegression(), LogisticRegression(C=0.01)], passes=5)])
def test_it_is_an_estimator(estimator, check):
    check(estimator)


def test_the_command_shows_who_is_believed(tmp_path):
    data = load_breast_cancer(as_frame=True).frame.iloc[:, [0, 1, 4, 30]]
    data.to_csv(tmp_path / "cancer.csv", index=False)
    out = tmp_path / "p.parquet"
    told = CliRunner().invoke(
        app, ["judge", "market", str(tmp_path / "cancer.csv"), "--target", "target", "--out", str(out)]
    )
    assert told.exit_code == 0, told.output
    table = pd.read_parquet(out)
    assert table[["0", "1"]].sum(axis=1).to_numpy() == pytest.approx(1)
    assert "log loss" in told.output and "forest" in told.output
    wrong = CliRunner().invoke(app, ["judge", "market", str(tmp_path / "cancer.csv"), "--target", "mean radius"])
    assert wrong.exit_code == 2 and "classes" in wrong.output
