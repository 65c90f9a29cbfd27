"""Forecasters of many sensors: MHAC, and the hierarchy of state spaces HiSS."""

from __future__ import annotations

from dataclasses import replace

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
from manyheads.forecast.sensors.hiss import SENSORS, DiagonalStateSpace, Hiss, HissSettings, SensorRegressor
from manyheads.forecast.sensors.hiss_experiment import carried, equal_width
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


def test_the_state_space_is_its_recurrence_also_across_blocks():
    torch.manual_seed(0)
    space = DiagonalStateSpace(3, 4)
    u = torch.randn(2, 150, 3)
    a = torch.complex(-space.log_decay.exp(), space.turn).to(torch.complex128)
    step = (a * space.log_step.exp()[:, None].double()).exp()
    read, h, wanted = (
        torch.view_as_complex(space.read).to(torch.complex128),
        torch.zeros(2, 3, 4).to(torch.complex128),
        [],
    )
    for t in range(150):
        h = step * h + (step - 1) / a * u[:, t, :, None]
        wanted.append(2 * (read * h).sum(-1).real + space.skip * u[:, t])
    torch.testing.assert_close(space(u), torch.stack(wanted, 1).float(), rtol=1e-4, atol=1e-5)


def hiss(flat=False, **more):
    torch.manual_seed(0)
    return Hiss(HissSettings(chunk=10, width=8, high_width=8, summary=6, states=4, flat=flat, **more), 2, 1).eval()


@pytest.mark.parametrize("flat", [False, True])
def test_an_output_reads_its_own_chunk_and_earlier_ones_and_no_bit_of_later_ones(flat):
    network = hiss(flat)
    x = torch.randn(3, 200, 2)
    base = network.outputs(x)
    assert base.shape == (3, 20, 1)
    for i in (0, 7, 18):
        later = x.clone()
        later[:, (i + 1) * 10 :] = 4.0
        out = network.outputs(later)
        assert (out[:, : i + 1] == base[:, : i + 1]).all()
        assert (out[:, i + 1] != base[:, i + 1]).all()
        own = x.clone()
        own[:, i * 10 + 3] += 1
        assert (network.outputs(own)[:, i] != base[:, i]).all()


def test_the_low_level_never_carries_its_state_into_another_chunk():
    network = hiss()
    u = torch.randn(1, 50, 4, requires_grad=True)
    last = network.low(u.unflatten(1, (-1, 10)).flatten(0, 1))[:, -1]
    (gradient,) = torch.autograd.grad(last[2].sum(), u)
    moved = gradient[0].abs().sum(-1) > 0
    assert moved[20:30].all() and not moved[:20].any() and not moved[30:].any()


def test_a_hierarchy_learns_what_a_carrier_hides_and_comes_back_from_a_file(tmp_path):
    """The sheet's comparison over three seeds is `manyheads forecast try hiss`."""
    x, y = carried(48, 0)
    hidden = y.copy()
    hidden[:, ::7] = np.nan
    settings = HissSettings(width=16, high_width=16, states=8)
    model = SensorRegressor(settings, replace(SENSORS, epochs=25, rate=5e-3)).fit(x, hidden)
    new_x, new_y = carried(48, 1)
    error = ((model.predict(new_x) - new_y) ** 2).mean() / new_y.var()
    assert error < 0.3
    again = SensorRegressor.load(model.save(tmp_path / "saved"))
    assert (again.predict(new_x) == model.predict(new_x)).all()


def test_flat_baselines_have_as_many_parameters():
    settings = HissSettings()
    sizes = [sum(p.numel() for p in Hiss(one, 2, 1).parameters()) for one in (settings, equal_width(settings))]
    assert abs(sizes[1] / sizes[0] - 1) < 0.05


def test_sequences_that_do_not_fit_are_refused():
    x, y = carried(4, 0)
    with pytest.raises(InputError, match="give 10 steps for each target"):
        SensorRegressor().fit(x[:, :-1], y)
    with pytest.raises(InputError, match="finite"):
        SensorRegressor().fit(x * np.nan, y)
    with pytest.raises(InputError, match="not fitted"):
        SensorRegressor().predict(x)
    with pytest.raises(InputError, match="whole number of chunks"):
        hiss().outputs(torch.zeros(1, 15, 2))
