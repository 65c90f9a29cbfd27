"""Forecasters of many sensors: MHAC."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.forecaster import Forecaster
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.core.windows import Shape
from manyheads.forecast.explaining import explain_forecast
from manyheads.forecast.sensors.mhac import Mhac
from manyheads.forecast.sensors.mhac_experiment import held_out_error, leading_covariate, without_covariates
from manyheads.model.editing.edits import Ablate


def mhac_trunk(seed=0, known=0, layers=2):
    torch.manual_seed(seed)
    return Mhac(horizon=3, layers=layers).trunk(Shape(14, 3, 2, 3 - known, known)).eval()


def test_permuted_variables_give_permuted_features():
    trunk, order = mhac_trunk(), torch.tensor([3, 0, 4, 1, 2])
    x, seen = torch.randn(4, 14, 5), torch.rand(4, 14, 5).round()
    features = trunk.variables(x, seen)
    permuted = trunk.variables(x[..., order], seen[..., order])
    torch.testing.assert_close(permuted, features[:, order], rtol=0, atol=1e-6)
    assert (features[:, 0] - features[:, 1]).abs().max() > 0.1
    # The last map alone knows which is which.
    out = [trunk(v, m).last_hidden_state for v, m in ((x, seen), (x[..., order], seen[..., order]))]
    assert (out[0] - out[1]).abs().max() > 1e-3


def test_attention_is_the_formula_across_variables():
    trunk = mhac_trunk(layers=1)
    x = trunk.embedded(torch.randn(2, 14, 5))
    attention = trunk.layers[0].attention
    wanted = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        wanted.in_proj_weight.copy_(torch.cat([attention.q.weight, attention.k.weight, attention.v.weight]))
        wanted.in_proj_bias.copy_(torch.cat([attention.q.bias, attention.k.bias, attention.v.bias]))
        wanted.out_proj.load_state_dict(attention.o.state_dict())
    torch.testing.assert_close(attention(x), wanted(x, x, x)[0], rtol=1e-5, atol=1e-6)


def test_without_attention_a_variable_is_what_its_own_window_says():
    trunk = Mhac(horizon=3, mixes=False).trunk(Shape(14, 3, 1, 2, 0)).eval()
    x = torch.randn(2, 14, 3)
    other = x.clone()
    other[..., 1] += 1
    features = trunk.variables(x), trunk.variables(other)
    assert (features[0][:, [0, 2]] == features[1][:, [0, 2]]).all()
    mixed = mhac_trunk()
    assert (
        mixed.variables(torch.cat([x, x[..., :2]], -1))[:, 0]
        != mixed.variables(torch.cat([other, x[..., :2]], -1))[:, 0]
    ).any()


def test_its_heads_are_opened_read_and_ablated():
    trunk = mhac_trunk(layers=2)
    model = mh.open_model(trunk)
    assert len(model.heads) == 8 and not model.proof.failed
    x = torch.randn(3, 14, 5)
    before = trunk(x).last_hidden_state
    with model.editing(Ablate([mh.Head(1, 2)], "zero")):
        ablated = trunk(x).last_hidden_state
    columns = slice(2 * 8, 3 * 8)
    with torch.no_grad():
        trunk.layers[1].attention.o.weight[:, columns] = 0
    torch.testing.assert_close(trunk(x).last_hidden_state, ablated, rtol=1e-5, atol=1e-6)
    assert (before - ablated).abs().max() > 1e-4


def daily(n=300, seed=0):
    """The target is a covariate of the same day: known ahead, or not known at all."""
    rng = np.random.default_rng(seed)
    c = rng.normal(size=n)
    return pd.DataFrame({"timestamp": pd.date_range("2020-01-01", periods=n), "target": 2 * c, "c": c})


def test_covariates_known_ahead_are_read_where_they_are_and_past_ones_have_no_future():
    df = daily()
    settings = {"horizon": 5, "context": 10, "epochs": 25, "objective": "point", "rate": 3e-3}
    ahead = df.iloc[-5:][["timestamp", "c"]]
    knows = Mhac(**settings).fit(df.iloc[:-5], known=["c"])
    found = knows.predict(future_df=ahead)["predictions"].to_numpy()
    assert np.abs(found - df["target"].to_numpy()[-5:]).mean() < 0.5
    past = Mhac(**settings).fit(df.iloc[:-5])
    assert np.abs(past.predict()["predictions"].to_numpy() - df["target"].to_numpy()[-5:]).mean() > 0.9
    missing = knows.predict(future_df=ahead.assign(c=np.nan))["predictions"]
    assert np.isfinite(missing).all() and np.abs(missing - found).max() > 0.1


def test_what_comes_after_the_cut_is_not_read():
    df = daily(120)
    wild = df.copy()
    wild.loc[113:, ["target", "c"]] = 1e3
    found = []
    for frame in (df, wild):
        before = panel_of(frame, columns_of(frame)).without_last(7)
        found.append(Mhac(horizon=7, context=10, epochs=1).fit_panel(before).forecast_panel(before).point[0])
    assert (found[0] == found[1]).all()


def test_a_covariate_a_week_ahead_is_found():
    """The sheet's claims over three seeds are `manyheads forecast try mhac`."""
    panel = leading_covariate(0, 500)
    settings = {"horizon": 7, "objective": "point", "epochs": 15}
    one = Mhac(**settings)
    error = held_out_error(one, panel, 4)
    assert error <= 0.5 * held_out_error(SeasonalNaive(horizon=7), panel, 4)
    assert error <= 0.8 * held_out_error(Mhac(mixes=False, **settings), without_covariates(panel), 4)
    table = explain_forecast(one, panel, windows=4, n_random=1).table
    assert table.sort_values("effect").iloc[-1]["part"] == "c1"


def test_a_saved_one_forecasts_the_same_bits(tmp_path):
    df = daily(120).assign(other=1.0)
    df.loc[30:33, "target"] = np.nan
    one = Mhac(horizon=4, context=10, epochs=1).fit(df)
    again = Forecaster.load(one.save(tmp_path / "saved"))
    pd.testing.assert_frame_equal(one.predict(), again.predict(), check_exact=True)


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="no multiple of 3 heads"):
        Mhac(width=32, n_heads=3)
    df = daily(60)
    with pytest.raises(InputError, match="channels"):
        Mhac(horizon=4, context=10, epochs=1).fit(df).forecast_panel(
            panel_of(df, columns_of(df, target=["target", "c"])), 4
        )
