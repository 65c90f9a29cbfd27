"""The deterministic pipeline of TimeSeriesScientist, and the scorer of TADPOLE."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from manyheads.errors import InputError
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.pipelines.longitudinal import balanced_accuracy, hand_till, score_longitudinal
from manyheads.forecast.pipelines.longitudinal_baselines import generated_cohort, progression, repeated_visit
from manyheads.forecast.pipelines.scientist import Scientist, ScientistReport, combined
from manyheads.forecast.pipelines.scientist_curate import SeriesStatistics, curated, season_in
from manyheads.forecast.pipelines.scientist_plan import MOST_SETTINGS, TRIED, planned
from manyheads.report import write


class Answers:
    """A chat model that always answers the same."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def answer(self, question):
        self.asked.append(question)
        return self.said


NAIVE_ONLY = Answers('["seasonal_naive"]')
CHEAP = Answers('["seasonal_naive", "theta"]')


def wave(n=120, season=12, seed=0, noise=0.2):
    t = np.arange(n)
    return 10 + 0.05 * t + 3 * np.sin(2 * np.pi * t / season) + np.random.default_rng(seed).normal(0, noise, n)


def frame(y, freq="MS", item="a"):
    times = pd.date_range("2000-01-01", periods=len(y), freq=freq)
    return pd.DataFrame({"item_id": item, "timestamp": times, "target": y})


def panel(y, freq="MS"):
    df = frame(y, freq)
    return panel_of(df, columns_of(df), freq)


def test_gaps_and_outliers_are_repaired_and_each_is_reported():
    clean = wave(noise=0.3)
    y = clean.copy()
    y[50] += 40
    y[[20, 21]] = np.nan
    y[60:80] = np.nan
    y[-2:] = np.nan
    out, repairs, statistics = curated(y, 12)
    steps = {repair.kind: repair.steps for repair in repairs}
    assert steps["between"] == (20, 21)
    assert steps["season"] == (*range(60, 80), 118, 119)
    assert steps["clipped"] == (50,)
    touched = [i for i in range(120) if i not in {*steps["between"], *steps["season"], *steps["clipped"]}]
    assert (out[touched] == y[touched]).all()
    assert np.abs(out - clean).max() < 2.5
    assert statistics.season == 12 and statistics.season_strength > 0.9 and statistics.missing == pytest.approx(0.2)


def test_a_change_of_level_and_sparse_demand_are_no_outliers():
    shifted = np.r_[np.zeros(60), np.full(60, 50.0)] + np.random.default_rng(0).normal(size=120)
    assert not any(r.kind == "clipped" for r in curated(shifted)[1])
    sparse = np.where(np.arange(120) % 9 == 0, 5.0, 0.0)
    sparse[7] = 3
    assert (curated(sparse)[0] == sparse).all()


@pytest.mark.parametrize("season", [7, 12, 30])
def test_the_season_is_found_without_a_calendar_and_noise_has_none(season):
    assert season_in(wave(300, season)) == season
    assert season_in(np.random.default_rng(0).normal(size=300)) == 1
    assert season_in(np.arange(300.0)) == 1
    assert season_in(np.full(300, 5.0)) == 1


def test_leading_gaps_stay_and_a_series_without_a_value_is_left_alone():
    y = np.r_[np.full(5, np.nan), wave(60)]
    out, _, statistics = curated(y, 12)
    assert np.isnan(out[:5]).all() and np.isfinite(out[5:]).all() and statistics.n == 60
    assert curated(np.full(8, np.nan))[2].n == 0


@pytest.mark.parametrize("n", [12, 60, 1000, 100_000])
def test_a_plan_is_capped_and_fits_the_length(n):
    found = planned(SeriesStatistics(n, 0.0, 12, 0.9, 0.5, 0.9), 6)
    names = list(dict.fromkeys(one.name for one in found))
    assert 1 <= len(names) <= TRIED and len(found) <= MOST_SETTINGS and len(set(found)) == len(found)
    assert "seasonal_naive" in names
    assert ("linear" in names) == (n >= 1000)


def test_what_comes_after_the_cut_changes_neither_the_plan_nor_the_forecast():
    y = wave(72)
    other = y.copy()
    other[60:] = np.random.default_rng(1).normal(size=12) * 1000
    found = []
    for values in (y, other):
        before = panel(values).without_last(12)
        one = Scientist(horizon=12, windows=2).advised_by(Answers('["seasonal_naive", "theta", "linear"]'))
        one.fit_panel(before)
        forecast = one.forecast_panel(before)
        found.append((one.report_, one.chat_.asked, forecast.point[0].tobytes(), forecast.quantiles[0].tobytes()))
    assert found[0] == found[1]
    assert any(plan.errors for plan in found[0][0].plans)


def test_validation_is_compared_with_what_was_observed_not_with_repairs():
    """A candidate that is right but for one wild value of the last fifth pays for that value."""
    y = np.tile(np.arange(12.0), 10)
    y[115] += 400
    one = Scientist(horizon=6).advised_by(NAIVE_ONLY)
    one.fit_panel(panel(y))
    assert max(one.report_.plans[0].errors.values()) > 10


def test_members_combine_as_named():
    members = np.array([[1.0, 4.0], [2.0, 0.0], [6.0, 8.0]])
    assert combined(members, (0.5, 0.3, 0.2), "best").tolist() == [1, 4]
    np.testing.assert_allclose(combined(members, (0.5, 0.3, 0.2), "weights"), [2.3, 3.6])
    assert combined(members, (), "median").tolist() == [2, 4]
    assert combined(members, (), "trimmed").tolist() == [3, 4]
    ten = np.r_[np.ones(8), 1000, -5][:, None]
    assert combined(ten, (), "trimmed").tolist() == [1]


def test_weights_are_inverse_errors_and_what_was_kept_is_the_best_of_each_model():
    one = Scientist(horizon=6, combine="weights").advised_by(Answers('["seasonal_naive", "theta", "linear"]'))
    one.fit_panel(panel(wave()))
    plan = one.report_.plans[0]
    assert len({c.name for c in plan.kept}) == len(plan.kept) == 3
    errors = np.array([plan.errors[str(c)] for c in plan.kept])
    assert (np.diff(errors) >= 0).all()
    np.testing.assert_allclose(plan.weights, (1 / errors) / (1 / errors).sum())
    members = [one.members_[c].forecast_panel(one.members_[c].panel_, 6, ()).point[0][0] for c in plan.kept]
    np.testing.assert_allclose(one.predict()["predictions"], np.array(plan.weights) @ members, rtol=1e-9)


def test_a_failing_candidate_is_an_error_or_is_named(monkeypatch):
    from manyheads.forecast.baselines.statistics import Theta

    def fails(self, y, season, horizon):
        raise ValueError("no fit")

    monkeypatch.setattr(Theta, "fitted", fails)
    with pytest.raises(InputError, match=r"theta\(.*no fit.*failed='drop'"):
        Scientist(horizon=6).advised_by(CHEAP).fit_panel(panel(wave()))
    one = Scientist(horizon=6, failed="drop").advised_by(CHEAP)
    one.fit_panel(panel(wave()))
    assert {c.name for c in one.report_.plans[0].kept} == {"seasonal_naive"}
    assert all("theta" in name for name in one.report_.failures) and one.report_.failures
    with pytest.raises(InputError, match="no candidate"):
        Scientist(horizon=6, failed="drop").advised_by(Answers('["theta"]')).fit_panel(panel(wave(12)))


def test_a_chat_model_chooses_from_the_library_alone():
    one = Scientist(horizon=6).advised_by(Answers('["seasonal_naive"]'))
    one.fit_panel(panel(wave()))
    assert [c.name for c in one.report_.plans[0].kept] == ["seasonal_naive"]
    assert '"season": 12' in one.chat_.asked[0]
    assert one.fresh().chat_ is one.chat_
    for said in ('["scientist"]', "take theta", "[]", '{"a": 1}'):
        with pytest.raises(InputError):
            Scientist(horizon=6).advised_by(Answers(said)).fit_panel(panel(wave()))


def test_several_series_and_targets_each_have_their_plan_and_new_ones_borrow_one():
    df = pd.concat(
        [frame(wave(), item="a"), frame(wave(90, seed=1), item="b").assign(target=5.0), frame(wave(6), item="c")]
    )
    df["other"] = df["target"] * 2 + 1
    one = Scientist(horizon=6).advised_by(CHEAP).fit(df, target=["target", "other"])
    assert [plan.name for plan in one.report_.plans] == [f"{i}/{t}" for i in "abc" for t in ("target", "other")]
    out = one.predict()
    assert len(out) == 36 and np.isfinite(out["predictions"]).all()
    assert (out[(out["item_id"] == "b") & (out["target_name"] == "other")]["predictions"] == 11).all()
    a = out[out["item_id"] == "a"]
    np.testing.assert_allclose(
        a[a["target_name"] == "other"]["predictions"], a[a["target_name"] == "target"]["predictions"] * 2 + 1, rtol=1e-6
    )
    new = one.predict_df(frame(wave(80), item="new").assign(other=1.0))
    assert np.isfinite(new["predictions"]).all()


def test_a_saved_pipeline_forecasts_the_same_bits_and_its_report_comes_back(tmp_path):
    one = Scientist(horizon=6).advised_by(Answers('["seasonal_naive", "linear"]'))
    one.fit(frame(wave(), item="a"))
    again = Forecaster.load(one.save(tmp_path / "saved"))
    assert "linear" in {c.name for c in one.report_.plans[0].kept}
    pd.testing.assert_frame_equal(one.predict(), again.predict(), check_exact=True)
    assert again.report_ == one.report_ == ScientistReport.of(json.loads(json.dumps(one.report_.to_dict())))


def test_the_report_is_text_and_a_page(tmp_path):
    y = wave()
    y[50] = 500
    one = Scientist(horizon=6).advised_by(CHEAP).fit(frame(y, item="<a>"))
    assert "a season of 12 steps" in one.report_.says and "clipped: 1" in one.report_.says
    page = write(one.report_, tmp_path / "page.html").read_text()
    assert "&lt;a&gt;" in page and "theta(" in page


@pytest.mark.slow
def test_the_pipeline_is_within_five_percent_of_the_best_single_model_on_a_small_suite():
    """The whole suite, real series and three seeds are in benchmarks/forecast/pipelines.py."""
    found = []
    for seed in range(3):
        whole = panel(wave(108, seed=seed, noise=0.5))
        truth, before = whole.series[0].values[0, -12:], whole.without_last(12)
        one = Scientist(horizon=12, windows=2)
        one.fit_panel(before)
        row = {"scientist": one.forecast_panel(before).point[0][0]}
        for name in ("seasonal_naive", "theta", "ets"):
            row[name] = Forecaster.forecast_panel(_named(name), before).point[0][0]
        found.append({name: np.abs(x - truth).mean() for name, x in row.items()})
    mean = pd.DataFrame(found).mean()
    assert mean["scientist"] <= 1.05 * mean.drop("scientist").min()
    assert mean["scientist"] < 0.8 * mean["seasonal_naive"]


def _named(name):
    from manyheads.forecast.core.forecaster import FORECASTERS

    return FORECASTERS[name](horizon=12)


CLASSES = ("CN", "MCI", "AD")


def visits(n=20, seed=0):
    """Two visits a subject; diagnosis and value are measured on one day, the scan on another."""
    rng = np.random.default_rng(seed)
    rows = [
        {
            "subject": s,
            "date": 3.0 + 6 * v,
            "scan_date": 5.0 + 6 * v,
            "diagnosis": CLASSES[int(rng.integers(3))],
            "ADAS13": rng.normal(20, 5),
            "Ventricles": rng.normal(0.03, 0.01),
        }
        for s in range(n)
        for v in range(2)
    ]
    return pd.DataFrame(rows)


def perfect(truth, width=0.0):
    """What will be measured, month by month; months without a visit hold nonsense far from it."""
    months = pd.DataFrame({"date": np.arange(14.0)})
    out = truth[["subject"]].drop_duplicates().merge(months, "cross")
    for name in CLASSES:
        out[f"p_{name}"] = 1 / 3
    for name, when in (("ADAS13", "date"), ("Ventricles", "scan_date")):
        own = truth.set_index(["subject", when])[name]
        out[name] = [own.get((s, m), 999.0) for s, m in zip(out["subject"], out["date"], strict=True)]
        out[f"{name}_low"], out[f"{name}_high"] = out[name] - width, out[name] + width
    label = truth.set_index(["subject", "date"])["diagnosis"]
    for i, key in enumerate(zip(out["subject"], out["date"], strict=True)):
        for name in CLASSES:
            if key in label:
                out.loc[i, f"p_{name}"] = float(label[key] == name)
    return out


def test_a_perfect_entry_scores_perfectly_each_target_on_its_own_day():
    truth = visits()
    for width in (0.0, 2.0):
        found = score_longitudinal(perfect(truth, width), truth, dates={"Ventricles": "scan_date"}, resamples=20)
        assert found["diagnosis", "mAUC"] == found["diagnosis", "BCA"] == 1
        for name in ("ADAS13", "Ventricles"):
            assert found[name, "MAE"] == found[name, "WES"] == 0 and found[name, "CPA"] == 0.5
        assert (found.table["visits"] == 40).all() and (found.table["stderr"] == 0).all()
    wrong_day = score_longitudinal(perfect(truth), truth)
    assert wrong_day["Ventricles", "MAE"] > 100


def test_constant_probabilities_have_an_area_of_a_half():
    truth = visits()
    entry = perfect(truth).assign(p_CN=0.2, p_MCI=0.5, p_AD=0.3)
    found = score_longitudinal(entry, truth, values=["ADAS13"])
    assert found["diagnosis", "mAUC"] == 0.5
    assert found["diagnosis", "BCA"] == pytest.approx(0.5)


def test_the_area_is_that_of_scikit_learn_ties_and_all():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    p = np.round(rng.dirichlet(np.ones(3) + 2 * np.eye(3)[y].mean(0), 300) + np.eye(3)[y] * 0.2, 1) + 0.01
    p = p / p.sum(1, keepdims=True)
    pairs = pd.DataFrame({"y": y, **{f"p{k}": p[:, k] for k in range(3)}})
    assert len(np.unique(p[:, 0])) < 60
    wanted = metrics.roc_auc_score(y, p, multi_class="ovo", average="macro")
    assert hand_till(pairs) == pytest.approx(wanted, abs=1e-12)
    parts = [
        (metrics.recall_score(y == k, p.argmax(1) == k) + metrics.recall_score(y != k, p.argmax(1) != k)) / 2
        for k in range(3)
    ]
    assert balanced_accuracy(pairs) == pytest.approx(np.mean(parts))


def gaussian(n=2000, spread=1.0, seed=0):
    rng = np.random.default_rng(seed)
    truth = pd.DataFrame({"subject": np.arange(n), "date": 0.0, "x": rng.normal(size=n)})
    half = 0.6744897501960817 * spread
    entry = pd.DataFrame({"subject": np.arange(n), "date": 0.0, "x": 0.0, "x_low": -half, "x_high": half})
    return entry, truth


def test_calibrated_intervals_cover_half_and_others_do_not():
    assert score_longitudinal(*gaussian(), resamples=0)["x", "CPA"] < 0.03
    assert score_longitudinal(*gaussian(spread=2.0), resamples=0)["x", "CPA"] > 0.3
    assert score_longitudinal(*gaussian(spread=0.3), resamples=0)["x", "CPA"] > 0.3


def test_the_weighted_error_listens_to_sure_forecasts_and_has_a_limit_at_width_zero():
    truth = pd.DataFrame({"subject": [1, 2], "date": 0.0, "x": [0.0, 0.0]})
    entry = pd.DataFrame({"subject": [1, 2], "date": 0.0, "x": [1.0, 4.0], "x_low": [0.0, 0.0], "x_high": [1.0, 3.0]})
    assert score_longitudinal(entry, truth)["x", "WES"] == pytest.approx((1 + 4 / 3) / (1 + 1 / 3))
    sure = [score_longitudinal(entry.assign(x_low=[0.0, 3 - w]), truth)["x", "WES"] for w in (1e-200, 0.0)]
    assert sure == [4.0, 4.0]


def test_the_order_of_rows_and_the_scale_of_probabilities_change_nothing():
    truth = visits()
    entry = perfect(truth, 2.0)
    entry["ADAS13"] += np.random.default_rng(1).normal(size=len(entry))
    base = score_longitudinal(entry, truth, resamples=20)
    shuffled = score_longitudinal(
        entry.sample(frac=1, random_state=1), truth.sample(frac=1, random_state=2), resamples=20
    )
    pd.testing.assert_frame_equal(base.table, shuffled.table, check_exact=True)
    scaled = entry.assign(**{f"p_{name}": 4 * entry[f"p_{name}"] for name in CLASSES})
    pd.testing.assert_frame_equal(base.table, score_longitudinal(scaled, truth, resamples=20).table)
    assert (
        base.table["stderr"][base.table["metric"].isin(["MAE", "WES"]) & (base.table["target"] == "ADAS13")] > 0
    ).all()


def test_a_visit_between_two_months_has_the_earlier_and_dates_may_be_dates():
    entry = pd.DataFrame({"subject": "a", "date": [2.0, 1.0], "x": [20.0, 10.0], "x_low": 0.0, "x_high": 30.0})
    truth = pd.DataFrame({"subject": ["a", "a"], "date": [1.5, 1.6], "x": [10.0, 20.0]})
    assert score_longitudinal(entry.set_axis([0, 0]), truth)["x", "MAE"] == 0
    months = pd.to_datetime(["2020-02-01", "2020-01-01"])
    days = pd.to_datetime(["2020-01-03", "2020-01-30"])
    assert score_longitudinal(entry.assign(date=months), truth.assign(date=days))["x", "MAE"] == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda e, t: (e[e["subject"] != 7], t), "were not forecast, 7 first"),
        (lambda e, t: (e.assign(ADAS13=np.nan), t), "not all finite"),
        (lambda e, t: (e.assign(p_CN=-1.0), t), "negative"),
        (lambda e, t: (pd.concat([e, e.iloc[:1]]), t), "two rows of one date"),
        (lambda e, t: (e.assign(ADAS13_low=e["ADAS13"] + 1), t), "ends before it begins"),
        (lambda e, t: (e, t.assign(diagnosis="LMCI")), "'LMCI' without a forecast"),
        (lambda e, t: (e.drop(columns="ADAS13_high"), t), "no column 'ADAS13_high'"),
        (lambda e, t: (e, t.assign(Ventricles=np.nan)), "nothing to score"),
        (lambda e, t: (e, t.assign(date="2020")), "of two kinds"),
        (lambda e, t: (e[["subject", "date"]], t), "nothing to score"),
    ],
)
def test_entries_that_do_not_fit_are_refused(change, said):
    truth = visits(10)
    with pytest.raises(InputError, match=said):
        score_longitudinal(*change(perfect(truth), truth))


def test_one_class_alone_has_no_metric_and_a_class_without_a_visit_is_left_out():
    truth = visits(20)
    found = score_longitudinal(perfect(truth), truth.assign(diagnosis="CN"), resamples=5)
    assert np.isnan(found["diagnosis", "mAUC"]) and np.isnan(found["diagnosis", "BCA"])
    two = truth[truth["diagnosis"] != "AD"]
    assert score_longitudinal(perfect(two), two)["diagnosis", "mAUC"] == 1


def test_a_learned_progression_beats_the_last_visit_and_neither_sees_the_future():
    cohort = generated_cohort(160, 0)
    own, others = (cohort[cohort["subject"] % 2 == k] for k in (0, 1))
    past, later = own[own["date"] < 36], own[own["date"] >= 36]
    months = np.arange(36.0, 75, 3)
    last = score_longitudinal(repeated_visit(past, months), later, resamples=0)
    learned = score_longitudinal(progression(past, months, others), later, resamples=0)
    assert learned["Ventricles", "MAE"] < 0.9 * last["Ventricles", "MAE"]
    assert learned["ADAS13", "CPA"] < 0.12
    assert last["diagnosis", "mAUC"] > 0.7
    with pytest.raises(InputError, match="two whole visits"):
        progression(past, months, others.drop_duplicates("subject"))
