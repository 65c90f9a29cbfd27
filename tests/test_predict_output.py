"""Output heads over ordered bins: densities that are densities, and quantiles that never cross."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.errors import InputError
from manyheads.learning import LinearSettings, MultiHead, Trunk
from manyheads.learning.binned import (
    LinearBins,
    MixtureHead,
    MixtureSettings,
    QuantileHead,
    QuantileSettings,
    bins_of,
    centres,
    smoothness,
)
from manyheads.learning.fourier import FourierHead, FourierSettings, autocorrelation
from manyheads.predict.trunks import mlp
from manyheads.training import ADAM, row_batches


def _head(frequencies=7, bins=20, seed=0, **more):
    head = FourierHead(FourierSettings(5, bins, frequencies, shrink=1.0, seed=seed, **more))
    return head.eval()


STATES = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 5))
def test_the_density_is_one_whatever_the_weights(frequencies, seed):
    z = torch.linspace(-1, 1, 4001)
    p = _head(frequencies, seed=seed).density(STATES, z).detach()
    assert p.min() >= 0
    torch.testing.assert_close(p[:, :-1].mean(-1) * 2, torch.ones(6), rtol=0, atol=1e-4)
    torch.testing.assert_close(p[:, 0], p[:, -1], rtol=1e-3, atol=1e-4)  # the ends meet


def test_the_density_is_the_fourier_series_of_the_autocorrelation():
    head, z = _head(), torch.linspace(-1, 1, 31)
    real, imaginary = head.linear(STATES).chunk(2, -1)
    a = torch.complex(real, imaginary)
    c = autocorrelation(real, imaginary)
    by_hand = torch.stack([(a[:, k:] * a[:, : a.shape[1] - k].conj()).sum(1) for k in range(a.shape[1])], 1)
    torch.testing.assert_close(c, by_hand, rtol=0, atol=1e-5)
    k = torch.arange(1, a.shape[1])
    waves = torch.exp(1j * torch.pi * k[:, None] * z)
    series = 0.5 + ((c[:, 1:] / c[:, :1]) @ waves).real
    torch.testing.assert_close(head.density(STATES, z), series, rtol=1e-4, atol=1e-5)


def test_the_bins_probabilities_are_the_density_at_their_centres_and_the_logits_nearly_normalised():
    head = _head(bins=20)
    p = head.density(STATES, centres(20))
    logits = head(STATES)
    torch.testing.assert_close(logits, torch.log(p / p.sum(-1, keepdim=True) + 1e-5))
    torch.testing.assert_close(logits.exp().sum(-1), torch.full((6,), 1 + 20e-5), rtol=0, atol=1e-5)


def test_the_regulariser_counts_in_training_only():
    target = torch.randint(20, (6,), generator=torch.Generator().manual_seed(1))
    plain, rough = _head(gamma=0.0), _head(gamma=0.5)
    rough.train()
    real, imaginary = rough.linear(STATES).chunk(2, -1)
    c, k = autocorrelation(real, imaginary), torch.arange(8)
    more = 0.5 * 2 * (2 * np.pi**2 * k**2 * c.abs() ** 2).sum(1).mean()
    torch.testing.assert_close(rough.loss(rough(STATES), target), plain.loss(plain(STATES), target) + more)
    torch.testing.assert_close(rough.eval().loss(rough(STATES), target), plain.loss(plain(STATES), target))


def test_first_weights_make_a_nearly_flat_start_the_smaller_they_are():
    def spread(shrink):
        return float(FourierHead(FourierSettings(5, 20, shrink=shrink)).linear.weight.detach().abs().max())

    assert spread(100.0) == pytest.approx(spread(1.0) / 100)


def test_roughness_tells_a_smooth_distribution_from_a_jagged_one_wherever_it_lies():
    z = centres(50)
    smooth = torch.exp(-0.5 * (z / 0.3) ** 2)
    smooth = (smooth / smooth.sum())[None]
    jagged = smooth * torch.where(torch.arange(50) % 2 == 0, 1.6, 0.4)
    jagged = jagged / jagged.sum()
    assert float(smoothness(smooth)) < 0.5 * float(smoothness(jagged))
    torch.testing.assert_close(smoothness(smooth), smoothness(smooth.roll(17, -1)))
    torch.testing.assert_close(smoothness(torch.full((1, 50), 0.02)), torch.zeros(1), rtol=0, atol=1e-6)
    # By the formula, with each Gaussian applied as a matrix.
    away = (torch.arange(50)[:, None] - torch.arange(50)).abs()
    away = torch.minimum(away, 50 - away).double()
    wanted = 0.0
    for s in range(1, 101):
        g = torch.exp(-0.5 * (away / s) ** 2)
        wanted += (
            6 / np.pi**2 / s**2 * float((jagged[0].double() - (g / g.sum(1, keepdim=True)) @ jagged[0].double()).norm())
        )
    assert float(smoothness(jagged)) == pytest.approx(wanted, rel=1e-4)


def test_a_mixture_head_is_the_mixture_of_its_gaussians():
    head = MixtureHead(MixtureSettings(5, 30, 2))
    weight, mean, scale = head.linear(STATES).chunk(3, -1)
    scale = torch.nn.functional.softplus(scale) + 1e-2
    parts = torch.distributions.Normal(mean[..., None], scale[..., None]).log_prob(centres(30))
    wanted = (weight.softmax(-1)[..., None] * parts.exp()).sum(1)
    torch.testing.assert_close(head(STATES).exp(), wanted / wanted.sum(-1, keepdim=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000))
def test_quantiles_never_cross(seed):
    head = QuantileHead(QuantileSettings(5, seed=seed))
    states = 20 * torch.randn(50, 5, generator=torch.Generator().manual_seed(seed))
    assert (head(states).diff(dim=-1) >= 0).all()


def test_quantiles_learn_the_shares_below_them():
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(4000, generator=draw).exp()
    heads = MultiHead(Trunk(torch.nn.Identity()), {"y": QuantileHead(QuantileSettings(1, (0.1, 0.5, 0.9)))})
    data = {"input": torch.ones(4000, 1), "y": y}
    heads.fit(row_batches(data, 200), replace(ADAM, steps=600, rate=3e-2))
    found = heads.evaluate([data]).set_index("metric")["value"]
    assert found["coverage_error"] < 0.03
    torch.testing.assert_close(
        heads({"input": torch.ones(1, 1)})["y"][0], torch.quantile(y, torch.tensor([0.1, 0.5, 0.9])), rtol=0.1, atol=0.1
    )


def test_a_fourier_head_learns_two_peaks_on_a_trunk_and_comes_back_from_disk(tmp_path):
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(1500, 1, generator=draw) * 0.6 + 0.2
    y = x[:, 0] * torch.where(torch.rand(1500, generator=draw) < 0.5, 1.0, -1.0)
    trunk = Trunk(mlp(1, 32), frozen=False)
    heads = MultiHead(trunk, {"bin": FourierHead(FourierSettings(32, 40, 12))})
    data = {"input": x, "bin": bins_of(y, 40)}
    heads.fit(row_batches(data, 50), replace(ADAM, steps=600, rate=3e-3))
    p = heads({"input": torch.tensor([[0.5]])})["bin"].softmax(-1)[0].detach()
    z = centres(40)
    assert p[(z.abs() - 0.5).abs() < 0.15].sum() > 0.8 and p[z > 0].sum() == pytest.approx(0.5, abs=0.1)
    heads.save(tmp_path / "h")
    again = MultiHead.load(tmp_path / "h", mlp(1, 32, seed=3))
    assert torch.equal(again(data)["bin"], heads(data)["bin"])


def test_bins_hold_what_falls_into_them():
    assert bins_of(torch.tensor([-5.0, -1.0, -0.01, 0.0, 0.99, 1.0, 7.0]), 4).tolist() == [0, 0, 1, 2, 3, 3, 3]
    assert torch.equal(bins_of(centres(9), 9), torch.arange(9))
    linear = LinearBins(LinearSettings(5, 9))
    assert set(linear.metrics(linear(STATES), torch.arange(6))) == {"nll", "mae", "roughness"}
    with pytest.raises(InputError, match="NaN"):
        bins_of(torch.tensor([0.0, float("nan")]), 4)


@pytest.mark.parametrize("wrong", [{"frequencies": 0}, {"gamma": -1.0}, {"shrink": 0.0}, {"bins": 1}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        FourierHead(FourierSettings(**{"width": 5, "bins": 9, **wrong}))


def test_levels_that_do_not_rise_are_refused():
    with pytest.raises(InputError, match="rising"):
        QuantileSettings(5, (0.9, 0.1))
