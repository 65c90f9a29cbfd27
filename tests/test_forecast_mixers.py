"""Mixers of channels: what OLinear, SOFTS and channel clustering compute, and what they find among planted channels."""

import time
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.experiment import experiment
from manyheads.forecast.baselines.linear import LinearForecaster, Values
from manyheads.forecast.core.forecaster import FORECASTERS, Forecaster
from manyheads.forecast.core.windows import Shape, Windows
from manyheads.forecast.mixers.clustering import (
    ClusteredForecaster,
    ClusteredTrunk,
    cluster_loss,
    clustered,
    history_views,
    rand_index,
    similarity,
    weighted,
)
from manyheads.forecast.mixers.olinear import NormLin, OLinear, OLinearTrunk, decorrelating
from manyheads.forecast.mixers.planted import (
    autoregression,
    channels_panel,
    items_panel,
    lagged_leaders,
    squared_errors,
    standardised,
    three_groups,
)
from manyheads.forecast.mixers.softs import Softs, SoftsTrunk, Star

SMALL = {"context": 24, "horizon": 8, "steps": 4, "epochs": 1, "patience": None}


def waves(channels=4, length=300, seed=0):
    """Different waves and noise."""
    rng, t = np.random.default_rng(seed), np.arange(length)
    rows = [np.sin(2 * np.pi * t / (8 + 5 * c)) + 0.1 * rng.standard_normal(length) for c in range(channels)]
    return np.stack(rows) * 10 ** np.arange(channels)[:, None] + 5


def off_diagonal(rows):
    """The mean absolute correlation of different columns."""
    found = np.abs(np.corrcoef(rows.T))
    return found[~np.eye(len(found), dtype=bool)].mean()


# OLinear


def test_the_rotation_is_orthogonal_and_decorrelates_windows_that_were_held_out():
    rng = np.random.default_rng(0)
    daily = np.sin(2 * np.pi * np.arange(40_000) / 24)
    rows = np.concatenate([autoregression(rng, (a,), 1, 40_000) for a in (0.85, 0.89, 0.93, 0.97)]) + daily
    windows = Windows(channels_panel(rows), 96, 24, held=20_000)
    q = decorrelating(windows, 96).double()
    assert (q @ q.T - torch.eye(96)).abs().max() < 1e-5
    held = np.lib.stride_tricks.sliding_window_view(rows[:, 20_000:], 96, axis=1)[:, ::3]
    # The correlation of the four channels together, each scaled by itself, as Q is of their mean.
    held = np.concatenate([(channel - channel.mean(0)) / channel.std(0) for channel in held])
    rotated = off_diagonal(held @ q.numpy().T)
    fourier = np.fft.rfft(held, axis=1)
    fourier = np.concatenate([fourier.real, fourier.imag[:, 1:-1]], 1)
    assert rotated <= 0.02 and off_diagonal(held) >= 0.2
    assert rotated < off_diagonal(fourier) / 3
    assert np.corrcoef((held @ q.numpy().T).T).shape == (96, 96) and (held @ q.numpy().T).var(0)[0] > 10


def test_the_rotation_does_not_see_the_steps_that_judge_and_needs_enough_of_the_others():
    rows = waves(2)
    later = rows.copy()
    later[:, 250:] = np.random.default_rng(1).standard_normal((2, 50))
    one, other = (Windows(channels_panel(x), 24, 8, held=50) for x in (rows, later))
    assert torch.equal(decorrelating(one, 24), decorrelating(other, 24))
    assert not torch.allclose(decorrelating(replace_held(one), 24), decorrelating(replace_held(other), 24))
    constant = Windows(channels_panel(np.ones((2, 60))), 24, 8)
    assert torch.equal(decorrelating(constant, 24), torch.eye(24))


def replace_held(windows):
    windows.held = 0
    return windows


def test_rows_of_the_mixing_matrix_sum_to_one_with_dropout_too_and_mix_as_written():
    torch.manual_seed(0)
    mix, x = NormLin(16, dropout=0.3), torch.randn(5, 16, 3)
    assert mix.training and (mix.matrix.sum(-1) - 1).abs().max() < 1e-6 and (mix.matrix == 0).any()
    mix.eval()
    a = F.softplus(mix.weight)
    assert torch.allclose(mix(x), torch.einsum("ij,bjd->bid", a / a.sum(-1, keepdim=True), x), atol=1e-6)
    assert (mix.matrix > 0).all()


def test_olinear_is_the_formula_with_e_written_out():
    torch.manual_seed(0)
    trunk = OLinearTrunk(Shape(12, 6, 3), width=8, embedding=4, layers=2, dropout=0.0)
    for p in (trunk.before, trunk.after):
        p.data.normal_()
    for name, n in (("rotation", 12), ("rotation_ahead", 6)):
        getattr(trunk, name).copy_(torch.linalg.qr(torch.randn(n, n))[0])
    x = torch.randn(2, 12, 3)
    e = torch.einsum("btc,d->bcdt", x, trunk.phi) @ trunk.rotation.T + trunk.before[:, None]
    h = trunk.norm(trunk.blocks(trunk.embed(e.flatten(2))))
    y = trunk.ahead(h).reshape(2, 3, 4, 6) @ trunk.rotation_ahead + trunk.after[:, None]
    assert torch.allclose(trunk(x), trunk.read(y.flatten(2)), atol=1e-5)


def test_a_point_forecast_drops_steps_in_training_only():
    forecaster = OLinear(width=8, embedding=2, objective="point", levels=(), output_dropout=0.5, **SMALL)
    forecaster.fit_panel(channels_panel(waves()))
    batch = Windows(channels_panel(waves()), 24, 8).batch(np.array([[0, 100]] * 50))
    heads = forecaster.heads_.train()
    assert 0.4 < float((heads(batch)["point"] == 0).float().mean()) < 0.6
    assert not (heads.eval()(batch)["point"] == 0).any()


# SOFTS


def test_the_mean_of_drawn_cores_is_the_core_of_evaluation_mode():
    torch.manual_seed(0)
    star, x = Star(8, 4), torch.randn(1, 6, 8)
    with torch.no_grad():
        drawn = star.train().core(x.expand(20_000, -1, -1)).mean(0)
        exact, h = star.eval().core(x)[0], star.to_core(x)
    assert (drawn - exact).abs().max() < 0.02 * h.std()
    with torch.no_grad():
        assert torch.equal(star(x), star(x)) and not torch.equal(star.train()(x), star(x))


def test_each_number_of_the_core_is_drawn_from_a_channel_of_its_own():
    torch.manual_seed(0)
    star, x = Star(8, 16).train(), torch.randn(1, 6, 8)
    with torch.no_grad():
        core, h = star.core(x)[0, 0], star.to_core(x)[0]
    channels = [int((h[:, d] == core[d]).nonzero()[0]) for d in range(16)]
    assert len(set(channels)) > 1


@pytest.mark.parametrize("calendar", [False, True])
def test_channels_of_softs_may_change_places(calendar):
    torch.manual_seed(0)
    trunk = SoftsTrunk(Shape(12, 6, 5), width=8, core=4, hidden=8, layers=2, calendar=calendar).eval()
    x, times, order = torch.randn(2, 12, 5), torch.randn(2, 12, 5), torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        assert torch.allclose(trunk(x, times)[:, order], trunk(x[..., order], times), atol=1e-6)
        changed = (trunk(x, times + 1) - trunk(x, times)).abs().max()
        x[0, :, 4] += 1
        assert (trunk(x, times)[0, :4] - trunk(x[..., :4], times)[0]).abs().max() > 1e-4  # channels see one another
    assert (changed > 1e-4) == calendar


def saved_numbers(channels):
    """How many numbers a forward pass keeps for the backward pass, and the largest tensor among them."""
    sizes = []
    trunk = SoftsTrunk(Shape(12, 6, channels), width=8, core=4, hidden=8, layers=1).eval()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        trunk(torch.randn(1, 12, channels))
    return sum(sizes), max(sizes)


def test_no_tensor_of_softs_is_of_channels_by_channels():
    total, _ = saved_numbers(500)
    more, largest = saved_numbers(2000)
    assert more < 4.1 * total and largest < 2000 * 30


@pytest.mark.slow
def test_softs_takes_time_linear_in_channels():
    torch.manual_seed(0)
    trunk, best = SoftsTrunk(Shape(96, 96, 1), width=64, core=64, hidden=64, layers=1).eval(), {}
    for _ in range(8):
        for channels in (250, 1000):
            x, started = torch.randn(4, 96, channels), time.perf_counter()
            with torch.no_grad():
                trunk(x)
            best[channels] = min(best.get(channels, 9.0), time.perf_counter() - started)
    assert best[1000] <= 6 * best[250]


def test_without_the_windows_scale_the_level_of_a_channel_stays():
    panel = channels_panel(waves())
    kept, scaled = (
        Softs(width=8, core=4, hidden=8, normalised=normalised, **SMALL)._windows(panel, 0)
        for normalised in (False, True)
    )
    batch = np.array([[0, 100]])
    assert (kept.batch(batch)["scale"] == 1).all() and kept.batch(batch)["past_values"].mean(1).abs().max() > 0.01
    assert scaled.batch(batch)["past_values"].mean(1).abs().max() < 1e-5


# Channel clustering


def test_mixing_outputs_is_mixing_weights():
    torch.manual_seed(0)
    states, p = torch.randn(2, 5, 7), torch.randn(2, 5, 3).softmax(-1)
    layers = [torch.nn.Linear(7, 4) for _ in range(3)]
    outputs = torch.stack([layer(states) for layer in layers], 2)  # [B, C, K, H]
    mixed = (p[..., None] * outputs).sum(2)
    one = torch.cat([torch.cat([layer.weight, layer.bias[:, None]], 1) for layer in layers], 1)
    assert (F.linear(weighted(states, p).flatten(2), one) - mixed).abs().max() < 1e-5
    weight = torch.einsum("bck,khd->bchd", p, torch.stack([layer.weight for layer in layers]))
    bias = p @ torch.stack([layer.bias for layer in layers])
    assert (torch.einsum("bchd,bcd->bch", weight, states) + bias - mixed).abs().max() < 1e-5


@pytest.mark.parametrize("base", ["linear", "softs"])
def test_channels_may_change_places(base):
    forecaster = ClusteredForecaster(
        base=base, settings={} if base == "linear" else {"width": 8, "core": 4, "hidden": 8}, clusters=3, **SMALL
    )
    panel = channels_panel(waves(5))
    forecaster.fit_panel(panel)
    order, windows = [3, 0, 4, 1, 2], forecaster._windows(panel)
    batch = forecaster._batch(windows, np.array([[0, 100], [0, 200]]))
    other = {name: batch[name][..., order] for name in ("views", "past_values")}
    with torch.no_grad():
        found, moved = (forecaster.heads_.eval()(b)["quantiles"] for b in (batch, batch | other))
    assert (found[:, order] - moved).abs().max() < 1e-6


def test_a_forecast_does_not_depend_on_the_rest_of_the_batch_nor_on_what_comes_after_it():
    rows = waves(3)
    forecaster = ClusteredForecaster(base="linear", clusters=2, **SMALL).fit_panel(channels_panel(rows))
    windows = forecaster._windows(channels_panel(rows))
    places = np.array([[0, 30], [0, 100], [0, 200]])
    whole = history_views(windows, places, 16)
    assert torch.equal(whole[1:2], history_views(windows, places[1:2], 16))
    rows[:, 100:] = 0.0
    changed = history_views(forecaster._windows(channels_panel(rows)), places[1:2], 16)
    assert torch.equal(changed, whole[1:2])
    assert torch.allclose(whole[:, -1], windows.batch(places)["past_values"])


def test_series_that_were_never_seen_are_forecast_and_assigned():
    groups = three_groups(0, 2, 400)
    forecaster = clustered(LinearForecaster(**SMALL), clusters=3).fit_panel(items_panel(groups[::2]))
    others = items_panel(groups)
    assert len(forecaster.forecast_panel(others).point) == 6
    table = forecaster.memberships(others)
    assert list(table.columns) == ["item", "target_name", "cluster", "p0", "p1", "p2"] and len(table) == 6
    assert np.allclose(table[["p0", "p1", "p2"]].sum(axis=1), 1, atol=1e-5)


def test_the_papers_cluster_loss_is_least_where_all_are_in_one_cluster_and_the_centred_one_where_groups_are():
    x = torch.tensor(three_groups(0, 2, 200), dtype=torch.float32).T[None]
    s = similarity(x)
    apart = F.one_hot(torch.tensor([[0, 0, 1, 1, 2, 2]]), 3).float()
    together = F.one_hot(torch.zeros(1, 6, dtype=torch.long), 3).float()
    assert cluster_loss(s, together, centred=False) < cluster_loss(s, apart, centred=False)
    every = [F.one_hot(torch.tensor([[0, *rest]]), 3).float() for rest in set(permutations([0, 1, 1, 2, 2]))]
    assert cluster_loss(s, apart) <= min(cluster_loss(s, p) for p in [together, *every])
    assert s.min() >= 0 and torch.allclose(s.diagonal(dim1=1, dim2=2), torch.ones(1, 6))


def test_the_cluster_loss_trains_the_assigner_where_it_is_asked_for():
    panel = channels_panel(waves(5))
    plain, weighed = (ClusteredForecaster(base="linear", clusters=3, beta=b, **SMALL) for b in (0.0, 5.0))
    for one in (plain, weighed):
        one.fit_panel(panel)
    a, b = (one.heads_.trunk.module.assigner.prototypes for one in (plain, weighed))
    assert "clusters" in weighed.heads_.attached and "clusters" not in plain.heads_.attached
    assert not torch.equal(a, b)


def test_a_clustered_forecaster_with_one_cluster_is_the_linear_one():
    panel = channels_panel(waves())
    one = ClusteredTrunk(Values(24), Shape(24, 8, 4), 1, 8, 0.05, 1)
    windows = Windows(panel, 24, 8)
    places = np.array([[0, 100]])
    batch = windows.batch(places)
    states = one(history_views(windows, places, 4), batch["past_values"])
    assert torch.allclose(states[:, :, 0, :-1], batch["past_values"].transpose(1, 2))
    assert (states[..., -1] == 1).all()


def test_the_rand_index_knows_equal_partitions_and_chance():
    a = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert rand_index(a, (a + 1) % 3) == pytest.approx(1)
    assert rand_index(np.zeros(9, int), a) == pytest.approx(0)
    assert rand_index(np.tile([0, 1, 2], 3), a) < 0
    assert rand_index(np.arange(3), np.array([2, 0, 1])) == 1
    with_one_off = np.array([0, 0, 1, 1, 1, 1, 2, 2, 2])
    assert rand_index(with_one_off, a) == pytest.approx(4.5 / 7)  # 7 pairs of 9.5, 2.5 by chance


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"base": "nothing"}, InputError, "there is no method 'nothing'"),
        ({"base": "seasonal_naive"}, InputError, "no trunk of its own"),
        ({"base": "channel_clustering"}, InputError, "no trunk of its own"),
        ({"base": "linear", "settings": {"depth": 3}}, InputError, "settings do not fit linear"),
        ({"clusters": 0}, InputError, "clusters is 0"),
        ({"beta": -1.0}, InputError, "beta"),
    ],
)
def test_what_cannot_be_clustered_is_refused_by_name(given, error, says):
    with pytest.raises(error, match=says):
        ClusteredForecaster(**given)


def test_a_forecaster_with_batches_of_its_own_is_refused(monkeypatch):
    monkeypatch.setattr(Softs, "_batch", lambda self, windows, places: windows.batch(places))
    with pytest.raises(UnsupportedError, match="softs makes windows"):
        ClusteredForecaster(base="softs")


# All of them

EACH = {
    "linear": {},
    "olinear": {"width": 8, "embedding": 2, "layers": 1},
    "softs": {"width": 8, "core": 4, "hidden": 8, "calendar": True},
    "patchtst": {"patch": 8, "patch_stride": 8, "width": 8, "n_heads": 2, "layers": 1},
    "channel_clustering": {"base": "olinear", "settings": {"width": 8, "embedding": 2}, "clusters": 2},
}


@pytest.mark.parametrize("base", ["linear", "olinear", "softs", "patchtst"])
def test_channels_of_any_network_are_clustered(base):
    own = FORECASTERS[base](**EACH[base], **SMALL)
    forecaster = clustered(own, clusters=2)
    assert forecaster.get_params()["settings"].items() >= EACH[base].items()
    panel = channels_panel(waves())
    assert np.isfinite(forecaster.fit_panel(panel).forecast_panel(panel).point).all()
    assert isinstance(forecaster.backbone.base, type(own.trunk(Shape(24, 8, 4))))


def test_a_trunk_that_reads_something_else_is_refused():
    class Other(Values):
        def forward(self, past_values, moon):
            return super().forward(past_values)

    with pytest.raises(UnsupportedError, match="moon"):
        ClusteredTrunk(Other(24), Shape(24, 8, 4), 2, 8, 0.05, 1)


@pytest.mark.parametrize("name", ["linear", "olinear", "softs", "channel_clustering"])
def test_what_is_saved_forecasts_the_same_bits(name, tmp_path):
    forecaster = FORECASTERS[name](**EACH[name], **SMALL)
    frame = channels_panel(waves())
    forecaster.fit_panel(frame)
    before = forecaster.predict(12)
    assert np.isfinite(before.select_dtypes("number").to_numpy()).all()
    forecaster.save(tmp_path / "kept")
    after = Forecaster.load(tmp_path / "kept").predict(12)
    assert before.equals(after)


@pytest.mark.parametrize("name", ["linear", "olinear", "softs", "channel_clustering"])
def test_the_same_seed_learns_the_same_and_the_unit_of_the_data_does_not_matter(name):
    rows = waves()
    one, other, scaled = (FORECASTERS[name](**EACH[name], **SMALL) for _ in range(3))
    a, b, c = (
        f.fit_panel(channels_panel(x)).forecast_panel(channels_panel(x)).point[0]
        for f, x in ((one, rows), (other, rows), (scaled, 1000 * rows))
    )
    assert np.array_equal(a, b) and np.allclose(1000 * a, c, rtol=1e-3)


def test_a_network_learns_what_a_linear_layer_can():
    rows = standardised(waves(2, 400))
    panel = channels_panel(rows)
    some = {"context": 48, "horizon": 8, "objective": "point", "levels": (), "patience": None}
    made = [
        LinearForecaster(**some, steps=150, rate=1e-2),
        OLinear(**some, steps=100, width=32, embedding=2, layers=1, rate=5e-3),
        Softs(**some, steps=100, width=32, core=8, hidden=32, rate=3e-3),
    ]
    for one in made:
        one.fit_panel(panel.without_last(100), validation=0)
        assert squared_errors(one, panel, 300).mean() < 0.15  # repeating the mean is 1


def test_a_lagged_copy_is_its_leader_24_steps_later():
    rows = lagged_leaders(0, 500)
    assert rows.shape == (8, 500) and np.array_equal(rows[4:, 24:], rows[:4, :-24])


@pytest.mark.parametrize("name", ["lagged_leaders", "one_factor", "channel_clustering"])
def test_experiments_run(name):
    FORECASTERS.all()
    tried = experiment("forecast", name)
    short = replace(tried, datasets=lambda quick: {k: _shorter(v) for k, v in tried.datasets(True).items()})
    found = short.run(seeds=(0,), quick=True)
    assert len(found.verdicts) == len(tried.claims)
    assert found.comparison.table["value"].dropna().gt(-1).all()


def _shorter(data):
    return 3 if isinstance(data, int) else replace(data, steps=3, length=700, first=500)
