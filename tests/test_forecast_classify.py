"""Classifiers of series: what the priors do to attention, that nothing of the test series is used, and what planted sets need."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from manyheads.data.series import classified_series, read_ts
from manyheads.errors import InputError
from manyheads.forecast.representations.classify import (
    ConvolutionRidge,
    NearestSeries,
    RawRidge,
    RidgeProbe,
    warped_distance,
)
from manyheads.forecast.representations.vsformer import (
    CLASSIFYING,
    VSFormer,
    VSFormerSettings,
    class_motifs,
    intervals_of,
    prior_attention,
    shape_prior,
    shapes_of,
    value_prior,
)
from manyheads.forecast.representations.vsformer_claims import class_shapes, planted_motifs, planted_variances

SMALL = VSFormerSettings(motifs=3, lengths=(0.2,), levels=2, width=8, heads=2, layers=1, steps=20)
SHORT = replace(CLASSIFYING, epochs=2)


@pytest.fixture(scope="module")
def fitted():
    return VSFormer(SMALL, SHORT).fit(*planted_motifs(24, 0))


# Attention with priors


def test_priors_of_1_are_plain_attention_and_so_are_equal_ones():
    q, k, v = torch.randn(3, 2, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    plain = F.scaled_dot_product_attention(q, k, v)
    for prior in (torch.ones(7), torch.full((7,), 2.5)):
        torch.testing.assert_close(prior_attention(q, k, v, prior), plain, atol=1e-6, rtol=0)


def test_priors_multiply_scores_by_an_outer_product_of_mean_1():
    q, k, v = torch.randn(3, 1, 1, 5, 4, generator=torch.Generator().manual_seed(1))
    prior = torch.tensor([0.5, 1.0, 2.0, 4.0, 0.1])
    R = torch.outer(prior, prior)
    R = R / R.mean()
    by_hand = (R * (q @ k.transpose(-1, -2)) / 2).softmax(-1) @ v
    torch.testing.assert_close(prior_attention(q, k, v, prior), by_hand, atol=1e-6, rtol=0)
    assert not torch.allclose(prior_attention(q, k, v, prior), F.scaled_dot_product_attention(q, k, v), atol=1e-2)


def test_the_priors_of_a_fitted_model_have_mean_1_and_without_them_all_are_1(fitted):
    for prior in fitted.priors_.values():
        assert float(prior.mean()) == pytest.approx(1, abs=1e-5) and float(prior.std()) > 0.01
    plain = VSFormer(replace(SMALL, priors="none"), SHORT).fit(*planted_motifs(24, 0))
    assert all(bool((prior == 1).all()) for prior in plain.priors_.values())


# Priors


def test_a_shape_prior_is_distance_to_other_classes_over_that_within_without_itself():
    far = torch.tensor([[0.0], [2.0], [6.0], [10.0]])
    prior = shape_prior(far, torch.tensor([0]), torch.tensor([0]), torch.tensor([0, 0, 1, 1]))
    assert prior.tolist() == [4.0]  # (6 + 10) / 2 over 2


def test_a_value_prior_is_1_where_quarters_tell_the_class_and_0_where_they_say_nothing():
    y = torch.arange(80) % 2
    tells = y.float() + 0.01 * torch.rand(80)
    nothing = torch.arange(80).float() // 2
    found = value_prior(torch.stack([tells, nothing], 1)[..., None], y)
    torch.testing.assert_close(found, torch.tensor([1.0, 0.0]), atol=1e-5, rtol=0)


def test_priors_motifs_and_scales_come_from_the_training_series_alone(fitted):
    """Whatever is predicted between, and whatever else there is: the same rows give the same priors."""
    x, y = planted_motifs(24, 0)
    other = VSFormer(SMALL, SHORT).fit(x, y)
    other.predict(1e3 + planted_variances(10, 5)[0])
    for name, prior in fitted.priors_.items():
        assert torch.equal(prior, other.priors_[name])
    assert other.mean_.tolist() == fitted.mean_.tolist() and other.motifs_ == fitted.motifs_
    one = fitted.predict_proba(x[:1])
    np.testing.assert_allclose(fitted.predict_proba(np.concatenate([x[:1], 50 * x[1:4]]))[:1], one, atol=1e-6)


def test_shuffled_priors_weigh_the_same_tokens():
    x, y = planted_motifs(24, 0)
    true, shuffled = (VSFormer(replace(SMALL, priors=kind), SHORT).fit(x, y) for kind in ("classes", "shuffled"))
    assert true.motifs_ == shuffled.motifs_ and true.intervals_ == shuffled.intervals_
    assert not torch.allclose(true.priors_["shape"], shuffled.priors_["shape"])


# Tokens


def test_the_motif_that_was_planted_is_found():
    x, y = planted_motifs(40, 3, strength=4.0)
    series = torch.from_numpy(x[y == 0][..., 0]).float()
    shapes, _ = class_motifs(series, 20, 3, torch.Generator().manual_seed(0))
    planted = shapes_of(torch.from_numpy(class_shapes()[0].copy())[None].float(), 20)[0, 0]
    lags = [float(F.cosine_similarity(shapes[0], torch.roll(planted, by, 0), dim=0)) for by in range(-4, 5)]
    assert max(lags) > 0.8


def test_motifs_of_a_series_are_not_matched_with_itself():
    """The same stretch twice in one series is no motif of a class; one that two series share is."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(size=(4, 100))).float()
    x[0, 10:30], x[0, 60:80] = torch.sin(torch.arange(20.0)), torch.sin(torch.arange(20.0))
    x[1, 5:25] = x[2, 70:90] = torch.cos(0.5 * torch.arange(20.0))
    shapes, of = class_motifs(x, 20, 1, torch.Generator().manual_seed(0))
    assert int(of[0]) in (1, 2)
    assert float(F.cosine_similarity(shapes[0], shapes_of(x[1:2], 20)[0, 5], dim=0)) > 0.999


def test_a_shape_token_of_an_exact_copy_is_0_wherever_the_copy_lies(fitted):
    (c, m, _), shape = fitted.motifs_[0], fitted._shapes[0]
    x = torch.randn(3, fitted.steps_, 1)
    for row, at in zip(x, (0, 31, fitted.steps_ - m), strict=True):
        row[at : at + m, c] = 7 * shape - 3
    token = fitted.tokens(x)["shape"][:, 0]
    torch.testing.assert_close(token[:, :-2], torch.zeros_like(token[:, :-2]), atol=1e-3, rtol=0)
    begin = torch.tensor([0, 31, fitted.steps_ - m]) / fitted.steps_
    torch.testing.assert_close(token[:, -2], begin)


def test_value_tokens_are_the_statistics_of_their_intervals(fitted):
    x = torch.randn(2, fitted.steps_, 1)
    token = fitted.tokens(x)["value"]
    for i, (c, low, high) in enumerate(fitted.intervals_):
        part = x[:, low:high, c]
        expected = torch.stack([part.mean(1), part.std(1, correction=0), part.amin(1), part.amax(1)], 1)
        torch.testing.assert_close(token[:, i, :4], expected)
        slopes = [np.polyfit(np.linspace(-1, 1, high - low), row, 1)[0] for row in part.numpy()]
        np.testing.assert_allclose(token[:, i, 4], slopes, atol=1e-5)
    assert intervals_of(10, 3) == [(0, 10), (0, 5), (5, 10), (0, 2), (2, 5), (5, 7), (7, 10)]


# The estimator


def test_it_is_saved_and_loads_bit_for_bit(fitted, tmp_path):
    x = planted_motifs(5, 9)[0]
    loaded = VSFormer.load(fitted.save(tmp_path / "one"))
    assert (loaded.predict_proba(x) == fitted.predict_proba(x)).all()
    assert loaded.motifs_ == fitted.motifs_ and (loaded.classes_ == fitted.classes_).all()
    (tmp_path / "one" / "head.json").write_text("{}")
    with pytest.raises(InputError, match="no VSFormer"):
        VSFormer.load(tmp_path / "one")


def test_the_same_seed_learns_the_same_and_classes_may_be_texts(fitted):
    x, y = planted_motifs(24, 0)
    again = VSFormer(SMALL, SHORT).fit(x, np.array(["down", "up"])[y])
    assert (again.predict_proba(x) == fitted.predict_proba(x)).all()
    assert set(again.predict(x)) <= {"down", "up"}
    np.testing.assert_allclose(again.predict_proba(x).sum(1), 1, atol=1e-6)


@pytest.mark.usefixtures("any_shape")
def test_series_of_different_lengths_with_gaps_and_constant_ones_have_probabilities(fitted):
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=(n, 2)) for n in (30, 45, 60, 40, 50, 33)]
    rows[0][3:6, 0] = np.nan
    rows[1][:] = 4.0
    model = VSFormer(SMALL, SHORT).fit(rows, [0, 1, 0, 1, 0, 1])
    assert model.steps_ == 42
    assert np.isfinite(model.predict_proba([*rows, 1e12 * rows[2], rows[2][:5]])).all()
    padded = np.full((2, 60, 2), np.nan)
    padded[0, :30], padded[1] = rows[0], rows[2]
    np.testing.assert_array_equal(model.predict_proba(padded), model.predict_proba([rows[0], rows[2]]))
    lonely = VSFormer(SMALL, SHORT).fit(rows, ["a", "a", "a", "b", "c", "b"])  # one series of class c
    assert np.isfinite(lonely.predict_proba(rows)).all()


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize(
    "x, y, says",
    [
        (np.zeros((4, 9)), [0, 0, 0, 0], "all series are of class"),
        (np.zeros((4, 9)), [0, 1], "do not go with classes"),
        (np.full((2, 9), np.nan), [0, 1], "without a value"),
        (np.full((2, 9), np.inf), [0, 1], "infinity"),
        ([], [], "there are no series"),
        ([np.zeros((5, 2)), np.zeros((5, 3))], [0, 1], "differ in their channels"),
        ("no series", [0, 1], "no numbers"),
        (np.random.default_rng(0).normal(size=(4, 3)), [0, 1, 0, 1], "give longer series"),
    ],
)
def test_what_is_no_series_with_a_class_is_refused(x, y, says):
    with pytest.raises(InputError, match=says):
        VSFormer(SMALL, SHORT).fit(x, y)


def test_settings_and_other_channels_are_refused(fitted):
    with pytest.raises(InputError, match="fitted on 1 channels"):
        fitted.predict(np.zeros((2, 50, 3)))
    with pytest.raises(InputError, match="not fitted"):
        VSFormer().predict(np.zeros((2, 50, 1)))
    with pytest.raises(InputError, match="heads divide"):
        VSFormerSettings(width=10)
    with pytest.raises(InputError, match="branches"):
        VSFormerSettings(branches=("colour",))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [planted_motifs, planted_variances])
def test_the_whole_model_knows_both_planted_sets(planted):
    model = VSFormer(VSFormerSettings(steps=300), replace(CLASSIFYING, epochs=1)).fit(*planted(120, 0))
    assert model.score(*planted(200, 1000)) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("planted, branch", [(planted_motifs, "value"), (planted_variances, "shape")])
def test_a_single_branch_does_not_know_the_other_set(planted, branch):
    settings = VSFormerSettings(steps=300, branches=(branch,))
    model = VSFormer(settings, replace(CLASSIFYING, epochs=1)).fit(*planted(120, 0))
    assert model.score(*planted(200, 1000)) <= 0.7


# The plain ones


def test_warped_distance_is_euclid_without_a_band_and_follows_a_shift_with_one():
    a = torch.randn(3, 12, 2, generator=torch.Generator().manual_seed(0))
    euclid = (a[:, None] - a[None]).square().sum((2, 3))
    torch.testing.assert_close(warped_distance(a, a, 0), euclid)
    assert bool((warped_distance(a, a, 3) <= euclid + 1e-5).all())
    bump = torch.zeros(2, 20, 1)
    bump[0, 5:8], bump[1, 7:10] = 1.0, 1.0
    assert float(warped_distance(bump, bump, 2)[0, 1]) == 0 < float(warped_distance(bump, bump, 1)[0, 1])


@pytest.mark.parametrize("n, d", [(40, 6), (12, 30)])
def test_a_ridge_is_the_minimum_of_its_loss_with_the_penalty_of_least_leave_one_out_error(n, d):
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(n, d, generator=draw), torch.randn(n, 2, generator=draw)
    y = x[:, :2] + 0.5 * noise
    probe = RidgeProbe().fit(x, y)
    z = (x - x.mean(0)) / x.std(0, correction=0) / d**0.5
    normal = z.T @ z + probe.penalty * torch.eye(d)
    by_hand = z @ torch.linalg.solve(normal, z.T @ (y - y.mean(0))) + y.mean(0)
    torch.testing.assert_close(probe.predict(x).float(), by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("made", [NearestSeries(0.1), NearestSeries(), RawRidge(), ConvolutionRidge(200)])
def test_the_plain_ones_tell_slow_waves_from_fast_ones(made):
    rng, t = np.random.default_rng(0), np.arange(40)
    y = np.arange(40) % 2
    x = np.sin(2 * np.pi * t / np.where(y, 10, 20)[:, None]) + 0.1 * rng.normal(size=(40, 40))
    assert made.fit(x[:20], y[:20]).score(x[20:], y[20:]) == 1.0


# Files


def test_a_ts_file_is_read_with_its_classes_gaps_and_ends(tmp_path):
    path = tmp_path / "A.ts"
    path.write_text("#about\n@problemName A\n@classLabel true up down\n@data\n1,2,?:4,5,6:down\n7:8:up\n")
    found = read_ts(path)
    assert found.names == ("up", "down") and found.y.tolist() == [1, 0] and found.x.shape == (2, 3, 2)
    np.testing.assert_array_equal(found.x[0, :, 0], [1, 2, np.nan])
    np.testing.assert_array_equal(found.x[1], [[7, 8], [np.nan] * 2, [np.nan] * 2])
    path.write_text("@classLabel true up down\n@data\n1,x:up\n")
    with pytest.raises(InputError, match="line 3"):
        read_ts(path)
    path.write_text("@classLabel true up down\n@data\n")
    with pytest.raises(InputError, match="no series"):
        read_ts(path)


def test_sets_of_aeon_are_read_without_importing_it(tmp_path, monkeypatch):
    folder = tmp_path / "aeon" / "datasets" / "data" / "GunPoint"
    folder.mkdir(parents=True)
    (tmp_path / "aeon" / "__init__.py").write_text("raise RuntimeError('imported')")
    for part, n in (("TRAIN", 2), ("TEST", 3)):
        (folder / f"GunPoint_{part}.ts").write_text("@classLabel true 1 2\n@data\n" + "1,2:1\n" * n)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    train, test = classified_series("GunPoint")
    assert len(train) == 2 and len(test) == 3 and "aeon" not in sys.modules
    with pytest.raises(InputError, match="choose from"):
        classified_series("Gun")


def test_without_aeon_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("manyheads.data.series.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install"):
        classified_series("GunPoint")
