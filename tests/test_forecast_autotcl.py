"""Contrast with a learned augmentation: its losses by hand, whose turn it is, and what the mask finds."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from manyheads.errors import InputError
from manyheads.forecast.representations.autotcl import (
    CONTRASTING,
    AutoTCL,
    AutoTCLClassifier,
    AutoTCLNetwork,
    AutoTCLSettings,
    concrete_gate,
    gaussian_mmd,
    info_nce,
)
from manyheads.forecast.representations.autotcl_claims import informative_quarter, windows_ahead

SMALL = AutoTCLSettings(width=8, hidden=8, depth=2, steps=6)


def draws(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def fitted():
    return AutoTCL(SMALL).fit(informative_quarter(20, 0)[0])


def batch(number, n=5, steps=40):
    u = torch.rand(2, n, steps, 1, generator=torch.Generator().manual_seed(1))
    return {"x": draws(n, steps, 1), "number": number, "u": u}


# Losses


def test_info_nce_is_the_cross_entropy_of_cosines_both_ways():
    a, b = draws(4, 6), draws(4, 6, seed=1)
    cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=-1)
    own = torch.arange(4)
    by_hand = (torch.nn.functional.cross_entropy(cosines, own) + torch.nn.functional.cross_entropy(cosines.T, own)) / 2
    torch.testing.assert_close(info_nce(a, b), by_hand)
    torch.testing.assert_close(info_nce(torch.stack([a, b]), torch.stack([b, a])), by_hand)  # over groups
    assert float(info_nce(a, a)) < float(info_nce(a, a.roll(1, 0)))


def test_mmd_is_0_for_the_same_rows_whatever_their_order_and_grows_with_a_shift():
    a = draws(30, 4)
    assert abs(float(gaussian_mmd(a, a.flip(0)))) < 1e-6
    near, far = (float(gaussian_mmd(a, a.flip(0) + by)) for by in (0.3, 2.0))
    assert 0 < near < far


def test_mmd_by_hand_for_two_points():
    a, b = torch.zeros(1, 1), torch.ones(1, 1)
    # Squared distances 0, 1, 1, 0: their sum over n (n - 1) = 2 pairs is a mean of 1.
    expected = 5 + 5 - 2 * sum(np.exp(-1 / 2.0**i) for i in range(-2, 3))
    assert float(gaussian_mmd(a, b)) == pytest.approx(expected, rel=1e-5)


# Gates


def test_gates_are_stretched_and_clipped_so_that_some_are_exactly_0():
    u = torch.linspace(0, 1, 10_001)[None, :, None]
    gate = concrete_gate(torch.zeros_like(u), u)
    assert float(gate.min()) == 0.0 and float(gate.max()) == pytest.approx(1.0, abs=1e-4)
    assert float((gate == 0).float().mean()) == pytest.approx(0.1 / 1.1, abs=1e-3)
    shut, open_ = (concrete_gate(torch.full_like(u, h), u).mean() for h in (-8.0, 8.0))
    assert float(shut) < 0.01 and float(open_) > 0.99


def test_bounded_gates_cannot_reach_a_ratio_of_one_and_a_half_and_free_ones_can():
    """The trap of the sheet: with h a sigmoid, from 0 to 1, the mean gate goes from its least to 1.4 times that at most."""
    u = torch.linspace(0, 1, 100_001)[None, :, None]
    least, most = (float(concrete_gate(torch.full_like(u, h), u).mean()) for h in (0.0, 1.0))
    assert 1.3 < most / least < 1.4
    low, high = (float(concrete_gate(torch.full_like(u, h), u).mean()) for h in (-2.0, 2.0))
    assert high / low > 4


# Turns


@pytest.mark.parametrize("number, learns, rests", [(0, "augmenter", "encoder"), (1, "encoder", "augmenter")])
def test_one_learns_and_the_other_gets_no_gradient(number, learns, rests):
    network = AutoTCLNetwork(1, SMALL)
    network(batch(number)).backward()
    grads = {name: [p.grad for p in getattr(network, name).parameters()] for name in (learns, rests)}
    assert all(g is None for g in grads[rests])
    assert any(g is not None and float(g.abs().sum()) > 0 for g in grads[learns])


def test_a_fixed_augmenter_never_learns():
    network = AutoTCLNetwork(1, replace(SMALL, augmenter="fixed"))
    for number in (0, 1):
        network(batch(number)).backward()
    assert all(p.grad is None for p in network.augmenter.parameters())


def test_gates_that_keep_too_much_cost():
    network = AutoTCLNetwork(1, replace(SMALL, smooth=0.0))
    with torch.no_grad():
        for p in network.augmenter.end.parameters():
            p.zero_()
        losses = []
        for logit in (-0.4055, 3.0):  # a mean of .4, the border, and of .95
            network.augmenter.end.bias[0] = logit
            light, heavy = (AutoTCLNetwork(1, replace(SMALL, smooth=0.0, area=area)) for area in (0.0, 1.0))
            for one in (light, heavy):
                one.load_state_dict(network.state_dict())
            losses.append(float(heavy(batch(0)) - light(batch(0))))
    assert losses == pytest.approx([0.0, 0.9526 - 0.4], abs=1e-3)


# The estimator


def test_rows_are_finite_saved_and_the_same_by_the_same_seed(fitted, tmp_path):
    x = informative_quarter(6, 3)[0]
    rows = fitted.embed(x)
    assert rows.shape == (6, 8) and np.isfinite(rows).all() and fitted.embed(x, pool="last").shape == (6, 8)
    again = AutoTCL(SMALL).fit(informative_quarter(20, 0)[0])
    loaded = AutoTCL.load(fitted.save(tmp_path / "one"))
    for other in (again, loaded):
        assert (other.embed(x) == rows).all() and (other.mask(x) == fitted.mask(x)).all()
    with pytest.raises(InputError, match="pool"):
        fitted.embed(x, pool="first")


def test_what_is_read_is_the_mean_of_the_weights_over_steps():
    """After one step the mean is that step's weights; after six it is none of the newest."""
    x = informative_quarter(20, 0)[0]
    seen = [AutoTCL(replace(SMALL, steps=n), replace(CONTRASTING, decay=0.0)).fit(x) for n in (1, 2, 3)]
    means = [model.network_.encoder.end.weight.detach() for model in seen]
    # Of weights w_1, w_2 = w_1 + a, w_3 the means are w_1, w_1 + a / 2, ...: each moves less than a step of AdamW does.
    drawn = AutoTCL(replace(SMALL, steps=0)).fit(x).network_.encoder.end.weight.detach()
    assert torch.equal(means[0], drawn)  # step 0 is the augmenter's
    assert not torch.equal(means[1], drawn) and not torch.equal(means[2], means[1])


def test_the_last_state_is_that_of_the_last_step(fitted):
    x = torch.from_numpy(informative_quarter(3, 5)[0]).float()
    states = fitted.network_.encoder(x).detach()
    torch.testing.assert_close(fitted.pooled(x, "last"), states[:, -1])
    torch.testing.assert_close(fitted.pooled(x), states.amax(1))


def test_one_series_other_channels_and_a_model_that_was_not_fitted_are_refused(fitted):
    with pytest.raises(InputError, match="one series"):
        AutoTCL(SMALL).fit(np.zeros((1, 20, 1)))
    with pytest.raises(InputError, match="fitted on 1 channels"):
        fitted.embed(np.zeros((2, 20, 2)))
    with pytest.raises(InputError, match="not fitted"):
        AutoTCL().embed(np.zeros((2, 20, 1)))
    with pytest.raises(InputError, match="fixed augmenter"):
        AutoTCL(replace(SMALL, augmenter="fixed", steps=0)).fit(np.zeros((2, 20, 1))).mask(np.zeros((2, 20, 1)))
    for wrong in ({"gate": "open"}, {"period": 1}, {"area": -1.0}, {"width": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            AutoTCLSettings(**wrong)


def test_a_classifier_on_its_rows_tells_waves_apart():
    x, y, _ = informative_quarter(80, 0)
    model = AutoTCLClassifier(replace(SMALL, width=32, hidden=16, depth=4)).fit(x, np.array(list("abcd"))[y])
    held, truth, _ = informative_quarter(80, 9)
    assert model.score(held, np.array(list("abcd"))[truth]) >= 0.7


def test_windows_ahead_are_less_the_last_step_they_show():
    values = np.arange(200.0)[:, None] ** 2
    x, y = windows_ahead(values, 10, 120)
    assert len(x) == 110 - 64 - 12 + 1 and (x[:, -1] == 0).all()
    assert y[0].tolist() == [float((74 + i) ** 2 - 73**2) for i in range(12)]


@pytest.mark.slow
def test_the_mask_finds_the_quarter_that_informs():
    x, _, _ = informative_quarter(240, 0)
    held, _, inside = informative_quarter(200, 1000)
    mask = AutoTCL().fit(x).mask(held)
    assert mask[inside].mean() / mask[~inside].mean() >= 1.5
    assert 0.05 <= (mask > 0.9).mean() <= 0.95
