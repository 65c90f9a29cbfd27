"""Heads as estimators: scikit-learn's own checks, real tables, texts, and quantiles."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import manyheads as mh
from manyheads.data import table
from manyheads.errors import InputError
from manyheads.predict.estimators import HeadClassifier, HeadRegressor


@pytest.mark.usefixtures("any_shape")
@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([HeadClassifier(epochs=12, rate=2e-2), HeadRegressor(epochs=12, rate=2e-2)])
def test_scikit_learn_finds_them_to_be_estimators(estimator, check):
    check(estimator)


def test_on_real_tables_they_are_as_good_as_linear_models():
    data = table("wine")
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    ours, theirs = (
        cross_val_score(e, data.x, data.y, cv=3).mean() for e in (HeadClassifier(epochs=30, rate=1e-2), linear)
    )
    assert ours > 0.94 and ours > theirs - 0.03
    data = table("diabetes")
    ours = cross_val_score(HeadRegressor(hidden=(), epochs=60, rate=2e-2), data.x, data.y, cv=3).mean()
    theirs = cross_val_score(make_pipeline(StandardScaler(), Ridge()), data.x, data.y, cv=3).mean()
    assert ours > 0.4 and abs(ours - theirs) < 0.03


def test_quantiles_rise_and_hold_their_share():
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (800, 1))
    y = 100 + 10 * x[:, 0] + rng.normal(0, 1 + 3 * (x[:, 0] > 0), 800)
    model = HeadRegressor(levels=(0.1, 0.5, 0.9), epochs=25, rate=1e-2).fit(x, y)
    low, middle, high = model.predict_quantiles(x).T
    assert (low <= middle).all() and (middle <= high).all()
    assert abs((y < low).mean() - 0.1) < 0.05 and abs((y < high).mean() - 0.9) < 0.05
    assert (high - low)[x[:, 0] > 0.3].mean() > 2 * (high - low)[x[:, 0] < -0.3].mean()
    with pytest.raises(InputError, match="give levels"):
        HeadRegressor(epochs=1).fit(x, y).predict_quantiles(x)


def test_a_head_on_a_language_models_states_learns_from_texts():
    model = mh.open_model()
    colours, places = ["red", "blue", "green"], ["Paris", "Rome", "Berlin"]
    words = [f"{a} {b}" for a in ["the", "a", "my", "one"] for b in [*colours, *places]]
    kinds = ["colour" if word.split()[1] in colours else "place" for word in words]
    found = HeadClassifier(model, layer=1, pool="last", epochs=40).fit(words, kinds)
    assert found.score(words, kinds) == 1.0
    assert found.predict_proba(["the red"]).sum() == pytest.approx(1.0)
    assert found.n_features_in_ == model.layout.hidden_size


def test_one_class_is_refused():
    with pytest.raises(InputError, match="at least two"):
        HeadClassifier().fit(np.zeros((4, 2)) + np.arange(4)[:, None], np.ones(4))
