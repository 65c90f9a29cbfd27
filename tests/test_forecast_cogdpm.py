"""Precision-weighted diffusion: U of 1 is ordinary guidance, and the noisy half of a field is where U is high."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from manyheads.errors import InputError
from manyheads.evaluation.experiment import experiment
from manyheads.forecast.fields.cogdpm import CogDPM, crps, guided, normalised_variance
from manyheads.forecast.fields.cogdpm_experiment import two_regions
from manyheads.training import generator_of

SMALL = {"levels": 5, "width": 8, "blocks": 2, "steps": 4, "rows": 4, "window": 2}


def weather(length=20, channels=2, size=(4, 8)):
    rng = np.random.default_rng(0)
    return (rng.standard_normal((length, channels, *size)) * 3 + 10).astype(np.float32)


@pytest.fixture(scope="module")
def fitted():
    return CogDPM(**SMALL).fit(weather())


def like(made, **changes):
    other = CogDPM(**SMALL | changes)
    other.net_, other.climatology_, other.grid_ = made.net_, made.climatology_, made.grid_
    other.start_, other.spread_ = made.start_, made.spread_
    return other


@torch.no_grad()
def ordinary(made, past, draw, weight):
    """Classifier-free guidance and ancestral sampling, written out."""
    a, c, n = made.signal, past.flatten(1, 2), len(past)
    z = torch.randn(past[:, 0].shape, generator=draw)
    for level in reversed(range(len(a))):
        at = torch.full((n,), level)
        given, without = made.net_(z, at, c, torch.ones(n)), made.net_(z, at, c, torch.zeros(n))
        eps = without + weight * (given - without)
        x = ((z - (1 - a[level]).sqrt() * eps) / a[level].sqrt()).clamp(-5, 5)
        if level:
            ratio = a[level] / a[level - 1]
            mean = (a[level - 1].sqrt() * (1 - ratio) * x + ratio.sqrt() * (1 - a[level - 1]) * z) / (1 - a[level])
            spread = ((1 - ratio) * (1 - a[level - 1]) / (1 - a[level])).sqrt()
            z = mean + spread * torch.randn(z.shape, generator=draw)
    return x


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_u_of_one_is_ordinary_guidance_exactly(fitted, weight):
    past = torch.randn(3, 2, 2, 4, 8)
    wanted = ordinary(fitted, past, generator_of(0, 0), weight)
    for settings in ({"low": 1.0, "high": 1.0}, {"uniform": True}):
        made = like(fitted, weight=weight, **settings)
        assert torch.equal(made.sampled(past, generator_of(0, 0), generator_of(0, 1))[0], wanted)
    precise = like(fitted, weight=weight).sampled(past, generator_of(0, 0), generator_of(0, 1))[0]
    assert torch.equal(precise, wanted) == (weight == 0)  # without guidance U has nothing to change


def test_guidance_is_stronger_where_u_is_higher():
    without, given, u = torch.zeros(2), torch.ones(2), torch.tensor([0.5, 2.0])
    assert guided(without, given, 3.0, u).tolist() == [1.5, 6.0]


def test_u_has_mean_one_for_each_sample_before_it_is_clipped():
    variance = torch.rand(3, 2, 4, 8) * torch.tensor([1.0, 100.0, 0.0])[:, None, None, None]
    u = normalised_variance(variance, 0.0, torch.inf)
    torch.testing.assert_close(u.mean((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(u[0] / u[0].max(), variance[0] / variance[0].max())  # the sign is not turned
    held = normalised_variance(variance, 0.5, 1.5)
    assert held.min() >= 0.5 and held.max() <= 1.5


def test_crps_of_a_normal_ensemble_is_the_formula_and_fair_to_its_size():
    draw = torch.Generator().manual_seed(0)
    y = torch.full((40000,), 0.7)
    z = torch.distributions.Normal(0.0, 1.0)
    true = 0.7 * (2 * z.cdf(torch.tensor(0.7)) - 1) + 2 * z.log_prob(torch.tensor(0.7)).exp() - torch.pi**-0.5
    for n in (2, 20):
        assert crps(torch.randn(n, len(y), generator=draw), y).mean().item() == pytest.approx(float(true), abs=0.01)
    assert crps(torch.full((1, 1), 3.0), torch.ones(1)).item() == 2


def test_the_unconditional_path_reads_no_past(fitted):
    z, level = torch.randn(2, 2, 4, 8), torch.tensor([0, 3])
    with torch.no_grad():
        found = [
            fitted.net_(z, level, torch.randn(2, 4, 4, 8), torch.full((2,), told)) for told in (0.0, 0.0, 1.0, 1.0)
        ]
    assert torch.equal(found[0], found[1]) and (found[2] - found[3]).abs().max() > 1e-4


def test_longitude_wraps_around_a_globe_only(fitted):
    z, past, level = torch.randn(1, 2, 4, 8), torch.randn(1, 4, 4, 8), torch.tensor([2])
    with torch.no_grad():
        plain = fitted.net_(z, level, past, torch.ones(1))
        moved = fitted.net_(z.roll(3, -1), level, past.roll(3, -1), torch.ones(1))
        assert (moved - plain.roll(3, -1)).abs().max() < 1e-5
        cut = CogDPM(**SMALL).fit(weather(), longitude=np.arange(8) * 5.0).net_
        off = cut(z.roll(3, -1), level, past.roll(3, -1), torch.ones(1)) - cut(z, level, past, torch.ones(1)).roll(
            3, -1
        )
        assert off.abs().max() > 1e-3


def test_samples_are_saved_bit_for_bit_and_seeded(fitted, tmp_path):
    fitted.save(tmp_path / "saved")
    again = CogDPM.load(tmp_path / "saved")
    for lead in (1, 3):
        found = fitted.predict(lead, samples=3)
        assert found.shape == (3, 2, 4, 8) and np.isfinite(found).all()
        np.testing.assert_array_equal(again.predict(lead, samples=3), found)
        assert (fitted.predict(lead, samples=3, seed=1) != found).any()
    np.testing.assert_array_equal(fitted.predict(history=weather()[-2:]), fitted.predict())


def test_missing_cells_stay_missing_and_matter_to_no_other():
    values = weather()
    values[:, :, 1, 2] = np.nan
    found = CogDPM(**SMALL).fit(values).predict(2, samples=2)
    assert np.isnan(found[:, :, 1, 2]).all() and np.isfinite(np.delete(found.reshape(4, -1), 10, 1)).all()


def test_skill_has_a_row_a_lead_and_channel(fitted):
    table = fitted.skill(weather(8), leads=(1, 2), samples=3, changes=fitted.training_changes(weather()))
    assert list(table["lead"]) == [1, 1, 2, 2]
    assert (table[["crps", "persistence", "rmse"]] > 0).all().all() and table["rank"].between(-1, 1).all()


def test_what_cannot_be_forecast_is_refused(fitted):
    with pytest.raises(InputError, match="not fitted"):
        CogDPM().predict()
    with pytest.raises(InputError, match="3 fields are too few"):
        CogDPM(**SMALL).fit(weather(3))
    with pytest.raises(InputError, match="give 2 or more fields"):
        fitted.predict(history=weather(1))
    with pytest.raises(InputError, match="give start"):
        CogDPM(**SMALL | {"period": 4}).fit(weather()).predict(history=weather())
    with pytest.raises(InputError, match="low is 2"):
        CogDPM(low=2.0)


def test_the_west_of_two_regions_is_known_from_two_fields_and_the_east_is_not():
    values = two_regions(0, 300)[:, 0]
    assert values.var(0).mean() == pytest.approx(1, abs=0.2)
    x = np.stack([values[:-2], values[1:-1]], 1).reshape(298, -1)
    found = np.linalg.lstsq(x[:250], values[2:252].reshape(250, -1), rcond=None)[0]
    off = ((x[250:] @ found).reshape(48, 8, 16) - values[252:]) ** 2
    assert off[..., :8].mean() < 1e-3 < 0.5 < off[..., 8:].mean()


@pytest.mark.slow
def test_u_is_high_where_the_field_is_noise():
    tried = experiment("forecast", "cogdpm").run(seeds=(0, 1))
    assert [one.answer for one in tried.verdicts[:2]] == ["held", "held"]
