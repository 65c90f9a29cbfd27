"""Which covariates to use where: the sheet's figures, marks without y, abstention, and the face of scikit-learn."""

import numpy as np
import pandas as pd
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.evaluation import experiment
from manyheads.judge.tables.covariates import CovariateSelector, environment_mark
from manyheads.judge.tables.covariates_claims import KINDS, ROWS, SETS, ShiftedWorlds, _run, world


def learned(seed=0, environments=40, **settings):
    draw = np.random.default_rng(seed)
    made = [world(draw, kind, level) for kind in KINDS for level in np.linspace(0, 4, environments)]
    where = np.repeat(np.arange(len(made)), ROWS)
    fitted = CovariateSelector(SETS, **settings).fit(
        np.concatenate([x for x, _ in made]), np.concatenate([y for _, y in made]), where
    )
    return fitted, draw


@pytest.mark.parametrize(
    "chosen, mean, under_x",
    [("c2", 3.38, 2.42), ("c2 and x", 2.29, 2.75), ("selected", 2.09, 2.16), ("best", 2.08, 2.16)],
)
def test_errors_are_those_of_the_sheet(chosen, mean, under_x):
    found = [_run(chosen, ShiftedWorlds(100), seed) for seed in range(4)]
    assert np.mean([one["error"] for one in found]) == pytest.approx(mean, abs=0.06)
    assert np.mean([one["error, shift of x"] for one in found]) == pytest.approx(under_x, abs=0.09)


@pytest.mark.parametrize("environments, hits", [(100, 0.97), (20, 0.95), (5, 0.91)])
def test_the_best_set_is_named_at_least_as_often_as_the_sheet_says(environments, hits):
    found = [_run("selected", ShiftedWorlds(environments), seed)["best set"] for seed in range(4)]
    assert np.mean(found) >= hits - 0.02


def test_every_claim_holds_on_five_seeds():
    tried = experiment("judge", "covariates").run(seeds=range(5), quick=True)
    assert {one.answer for one in tried.verdicts} == {"held"}


def test_marks_are_of_the_environment_and_never_of_y():
    draw = np.random.default_rng(0)
    x, _ = world(draw, "x", 2.0)
    mark = environment_mark(x)
    assert mark == pytest.approx([*x.std(0, ddof=1), np.corrcoef(x.T)[0, 1]])
    fitted, _ = learned()
    shuffled = draw.permutation(len(x))
    assert fitted.choose(x) == fitted.choose(x[shuffled]), "rows of an environment have no order"
    assert environment_mark(np.ones((5, 2))) == pytest.approx([0, 0, 0])
    # One mark a batch, not a row: a batch of mixed rows is answered by one set.
    a, b = world(draw, "c1", 0.0)[0], world(draw, "x", 4.0)[0]
    line = fitted.models_[fitted.subsets_.index(fitted.choose(np.concatenate([a, b])))]
    columns = list(fitted.choose(np.concatenate([a, b])))
    assert fitted.predict(np.concatenate([a, b])) == pytest.approx(line.predict(np.concatenate([a, b])[:, columns]))


def test_a_shift_of_an_unseen_kind_is_answered_by_the_best_set_on_average():
    fitted, draw = learned()
    x, _ = world(draw, "x", 3.0)
    assert fitted.choose(x) == (0,) and not fitted.uncertain(x)
    assert fitted.choose(x * 40) == (0, 1) and fitted.uncertain(x * 40)
    assert fitted.uncertain(x[:10]), "ten rows say little of a correlation"
    assert fitted.predict(x * 40) == pytest.approx(fitted.models_[3].predict(x * 40))
    bold, _ = learned(abstain=False)
    assert not bold.uncertain(x * 40)


def test_sets_are_checked_and_what_must_be_in_them_is():
    draw = np.random.default_rng(1)
    X, y = draw.normal(size=(80, 3)), draw.normal(size=80)
    fitted = CovariateSelector(always=[1]).fit(X, y, np.repeat([0, 1], 40))
    assert all(1 in chosen for chosen in fitted.subsets_) and len(fitted.subsets_) == 4
    for bad in ([[3]], [[-1]], []):
        with pytest.raises(InputError, match="columns 0 to 2"):
            CovariateSelector(bad).fit(X, y)
    assert len(CovariateSelector().fit(draw.normal(size=(80, 10)), y).subsets_) == 22
    assert len(CovariateSelector().fit(draw.normal(size=(80, 40)), y).subsets_) == 2
    with pytest.raises(InputError, match="one a row"):
        CovariateSelector().fit(X, y, [1, 2])


@parametrize_with_checks([CovariateSelector()])
def test_it_is_an_estimator(estimator, check):
    if check.func.__name__ == "check_methods_subset_invariance":
        pytest.skip("a prediction depends on the whole batch, as it should")
    check(estimator)


def test_the_command_names_the_set_of_each_environment(tmp_path):
    draw = np.random.default_rng(0)
    frames = []
    for i, (kind, level) in enumerate((kind, level) for kind in KINDS for level in np.linspace(0, 4, 20)):
        x, y = world(draw, kind, level)
        frames.append(pd.DataFrame({"c2": x[:, 0], "x": x[:, 1], "y": y, "place": f"e{i}"}))
    pd.concat(frames).to_csv(tmp_path / "known.csv", index=False)
    new = pd.DataFrame(world(draw, "x", 3.5)[0], columns=["c2", "x"]).assign(place="new")
    new.loc[4, "x"] = np.nan
    new.to_csv(tmp_path / "new.csv", index=False)
    out = tmp_path / "out.parquet"
    told = ["judge", "covariates", str(tmp_path / "known.csv"), "--target", "y", "--environment", "place"]
    found = CliRunner().invoke(app, [*told, "--predict", str(tmp_path / "new.csv"), "--out", str(out)])
    assert found.exit_code == 0, found.output
    table = pd.read_parquet(out)
    assert set(table["covariates"]) == {"c2"} and 4 not in set(table["row"]) and table["row"].max() == ROWS - 1
    assert len(table) == ROWS - 1 and table["prediction"].notna().all()
    known = pd.DataFrame(world(draw, "x", 3.5)[0], columns=["c2", "x"]).assign(place="new", y=0.0)
    known.to_csv(tmp_path / "answered.csv", index=False)
    told_more = CliRunner().invoke(app, [*told, "--predict", str(tmp_path / "answered.csv")])
    assert "chosen by environment" in told_more.output and "all: c2, x" in told_more.output
    for bad, said in [(["--target", "z"], "no column 'z'"), (["--environment", "nowhere"], "no column 'nowhere'")]:
        assert said in CliRunner().invoke(app, [*told, *bad]).output
