"""Advice on a cohort whose truth is known: changes that hold, few columns, lower true risk, exact shares, checked words."""

import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.tables.prescriptions import Prescriber, tuned_threshold
from manyheads.judge.tables.prescriptions_claims import COLUMNS, WEIGHTS, cohort, random_search


@pytest.fixture(scope="module", params=["boosted trees", "linear"])
def asked(request):
    x, bad = cohort()
    model = (
        HistGradientBoostingClassifier(random_state=0, max_leaf_nodes=15)
        if request.param == "boosted trees"
        else LogisticRegression()
    )
    model.fit(x[:1500], bad[:1500])

    def risk(rows):
        return model.predict_proba(rows)[:, 1]

    advisor = Prescriber(risk, x[:1500], COLUMNS, fixed=("age",), up=("attendance", "homework"), threshold=0.5)
    high = [row for row in x[1500:] if risk(row[None])[0] >= 0.5][:16]
    return advisor, high


def test_every_change_holds_keeps_the_rules_and_lowers_the_true_risk(asked):
    advisor, high = asked
    lower, changed, tried = [], [], []
    draw = np.random.default_rng(1)
    for row in high:
        changes = advisor.changes(row)
        for change in changes:
            x = row.copy()
            for name, value in change.to.items():
                x[COLUMNS.index(name)] = value
            assert advisor.risk(x[None])[0] == pytest.approx(change.risk) and change.risk <= 0.45
            assert "age" not in change.to and all(
                change.to[n] > row[COLUMNS.index(n)] for n in ("attendance", "homework") if n in change.to
            )
            assert all(
                advisor.data[:, COLUMNS.index(n)].min() <= v <= advisor.data[:, COLUMNS.index(n)].max()
                for n, v in change.to.items()
            )
            lower.append(x @ WEIGHTS < row @ WEIGHTS)
        assert [c.cost for c in changes] == sorted(c.cost for c in changes)
        assert len({tuple(sorted(c.to)) for c in changes}) == len(changes)
        if changes:
            changed.append(len(changes[0].to))
            tried.append(random_search(advisor, row, 3000, draw)[0])
    assert len(changed) >= 0.9 * len(high), "nearly all can be helped"
    assert np.mean(changed) <= 0.7 * np.mean(tried) and np.mean(lower) >= 0.8


def test_a_pair_is_as_cheap_as_a_finer_search_finds():
    x, bad = cohort()
    model = LogisticRegression().fit(x, bad)
    advisor = Prescriber(
        lambda rows: model.predict_proba(rows)[:, 1], x, COLUMNS, fixed=("age", "grade", "hours", "noise")
    )
    row = np.array([-1.0, -1.0, 0.0, 0.0, 0.0, 0.0])
    best = advisor.changes(row)[0]
    mad = np.median(np.abs(x - np.median(x, 0)), 0)
    need = (np.log(0.45 / 0.55) - model.decision_function(row[None])[0]) / model.coef_[0][:2]  # each column alone
    alone = [abs(need[j]) / mad[j] + 0.5 for j in range(2) if row[j] + need[j] <= x[:, j].max()]
    assert best.cost <= min(alone) * 1.02


def test_shapley_values_of_a_line_are_its_terms_and_sum_to_the_difference():
    x, _ = cohort(500)
    advisor = Prescriber(lambda rows: rows @ WEIGHTS * 0.05 + 0.5, x, COLUMNS)
    found = advisor.shapley(x[0], orders=4000)
    terms = WEIGHTS * 0.05 * (x[0] - x.mean(0))
    assert list(found.values()) == pytest.approx(terms, abs=0.01) and found["noise"] == pytest.approx(0, abs=1e-12)


def test_what_a_writer_gets_wrong_is_not_said(asked):
    advisor, high = asked
    found = advisor.prescribe(high[0])
    plain = found.text()
    assert f"{found.risk:.2f}" in plain and found.wrong_in(plain) == []
    assert found.text(lambda facts: plain.replace("The risk", "Your risk")).startswith("Your risk")
    wrong = plain.replace(f"{found.risk:.2f}", f"{found.risk + 0.01:.2f}")
    assert found.text(lambda facts: wrong) == plain and found.wrong_in(wrong) == [f"{found.risk + 0.01:.2f}"]
    silent = next(name for name in COLUMNS if name not in plain)
    assert found.text(lambda facts: f"{plain} Mind {silent}.") == plain
    low = advisor.prescribe(np.array([3.0, 3.0, 0.0, 2.0, 0.0, 0.0]))
    assert low.changes == () and "Nothing needs to change" in low.text()


def test_rules_that_cannot_be_are_refused():
    x, _ = cohort(100)
    with pytest.raises(InputError, match="no column 'sex'"):
        Prescriber(lambda rows: rows[:, 0], x, COLUMNS, fixed=("sex",))
    with pytest.raises(InputError, match="named twice"):
        Prescriber(lambda rows: rows[:, 0], x, COLUMNS, fixed=("age",), up=("age",))
    with pytest.raises(InputError, match="finite"):
        Prescriber(lambda rows: rows[:, 0], x, COLUMNS).prescribe(np.full(6, np.nan))
    assert tuned_threshold(np.array([0.1, 0.2, 0.7, 0.9]), [False, False, True, True]) == pytest.approx(0.45)
    draw = np.random.default_rng(0)
    p = np.r_[draw.normal(0.3, 0.1, 400), draw.normal(0.6, 0.1, 200)]
    assert tuned_threshold(p, np.arange(600) >= 400) == pytest.approx(0.45, abs=0.04), "halfway between two equal bells"
    stuck = Prescriber(lambda rows: np.full(len(rows), 0.9), x, COLUMNS)
    assert stuck.changes(x[0]) == () and "No change" in stuck.prescribe(x[0]).text()


def test_the_command_advises_on_rows_of_a_table(tmp_path):
    x, bad = cohort(600)
    frame = pd.DataFrame(x, columns=COLUMNS).assign(left=np.where(bad, "yes", "no"))
    frame.loc[[2, 3], "age"] = np.nan
    frame.to_csv(tmp_path / "students.csv", index=False)
    told = ["judge", "advise", str(tmp_path / "students.csv"), "--target", "left", "--bad", "yes", "--fixed", "age"]
    out = tmp_path / "advice.jsonl"
    found = CliRunner().invoke(app, [*told, "--up", "attendance,homework", "--rows", "0-30", "--out", str(out)])
    assert found.exit_code == 0, found.output
    lines = pd.read_json(out, lines=True)
    assert lines["row"].tolist() == [0, 1, *range(4, 31)], "rows are counted as they stand in the file"
    assert lines["text"].str.startswith("The risk is").all()
    for bad_option, said in [
        (["--bad", "maybe"], "maybe"),
        (["--rows", "a-b"], "--rows"),
        (["--rows", "590-600"], "up to 599"),
        (["--rows", "2-3"], "each of these rows lacks a value"),
        (["--fixed", "sex"], "no column 'sex'"),
    ]:
        failed = CliRunner().invoke(app, [*told, *bad_option])
        assert failed.exit_code == 2 and said in failed.output, failed.output
