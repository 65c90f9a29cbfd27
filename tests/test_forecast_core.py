"""Windows, heads, training, saving and backtests of forecasters, on series whose answer is known."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyheads.errors import InputError
from manyheads.forecast.backtest import backtest
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.heads import LEVELS, pinball
from manyheads.forecast.core.metrics import scores, seasonal_error
from manyheads.forecast.core.network import NetworkForecaster, interpolated
from manyheads.forecast.core.windows import Windows
from manyheads.forecast.mixers.softs import Softs


class Line(nn.Module):
    """The last `width` values themselves."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, past_values):
        return self.scale * past_values.transpose(1, 2)


class Linear(NetworkForecaster):
    METHOD = "linear of tests"

    def trunk(self, shape):
        return Line(shape.context)


def frame(values, freq="h", **more):
    values = np.asarray(values, dtype=float)
    times = pd.date_range("2024-01-01", periods=len(values), freq=freq)
    return pd.DataFrame({"timestamp": times, "target": values}).assign(**more)


def panel(*values, freq="h"):
    df = pd.concat([frame(v, freq, item_id=f"s{i}") for i, v in enumerate(values)])
    return panel_of(df, columns_of(df))


def sine(n, period=24, noise=0.1, seed=0, level=0.0):
    return level + np.sin(2 * np.pi * np.arange(n) / period) + noise * np.random.default_rng(seed).normal(size=n)


@settings(max_examples=30, deadline=None)
@given(
    scale=st.sampled_from([1e-6, 1.0, 1e12]),
    level=st.floats(-1e3, 1e3),
    lengths=st.lists(st.integers(12, 40), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_what_a_window_scaled_comes_back(scale, level, lengths, seed):
    rng = np.random.default_rng(seed)
    values = [scale * (level + rng.normal(size=n)) for n in lengths]
    windows = Windows(panel(*values), 6, 3)
    places = windows.places([(s, windows.cuts(s)) for s in range(len(lengths))])
    batch = windows.batch(places)
    back = windows.original(places, batch["future"])
    for row, (s, cut) in enumerate(places):
        truth = values[s][cut : cut + 3]
        np.testing.assert_allclose(back[row, 0], truth, rtol=0, atol=1e-4 * np.abs(values[s]).max())
    whole = batch["past_observed_mask"].bool().all(1)[:, 0]
    assert batch["past_values"][whole].mean(1).abs().max() < 1e-4 if whole.any() else True


def test_windows_never_fill_a_gap_with_what_came_later_and_count_only_what_was_observed():
    values = np.arange(20.0)
    values[[0, 5, 6, 15]] = np.nan
    windows = Windows(panel(values), 8, 4)
    batch = windows.batch(np.array([[0, 9]]))
    x, seen = batch["past_values"][0, :, 0], batch["past_observed_mask"][0, :, 0]
    assert seen.tolist() == [1, 1, 1, 1, 0, 0, 1, 1]  # steps 1 to 8
    assert x[4] == x[3] and x[5] == x[3]
    early = windows.batch(np.array([[0, 12]]))
    assert early["counted"][0, 0].tolist() == [1, 1, 1, 0]
    other = values.copy()
    other[9:] = 99.0
    changed = Windows(panel(other), 8, 4, held=11).batch(np.array([[0, 9]]))
    same = Windows(panel(values), 8, 4, held=11).batch(np.array([[0, 9]]))
    assert torch.equal(changed["past_values"], same["past_values"])


def test_training_windows_end_before_the_validation_and_cover_all():
    windows = Windows(panel(np.arange(100.0)), 20, 5)
    cuts = windows.cuts(0, last=80)
    assert (cuts[0], cuts[-1]) == (20, 75)
    judged = windows.cuts(0, 80)
    assert (judged[0], judged[-1]) == (80, 95)
    short = Windows(panel(np.arange(10.0)), 20, 5)
    assert len(short.places([(0, short.cuts(0))])) >= 1


def test_quantiles_at_the_truth_cost_nothing_and_the_median_is_the_absolute_error():
    y = torch.randn(50)
    levels = torch.tensor(LEVELS)
    assert float(pinball(y, y[:, None].expand(-1, 9), levels).abs().max()) == 0
    q = torch.randn(50, 9)
    torch.testing.assert_close(pinball(y, q, levels)[:, 4], (y - q[:, 4]).abs())
    grid = torch.linspace(-4, 4, 2001)
    draws = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    for level in (0.1, 0.9):
        cost = torch.stack([pinball(draws, g.expand(len(draws), 1), torch.tensor([level])).mean() for g in grid[::40]])
        best = grid[::40][cost.argmin()]
        assert abs(float(best) - float(torch.distributions.Normal(0, 1).icdf(torch.tensor(level)))) < 0.17


def test_levels_that_were_not_learned_lie_between_those_that_were():
    q = np.array([[1.0, 2.0, 4.0]])
    np.testing.assert_allclose(interpolated(q, (0.1, 0.5, 0.9), (0.05, 0.3, 0.5, 0.7, 0.99)), [[1, 1.5, 2, 3, 4]])


@pytest.fixture(scope="module")
def fitted():
    df = pd.concat([frame(sine(400, seed=s, level=10.0 * s), item_id=f"s{s}") for s in range(2)])
    return Linear(horizon=12, context=48, epochs=20, rows=32, rate=3e-3).fit(df), df


def test_a_linear_trunk_learns_a_sine_with_calibrated_quantiles(fitted):
    model, df = fitted
    result = model.backtest(df, windows=4)
    table = result.scores().set_index("method")
    assert (
        table.loc["linear of tests", "MASE"] < 0.85 * table.loc["seasonal_naive", "MASE"]
    )  # noise of one draw, not two
    assert 0.6 < table.loc["linear of tests", "coverage"] < 0.95  # of .1 to .9
    assert table.loc["linear of tests", "parameters"] > 48 * 12


def test_quantiles_do_not_cross_and_the_point_is_the_median(fitted):
    model, _ = fitted
    out = model.predict(quantile_levels=(0.05, 0.2, 0.5, 0.8))
    assert (np.diff(out[["0.05", "0.2", "0.5", "0.8"]].to_numpy(), axis=1) >= 0).all()
    np.testing.assert_array_equal(out["predictions"], out["0.5"])
    assert out.groupby("item_id").size().tolist() == [12, 12]


def test_a_longer_horizon_is_rolled_out_and_a_shorter_one_is_its_beginning(fitted):
    model, df = fitted
    long, own, short = (model.predict(h, quantile_levels=(0.5,)) for h in (30, 12, 5))
    for name in ("s0", "s1"):
        a, b, c = (one[one["item_id"] == name]["predictions"].to_numpy() for one in (long, own, short))
        np.testing.assert_array_equal(a[:12], b)
        np.testing.assert_array_equal(a[:5], c)
        continued = df[df["item_id"] == name].iloc[:400]
        after = pd.date_range("2024-01-01", periods=412, freq="h")[400:]
        grown = pd.concat([continued, pd.DataFrame({"item_id": name, "timestamp": after, "target": b})])
        np.testing.assert_allclose(model.predict_df(grown)["predictions"][:12], a[12:24], rtol=1e-4, atol=1e-5)


def test_saved_and_loaded_it_gives_the_same_bits(fitted, tmp_path):
    df = pd.concat([frame(sine(300, seed=s), item_id=f"s{s}") for s in range(2)])
    model = Softs(horizon=6, context=24, width=8, core=4, hidden=8, epochs=1, channels="series").fit(df)
    model.save(tmp_path / "softs")
    again = Forecaster.load(tmp_path / "softs")
    pd.testing.assert_frame_equal(model.predict(), again.predict(), check_exact=True)
    pd.testing.assert_frame_equal(model.predict_df(df), again.predict_df(df), check_exact=True)
    assert again.get_params() == model.get_params()
    with pytest.raises(InputError, match="holds no forecaster"):
        Forecaster.load(tmp_path)
    with pytest.raises(InputError, match="exists"):
        model.save(tmp_path / "softs")


def test_the_seed_decides_and_an_interrupted_run_ends_the_same(tmp_path):
    df = frame(sine(300))
    kwargs = dict(horizon=6, context=24, epochs=2, rows=64)
    a, b = (Linear(**kwargs, seed=3).fit(df).predict()["0.9"].to_numpy() for _ in range(2))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, Linear(**kwargs, seed=4).fit(df).predict()["0.9"].to_numpy())

    class Stop(Exception):
        pass

    from manyheads.progress import Bar

    class Interrupting(Bar):
        def __init__(self):
            self.n = 0

        def __call__(self, more=1, /, note=""):
            self.n += 1
            if self.n == 5:
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

        def step(self, name, total=None, *, done=0):
            return self

    with pytest.raises(KeyboardInterrupt):
        Linear(**kwargs, seed=3).fit(df, folder=tmp_path / "run", bar=Interrupting())
    resumed = Linear(**kwargs, seed=3).fit(df, folder=tmp_path / "run").predict()["0.9"].to_numpy()
    np.testing.assert_array_equal(a, resumed)


@pytest.mark.parametrize(
    "values",
    [np.full(60, 7.0), 1e12 * (1 + sine(60)), np.where(np.arange(60) % 3, np.nan, sine(60)), sine(9), sine(60) * 1e-12],
    ids=["constant", "huge", "two thirds missing", "short", "tiny"],
)
def test_odd_series_have_finite_forecasts_of_their_size(values):
    df = pd.concat([frame(values, item_id="odd"), frame(sine(200), item_id="other")])
    out = Linear(horizon=4, context=12, epochs=3).fit(df).predict()
    own = out[out["item_id"] == "odd"].drop(columns=["item_id", "timestamp", "target_name"]).to_numpy()
    assert np.isfinite(own).all()
    span = np.nanmax(np.abs(values)) + 1e-15
    assert np.abs(own).max() < 10 * span
    if np.ptp(values[np.isfinite(values)]) == 0:
        np.testing.assert_allclose(own, 7.0, rtol=0.02)


def test_point_objective_keeps_the_trunk_free_of_the_quantile_head():
    df = frame(sine(300))
    kwargs = dict(horizon=6, context=24, epochs=1, objective="point")
    with_head = Linear(**kwargs).fit(df)
    without = Linear(**kwargs, levels=()).fit(df)
    assert torch.equal(with_head.heads_.trunk.module.scale, without.heads_.trunk.module.scale)
    np.testing.assert_array_equal(
        with_head.predict()["predictions"], without.predict(quantile_levels=())["predictions"]
    )
    with pytest.raises(InputError, match="learned no quantiles"):
        without.predict()


def test_metrics_are_those_of_the_formulas():
    p = panel(np.array([1.0, 2, 4, 7, 11, 16, 22]))
    assert seasonal_error(p, 1)[0, 0] == pytest.approx((1 + 2 + 3 + 4 + 5 + 6) / 6)
    assert seasonal_error(p, 2)[0, 0] == pytest.approx((3 + 5 + 7 + 9 + 11) / 5)
    table = pd.DataFrame(
        {
            "window": 0,
            "target_name": "y",
            "y": [1.0, 2.0, np.nan],
            "point": [2.0, 2.0, 9.0],
            "error": 2.0,
            "0.1": 0.0,
            "0.9": 3.0,
        }
    )
    row = scores(table).iloc[0]
    assert (
        row["MASE"] == pytest.approx(0.25) and row["MAE"] == pytest.approx(0.5) and row["WAPE"] == pytest.approx(1 / 3)
    )
    expected = np.mean([2 * 0.1 * 1, 2 * 0.1 * 2, 2 * 0.1 * 2, 2 * 0.1 * 1])
    assert row["SQL"] == pytest.approx(expected / 2) and row["coverage"] == 1.0


def test_a_backtest_has_the_truth_of_its_windows_and_nothing_of_it_is_seen_before():
    values = np.arange(60.0)
    p = panel(values, values[:30])
    result = backtest(SeasonalNaive(horizon=5, season=1), p, windows=3, season=1)
    own = result.table[(result.table["method"] == "seasonal_naive") & (result.table["item"] == "s0")]
    assert own["y"].tolist() == list(range(45, 60))
    assert own["point"].tolist() == [44.0] * 5 + [49.0] * 5 + [54.0] * 5
    assert result.worse_than_naive().empty
    poisoned = values.copy()
    poisoned[45:] = 1e6

    class Spy(SeasonalNaive):
        seen: ClassVar[list[float]] = []

        def _fit(self, panel, **kwargs):
            Spy.seen.append(max(float(np.nanmax(one.values)) for one in panel.series))

    backtest({"spy": Spy(horizon=5, season=1)}, panel(poisoned), windows=3, season=1)
    assert Spy.seen == [44.0]
    Spy.seen.clear()
    backtest({"spy": Spy(horizon=5, season=1)}, p, windows=3, season=1, refit=True)
    assert Spy.seen == [44.0, 49.0, 54.0]
    with pytest.raises(InputError, match="ask for fewer"):
        backtest(SeasonalNaive(horizon=30), p, windows=3)


def test_short_series_beside_a_long_one_learn_from_their_own_windows_and_none_reaches_what_judges():
    seen = {}

    class Spying(Linear):
        def prepare(self, trunk, windows, places):
            seen["places"], seen["held"], seen["lengths"] = places, windows.held, windows.lengths

    Spying(horizon=6, context=24, epochs=1).fit_panel(panel(sine(1000), sine(60), sine(60), sine(60), sine(9)))
    places, lengths = seen["places"], np.array(seen["lengths"])
    assert seen["held"] == 6  # of the median series, not a tenth of the longest
    counts = np.bincount(places[:, 0], minlength=5)
    assert counts[1] == 60 - 6 - 6 - 24 + 1 and counts[4] == 0  # the last has 3 steps before the 6 that judge
    assert (places[:, 1] + 6 <= lengths[places[:, 0]] - 6).all()


def test_channels_are_permuted_series_and_must_cover_the_same_times():
    a, b = sine(200, seed=0), sine(200, seed=1)
    p = panel(a, b)
    stacked = p.stacked()
    np.testing.assert_array_equal(stacked.series[0].values, np.stack([a, b]))
    with pytest.raises(InputError, match="'s1' does not cover the same times"):
        panel(a, b[:100]).stacked()


def test_settings_are_checked_before_work_and_cloned_by_scikit_learn():
    from sklearn.base import clone

    assert clone(Softs(horizon=3, width=9)).width == 9
    for wrong, said in (
        ({"horizon": 0}, "horizon"),
        ({"context": 0}, "context"),
        ({"levels": (0.9, 0.1)}, "rising"),
        ({"objective": "both"}, "objective"),
        ({"levels": ()}, "no quantile levels"),
    ):
        with pytest.raises(InputError, match=said):
            Softs(**wrong)
    with pytest.raises(InputError, match="not fitted"):
        Softs().predict()
    with pytest.raises(InputError, match="too few to learn"):
        Softs(horizon=24).fit(frame(sine(20)))
    with pytest.raises(InputError, match="no setting 'depth'"):
        Softs().set_params(depth=3)
