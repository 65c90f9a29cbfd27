"""Masks: the right count, the hardest always among them, chance where nothing is asked. And what the predictor's loss moves."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.predict.auxiliary.hard_patches import (
    HardPatches,
    PatchSettings,
    hard_mask,
    noisy_pictures,
    patches,
    relative_loss,
)
from manyheads.training import ADAM

SMALL = PatchSettings(patch=2, width=16, heads=2, layers=1)
PICTURES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def _mask(n=6, ratio=0.75, alpha=0.0, seed=0):
    return hard_mask(torch.zeros(n, 16), ratio, alpha, torch.Generator().manual_seed(seed))


@settings(max_examples=50, deadline=None)
@given(st.integers(4, 40), st.floats(0.1, 0.9), st.floats(0.0, 1.0), st.integers(0, 100))
def test_a_mask_hides_the_right_count_and_the_hardest_always(n, ratio, alpha, seed):
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(5, n, generator=draw)
    mask = hard_mask(scores, ratio, alpha, draw)
    assert (mask.sum(1) == round(ratio * n)).all()
    hardest = scores.argsort(1, descending=True)[:, : round(alpha * ratio * n)]
    assert mask.gather(1, hardest).all()


def test_without_hardness_every_patch_is_hidden_equally_often():
    mask = hard_mask(torch.arange(16.0).expand(8000, 16), 0.75, 0.0, torch.Generator().manual_seed(0))
    counts = mask.sum(0).double()
    chi = ((counts - 6000) ** 2 / (6000 * 0.25)).sum() * 15 / 16
    assert chi < 37.7  # .999 of chi-square with 15 degrees of freedom


def test_patches_are_squares_row_by_row():
    picture = torch.arange(16.0).view(1, 1, 4, 4)
    assert patches(picture, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    with pytest.raises(InputError, match="4 x 4 do not divide into patches of 3 x 3"):
        patches(picture, 3)


def test_the_relative_loss_counts_ordered_pairs_of_masked_patches():
    draw = torch.Generator().manual_seed(0)
    s, loss = torch.randn(3, 5, generator=draw), torch.rand(3, 5, generator=draw)
    loss[0, 1] = loss[0, 2]
    mask = torch.rand(3, 5, generator=draw) < 0.7
    terms = [
        -F.logsigmoid(s[b, i] - s[b, j] if loss[b, i] > loss[b, j] else s[b, j] - s[b, i])
        for b in range(3)
        for i in range(5)
        for j in range(5)
        if mask[b, i] and mask[b, j] and loss[b, i] != loss[b, j]
    ]
    torch.testing.assert_close(relative_loss(s, loss, mask), torch.stack(terms).mean())
    right = relative_loss(10 * loss, loss, mask)
    assert right < relative_loss(torch.zeros_like(loss), loss, mask) < relative_loss(-10 * loss, loss, mask)


def test_hidden_pixels_are_not_seen():
    model, mask = HardPatches((1, 8, 8), SMALL).eval(), _mask()
    hidden = F.fold(mask[:, None].float().expand(6, 4, 16), (8, 8), 2, stride=2) > 0
    other = torch.where(hidden, torch.rand(6, 1, 8, 8), PICTURES)
    for a, b in zip(model(PICTURES, mask), model(other, mask), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(model(PICTURES, mask)[0], model(PICTURES, ~mask.roll(1, 1))[0])


def test_predicting_hardness_leaves_the_gradient_of_the_reconstructors_own_layers_as_it_was():
    grads = []
    for predict in (True, False):
        model = HardPatches((1, 8, 8), replace(SMALL, predict=predict))
        model.loss(PICTURES, _mask()).backward()
        grads.append([p.grad for part in (model.reconstructor, model.pixels) for p in part.parameters()])
    for with_it, without in zip(*grads, strict=True):
        torch.testing.assert_close(with_it, without, rtol=1e-5, atol=1e-7)


def test_scores_in_folds_are_read_where_patches_are_hidden():
    model = HardPatches((1, 8, 8), SMALL).eval()
    scores = model.scores(PICTURES)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(16))
    mask = torch.zeros(6, 16, dtype=torch.bool)
    mask[:, order[1::4]] = True
    torch.testing.assert_close(scores[mask], model(PICTURES, mask)[1][mask])
    full = HardPatches((1, 8, 8), replace(SMALL, score_mode="full")).eval()
    torch.testing.assert_close(full.scores(PICTURES), full(PICTURES, torch.zeros_like(mask))[1])


def test_training_learns_the_slow_copy_follows_and_an_interrupted_run_has_it(tmp_path):
    pictures, _ = noisy_pictures(0, 32)
    run = replace(ADAM, steps=12, rate=1e-3, rows=8)
    whole, cut = (HardPatches((1, 24, 24), replace(SMALL, patch=4, decay=0.5)) for _ in range(2))
    start = whole.pixels.weight.detach().clone()
    mask = hard_mask(torch.zeros(32, 36), 0.75, 0.0, torch.Generator().manual_seed(0))
    before = float(whole.loss(pictures, mask).detach())
    whole.fit(pictures, run)
    assert float(whole.loss(pictures, mask).detach()) < before
    slow, new = whole.slow.pixels.weight, whole.pixels.weight
    assert not torch.equal(slow, start) and not torch.equal(slow, new)
    assert (slow - new).abs().sum() < (start - new).abs().sum()

    stop = replace(run, steps=12)
    calls = []

    class Stop(Exception):
        pass

    loss = cut.loss
    cut.loss = lambda *given: loss(*given) if calls.append(1) or len(calls) < 7 else (_ for _ in ()).throw(Stop)
    with pytest.raises(Stop):
        cut.fit(pictures, replace(stop, save_minutes=0.0), tmp_path / "run")
    cut.loss = loss
    cut.fit(pictures, stop, tmp_path / "run")
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_states_are_one_row_a_picture_and_settings_are_checked():
    model = HardPatches((1, 8, 8), SMALL)
    assert model.states(PICTURES).shape == (6, 16)
    with pytest.raises(InputError, match="ratio"):
        PatchSettings(ratio=0.0)
    with pytest.raises(InputError, match="score_mode"):
        PatchSettings(score_mode="half")
    with pytest.raises(InputError, match="steps"):
        model.fit(PICTURES, replace(ADAM, minutes=1.0))
