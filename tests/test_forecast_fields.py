"""Fields on a grid: windows that do not see each other, the climatology of a silent network, observations in any order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import manyheads as mh
from manyheads.errors import InputError
from manyheads.evaluation.experiment import experiment
from manyheads.forecast.fields.aardvark import Aardvark, nearest_gridding
from manyheads.forecast.fields.grid import Climatology, fields_of, latitude_weights, weighted_mse
from manyheads.forecast.fields.planted_fields import moved_fields
from manyheads.forecast.fields.prithvi import PrithviWxC
from manyheads.forecast.fields.prithvi_model import (
    PrithviConfig,
    PrithviModel,
    partitioned,
    token_groups,
    unpartitioned,
)
from manyheads.forecast.fields.set_conv import Observations, SetConv
from manyheads.model.reading.readers import ReadAttention

SMALL = {"width": 16, "n_heads": 2, "window": (2, 2), "steps": 3, "rows": 4}


def weather(length=30, channels=2, size=(8, 16), seed=0):
    """Fields with a level, a wave of period 6 and noise."""
    rng, t = np.random.default_rng(seed), np.arange(length)[:, None, None, None]
    level = np.array([10.0, -500.0])[:channels, None, None] + np.linspace(0, 3, size[0])[:, None]
    noise = rng.standard_normal((length, channels, *size)) * np.array([1.0, 30.0])[:channels, None, None]
    return (level + 2 * np.sin(2 * np.pi * t / 6) + noise).astype(np.float32)


# The grid


def test_weights_are_cosines_of_mean_one_and_an_error_near_the_pole_counts_less():
    weights = latitude_weights(np.array([75.0, 0.0, -60.0]))
    cosine = np.cos(np.deg2rad([75, 0, 60]))
    np.testing.assert_allclose(weights[:, 0], cosine / cosine.mean(), rtol=1e-6)
    off = torch.zeros(1, 3, 4)
    off[0, 2] = 2.0
    assert float(weighted_mse(off, torch.zeros(1, 3, 4), weights)) == pytest.approx(4 * 0.5 / cosine.sum())


def test_missing_values_do_not_count_in_the_loss():
    target = torch.zeros(1, 2, 4)
    target[0, 0] = torch.nan
    off = torch.ones(1, 2, 4)
    off[0, 0] = 100.0
    assert float(weighted_mse(off, target, torch.tensor([[1.0], [1.0]]))) == pytest.approx(1.0)


def test_sigma_is_that_of_the_anomalies_not_of_the_field():
    values = weather(60)
    clim = Climatology.of(fields_of(values), 6)
    assert clim.mean.shape == (6, 2, 8, 16)
    np.testing.assert_allclose(clim.mean[2], values[2::6].mean(0), rtol=1e-4, atol=1e-3)
    assert clim.sigma[0] == pytest.approx(0.95, abs=0.05) and values[:, 0].std() > 1.6
    times = torch.arange(60)
    again = clim.field(clim.anomaly(torch.from_numpy(values), times), times)
    np.testing.assert_allclose(again, values, rtol=1e-4, atol=1e-3)


def test_a_channel_that_never_changes_and_cells_without_values_are_forecast_as_they_are():
    values = weather()
    values[:, 0], values[:, 1, 3, 5] = 7.0, np.nan
    made = PrithviWxC(**SMALL).fit(values)
    found = made.predict(1)
    assert np.isnan(found[1, 3, 5]) and np.isfinite(np.delete(found[1].ravel(), 3 * 16 + 5)).all()
    assert np.isfinite(found[0]).all()


class Labelled:
    """What an xarray DataArray shows of itself, as far as it is asked."""

    def __init__(self, values, dims, coords):
        self.values, self.dims, self.coords = values, dims, coords

    def transpose(self, *order):
        return Labelled(self.values.transpose([self.dims.index(d) for d in order]), order, self.coords)


def test_a_labelled_array_is_read_in_any_order_with_its_own_latitudes():
    values = weather(5)
    turned = Labelled(
        values.transpose(3, 1, 0, 2), ("longitude", "channel", "time", "latitude"), {"latitude": np.arange(8.0)}
    )
    found = fields_of(turned)
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_array_equal(found.latitude, np.arange(8.0))
    assert fields_of(values).wraps and not fields_of(values, longitude=np.arange(16.0)).wraps
    with pytest.raises(InputError, match="give time, lat and lon"):
        fields_of(Labelled(values, ("time", "level", "row", "column"), {}))


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        (np.zeros((3, 4)), {}, r"give numbers \[time"),
        (np.full((3, 1, 4, 4), np.nan), {}, "nothing but NaN"),
        (np.full((3, 1, 4, 4), np.inf), {}, "infinity"),
        (np.zeros((3, 1, 4, 4)), {"latitude": [0, 1]}, "one for each row"),
        (np.zeros((3, 1, 4, 4)), {"latitude": [0, 30, 60, 120]}, "from -90 to 90"),
    ],
)
def test_what_is_no_field_is_refused(values, options, says):
    with pytest.raises(InputError, match=says):
        fields_of(values, **options)


# Prithvi WxC


@pytest.mark.parametrize(("grid", "window"), [((4, 8), (2, 4)), ((6, 9), (3, 3)), ((4, 4), (4, 4)), ((5, 6), (1, 2))])
def test_windows_are_cut_and_joined_exactly(grid, window):
    x = torch.randn(2, *grid, 3)
    cut = partitioned(x, window)
    assert cut.shape == (2, grid[0] * grid[1] // (window[0] * window[1]), window[0] * window[1], 3)
    assert torch.equal(unpartitioned(cut, window, grid), x)
    assert torch.equal(cut[1, 0], x[1, : window[0], : window[1]].flatten(0, 1))  # a window is a rectangle


def network(**changes):
    torch.manual_seed(0)
    sizes = {"image_size": (8, 16), "window": (2, 2), "hidden_size": 16, "num_attention_heads": 2}
    return PrithviModel(PrithviConfig(**sizes | changes)).eval()


def reached(layers, kind):
    """Which windows change, [n, n], when the tokens of one (the first axis) do."""
    groups = token_groups((4, 8), (2, 2), kind, True)
    x, out = torch.randn(1, 32, 16), []
    with torch.no_grad():
        clean = layers(x, groups)
        for n in range(8):
            moved = x.clone()
            moved[:, 4 * n : 4 * n + 4] += torch.randn(4, 16)
            out.append((layers(moved, groups) - clean).abs().amax((0, 2)).view(8, 4).amax(1) > 1e-7)
    return torch.stack(out)


def test_a_local_layer_reaches_no_other_window_and_a_global_layer_all():
    layer = network().trunk.layers[0]
    assert torch.equal(reached(layer, "local"), torch.eye(8, dtype=torch.bool))
    assert reached(layer, "global").all()


def test_shifted_windows_reach_their_neighbours_around_the_globe_but_not_across_the_poles():
    found = reached(network().trunk.layers[0], "shifted")
    across = found.view(2, 4, 2, 4)  # window row and column that was moved, and those that changed
    assert across[0, 0, 0, 3] and across[0, 0, 0, 1] and not across[0, 0, 0, 2]  # longitude wraps
    assert across[0, 1, 1, 1]  # the rows in the middle meet
    groups = token_groups((8, 4), (2, 2), "shifted", True)  # four rows of windows: the first and the last do not
    pattern = groups.dense(None, torch.float32)[0, 0] == 0
    row = partitioned((torch.arange(8)[:, None] * torch.ones(1, 4)).view(1, 8, 4, 1), (2, 2)).flatten()
    assert ((row[:, None] - row).abs()[pattern] <= 1).all() and pattern.diagonal().all()


def test_folding_into_groups_and_a_mask_over_all_tokens_are_the_same_attention():
    model = network(encoder_blocks=2, decoder_blocks=1)
    watched = mh.open_model(model)
    for visible in (None, torch.rand(2, 32) < 0.5):
        given = {"pixel_values": torch.randn(2, 2, 8, 16)} | ({} if visible is None else {"visible": visible})
        with torch.no_grad():
            fast = model(**given).anomaly
        assert (watched.read(given, ReadAttention(lambda call: None)) - fast).abs().max() < 1e-5


def test_its_heads_open_are_proved_and_read_windows_and_places():
    model = mh.open_model(network())
    assert model.shape == (4, 2) and not model.proof.failed
    patterns = {}
    given = {"pixel_values": torch.randn(1, 2, 8, 16)}
    model.read(given, ReadAttention(lambda call: patterns.update({call.layer: call.pattern})))
    window, place = torch.arange(32) // 4, torch.arange(32) % 4
    assert patterns[0][:, :, window[:, None] != window].abs().max() == 0
    assert patterns[1][:, :, place[:, None] != place].abs().max() == 0
    clean = model.logits(given)
    with model.editing(mh.Ablate(["L1H0", "L1H1"])):
        assert (model.logits(given) - clean).abs().max() > 1e-4


def test_nobody_reads_what_is_masked():
    model = network(decoder_blocks=1)
    visible = torch.rand(1, 32) < 0.5
    hidden = unpartitioned((~visible).float().view(1, 8, 4, 1), (2, 2), (4, 8))[..., 0]
    cells = hidden.repeat_interleave(2, 1).repeat_interleave(2, 2)[:, None]
    x = torch.randn(1, 2, 8, 16)
    with torch.no_grad():
        a = model(x, visible=visible).anomaly
        b = model(x + 100 * cells, visible=visible).anomaly
        c = model(x + (1 - cells), visible=visible).anomaly
    assert torch.equal(a, b) and (a - c).abs().max() > 1e-4


def test_lead_gap_and_static_fields_matter():
    model = network(statics=3)
    x, static = torch.randn(1, 2, 8, 16), torch.randn(1, 3, 8, 16)
    with torch.no_grad():
        found = [
            model(x, static).anomaly,
            model(x, -static).anomaly,
            model(x, static, lead=torch.tensor([3.0])).anomaly,
            model(x, static, gap=torch.tensor([3.0])).anomaly,
        ]
    assert all((a - b).abs().max() > 1e-4 for i, a in enumerate(found) for b in found[:i])


def test_whole_windows_and_tokens_inside_windows_are_hidden_in_turn():
    made = PrithviWxC(**SMALL | {"mask": 0.5}).fit(weather())
    batch = made._batches(made._anomalies(fields_of(weather()), 0), "masked")
    windows, tokens = (batch(i)["visible"].view(4, 8, 4).sum(2) for i in (0, 1))
    assert ((windows == 0) | (windows == 4)).all() and (windows == 0).sum(1).eq(4).all()
    assert (tokens == 2).all()


def test_a_zero_head_returns_the_climatology_exactly():
    values = weather(36)
    made = PrithviWxC(**SMALL | {"period": 6, "leads": (1, 2)}).fit(values)
    assert made.model_.head.weight.abs().max() > 0
    nn.init.zeros_(made.model_.head.weight)
    nn.init.zeros_(made.model_.head.bias)
    for lead in (1, 2, 5):
        np.testing.assert_array_equal(made.predict(lead), made.climatology_.mean[(35 + lead) % 6])


def test_forecasts_are_saved_bit_for_bit_and_resume(tmp_path):
    values = weather(30, size=(7, 13))  # no whole number of windows
    settings = SMALL | {"leads": (1, 2), "gaps": (1, 2), "period": 6, "rollout_steps": 2, "rollout": 2}
    made = PrithviWxC(**settings).fit(values, held=6, folder=tmp_path / "run")
    made.save(tmp_path / "saved")
    again = PrithviWxC.load(tmp_path / "saved")
    for lead in (1, 2, 4):
        assert made.predict(lead).shape == (2, 7, 13)
        np.testing.assert_array_equal(again.predict(lead), made.predict(lead))
    np.testing.assert_array_equal(made.predict(1, history=values[-2:], start=28), made.predict(1))
    resumed = PrithviWxC(**settings).fit(values, held=6, folder=tmp_path / "run")
    np.testing.assert_array_equal(resumed.predict(1), made.predict(1))
    assert mh.open_model(made.backbone).shape == (4, 2)
    table = made.skill(values, start=0)
    assert list(table["lead"]) == [1, 1, 2, 2] and (table[["rmse", "climatology", "persistence"]] > 0).all().all()


def test_persistence_and_climatology_are_what_they_are_called():
    values = weather(30, channels=1)
    made = PrithviWxC(**SMALL).fit(values)
    table = made.skill(values)
    weights = latitude_weights(fields_of(values).latitude)
    off = torch.from_numpy(values[2:] - values[1:-1])[:, 0].square() * weights
    assert table["persistence"].iloc[0] == pytest.approx(float(off.mean()) ** 0.5, rel=1e-4)
    off = torch.from_numpy(values[2:] - values.mean(0))[:, 0].square() * weights
    assert table["climatology"].iloc[0] == pytest.approx(float(off.mean()) ** 0.5, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"leads": ()}, "at least one lead"),
        ({"mask": 1.0}, "mask is 1.0"),
        ({"leads": (2,), "rollout_steps": 5}, "roll-outs go by 1"),
        ({"width": 0}, "width is 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(InputError, match=says):
        PrithviWxC(**settings)


def test_what_cannot_be_forecast_is_refused():
    with pytest.raises(InputError, match="not fitted"):
        PrithviWxC().predict()
    with pytest.raises(InputError, match="3 fields are left"):
        PrithviWxC(**SMALL | {"leads": (3,)}).fit(weather(3))
    made = PrithviWxC(**SMALL | {"leads": (2,)}).fit(weather())
    with pytest.raises(InputError, match="a lead of 3 cannot be reached"):
        made.predict(3)
    with pytest.raises(InputError, match=r"fields of \[2, 8, 8\]"):
        made.predict(2, history=weather(size=(8, 8)))
    made = PrithviWxC(**SMALL | {"period": 6}).fit(weather())
    with pytest.raises(InputError, match="give start"):
        made.predict(1, history=weather())


def test_planted_fields_move_by_their_shift():
    values = moved_fields(0, 400)[:, 0]
    assert values.var() == pytest.approx(1, abs=0.1)
    at = [np.mean(values[1:] * np.roll(values[:-1], shift, -1)) for shift in (0, 8, 16)]
    assert at[2] == pytest.approx(0.9, abs=0.1) and abs(at[0]) < 0.1 and abs(at[1]) < 0.1


@pytest.mark.slow
def test_layers_across_windows_find_a_teleconnection():
    tried = experiment("forecast", "teleconnection").run(seeds=(0, 1))
    assert tried.verdicts[0].answer == "held"


# Aardvark Weather

PHI, LAM = torch.tensor([60.0, 20.0, -20.0, -60.0]), torch.arange(8) * 45.0


def observed(n=12, channels=2, times=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return Observations(
        torch.randn(times, n, channels, generator=draw),
        torch.rand(times, n, generator=draw) * 180 - 90,
        torch.rand(times, n, generator=draw) * 360,
    )


def test_a_set_conv_is_its_formula_written_out():
    conv, seen = SetConv(PHI, LAM, 0.1), observed()
    field, den = conv(seen)
    north = (PHI[:, None] - seen.latitude[0]) / 360
    apart = (LAM[:, None] - seen.longitude[0]).abs()
    east = torch.minimum(apart, 360 - apart) / 360
    w = (-0.5 * (north[:, None] ** 2 + east[None] ** 2) / 0.1**2).exp()
    assert (den[0, 1] - w.sum(-1)).abs().max() < 1e-5
    assert (field[0, 1] - (w @ seen.values[0, :, 1]) / w.sum(-1).clamp_min(1e-6)).abs().max() < 1e-5


def test_a_constant_field_returns_the_constant_wherever_something_was_observed():
    seen = observed(5, 1)
    seen = Observations(torch.full_like(seen.values, 7.5), seen.latitude, seen.longitude)
    field, den = SetConv(PHI, LAM, 0.02)(seen)
    near = den > 1e-3
    assert near.any() and not near.all()
    assert (field[near] - 7.5).abs().max() < 1e-5 and field.isfinite().all()
    assert (
        SetConv(PHI, LAM, 0.1).read(torch.full((3, 1, 4, 8), 7.5), seen.latitude, seen.longitude) - 7.5
    ).abs().max() < 1e-5


def test_longitude_wraps():
    seen = Observations(torch.ones(2, 1, 1), torch.full((2, 1), 20.0), torch.tensor([[355.0], [-5.0]]))
    _, den = SetConv(PHI, LAM, 0.1)(seen)
    torch.testing.assert_close(den[0], den[1])
    assert den[0, 0, 1, 0] > den[0, 0, 1, 7] > den[0, 0, 1, 1]  # 5, 40 and 50 degrees away


def test_a_missing_value_is_no_observation():
    seen = observed()
    values = seen.values.clone()
    values[:, 3, 0] = torch.nan
    rest = torch.arange(12) != 3
    found, den = SetConv(PHI, LAM, 0.1)(Observations(values, seen.latitude, seen.longitude))
    less = Observations(seen.values[:, rest], seen.latitude[:, rest], seen.longitude[:, rest])
    without, den_without = SetConv(PHI, LAM, 0.1)(less)
    torch.testing.assert_close(found[:, 0], without[:, 0])
    torch.testing.assert_close(den[:, 0], den_without[:, 0])
    assert (den[:, 1] - den_without[:, 1]).min() > 0


@pytest.fixture(scope="module")
def forecaster():
    states = weather(30, size=(4, 8))
    seen = {"ships": observed(12, 2, 30), "balloons": observed(6, 1, 30, seed=1)}
    stations = observed(5, 1, 30, seed=2)
    made = Aardvark(leads=2, width=16, n_heads=2, steps=3, tune=2, rows=4)
    return made.fit(states, seen, stations=stations), seen


def test_shuffled_observations_change_nothing(forecaster):
    made, seen = forecaster
    order = torch.randperm(12)
    ships = seen["ships"]
    turned = Observations(ships.values[:, order], ships.latitude[:, order], ships.longitude[:, order])
    with torch.no_grad():
        a, b = (made.net_.ahead(made.net_.encode(given), 2) for given in (seen, {**seen, "ships": turned}))
    assert (a - b).abs().max() < 1e-6  # in standard deviations of the states
    other = Observations(ships.values[:, order], ships.latitude, ships.longitude)
    with torch.no_grad():
        assert (made.net_.ahead(made.net_.encode({**seen, "ships": other}), 2) - a).abs().max() > 1e-3


def test_no_observations_give_a_den_of_zero_and_a_finite_forecast(forecaster):
    made, seen = forecaster
    none = {
        name: Observations(torch.full_like(one.values, torch.nan), one.latitude, one.longitude)
        for name, one in seen.items()
    }
    field, den = made.net_.encoder["convs"]["ships"](none["ships"])
    assert field.abs().max() == 0 and den.abs().max() == 0
    assert np.isfinite(made.predict(none, 2)).all()
    empty = {name: Observations(o.values[:, :0], o.latitude[:, :0], o.longitude[:, :0]) for name, o in none.items()}
    np.testing.assert_array_equal(made.predict(empty, 2), made.predict(none, 2))


def test_each_instrument_has_a_length_of_its_own_and_a_lead_of_zero_is_the_analysis(forecaster):
    made, seen = forecaster
    assert len({conv.log_length.item() for conv in made.net_.encoder["convs"].values()}) == 2
    with torch.no_grad():
        state = made.net_.encode(seen)
        ahead = made.net_.step(made.net_.step(state, 0), 1)
    np.testing.assert_array_equal(made.predict(seen, 0), made.net_.unscaled(state))
    np.testing.assert_array_equal(made.predict(seen, 2), made.net_.unscaled(ahead))


def test_the_heads_of_its_networks_open(forecaster):
    made, _ = forecaster
    for network in (made.net_.encoder["vit"], *made.net_.processors):
        model = mh.open_model(network)
        assert model.shape == (2, 2) and not model.proof.failed


def test_aardvark_is_saved_bit_for_bit(forecaster, tmp_path):
    made, seen = forecaster
    made.save(tmp_path / "saved")
    again = Aardvark.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict(seen, 1), made.predict(seen, 1))
    places = torch.tensor([[10.0, -40.0]] * 30), torch.tensor([[0.0, 200.0]] * 30)
    found = made.predict_stations(seen, *places, lead=2)
    assert found.shape == (30, 2, 1)
    np.testing.assert_array_equal(again.predict_stations(seen, *places, lead=2), found)


def test_the_nearest_observation_is_found_around_the_globe():
    seen = Observations(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[20.0, 20.0]]), torch.tensor([[350.0, 120.0]]))
    found = nearest_gridding(seen, PHI, LAM)[0, 0]
    assert found[1].tolist() == [1, 1, 2, 2, 2, 2, 1, 1]


def test_what_does_not_fit_is_refused(forecaster):
    made, seen = forecaster
    with pytest.raises(InputError, match="not fitted"):
        Aardvark().predict(seen)
    with pytest.raises(InputError, match="the instruments and their channels"):
        made.predict({"ships": seen["ships"]})
    with pytest.raises(InputError, match="has observations of 30 times"):
        Aardvark().fit(weather(20), seen)
    with pytest.raises(InputError, match="no whole number of patches"):
        Aardvark(patch=3).fit(weather(30), seen)
    with pytest.raises(InputError, match="an even number"):
        Aardvark(depth=3)
    with pytest.raises(InputError, match="a place is NaN"):
        Observations(torch.ones(1, 1, 1), torch.full((1, 1), torch.nan), torch.ones(1, 1))
    alone = Aardvark(width=16, n_heads=2, steps=1, tune=0).fit(weather(30), seen)
    with pytest.raises(InputError, match="without stations"):
        alone.predict_stations(seen, torch.zeros(30, 1), torch.zeros(30, 1))


@pytest.mark.slow
def test_a_moving_field_is_forecast_from_a_twentieth_of_its_cells():
    tried = experiment("forecast", "sparse_advection").run(seeds=(0, 1))
    assert tried.verdicts[0].answer == "held"
