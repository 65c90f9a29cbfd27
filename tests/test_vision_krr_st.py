"""KRR-ST: the closed form against a direct solution, what the outer step may change, and a set that is known to be enough."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.vision.core.twins import TWINS, fit_twins, jittered, twins_loss
from manyheads.vision.views.krr_st import (
    TRAINING,
    DistilledSet,
    DistilSettings,
    Student,
    distil,
    ridge_answers,
    taught,
)

GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.randn(200, 1, 3, 3, generator=GENERATOR)
FEW = DistilSettings(count=12, nets=3, longest=20)
SHORT = replace(TRAINING, steps=5, rows=32)


def _net(seed):
    return nn.Sequential(nn.Flatten(), nn.Linear(9, 16), nn.Tanh())


def test_the_closed_form_is_the_ridge_solution():
    draw = torch.Generator().manual_seed(1)
    f, fs, ys = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((7, 5), (9, 5), (9, 3)))
    one, ones = torch.ones(7, 1, dtype=torch.float64), torch.ones(9, 1, dtype=torch.float64)
    a, b = torch.cat([f, one], 1), torch.cat([fs, ones], 1)
    for ridge in (1e-6, 0.1):
        shrink = ridge * (b @ b.T).trace()
        primal = a @ torch.linalg.solve(b.T @ b + shrink * torch.eye(6, dtype=torch.float64), b.T @ ys)
        assert torch.allclose(ridge_answers(f, fs, ys, ridge), primal, atol=1e-4)
    assert torch.allclose(
        ridge_answers(f.float(), fs.float(), ys.float(), 1e-6).double(), a @ torch.linalg.pinv(b) @ ys, atol=1e-3
    )


def test_twins_are_at_zero_when_copies_agree_and_columns_tell_nothing_of_each_other():
    z = torch.linalg.qr(torch.randn(64, 4, generator=torch.Generator().manual_seed(2)) - 0.0)[0]
    z = torch.linalg.qr(z - z.mean(0))[0]
    assert twins_loss(z, z) == pytest.approx(0, abs=1e-3)
    assert twins_loss(z, -z) == pytest.approx(16, abs=0.02)  # every diagonal entry is -1
    same = z[:, :1].expand(-1, 4)
    assert twins_loss(same, same, 0.01) == pytest.approx(0.12, abs=1e-3)  # 12 entries beside it are 1


def test_jittered_pictures_are_still_the_pictures():
    smooth = F.interpolate(
        torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(3)), (12, 12), mode="bicubic"
    )
    one, other = (jittered(smooth, torch.Generator().manual_seed(k)) for k in (0, 1))
    near = (one - other).square().flatten(1).mean(1)
    far = (one - other.roll(1, 0)).square().flatten(1).mean(1)
    assert (near < far).float().mean() > 0.8
    assert torch.equal(one, jittered(smooth, torch.Generator().manual_seed(0)))


def test_pictures_and_targets_are_learned_and_the_outer_loss_falls():
    """The targets are a fixed linear map of the pictures: 12 pairs can hold it, the first 12 real ones with noise do not."""
    draw = torch.Generator().manual_seed(4)
    targets = PICTURES.flatten(1) @ torch.randn(9, 2, generator=draw)
    noisy = targets + 2 * torch.randn(targets.shape, generator=draw)
    found = distil(PICTURES, noisy, _net, FEW, replace(TRAINING, steps=150, rows=100, rate=0.03))
    assert found.losses[-20:].mean() < 0.7 * found.losses[:20].mean()
    start = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:12]
    assert not torch.allclose(found.pictures, PICTURES[start])
    new = torch.randn(100, 1, 3, 3, generator=draw)
    truth = new.flatten(1) @ torch.linalg.lstsq(PICTURES.flatten(1), targets).solution
    errors = []
    for pictures, said in ((found.pictures, found.targets), (PICTURES[start], noisy[start])):
        net = taught(_net, pictures, said, FEW, steps=100, seed=77)
        with torch.no_grad():
            errors.append(F.mse_loss(ridge_answers(net(new), net(pictures), said, 1e-2), truth))
    assert errors[0] < 0.7 * errors[1]


def test_the_outer_step_changes_no_network_and_reads_them_as_they_are_in_use():
    """A batch norm in training mode would tell of the other pictures: then features of a subset differ."""
    modes = []

    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.norm = _net(0), nn.BatchNorm1d(16)

        def forward(self, x):
            modes.append((self.training, len(x)))
            return self.norm(self.net(x))

    distil(PICTURES, PICTURES.flatten(1), lambda seed: Watched(), FEW, SHORT)
    outer = [training for training, n in modes if n == 32]
    assert len(outer) == 5
    assert not any(outer)
    assert any(training for training, n in modes if n == 12)


def test_a_student_learns_what_it_is_shown_and_two_with_a_seed_are_equal():
    said = PICTURES[:20].flatten(1)[:, :2]
    one, other, another = (Student(_net, 16, 2, FEW, seed) for seed in (3, 3, 4))
    for student in (one, other, another):
        student.learn(PICTURES[:20], said, 50)
    assert torch.equal(one.out.weight, other.out.weight)
    assert not torch.equal(one.out.weight, another.out.weight)
    assert F.mse_loss(one.out(one.net(PICTURES[:20])), said) < 0.3 * said.var()


def test_a_teacher_without_labels_tells_planted_kinds_apart():
    from manyheads.vision.core.probes import linear_accuracy

    draw = torch.Generator().manual_seed(5)
    kinds = torch.randint(2, (300,), generator=draw)
    shapes = torch.zeros(2, 1, 8, 8)
    shapes[0, 0, 3:5, 1:7], shapes[1, 0, 1:7, 3:5] = 1, 1
    pictures = jittered(shapes[kinds], draw)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    before = twins_and_loss(encoder, pictures)
    teacher = fit_twins(encoder, pictures, replace(TWINS, steps=100, rows=128, rate=5e-3))
    assert teacher.module is encoder
    assert twins_and_loss(encoder, pictures) < 0.5 * before
    with torch.no_grad():
        z = teacher(pictures)
    assert linear_accuracy(z[:200], kinds[:200], z[200:], kinds[200:]) > 0.95


@torch.no_grad()
def twins_and_loss(encoder, pictures):
    one, other = (jittered(pictures, torch.Generator().manual_seed(k)) for k in (8, 9))
    return float(twins_loss(encoder(one), encoder(other)))


def test_a_set_comes_back_from_a_folder(tmp_path):
    found = distil(PICTURES, PICTURES.flatten(1), _net, FEW, SHORT)
    again = DistilledSet.load(found.save(tmp_path / "set"))
    assert torch.equal(again.pictures, found.pictures)
    assert torch.equal(again.targets, found.targets)
    assert again.settings == FEW
    with pytest.raises(InputError, match="holds no distilled set"):
        DistilledSet.load(tmp_path)


@pytest.mark.parametrize(
    ("pictures", "targets", "make", "words"),
    [
        (PICTURES[:8], PICTURES[:8].flatten(1), _net, "at least 12"),
        (PICTURES, PICTURES[:9].flatten(1), _net, "as many of both"),
        (PICTURES, torch.full((200, 2), float("nan")), _net, "NaN"),
        (PICTURES, PICTURES.flatten(1), lambda seed: nn.Identity(), "flatten"),
    ],
)
def test_what_does_not_fit_is_refused(pictures, targets, make, words, any_shape):
    with pytest.raises(InputError, match=words):
        distil(pictures, targets, make, FEW, SHORT)
