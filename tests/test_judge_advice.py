"""A trial of advice whose effect is known: the estimate, its interval, the lottery, and a question that carries everything."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.advice import advice_trial

QUESTIONS = [f"q{j}" for j in range(6)]


def trial(seed, n=300, weight=0.5, bias=0.0, skilled=0.0, outlier=0.0):
    """Forecasters see the outcome with noise of sd 1 in the question's units, and move by `weight` to outcome + bias."""
    draw = np.random.default_rng(seed)
    units, outcomes = 10.0 ** draw.uniform(-1, 3, 6), draw.normal(size=6)
    rows = []
    for arm in ("control", "advised"):
        for i in range(n):
            skill = draw.normal()
            noise = draw.normal(size=6) * (np.exp(-0.3 * skill) if skilled else 1.0)
            used = (weight if skill < 0 or not skilled else weight * (1 - skilled)) if arm == "advised" else 0.0
            error = (1 - used) * noise + used * bias
            if arm == "control":
                error[0] += outlier
            rows += [
                {
                    "forecaster": f"{arm}{i}",
                    "arm": arm,
                    "question": q,
                    "forecast": u * (y + e),
                    "outcome": u * y,
                    "skill": skill,
                }
                for q, u, y, e in zip(QUESTIONS, units, outcomes, error, strict=True)
            ]
    return pd.DataFrame(rows)


def estimate(frame, **options):
    return advice_trial(frame, control="control", draws=20, **options).effects["effect"][0]


def folded(mean, sd):
    """E|N(mean, sd^2)|."""
    return sd * np.sqrt(2 / np.pi) * np.exp(-(mean**2) / (2 * sd**2)) + mean * (1 - 2 * norm.cdf(-mean / sd))


@pytest.mark.parametrize("bias", [0.0, 0.6])
def test_the_estimate_is_within_three_points_of_the_analytic_effect_in_nine_of_ten_trials(bias):
    true = 1 - folded(0.5 * bias, 0.5) / folded(0.0, 1.0)
    found = [estimate(trial(seed, bias=bias), tails=0.0) for seed in range(50)]
    assert np.mean(np.abs(np.array(found) - true) <= 0.03) >= 0.9
    assert abs(np.mean(found) - true) < 0.01
    if bias == 0:  # halved errors are an effect of one half whatever the tails
        cut = [estimate(trial(seed)) for seed in range(20)]
        assert np.mean(cut) == pytest.approx(0.5, abs=0.01)


def test_intervals_hold_the_truth_and_the_lottery_finds_nothing_where_there_is_nothing():
    held, p = [], []
    for seed in range(40):
        (row,) = advice_trial(trial(seed, n=40), control="control", draws=100, tails=0.0).effects.itertuples()
        held.append(row.low <= 0.5 <= row.high)
        (row,) = advice_trial(trial(seed, n=40, weight=0.0), control="control", draws=99).effects.itertuples()
        p.append(row.p)
    assert np.mean(held) >= 0.85
    assert 0.3 < np.mean(p) < 0.7 and np.mean(np.array(p) <= 0.1) <= 0.2
    (row,) = advice_trial(trial(0), control="control", draws=199).effects.itertuples()
    assert row.p == row.q == pytest.approx(1 / 200)


def test_a_question_that_carries_the_whole_effect_is_named():
    found = advice_trial(trial(0, weight=0.0, outlier=8.0), control="control", draws=50)
    assert found.effects["effect"][0] > 0.3 and found.carried_by("advised") == "q0"
    rows = found.without.set_index("question")["effect"]
    assert abs(rows["q0"]) < 0.06 and (rows.drop("q0") > 0.3).all()
    assert advice_trial(trial(0), control="control", draws=50).carried_by("advised") is None


def test_crowds_gain_nothing_from_noise_and_lose_by_shared_bias():
    crowds = advice_trial(trial(0, bias=1.0), control="control", draws=200).crowds.set_index("arm")
    assert crowds.loc["advised", "spread"] == pytest.approx(0.5, abs=0.03) and crowds.loc["control", "spread"] == 1
    assert crowds.loc["advised", "error"] == pytest.approx(0.5, abs=0.1) and crowds.loc["control", "error"] < 0.15
    assert crowds.loc["control", "stderr"] == pytest.approx(
        1.25 / np.sqrt(300) * np.sqrt(1 - 2 / np.pi) / np.sqrt(6), rel=0.5
    )


def test_the_effect_is_told_apart_by_skill_where_it_differs_and_not_where_it_does_not():
    found = advice_trial(trial(1, skilled=1.0), control="control", draws=400).halves.set_index("by")
    assert found.loc["skill", "lower half"] == pytest.approx(0.5, abs=0.12)  # three standard errors
    assert abs(found.loc["skill", "upper half"]) < 0.15
    assert found.loc["skill", "p"] < 0.01 < found.loc["difficulty", "p"]
    assert advice_trial(trial(1), control="control", draws=400).halves.set_index("by").loc["skill", "p"] > 0.05


def test_probabilities_are_scored_by_brier():
    frame = pd.DataFrame(
        [
            {"forecaster": f"{arm}{i}", "arm": arm, "question": q, "forecast": f, "outcome": y}
            for arm, fs in (("control", (0.5, 0.5)), ("advised", (0.9, 0.3)))
            for i in range(4)
            for q, f, y in (("a", fs[0], 1), ("b", fs[1], 0))
        ]
    )
    found = advice_trial(frame, control="control", scored="probability", draws=50)
    assert found.effects["effect"][0] == pytest.approx(1 - (0.1**2 + 0.3**2) / (2 * 0.25))
    with pytest.raises(InputError, match=r"lie in \[0, 1\]"):
        advice_trial(frame.assign(outcome=0.5), control="control", scored="probability")


def test_a_question_left_open_is_left_out_of_the_mean():
    frame = trial(0, n=20)
    gone = frame["question"].eq("q3") & frame["forecaster"].str.endswith("7")
    part = advice_trial(frame[~gone], control="control", draws=20)
    assert part.effects["effect"][0] == pytest.approx(estimate(frame), abs=0.08)
    assert part.effects["forecasters"][0] == 20


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: f.drop(columns="arm"), "no column 'arm'"),
        (lambda f: f.assign(arm=["control", *f["arm"][1:-1], "control"]), "more than one arm"),
        (lambda f: f.assign(outcome=range(len(f))), "more than one outcome"),
        (lambda f: pd.concat([f, f[:1]]), "twice"),
        (lambda f: f[f["arm"] == "control"], "beside another"),
        (lambda f: f[(f["arm"] == "control") | f["forecaster"].isin(["advised0", "advised1"])], "has 2 forecasters"),
        (lambda f: f.assign(forecast=f["forecast"].where(f["question"] != "q1", 5.0)), "'q1' do not differ"),
        (lambda f: f.assign(forecast=np.inf), "infinite"),
    ],
)
def test_a_table_that_is_no_trial_is_refused(change, said):
    with pytest.raises(InputError, match=said):
        advice_trial(change(trial(0, n=5)), control="control")


def test_the_command_prints_effects_and_warns_of_the_question(tmp_path):
    file, out = str(tmp_path / "trial.csv"), tmp_path / "t"
    trial(0, n=40, weight=0.0, outlier=8.0).to_csv(file, index=False)
    told = CliRunner().invoke(app, ["judge", "trial", file, "--control", "control", "--out", str(out)])
    assert told.exit_code == 0, told.output
    assert "q0" in told.output and "carries" in told.output
    assert {path.stem for path in out.iterdir()} == {"effects", "without", "crowds", "halves"}
    wrong = CliRunner().invoke(app, ["judge", "trial", file, "--control", "none"])
    assert wrong.exit_code == 2 and "there is no arm 'none'" in wrong.output
