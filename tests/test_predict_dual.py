"""Two heads for two teachers: what each is told, how they are mixed, what is thrown away."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.learning import Trunk, Weighting
from manyheads.learning.attached import MISSING
from manyheads.learning.objective import _Objective
from manyheads.predict.distillation.dual_distillation import align, binary_kl, distilling_heads, normalised_kl
from manyheads.predict.distillation.dual_head import DistillHead, DistillSettings, Mix, best_mix, dual_heads
from manyheads.predict.trunks import mlp
from manyheads.training import ADAM

DRAW = torch.Generator().manual_seed(0)
X, T = torch.randn(24, 6, generator=DRAW), 3 * torch.randn(24, 4, generator=DRAW)
Y = torch.randint(4, (24,), generator=DRAW)
HALF = Y.where(torch.arange(24) < 12, MISSING)


def _dual():
    return dual_heads(Trunk(mlp(6, 8), frozen=False), 8, 4)


def test_the_loss_is_the_papers_where_half_of_the_rows_have_labels():
    heads = _dual()
    losses = heads.losses({"input": X, "ce": HALF, "kd": T})
    z = heads.backbone(X)
    ce, kd = heads.heads["ce"](z), heads.heads["kd"](z)

    def kl(rows):
        p, q = (T[rows] / 2).softmax(-1), (kd[rows] / 2).softmax(-1)
        return 4 * (p * (p / q).log()).sum(-1).mean()

    wanted = 0.5 * F.cross_entropy(ce[:12], Y[:12]) + 0.5 * (kl(slice(0, 12)) + kl(slice(12, 24)))
    torch.testing.assert_close(0.5 * losses["ce"] + losses["kd"], wanted)


def test_labels_teach_one_head_and_the_teacher_the_other():
    heads = _dual()
    batch = {"input": X, "ce": HALF, "kd": T}
    heads.losses(batch)["kd"].backward()
    assert heads.heads["ce"].linear.weight.grad is None
    heads.zero_grad()
    heads.losses(batch)["ce"].backward()
    assert heads.heads["kd"].linear.weight.grad is None or not heads.heads["kd"].linear.weight.grad.any()
    unlabelled = {"input": X, "ce": torch.full((24,), MISSING), "kd": T}
    assert set(heads.losses(unlabelled)) == {"kd"}


def test_at_its_ends_the_mix_is_one_head_and_choosing_it_trains_nothing():
    heads = _dual()
    before = copy.deepcopy(heads.state_dict())
    with torch.no_grad():
        outputs = heads({"input": X})
    assert torch.equal(Mix(1.0, 2.0)(outputs), outputs["ce"].softmax(-1))
    assert torch.equal(Mix(0.0, 1.0)(outputs), outputs["kd"].softmax(-1))
    mix = best_mix(outputs, Y)
    every = [Mix(a, b)(outputs).argmax(-1) for a in (0.0, 0.5, 1.0) for b in (0.5, 1.0, 4.0)]
    accuracy = (mix(outputs).argmax(-1) == Y).float().mean()
    assert all(accuracy >= (one == Y).float().mean() for one in every)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), heads.state_dict().values(), strict=True))


def test_a_mix_finds_the_head_that_is_right():
    right, wrong = 5 * F.one_hot(Y, 4).float(), torch.zeros(24, 4)
    assert best_mix({"ce": right, "kd": wrong}, Y).alpha > 0.5
    assert best_mix({"ce": 5 * F.one_hot((Y + 1) % 4, 4).float(), "kd": right}, Y).alpha < 0.5


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.5, 8.0))
def test_log_cosh_is_the_divergence_from_a_fair_coin(seed, temperature):
    draw = torch.Generator().manual_seed(seed)
    s, t = (4 * torch.randn(5, 3, generator=draw, dtype=torch.double) for _ in range(2))
    # The other side of a sigmoid is that of minus its argument: 1 - q would lose the digits of a small one.
    q, not_q = ((s - t) / temperature).sigmoid(), ((t - s) / temperature).sigmoid()
    by_hand = temperature**2 * (0.5 * (0.5 / q).log() + 0.5 * (0.5 / not_q).log()).sum(-1).mean()
    torch.testing.assert_close(normalised_kl(s, t, temperature), by_hand, rtol=1e-6, atol=1e-8)
    p, r = (t / temperature).sigmoid(), (s / temperature).sigmoid()
    not_p, not_r = (-t / temperature).sigmoid(), (-s / temperature).sigmoid()
    kl = temperature**2 * (p * (p / r).log() + not_p * (not_p / not_r).log()).sum(-1).mean()
    torch.testing.assert_close(binary_kl(s, t, temperature), kl, rtol=1e-6, atol=1e-8)
    for loss in (normalised_kl, binary_kl):
        torch.testing.assert_close(loss(t, t, temperature), torch.zeros((), dtype=torch.double), rtol=0, atol=1e-12)
        assert (
            loss(t + 1, t, temperature) > 1e-3
        )  # unlike ordinary distillation, a constant is no change without a loss
    assert torch.isfinite(normalised_kl(s * 1e4, t, temperature))


def test_ordinary_distillation_does_not_see_a_constant():
    head = DistillHead(DistillSettings(6, 4))
    torch.testing.assert_close(head.loss(T + 3, T), torch.zeros(()), rtol=0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_after_alignment_the_teacher_no_longer_pulls_against_the_labels(seed):
    g = torch.randn(2, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    c = align(g @ g.T)
    ce, kd = g
    total = c @ g
    if ce @ kd >= 0:
        torch.testing.assert_close(total, ce + kd)
    else:
        projected = total - ce
        assert projected @ ce >= -1e-6
        torch.testing.assert_close(projected, kd - (kd @ ce) / (ce @ ce) * ce)


def test_alignment_is_used_in_training():
    heads = distilling_heads(Trunk(mlp(6, 8), frozen=False), 8, 4, hidden=0).eval()
    weight = heads.heads["head1"].linear.weight
    with torch.no_grad():  # one head's outputs are the other's, the other way round, and so are their gradients
        heads.heads["head2"].layers.weight.copy_(-weight)
    batch = {"input": X, "head1": Y, "head2": 20 * F.one_hot(Y, 4).float()}

    def gradient(balance):
        heads.zero_grad()
        _Objective(heads, balance, 1)((0, 1.0, batch)).backward()
        return torch.cat([p.grad.flatten() for p in heads.backbone.parameters()])

    losses = heads.losses(batch)
    ce, kd = (
        torch.cat(
            [
                g.flatten()
                for g in torch.autograd.grad(losses[name], list(heads.backbone.parameters()), retain_graph=True)
            ]
        )
        for name in ("head1", "head2")
    )
    assert ce @ kd < 0
    torch.testing.assert_close(gradient(Weighting(lambda gram: torch.ones(2))), ce + kd, rtol=1e-4, atol=1e-6)
    wanted = ce + kd - (ce @ kd) / (ce @ ce) * ce
    torch.testing.assert_close(gradient(Weighting(align)), wanted, rtol=1e-4, atol=1e-5)


def test_the_second_head_goes_and_the_first_answers_as_before():
    heads = distilling_heads(Trunk(mlp(6, 8), frozen=False), 8, 4)
    batch = {"input": X, "head1": Y, "head2": T}
    heads.fit(lambda i: batch, replace(ADAM, steps=20, rate=1e-2), balance=Weighting(align))
    out = heads({"input": X})
    assert set(out) == {"head1"}
    assert torch.equal(out["head1"], heads.heads["head1"](heads.backbone(X)))
    heads.zero_grad()
    heads.losses(batch)["head2"].backward()
    assert heads.heads["head1"].linear.weight.grad is None


@pytest.mark.usefixtures("any_shape")
def test_a_teacher_with_other_classes_is_refused():
    for heads, names in (
        (_dual(), ("ce", "kd")),
        (distilling_heads(Trunk(mlp(6, 8), frozen=False), 8, 4), ("head1", "head2")),
    ):
        batch = {"input": X, names[0]: Y, names[1]: torch.randn(24, 7)}
        with pytest.raises(InputError, match=rf"head '{names[1]}'.*\[24, 4\].*\[24, 7\]"):
            heads.fit(lambda i, batch=batch: batch, replace(ADAM, steps=1))
    with pytest.raises(InputError, match="temperature"):
        DistillSettings(4, 2, temperature=0.0)
