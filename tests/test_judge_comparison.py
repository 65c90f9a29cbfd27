"""Five predictors under one protocol: shared importance, interactions, blocks, and folds that never leak."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t as student
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.tables.model_comparison import _corrected_p, compare_predictors, spatial_blocks

TREES = ["forest", "boosted trees"]


@pytest.fixture(scope="module")
def shared():
    draw = np.random.default_rng(0)
    x1 = draw.normal(size=150)
    x = np.stack([x1, x1 + 0.1 * draw.normal(size=150), draw.normal(size=150)], 1)
    return compare_predictors(
        x, x1 + 0.5 * draw.normal(size=150), columns=["x1", "x2", "x3"], models=["forest"], folds=3
    )


def test_importance_that_two_columns_share_is_said(shared):
    (said,) = [one for one in shared.remarks if "shared" in one]
    assert said.startswith("x1 and x2 rise together (rank correlation 0.9")
    assert set(zip(shared.together["a"], shared.together["b"], strict=True)) == {("x1", "x2")}
    assert (shared.together["both"] > 0.4).all(), "permuted with each other they cost what the signal is worth"
    forest = shared.importance[shared.importance["model"] == "forest"].set_index("column")["loss"]
    assert forest["x2"] > 0.05 > abs(forest["x3"]), "it is used though it causes nothing"
    assert "not what causes" in shared.remarks[-1]


def test_scores_curves_and_the_gap(shared):
    summary = shared.summary
    assert summary.loc["linear", "score"] == pytest.approx(0.8, abs=0.08) and abs(summary.loc["none", "score"]) < 0.1
    assert summary.loc["forest", "gap"] > summary.loc["linear", "gap"] + 0.05
    own = shared.curves[(shared.curves["model"] == "linear") & (shared.curves["column"] == "x1")]
    other = shared.curves[(shared.curves["model"] == "linear") & (shared.curves["column"] == "x3")]
    assert np.ptp(own["prediction"]) > 10 * np.ptp(other["prediction"])
    assert shared.kind == "number" and shared.folds == "random" and shared.promised.empty


def test_trees_see_an_interaction_that_no_line_sees():
    draw = np.random.default_rng(1)
    x = draw.normal(size=(240, 3))
    found = compare_predictors(x, np.where((x[:, 0] > 0) ^ (x[:, 1] > 0), "yes", "no"), models=TREES, folds=3).summary
    assert found.loc["boosted trees", "score"] >= found.loc["linear", "score"] + 0.3
    assert found.loc["forest", "score"] >= found.loc["linear", "score"] + 0.3
    assert found.loc["forest", "q"] < 0.05


def test_random_folds_promise_too_much_where_neighbours_are_alike():
    draw = np.random.default_rng(2)
    places = draw.uniform(size=(300, 2))

    def field():
        waves = draw.normal(scale=6, size=(12, 2))
        return np.cos(places @ waves.T + draw.uniform(0, 6.28, 12)).sum(1) / 6**0.5

    x, y = np.stack([field() for _ in range(4)], 1), field()  # nothing in x causes y, but it tells where one is
    blocks = spatial_blocks(places, 8)
    found = compare_predictors(x, y, blocks=blocks, models=["forest"], folds=4)
    assert found.promised["forest"] >= 0.1 and found.folds == "blocks"
    assert any("Random folds would have promised forest" in one for one in found.remarks)
    rows = found.scores[found.scores["folds"] == "blocks"]
    assert rows["fold"].nunique() == 4


def test_what_tunes_a_model_never_sees_what_judges_it(monkeypatch):
    """Labels without any signal: tuning on the test rows would show above chance. Blocks stay whole inside as outside."""
    import manyheads.judge.tables.model_comparison as module

    seen = []
    real = module.GridSearchCV.fit

    def fit(self, x, y, groups=None, **rest):
        if groups is not None:
            for a, b in self.cv.split(x, y, groups):
                seen.append((set(x[:, 0]), set(x[a, 0]) & set(x[b, 0]), set(groups[a]) & set(groups[b])))
        return real(self, x, y, groups=groups, **rest)

    monkeypatch.setattr(module.GridSearchCV, "fit", fit)
    draw = np.random.default_rng(3)
    x, blocks = draw.normal(size=(60, 2)), np.repeat(np.arange(12), 5)
    found = compare_predictors(x, draw.normal(size=60), blocks=blocks, models=["neighbours"], folds=3)
    assert len(seen) == 2 * 3 * 3  # two models that are tuned, three folds, three inside each
    assert all(len(rows) == 40 and not twice and not groups for rows, twice, groups in seen)
    assert found.summary["score"].max() < 0.3


def test_the_test_of_folds_allows_for_rows_they_share():
    differences = pd.Series([0.02, 0.03, 0.01, 0.04, 0.02])
    plain = 2 * student.sf(differences.mean() / (differences.std(ddof=1) / 5**0.5), 4)
    assert _corrected_p(differences, 0.0) == pytest.approx(plain)
    assert _corrected_p(differences, 0.25) == pytest.approx(
        2 * student.sf(differences.mean() / (differences.std(ddof=1) * (1 / 5 + 0.25) ** 0.5), 4)
    )
    assert _corrected_p(pd.Series([0.0, 0.0]), 0.5) == 1


def test_tables_that_cannot_be_judged_are_refused():
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(60, 2)), draw.normal(size=60)
    for change, said in [
        ({"y": np.zeros(60)}, "one value"),
        ({"x": x[:20], "y": y[:20]}, "too few for 5 folds"),
        ({"blocks": np.repeat([0, 1], 30)}, "2 blocks are too few"),
        ({"y": np.array(["a"] * 57 + ["b"] * 3)}, "a class has fewer"),
    ]:
        with pytest.raises(InputError, match=said):
            compare_predictors(**({"x": x, "y": y} | change))
    with pytest.raises(InputError, match="different places"):
        spatial_blocks(np.zeros((50, 2)), 5)


def test_the_command_takes_a_table_with_coordinates(tmp_path):
    draw = np.random.default_rng(0)
    frame = pd.DataFrame(draw.normal(size=(120, 2)), columns=["heat", "rain"]).assign(
        lon=draw.uniform(size=120), lat=draw.uniform(size=120)
    )
    frame["grown"] = 2 * frame["heat"] + draw.normal(size=120)
    frame.to_csv(tmp_path / "field.csv", index=False)
    told = [
        "judge",
        "compare",
        str(tmp_path / "field.csv"),
        "--target",
        "grown",
        "--coordinates",
        "lon,lat",
        "--folds",
        "3",
        "--models",
        "neighbours",
    ]
    found = CliRunner().invoke(app, [*told, "--out", str(tmp_path / "out")])
    assert found.exit_code == 0, found.output
    assert "linear" in found.output and "not what causes" in found.output
    table = pd.read_parquet(tmp_path / "out" / "importance.parquet")
    assert set(table["column"]) == {"heat", "rain"}, "places are no inputs"
    for bad, said in [
        (["--coordinates", "lon"], "two columns"),
        (["--block", "none"], "give one"),
        (["--target", "none"], "no column"),
    ]:
        failed = CliRunner().invoke(app, [*told, *bad])
        assert failed.exit_code == 2 and said in failed.output, failed.output
