"""Projection heads (#101): the loss is its formula, linear layers share weights, and heads lose what views do not share."""

import pytest
import torch
from architectures import build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manyheads.errors import InputError
from manyheads.evaluation import experiment, experiments
from manyheads.learning import Head, Trunk
from manyheads.predict.transfer.projection import (
    ProjectionHead,
    ProjectionSettings,
    ReweightingHead,
    ReweightingSettings,
    head_effect,
    layer_balance,
    normalised_spectrum,
    spectral_contrastive_loss,
    train_contrastive,
)
from manyheads.training import TrainSettings


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(1, 4))
def test_the_loss_is_its_formula_over_pairs_of_different_examples(seed, n, d):
    draw = torch.Generator().manual_seed(seed)
    z, plus = torch.randn(n, d, generator=draw).double(), torch.randn(n, d, generator=draw).double()
    same = sum(float(z[i] @ plus[i]) for i in range(n)) / n
    others = [float(z[i] @ plus[j]) ** 2 for i in range(n) for j in range(n) if i != j]
    assert float(spectral_contrastive_loss(z, plus)) == pytest.approx(-2 * same + sum(others) / len(others))


def test_balance_is_zero_where_both_layers_do_the_same():
    U, S, V = torch.linalg.svd(torch.randn(5, 5))
    root = S.sqrt().diag()
    assert layer_balance(root @ V, U @ root) < 1e-5
    assert layer_balance(2 * root @ V, U @ root / 2) > 0.5


def test_spectra_do_not_depend_on_scale_place_or_rotation():
    states = torch.randn(50, 4) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0]))
    rotated = 7 * states @ torch.linalg.qr(torch.randn(4, 4))[0] + 5
    spectrum = normalised_spectrum(states)
    assert spectrum[0] == 1 and spectrum[3] < 1e-6
    torch.testing.assert_close(normalised_spectrum(rotated), spectrum, atol=1e-5, rtol=1e-4)


def test_a_reweighting_head_learns_nothing_and_weighs_as_it_says():
    head = ReweightingHead(ReweightingSettings(4, 2.0))
    assert not list(head.parameters())
    torch.testing.assert_close(head(torch.ones(1, 4)), torch.tensor([[1, 0.5, 0.25, 0.125]]))
    assert torch.equal(ReweightingHead(ReweightingSettings(4, 1.0))(torch.ones(2, 4)), torch.ones(2, 4))


@pytest.mark.parametrize(
    "head",
    [
        ProjectionHead(ProjectionSettings(6, 3, (5,), relu=True, std=0.1)),
        ReweightingHead(ReweightingSettings(6, 1.2)),
    ],
)
def test_heads_are_built_again_from_their_settings(head):
    again = Head.rebuilt(type(head).__name__, head.described())
    again.load_state_dict(head.state_dict())
    x = torch.randn(3, 6)
    assert torch.equal(again(x), head(x)) and head(x).shape[0] == 3
    assert not head.settings.__dict__.get("relu") or (head(x) >= 0).all()


def test_metrics_are_cosines_of_views_of_the_same_and_of_different_examples():
    head, one = ReweightingHead(ReweightingSettings(2, 1.0)), torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    found = head.metrics(one, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))
    assert found["same"] == pytest.approx((1 + 0.5**0.5) / 2) and found["different"] == pytest.approx(0.5**0.5 / 2)


def test_a_probe_no_longer_reads_what_the_head_took_away():
    states = torch.randn(400, 6)
    targets = {"first": (states[:, 0] > 0).long(), "last": (states[:, 5] > 0).long()}
    effect = head_effect(states, lambda h: h[:, :5], targets, train=200)
    assert effect.accuracy("first", "before") > 0.9 and effect.accuracy("first", "after") > 0.9
    assert effect.accuracy("last", "before") > 0.9 > 0.65 > effect.accuracy("last", "after")
    assert len(effect.spectrum_before) == 6 and len(effect.spectrum_after) == 5


def test_gradients_keep_the_balance_of_linear_layers():
    """d(W1 W1' - W2' W2)/dt = 0 under gradient flow, on any batch and at any weights."""
    W1, W2 = torch.randn(5, 4).double().requires_grad_(), torch.randn(3, 5).double().requires_grad_()
    x, plus = torch.randn(9, 4).double(), torch.randn(9, 4).double()
    loss = spectral_contrastive_loss(x @ W1.T @ W2.T, plus @ W1.T @ W2.T)
    G1, G2 = torch.autograd.grad(loss, [W1, W2])
    torch.testing.assert_close(G1 @ W1.T + W1 @ G1.T, G2.T @ W2 + W2.T @ G2)


@pytest.mark.slow
def test_linear_layers_are_balanced_and_weights_after_are_squares_of_those_before():
    """Balance within 0.1, and the weak feature's relative weight after the head is that before it squared, within 0.05."""
    tried = experiment("predict", "projection-heads").run()
    assert [v.says for v in tried.verdicts if v.answer == "missed"] == []
    row = tried.comparison.table.groupby(["method", "metric"])["value"].mean()
    wanted = (1.2 / (1.2**2 + 4)) / (2 / (2**2 + 4))  # phi / (phi^2 + noise^2), the loss's minimum
    assert row["after", "weak weight"] == pytest.approx(wanted, abs=0.02)
    assert row["after", "destroyed weight"] < 0.05 < 0.2 + row["before", "destroyed weight"]


def test_a_transformer_learns_to_tell_texts_apart_by_two_views_of_each():
    model, head = build("llama"), ProjectionHead(ProjectionSettings(Trunk(build("llama")).width, 8))
    ids = torch.randint(3, 58, (16, 8), generator=torch.Generator().manual_seed(0))
    views = ids[:, :6], ids[:, 2:]  # two overlapping pieces of each text

    def loss():
        states = [Trunk(model).states(view, pool="mean") for view in views]
        return float(head.loss(*(head(one).detach() for one in states)))

    before = loss()
    settings = TrainSettings(steps=30, rate=2e-3, warmup=1, weight_decay=0.0, precision="fp32")
    train_contrastive(model, head, lambda i: views, settings)
    assert loss() < before - 0.5


def test_the_experiments_are_registered_and_run_in_part():
    assert {"projection-heads", "projection-heads-real"} <= set(experiments("predict"))
    one = experiment("predict", "projection-heads-real")
    found = {way: one.methods[way](("places", 30), 0) for way in ("before head", "after head")}
    assert found["before head"]["lost"] > found["after head"]["lost"]


def test_one_pair_and_wrong_settings_are_refused():
    with pytest.raises(InputError, match="at least two pairs"):
        spectral_contrastive_loss(torch.ones(1, 2), torch.ones(1, 2))
    with pytest.raises(InputError, match="kappa"):
        ReweightingHead(ReweightingSettings(4, 0.5))
    with pytest.raises(InputError, match="train is 4"):
        head_effect(torch.randn(4, 2), nn.Identity(), {}, train=4)
