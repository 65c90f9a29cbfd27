"""What made a forecast, where it is known what did: a lag, a leading channel, a covariate, heads that write or do not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import manyheads as mh
from manyheads.errors import InputError
from manyheads.forecast.baselines.linear import LinearForecaster
from manyheads.forecast.baselines.seasonal_naive import SeasonalNaive
from manyheads.forecast.core.frames import columns_of, panel_of
from manyheads.forecast.explaining import explain_forecast
from manyheads.forecast.mixers.olinear import OLinear
from manyheads.forecast.transformers.patchtst import PatchTST


def panel_from(freq="s", **columns):
    n = len(next(iter(columns.values())))
    df = pd.DataFrame({"timestamp": pd.date_range("2024-01-01", periods=n, freq=freq), **columns})
    return panel_of(df, columns_of(df, target=list(columns)))


def effects(found, kind):
    return found.table[found.table["kind"] == kind].set_index("part")["effect"]


def test_a_linear_forecaster_is_moved_by_the_lag_that_makes_the_series():
    rng = np.random.default_rng(0)
    y = rng.normal(size=900)
    for t in range(18, 900):
        y[t] = 0.97 * y[t - 18] + 0.05 * rng.normal()
    panel = panel_from(target=y)
    model = LinearForecaster(horizon=2, context=24, epochs=60, rate=3e-3).fit_panel(panel)
    found = explain_forecast(model, panel, windows=20, horizon=2)
    past = effects(found, "past")
    assert len(past) == 12 and past.idxmax() == "17 to 18 steps back"  # a lag of 18 for step 1, 17 for step 2
    assert past.max() > 3 * past.drop(past.idxmax()).max()
    assert found.table.set_index("part").loc[past.idxmax(), "harm"] > 0
    assert found.heads is None and "not a Transformers model" in found.no_heads


def test_of_other_channels_the_one_that_leads_is_found():
    rng = np.random.default_rng(1)
    leader = np.convolve(rng.normal(size=1200), [1, 0.5], "same")
    panel = panel_from(y=np.roll(leader, 6) + 0.1 * rng.normal(size=1200), leader=leader, other=rng.normal(size=1200))
    model = OLinear(horizon=6, context=24, width=32, embedding=4, layers=1, epochs=12, rate=3e-3).fit_panel(panel)
    found = explain_forecast(model, panel, windows=20)
    channels = effects(found, "channel")
    assert set(channels.index) == {"leader", "other"}
    assert channels["leader"] > 4 * channels["other"]
    assert "leader" in found.says
    harm = found.table.set_index("part")["harm"]
    assert harm["leader"] > 3 * found.table.set_index("part")["harm_stderr"]["leader"]


@pytest.fixture(scope="module")
def attending():
    t = np.arange(500)
    y = np.sin(2 * np.pi * t / 24) + 0.05 * np.random.default_rng(0).normal(size=500)
    panel = panel_from("h", target=y)
    settings = dict(horizon=12, context=48, width=16, n_heads=4, layers=2, patch=8, patch_stride=8, epochs=3)
    return PatchTST(**settings).fit_panel(panel), panel


def test_heads_of_a_series_trunk_are_read_and_a_head_that_writes_nothing_moves_nothing(attending):
    model, panel = attending
    opened = mh.open_model(model.backbone)
    assert (opened.n_layers, opened.n_heads) == (2, 4)
    layer = model.backbone.encoder.layers[1].self_attn.out_proj
    kept = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight[:, 4:8] = 0
    try:
        found = explain_forecast(model, panel, windows=6, n_random=19, quantile_levels=(0.1, 0.5, 0.9))
    finally:
        with torch.no_grad():
            layer.weight.copy_(kept)
    heads = effects(found, "head")
    assert len(heads) == 8 and heads["L1H1"] == 0 and (heads.drop("L1H1") > 0).all()
    assert len(found.heads) == 1 and heads[str(next(iter(found.heads)))] > heads.median()
    assert found.control is not None and len(found.control.random) == 3  # the layer has no more
    assert found.quantiles.shape == (12, 3)
    assert "random heads of the same layers" in found.says


def test_the_forecaster_is_as_it_was_afterwards(attending):
    model, panel = attending
    before = model.predict()
    explain_forecast(model, panel, windows=3, n_random=3)
    pd.testing.assert_frame_equal(before, model.predict(), check_exact=True)


def test_any_forecaster_can_be_explained_and_bad_requests_are_refused():
    panel = panel_from("D", a=np.arange(70.0) % 7, b=np.arange(70.0))
    model = SeasonalNaive(horizon=7).fit_panel(panel)
    found = explain_forecast(model, panel, windows=4)
    past = effects(found, "past")
    assert past.max() == 0  # the last season is taken for what it usually is, which it was
    rising = explain_forecast(model, panel, target="b", windows=4)
    assert effects(rising, "past").idxmax() == "1 to 7 steps back"
    assert effects(rising, "past").iloc[:-1].max() == 0 and effects(rising, "channel")["a"] == 0
    for wrong, said in (
        ({"item": "x"}, "no series 'x'"),
        ({"target": "c"}, "no target 'c'"),
        ({"horizon": 40}, "too few"),
    ):
        with pytest.raises(InputError, match=said):
            explain_forecast(model, panel, **wrong)
