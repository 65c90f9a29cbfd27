"""`manyheads forecast`: a file in, a forecast, a backtest, a page and an explanation out; statistics; ensembles; fev tasks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from manyheads import cli
from manyheads.errors import InputError
from manyheads.forecast.backtest import backtest
from manyheads.forecast.baselines.statistics import ARIMA, ETS, Theta
from manyheads.forecast.choosing import context_for, forecaster_named, methods_for
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.ensemble import Ensemble
from manyheads.forecast.fev import fev_predictions


def run(*args):
    return CliRunner().invoke(cli.app, list(map(str, args)))


def monthly(n=120, seed=0):
    t = np.arange(n)
    y = 100 + 0.5 * t + 10 * np.sin(2 * np.pi * t / 12) + np.random.default_rng(seed).normal(size=n)
    return pd.DataFrame({"ds": pd.date_range("2015-01-01", periods=n, freq="MS"), "y": y})


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "sales.csv"
    pd.concat([monthly(seed=s).assign(unique_id=f"shop {s}") for s in range(2)]).to_csv(path, index=False)
    return path


def test_a_file_becomes_a_forecast_a_backtest_a_page_and_a_forecaster(file, tmp_path):
    out = tmp_path / "out"
    done = run(
        "forecast", file, "--horizon", 6, "--method", "theta,linear", "--epochs", 2, "--windows", 2, "--out", out
    )
    assert done.exit_code == 0, done.output
    forecast = pd.read_parquet(out / "forecast.parquet")
    assert len(forecast) == 12 and forecast["ds"].iloc[0] == pd.Timestamp("2025-01-01")
    method = forecast.columns[2]
    assert method in ("theta", "linear") and f"{method}-q-10" in forecast
    table = pd.read_parquet(out / "backtest.parquet")
    assert set(table["method"]) == {"theta", "linear", "seasonal_naive"} and table["window"].nunique() == 2
    page = (out / "report.html").read_text("utf-8")
    for part in ("What comes next", "seasonal_naive", "shop 0: y", "shop 1: y", "Errors by step ahead", "<polygon"):
        assert part in page
    again = Forecaster.load(out / "forecaster")
    np.testing.assert_allclose(again.predict(6)[method], forecast[method])
    refused = run("forecast", file, "--horizon", 6, "--out", out)
    assert refused.exit_code == 2 and "exists" in refused.output


def test_methods_are_compared_and_explained_and_listed(file, tmp_path):
    page = tmp_path / "compare.html"
    done = run(
        "forecast", "compare", file, "--horizon", 6, "--method", "seasonal_naive,theta", "--windows", 3, "--out", page
    )
    assert done.exit_code == 0, done.output
    assert "theta" in done.output and "MASE" in page.read_text("utf-8")
    page = tmp_path / "why.html"
    asked = ("--horizon", 6, "--method", "patchtst", "--context", 36, "--epochs", 1, "--windows", 4, "--n-random", 5)
    done = run("forecast", "explain", file, *asked, "--series", "shop 1", "--out", page)
    assert done.exit_code == 0, done.output
    text = page.read_text("utf-8")
    assert "What made this forecast" in text and "Attention heads" in text and "L0H0" in text and "shop 1" in text
    assert "patchtst" in run("forecast", "methods").output
    assert run("forecast", "list").exit_code == 0


@pytest.mark.parametrize(
    "args, said",
    [
        (("none.csv", "--horizon", 3), "no file"),
        (("FILE", "--horizon", 3, "--method", "oracle"), "no method 'oracle'"),
        (("FILE", "--horizon", 200), "too few"),
        (("FILE", "--horizon", 3, "--target", "z"), "no column 'z'"),
        (("FILE", "--horizon", 3, "--freq", "moons"), "freq is 'moons'"),
        (("explain", "FILE"), "give --horizon"),
        (("FILE", "--horizon", 3, "--known", "y2"), "no column 'y2'"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence_before_work_begins(file, args, said):
    done = run("forecast", *[file if arg == "FILE" else arg for arg in args])
    assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output


@pytest.mark.parametrize("cls", [ETS, Theta, ARIMA])
def test_models_of_statistics_beat_seasonal_naive_on_a_trend_with_a_season(cls):
    df = monthly(96)
    panel = panel_of(df, columns_of(df))
    table = backtest(cls(horizon=6), panel, windows=1).scores().set_index("method")
    assert table.loc[cls.METHOD, "MASE"] < 0.6 * table.loc["seasonal_naive", "MASE"]
    assert table.loc[cls.METHOD, "coverage"] > 0.5
    odd = pd.concat(
        [
            pd.DataFrame({"ds": df["ds"][:20], "y": 5.0, "unique_id": "constant"}),
            pd.DataFrame({"ds": df["ds"][:20], "y": 1e12 + np.arange(20.0), "unique_id": "huge"}),
            pd.DataFrame({"ds": df["ds"][:3], "y": [1.0, np.nan, 3.0], "unique_id": "short"}),
        ]
    )
    out = cls(horizon=4).fit(odd).predict()
    assert np.isfinite(out[cls.METHOD]).all()
    assert (out[out["unique_id"] == "constant"][cls.METHOD] == 5.0).all()


def test_an_ensemble_is_the_mean_of_its_members_and_is_saved_whole(tmp_path):
    df = monthly()
    settings = {"context": 24, "epochs": 2}
    both = Ensemble(
        horizon=4, members=(("linear", settings), ("softs", settings | {"width": 8, "core": 4, "hidden": 8}))
    ).fit(df)
    parts = [one.predict() for one in both.made_]
    for name in ("q-10", "q-90"):
        mean = (parts[0][f"linear-{name}"] + parts[1][f"softs-{name}"]) / 2
        np.testing.assert_allclose(both.predict()[f"ensemble-{name}"], mean)
    both.save(tmp_path / "both")
    again = Forecaster.load(tmp_path / "both")
    pd.testing.assert_frame_equal(both.predict(), again.predict(), check_exact=True)
    unknown, misfit = (("linear", {}), ("moon", {})), (("linear", {"moon": 1}),) * 2
    for wrong, said in (((("linear", {}),), "two members"), (unknown, "'moon'"), (misfit, "do not fit")):
        with pytest.raises(InputError, match=said):
            Ensemble(members=wrong)


def test_what_is_tried_suits_the_file():
    df = monthly(30)
    short = panel_of(df, columns_of(df))
    assert methods_for(short, 6) == ["seasonal_naive", "theta", "ets"]
    long = pd.DataFrame({"ds": pd.date_range("2020-01-01", periods=2000, freq="h"), "y": np.arange(2000.0)})
    panel = panel_of(long, columns_of(long))
    assert "softs" in methods_for(panel, 24)
    assert context_for(panel, 24) == 336 and context_for(short, 6) == 8
    assert forecaster_named("linear", panel, 24, epochs=3, width=9).get_params()["epochs"] == 3


def test_a_task_of_fev_is_forecast_window_by_window():
    """The layout that fev 0.10 has: rows whose columns are sequences; predictions by target."""
    values = np.arange(40.0) % 5

    def window(cut):
        times = pd.date_range("2024-01-01", periods=cut, freq="D").to_numpy()
        past = [{"id": "a", "timestamp": times, "u": values[:cut], "v": -values[:cut]}]
        return SimpleNamespace(get_input_data=lambda: (past, []))

    task = SimpleNamespace(
        horizon=5,
        num_windows=2,
        quantile_levels=[0.1, 0.5],
        target=["u", "v"],
        id_column="id",
        timestamp_column="timestamp",
        known_dynamic_columns=[],
        past_dynamic_columns=[],
        iter_windows=lambda: (window(cut) for cut in (30, 35)),
    )
    from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive

    found, seconds = fev_predictions(task, SeasonalNaive(horizon=5, season=5))
    assert len(found) == 2 and set(found[0]) == {"u", "v"} and seconds["inference_time_s"] > 0
    assert found[1]["v"][0]["predictions"] == [-0.0, -1.0, -2.0, -3.0, -4.0]
    assert set(found[0]["u"][0]) == {"predictions", "0.1", "0.5"}
    json.dumps(found)


def test_covariates_known_ahead_come_from_a_second_file_and_are_explained(tmp_path):
    n = 120
    promotion = (np.arange(n + 5) % 3 == 0).astype(float)
    df = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=n + 5), "y": 5 * promotion, "promotion": promotion})
    df.iloc[:n].to_csv(tmp_path / "past.csv", index=False)
    df.iloc[n:].drop(columns="y").to_csv(tmp_path / "ahead.csv", index=False)
    asked = ("--horizon", 5, "--known", "promotion", "--method", "chronos2", "--context", 24, "--epochs", 1)
    done = run("forecast", tmp_path / "past.csv", *asked, "--windows", 1, "--future", tmp_path / "ahead.csv")
    assert done.exit_code == 0, done.output
    without = run("forecast", tmp_path / "past.csv", *asked, "--windows", 1)
    assert without.exit_code == 2 and "known ahead; give future_df" in " ".join(without.output.split())
    page = tmp_path / "why.html"
    done = run("forecast", "explain", tmp_path / "past.csv", *asked, "--n-random", 2, "--out", page)
    assert done.exit_code == 0, done.output
    assert "Covariates" in page.read_text("utf-8") and "promotion" in page.read_text("utf-8")
