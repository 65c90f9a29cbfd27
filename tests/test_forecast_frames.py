"""Long frames in, long frames out: both conventions, and every frame that is not right is refused by the name of its series."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from manyheads.errors import InputError
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.frames import columns_of, panel_of, read_frame
from manyheads.forecast.core.panel import season_of


def daily(names=("a", "b"), n=30, **more):
    parts = [
        pd.DataFrame(
            {
                "item_id": name,
                "timestamp": pd.date_range("2024-01-01", periods=n, freq="D"),
                "target": np.arange(n) % 7.0,
            }
        )
        for name in names
    ]
    return pd.concat(parts).assign(**more)


def naive(df, horizon=7, **kwargs):
    return SeasonalNaive(horizon=horizon).fit(df, **kwargs)


def test_the_convention_of_the_input_is_that_of_the_output():
    chronos = daily()
    nixtla = chronos.rename(columns={"item_id": "unique_id", "timestamp": "ds", "target": "y"})
    a = naive(chronos).predict(quantile_levels=(0.1, 0.5))
    b = naive(nixtla).predict(quantile_levels=(0.1, 0.5))
    assert list(a) == ["item_id", "timestamp", "target_name", "predictions", "0.1", "0.5"]
    assert list(b) == ["unique_id", "ds", "seasonal_naive", "seasonal_naive-q-10", "seasonal_naive-q-50"]
    assert (a["predictions"].to_numpy() == b["seasonal_naive"].to_numpy()).all()
    assert a["timestamp"].iloc[0] == pd.Timestamp("2024-01-31") and len(a) == 14
    assert a["predictions"].tolist()[:7] == [(30 + i) % 7 for i in range(7)]


def test_other_names_several_targets_and_one_series_without_a_name():
    df = pd.DataFrame({"when": pd.date_range("2024-01-01", periods=50, freq="h"), "u": range(50), "v": range(50)})
    out = naive(df, 3, time="when", target=["u", "v"]).predict(quantile_levels=())
    assert list(out) == ["when", "target_name", "predictions"]
    assert out["target_name"].tolist() == ["u"] * 3 + ["v"] * 3
    assert out["predictions"].tolist()[:3] == [26.0, 27.0, 28.0]


def test_rows_in_any_order_and_missing_rows_are_the_same_series():
    df = daily()
    expected = naive(df).predict()
    shuffled = df.sample(frac=1.0, random_state=0)
    pd.testing.assert_frame_equal(
        expected.sort_values(["item_id", "timestamp"], ignore_index=True),
        naive(shuffled).predict().sort_values(["item_id", "timestamp"], ignore_index=True),
    )
    gap = df[~((df["item_id"] == "a") & (df["timestamp"] == "2024-01-25"))]
    panel = panel_of(gap, columns_of(gap))
    assert len(panel.series[0]) == 30 and np.isnan(panel.series[0].values[0, 24])
    assert naive(gap).predict()["predictions"].tolist() == expected["predictions"].tolist()  # of the season before


@pytest.mark.parametrize(
    "freq, season",
    [
        ("h", 24),
        ("15min", 96),
        ("D", 7),
        ("B", 5),
        ("W-WED", 1),
        ("MS", 12),
        ("ME", 12),
        ("QS", 4),
        ("2h", 12),
        ("YS", 1),
    ],
)
def test_the_grid_and_the_season_are_found(freq, season):
    times = pd.date_range("2022-01-05", periods=60, freq=freq)
    df = pd.DataFrame({"timestamp": times, "target": np.arange(60.0)})
    panel = panel_of(df, columns_of(df))
    assert panel.season == season
    assert season_of(panel.freq) == season
    ahead = panel.future_times(panel.series[0], 3)
    assert ahead.tolist() == pd.date_range("2022-01-05", periods=63, freq=freq)[60:].tolist()


def test_whole_numbers_are_times_and_time_zones_stay():
    df = pd.DataFrame({"ds": np.arange(0, 100, 5), "y": np.arange(20.0)})
    assert naive(df, 2).predict(quantile_levels=())["ds"].tolist() == [100, 105]
    zoned = pd.date_range("2024-03-30", periods=48, freq="h", tz="Europe/Berlin")  # over the change to summer time
    df = pd.DataFrame({"timestamp": zoned, "target": np.arange(48.0)})
    out = naive(df, 2).predict(quantile_levels=())["timestamp"]
    assert str(out.dt.tz) == "Europe/Berlin" and out.iloc[0] == zoned[-1] + pd.Timedelta(hours=1)
    days = pd.DataFrame(
        {"timestamp": pd.date_range("2024-03-20", periods=20, freq="D", tz="Europe/Berlin"), "target": 1.0}
    )
    assert naive(days, 1).predict(quantile_levels=())["timestamp"].iloc[0] == pd.Timestamp(
        "2024-04-09", tz="Europe/Berlin"
    )


def with_duplicate(df):
    return pd.concat([df, df.iloc[[3]]])


def off_the_grid(df):
    df = df.reset_index(drop=True)
    df.loc[35, "timestamp"] += pd.Timedelta(minutes=7)
    return df


def without_values(df):
    return df.assign(target=df["target"].where(df["item_id"] != "b"))


@pytest.mark.parametrize(
    "broken, said",
    [
        (with_duplicate, r"series 'a' has two rows at 2024-01-04"),
        (off_the_grid, r"series 'b' is not on a grid of step 1?D: .* 2024-01-06 00:07"),
        (without_values, r"series 'b' has no value"),
        (lambda df: df.iloc[:0], "no rows"),
        (lambda df: df.drop(columns="target"), "no column 'target', only item_id, timestamp"),
        (lambda df: df.assign(target="x"), "column 'target' holds"),
        (lambda df: df.assign(target=np.inf), "holds infinity"),
        (lambda df: df.assign(timestamp="yesterday week"), "column 'timestamp' is no time"),
        (lambda df: df.assign(item_id=None), "without a name"),
    ],
)
def test_a_frame_that_is_not_right_is_refused_by_name(broken, said):
    df = broken(daily())
    with pytest.raises(InputError, match=said):
        panel_of(df, columns_of(df))


def test_one_value_needs_a_frequency_and_is_repeated():
    df = daily(("a",), n=1)
    with pytest.raises(InputError, match="give freq"):
        naive(df)
    assert naive(df, freq="D").predict(3)["predictions"].tolist() == [0.0, 0.0, 0.0]


def test_a_grid_that_is_nearly_empty_is_none():
    df = pd.DataFrame(
        {"timestamp": ["2020-01-01 00:00:00", "2020-01-01 00:00:01", "2024-01-01"], "target": [1.0, 2.0, 3.0]}
    )
    with pytest.raises(InputError, match="too few values for it"):
        panel_of(df, columns_of(df))


def test_files_are_read_and_others_refused(tmp_path):
    daily().to_csv(tmp_path / "a.csv", index=False)
    daily().to_parquet(tmp_path / "a.parquet", index=False)
    for name in ("a.csv", "a.parquet"):
        df = read_frame(tmp_path / name)
        assert len(panel_of(df, columns_of(df))) == 2
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    for name, said in (("b.parquet", "cannot read"), ("none.csv", "no file")):
        with pytest.raises(InputError, match=said):
            read_frame(tmp_path / name)
