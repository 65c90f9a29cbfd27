"""Learning curves: exact recovery, the sheet's bounds under noise, admissibility, when to stop, intervals that hold the truth."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.judge.curves import LearningCurve, bayesian_curve, power_law
from manyheads.judge.curves_claims import FULL, known_curve

SIZES = np.arange(5000, 100_001, 5000.0)


@settings(max_examples=30, deadline=None)
@given(st.floats(60, 99), st.floats(1, 80), st.floats(0.1, 1.5))
def test_without_noise_three_points_give_the_curve(c, a, b):
    sizes = np.array([1.0, 2.0, 4.0, 9.0])
    (first, last) = LearningCurve(sizes, c - a * sizes**-b).trace
    assert first.c == pytest.approx(c, abs=0.01) and first.b == pytest.approx(b, rel=1e-2)
    assert last.at(50.0) == pytest.approx(c - a * 50.0**-b, abs=0.01)


def test_under_noise_the_full_score_is_told_as_the_sheet_says():
    true = 97 - 60 * FULL**-0.35
    for n, most in ((19, 0.10), (40, 0.035)):
        curves = [known_curve(seed).prefix(n) for seed in range(40)]
        told = np.array([c.trend.at(FULL) for c in curves[:20]])
        carried = np.array([c.scores[-1] for c in curves[:20]])
        assert np.median(np.abs(told - true)) <= most
        assert np.median(np.abs(told - true)) <= np.median(np.abs(carried - true)) / 5
        held = [b.low <= true <= b.high for b in (bayesian_curve(c, FULL) for c in curves)]
        assert np.mean(held) >= 0.8
    assert abs(power_law(curves[0]).at(FULL) - true) > 0.2, "error does not fall to none here"


def test_a_prefix_whose_asymptote_is_above_100_is_not_believed():
    scores = 97 - 60 * SIZES**-0.35
    scores[:3] = 93.9, 94.6, 95.3  # as if it rose for ever
    curve = LearningCurve(SIZES, scores)
    assert curve.trace[0].c > 100 and curve.level is not None and curve.level > 3
    assert all(trend.c <= 100 for trend in curve.trace if trend.n >= curve.level)
    assert next(trend.c for trend in curve.trace if trend.n == curve.level - 1) > 100
    with pytest.raises(InputError, match="above the best there can be"):
        curve.prefix(3).predict(100.0)
    assert LearningCurve(curve.sizes, scores / 100, most=1.0).level == curve.level, "units do not matter"
    loss = LearningCurve(SIZES, -(2 + 3 * SIZES**-0.2), most=0.0)
    assert loss.predict(1e6) == pytest.approx(-(2 + 3 * 1e6**-0.2), abs=1e-4)


def test_training_stops_when_the_asymptote_stands_still():
    curve = known_curve(0).prefix(60)
    for tau in (0.5, 0.1, 0.02):
        n = curve.stops(tau)
        cs = {trend.n: trend.c for trend in curve.trace}
        assert abs(cs[n] - cs[n - 1]) < tau and n > curve.level
        assert all(abs(cs[m] - cs[m - 1]) >= tau for m in range(curve.level + 1, n))
    assert curve.trend == curve.trace[-1] and curve.stops(1e-12) is None and curve.stops(0.5) <= curve.stops(0.02)


def test_an_anchor_holds_the_trend_back():
    draws = [known_curve(seed).prefix(7) for seed in range(20)]
    plain = [trend.c for one in draws for trend in one.trace[2:]]
    held = [trend.c for one in draws for trend in LearningCurve(one.sizes, one.scores, anchor=1.0).trace[2:]]
    assert np.std(held) < np.std(plain)
    assert LearningCurve(SIZES, 97 - 60 * SIZES**-0.35, anchor=5.0).trace[-1].c == pytest.approx(97, abs=1e-3)


@pytest.mark.parametrize(
    "sizes, scores, said",
    [
        ([1.0, 2.0], [1.0, 2.0], "3 sizes at least"),
        ([1.0, 1.0, 2.0], [1.0, 2.0, 3.0], "must be above 0 and grow"),
        ([1.0, 2.0, 3.0], [1.0, np.nan, 3.0], "numbers"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 101.0], "above the best"),
    ],
)
def test_what_is_no_learning_curve_is_refused(sizes, scores, said):
    with pytest.raises(InputError, match=said):
        LearningCurve(np.array(sizes), np.array(scores))


def test_the_command_says_what_more_would_bring_and_draws_it(tmp_path):
    curve = known_curve(0).prefix(30)
    file, page = str(tmp_path / "curve.csv"), tmp_path / "curve.html"
    pd.DataFrame({"rows": curve.sizes, "accuracy": curve.scores}).to_csv(file, index=False)
    told = ["judge", "curve", file, "--size", "rows", "--score", "accuracy", "--at", "800000"]
    found = CliRunner().invoke(app, [*told, "--tau", "0.5", "--page", str(page)])
    assert found.exit_code == 0, found.output
    assert "96.4" in found.output and "could have stopped" in found.output
    assert "<svg" in page.read_text("utf-8")
    for bad, said in [(["--size", "n"], "no column 'n'"), (["--at", "-1"], "at"), (["--most", "50"], "above the best")]:
        failed = CliRunner().invoke(app, [*told, *bad])
        assert failed.exit_code == 2 and said in failed.output, failed.output
