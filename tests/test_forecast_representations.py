"""Trunks that represent series: what their views hold, that nothing hidden is seen, and what they find in planted series."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.errors import InputError
from manyheads.forecast import Forecaster
from manyheads.forecast.representations.tspulse import TSPulse
from manyheads.forecast.representations.tspulse_claims import two_sines
from manyheads.forecast.representations.tspulse_network import (
    SignatureHead,
    SpectrumHead,
    ViewSettings,
    inverse_spectrum,
    seen_as,
    spectrum,
    spectrum_size,
)


@pytest.fixture(scope="module")
def fitted():
    frame, _ = two_sines(24, 80, 0)
    return TSPulse(context=32, horizon=8, patch=8, width=16, steps=12, rows=16).fit(frame)


def windows_of(values):
    batch = {"window": values, "past_observed_mask": torch.ones_like(values)}
    return batch | {"target": torch.zeros(len(values), values.shape[2], 3)}


def test_a_window_without_a_nyquist_part_comes_back_from_its_spectrum():
    x = torch.randn(5, 2, 64)
    x = x - (x * (-1.0) ** torch.arange(64)).mean(-1, keepdim=True) * (-1.0) ** torch.arange(64)
    size = spectrum_size(x)
    values = spectrum(x, size)
    torch.testing.assert_close(inverse_spectrum(values, size), x, atol=1e-5, rtol=0)
    halves = values.unflatten(-1, (2, -1)).abs().amax(-1)
    torch.testing.assert_close(halves, torch.ones_like(halves))
    assert bool((spectrum_size(torch.zeros(1, 1, 8)) == 1).all())


def test_hidden_points_reach_no_output_whatever_they_are(fitted):
    heads, x = fitted.heads_, torch.randn(6, 32, 1)
    hidden = torch.rand(6, 32, 1, generator=torch.Generator().manual_seed(3)) < 0.3
    said = heads(seen_as(windows_of(x), hidden))
    other = heads(seen_as(windows_of(torch.where(hidden, 100 * torch.randn_like(x), x)), hidden))
    assert set(said) == {"point", "quantiles", "time", "spectrum", "signature"}
    for name, value in said.items():
        assert torch.equal(value, other[name]), name
    shown = heads(seen_as(windows_of(x + 1.0 * (torch.arange(32) == 5)[:, None]), torch.zeros_like(hidden)))
    assert not torch.allclose(shown["time"], said["time"])  # while what is seen does


def test_what_is_seen_has_mean_0_and_deviation_1_and_outputs_follow_the_unit(fitted):
    x, hidden = 7 + 3 * torch.randn(4, 32, 1), torch.rand(4, 32, 1) < 0.3
    view = seen_as(windows_of(x), hidden)
    kept = (~hidden).float()
    mean = (view["past_values"] * kept).sum(1) / kept.sum(1)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-5, rtol=0)
    square = (view["past_values"].square() * kept).sum(1) / kept.sum(1)
    torch.testing.assert_close(square, torch.ones_like(mean), atol=1e-4, rtol=0)
    other = fitted.heads_(seen_as(windows_of(10 * x - 50), hidden))
    torch.testing.assert_close(other["time"], fitted.heads_(view)["time"], atol=1e-3, rtol=0)


def test_masks_hide_the_share_asked_for_and_the_patches_asked_for():
    one = TSPulse(context=64, patch=8, most_hidden=0.4, whole_patches=1.0)
    drawn = one.masks((4000, 64, 1), torch.Generator().manual_seed(0))
    assert float(drawn.float().mean()) == pytest.approx(0.2, abs=0.01)
    whole = drawn.unflatten(1, (8, 8)).float().mean(2)
    assert bool(((whole == 0) | (whole == 1)).all())
    mixed = TSPulse(context=64, patch=8).masks((4000, 64, 1), torch.Generator().manual_seed(0))
    in_patches = mixed.unflatten(1, (8, 8)).all(2).float().mean() / mixed.float().mean()
    assert float(in_patches) == pytest.approx(0.2, abs=0.03)


def test_the_losses_of_the_spectrum_are_0_for_the_truth_and_those_of_the_signature_least():
    x = torch.randn(3, 2, 16)
    x = x - (x * (-1.0) ** torch.arange(16)).mean(-1, keepdim=True) * (-1.0) ** torch.arange(16)
    size, all_there = spectrum_size(x), torch.ones(3, 2)
    head = SpectrumHead(ViewSettings(4, 8))
    assert float(head.loss(spectrum(x, size), (x, torch.ones_like(x), size, all_there))) < 1e-8
    assert float(head.loss(0 * x, (x, torch.ones_like(x), size, all_there))) > 0.5
    names = SignatureHead(ViewSettings(4, 7))
    p = (1 + torch.fft.rfft(x)[..., 1:-1].abs()) / (1 + torch.fft.rfft(x)[..., 1:-1].abs()).sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1).mean()
    torch.testing.assert_close(names.loss(p.log(), (x, all_there)), entropy)


def test_gaps_are_filled_and_what_was_observed_stays(fitted):
    frame, _ = two_sines(3, 70, 5)
    gaps = frame.copy()
    gaps.loc[[3, 4, 20, 69, 70, 100], "target"] = np.nan
    gaps = gaps.drop(index=[30]).reset_index(drop=True)  # a time that is not there is a gap too
    out = fitted.impute(gaps)
    assert len(out) == len(frame) and np.isfinite(out["target"]).all()
    kept = gaps.dropna().merge(out, on=["item_id", "timestamp"], suffixes=("", "_out"))
    assert (kept["target"] == kept["target_out"]).all()
    huge = gaps.assign(target=gaps["target"] * 1e12)
    assert np.isfinite(fitted.impute(huge)["target"]).all()


def test_the_two_views_tell_where_a_series_was_broken(fitted):
    frame, _ = two_sines(2, 200, 7)
    broken = frame.copy()
    broken.loc[range(300, 303), "target"] += 8  # steps 100 to 102 of the second series
    out = fitted.anomaly(broken)
    assert list(out.columns) == ["item_id", "timestamp", "time", "spectrum", "forecast", "score"]
    second = out[out["item_id"] == 1].reset_index(drop=True)
    for name in ("time", "spectrum", "forecast", "score"):
        assert abs(int(second[name].idxmax()) - 101) <= 1, name
    assert out["score"].between(0, 1).all()


def test_short_constant_and_nearly_empty_series_have_finite_answers(fitted):
    values = {0: [1.0, 2.0, 3.0, 4.0, 9.0], 1: [5.0] * 50, 2: [np.nan] * 60 + [1.0, 2.0] + [np.nan] * 60}
    rows = [(name, t, y) for name, series in values.items() for t, y in enumerate(series)]
    frame = pd.DataFrame(rows, columns=["item_id", "timestamp", "target"])
    for out in (fitted.impute(frame), fitted.anomaly(frame), fitted.embed(frame)):
        assert np.isfinite(out.to_numpy(dtype=float)).all()


def test_registers_are_a_row_a_series_and_everything_is_saved_bit_for_bit(fitted, tmp_path):
    frame, _ = two_sines(5, 60, 9)
    rows = fitted.embed(frame)
    assert rows.shape == (5, 4 * 16) and list(rows.index) == [0, 1, 2, 3, 4]
    assert fitted.embed(frame, by="signature").shape == (5, 15)
    with pytest.raises(InputError, match="by"):
        fitted.embed(frame, by="colour")
    loaded = Forecaster.load(fitted.save(tmp_path / "one"))
    assert (loaded.embed(frame).to_numpy() == rows.to_numpy()).all()
    pd.testing.assert_frame_equal(loaded.predict(), fitted.predict())
    pd.testing.assert_frame_equal(loaded.impute(frame), fitted.impute(frame))


def test_the_same_seed_trains_the_same_with_a_folder_or_without(tmp_path):
    frame, _ = two_sines(6, 60, 1)
    settings = dict(context=32, horizon=8, width=8, rows=8)
    whole = TSPulse(**settings, steps=6).fit(frame, validation=0)
    again = TSPulse(**settings, steps=6).fit(frame, validation=0, folder=tmp_path / "run")
    pd.testing.assert_frame_equal(whole.embed(frame), again.embed(frame))


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"context": 60}, "multiple of the patch"),
        ({"context": 9, "patch": 3}, "even"),
        ({"most_hidden": 1.5}, "most_hidden"),
    ],
)
def test_what_cannot_be_is_refused(settings, says):
    with pytest.raises(InputError, match=says):
        TSPulse(**settings)
