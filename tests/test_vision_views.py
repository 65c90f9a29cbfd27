"""Views: what SIE and seq-JEPA compute against formulas by hand, what they must not see, and what users may give them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from manyheads.errors import InputError, MismatchError
from manyheads.learning import Trunk
from manyheads.training import TrainSettings
from manyheads.vision.core.collapse import covariance_term, evenness, variance_term
from manyheads.vision.core.encoders import SlowCopy, ViewEncoder, view_batches
from manyheads.vision.core.probes import linear_accuracy, network_r2
from manyheads.vision.core.turned import turned_digits, turned_dots, turned_pictures, view_mlp
from manyheads.vision.views import seq_jepa, sie
from manyheads.vision.views.seq_jepa import NextView, NextViewSettings, fit_next_view, load_next_view, summary_heads
from manyheads.vision.views.sie import ActionMatrix, SplitSettings, SplitViews, fit_split, load_split

GENERATOR = torch.Generator().manual_seed(0)
PICTURES = torch.rand(10, 4, 1, 6, 6, generator=GENERATOR)
ACTIONS = torch.randn(10, 3, 2, generator=GENERATOR)
SHORT = replace(sie.TRAINING, steps=3, rows=8)
NEXT = NextViewSettings(action_width=8, layers=2, heads=2, hidden=16)


def _encoder(seed=0):
    return view_mlp(36, 8, seed, hidden=16)


def _circle(n):
    angle = 2 * math.pi * torch.arange(n) / n
    return torch.stack([angle.cos(), angle.sin()], -1)


# what keeps features apart


def test_the_terms_against_features_whose_spread_is_known():
    point, even = torch.ones(50, 4), torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    assert variance_term(point) == pytest.approx(1 - 0.01)
    assert variance_term(2 * even) == 0
    assert covariance_term(even) < 0.01
    copied = even[:, :1].expand(-1, 4)  # every column is the same one: 12 of 4 x 4 covariances are its variance
    assert covariance_term(copied) == pytest.approx(12 * float(even[:, 0].var()) ** 2 / 4, rel=1e-4)
    assert evenness(point) == 0
    assert evenness(even) == pytest.approx(1, abs=0.02)


def test_the_slow_copy_moves_by_one_minus_decay_and_no_running_mean_with_it():
    net = nn.BatchNorm1d(3)
    slow = SlowCopy(net, 0.9)
    with torch.no_grad():
        net.weight.fill_(3.0)
        net.running_mean.fill_(7.0)
    slow.follow(net, 0.0)
    assert torch.allclose(slow.copied.weight, torch.full((3,), 1.2))
    slow.follow(net, 0.5)
    assert torch.allclose(slow.copied.weight, torch.full((3,), 1.2 + 0.05 * 1.8))
    slow.follow(net, 1.0)  # at the end it stands still
    assert torch.allclose(slow.copied.weight, torch.full((3,), 1.29))
    assert (slow.copied.running_mean == 0).all()
    assert not any(p.requires_grad for p in slow.parameters())


def test_probes_find_what_is_there_and_nothing_in_noise():
    draw = torch.Generator().manual_seed(2)
    x, noise = torch.randn(600, 6, generator=draw), torch.randn(600, 6, generator=draw)
    y, kinds = x[:, :2] * x[:, 2:4], (x[:, 0] > 0).long()
    assert network_r2(x[:400], x[:400, :2], x[400:], x[400:, :2], hidden=()) > 0.98
    assert network_r2(x[:400], y[:400], x[400:], y[400:]) > 0.5  # products, which no linear map finds
    assert network_r2(x[:400], y[:400], x[400:], y[400:], hidden=()) < 0.1
    assert linear_accuracy(x[:400], kinds[:400], x[400:], kinds[400:]) > 0.9
    assert linear_accuracy(noise[:400], kinds[:400], noise[400:], kinds[400:]) < 0.65


def test_views_are_turned_by_what_the_action_says():
    dots, draw = turned_dots(0), torch.Generator().manual_seed(3)
    one = torch.zeros(4, dtype=torch.long)
    seen = dots.draw(one, torch.tensor([0.0, math.pi / 2, math.pi, 2 * math.pi]))
    assert torch.allclose(seen[0], seen[3], atol=1e-5)
    assert torch.allclose(seen[2], seen[0].flip(1, 2), atol=1e-5)
    assert torch.allclose(seen[1], seen[0].rot90(-1, (1, 2)), atol=1e-5)
    picture = torch.rand(1, 1, 8, 8, generator=draw)
    turned = turned_pictures(picture, torch.zeros(1, dtype=torch.long), 0, 1.0).draw(
        one[:1], torch.tensor([math.pi / 2])
    )
    assert min(float((turned - picture.rot90(k, (2, 3))).abs().max()) for k in (1, 3)) < 1e-5
    digits = turned_digits(0)
    assert not set(digits.train.tolist()) & set(digits.test.tolist())
    views, actions, y = digits.sample(digits.test, 5, 3, draw)
    assert (views.shape, actions.shape, y.shape) == ((5, 3, 1, 16, 16), (5, 2, 2), (5,))
    assert torch.allclose(actions.norm(dim=-1), torch.ones(5, 2))


# SIE


def test_a_matrix_of_an_action_is_linear_in_it_and_its_product_the_same_without_making_it():
    net, draw = ActionMatrix(3, 5), torch.Generator().manual_seed(4)
    g, x = torch.randn(7, 3, generator=draw), torch.randn(7, 5, generator=draw)
    assert torch.equal(net.matrix(2 * g), 2 * net.matrix(g))
    assert torch.allclose(net(x, g), (net.matrix(g) @ x[..., None])[..., 0], atol=1e-6)


def test_constant_features_cannot_be_moved_by_any_matrix_but_satisfy_a_network_that_may_leave_the_action_aside():
    """Over the circle the mean of W(g) is 0, so E |W(g) c - c|^2 >= |c|^2 for every W."""
    g, c = _circle(24), torch.ones(24, 4)
    best = {}
    for predictor in ("matrix", "concatenated"):
        model = SplitViews(_encoder(), 8, 2, SplitSettings(width=4, predictor=predictor))
        optimizer = torch.optim.Adam(model.predictor.parameters(), lr=0.03)
        for _ in range(300):
            loss = (model.predictor(c, g) - c).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        best[predictor] = float(loss.detach())
    assert best["matrix"] == pytest.approx(1.0, abs=1e-3)
    assert best["concatenated"] < 0.01
    assert variance_term(c) >= 0.9


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_the_loss_is_the_formula(share):
    settings = SplitSettings(share=share, width=4)
    model = SplitViews(_encoder(), 8, 2, settings).train()
    batch = {"views": PICTURES[:, :2], "actions": ACTIONS[:, :1]}
    found = model(batch)
    z = model.encoder(batch["views"].flatten(0, 1))
    cut = round(8 * share)
    x_inv, y_inv = model.still_projector(z[:, :cut])[0::2], model.still_projector(z[:, :cut])[1::2]
    wanted, x, y = 10 * (x_inv - y_inv).square().mean(), x_inv, y_inv
    if share < 1:
        both = model.moving_projector(z[:, cut:])
        said = torch.stack([(w @ v) for w, v in zip(model.predictor.matrix(ACTIONS[:, 0]), both[0::2], strict=True)])
        wanted = wanted + 4.5 * (said - both[1::2]).square().mean() + 5 * variance_term(said)
        x, y = torch.cat([x_inv, both[0::2]], 1), torch.cat([y_inv, both[1::2]], 1)
    for one in (x, y):
        cov = torch.cov(one.T)
        wanted = wanted + 10 * variance_term(one) / 2 + (cov - cov.diag().diag()).square().sum() / one.shape[1]
    assert torch.allclose(found, wanted, rtol=1e-4)


# seq-JEPA


def _next(seed=0, **options):
    return NextView(_encoder(seed), 8, 2, replace(NEXT, seed=seed, **options)).eval()


def test_the_summary_sees_no_action_of_the_last_view_and_the_prediction_does():
    model, changed = _next(), ACTIONS.clone()
    changed[:, -1] += 1
    assert torch.equal(model.summary(PICTURES[:, :3], ACTIONS[:, :2]), model.summary(PICTURES[:, :3], changed[:, :2]))
    assert not torch.allclose(model.predicted(PICTURES[:, :3], ACTIONS), model.predicted(PICTURES[:, :3], changed))
    seen = []
    handle = model.aggregator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.predicted(PICTURES[:, :3], ACTIONS)
    handle.remove()
    assert (seen[0][:, -1, 8:] == 0).all()
    assert (seen[0][:, 1:-1, 8:] != 0).any(-1).all()
    assert torch.equal(seen[0][:, 1:, :8], model.encoder(PICTURES[:, :3].flatten(0, 1)).unflatten(0, (10, 3)))


def test_the_order_of_views_with_the_same_action_does_not_matter_without_places():
    model = _next(actions=False)
    turned = PICTURES[:, [1, 0, 2]]
    assert torch.allclose(
        model.summary(PICTURES[:, :3], ACTIONS[:, :2]), model.summary(turned, ACTIONS[:, :2]), atol=1e-5
    )


def test_no_gradient_reaches_the_slow_copy_and_the_loss_is_one_minus_the_cosine():
    model = _next()
    batch = {"views": PICTURES, "actions": ACTIONS}
    loss = model(batch)
    loss.backward()
    assert all(p.grad is None for p in model.slow.parameters())
    assert all(p.grad is not None for p in model.encoder.parameters())
    p, y = model.predicted(PICTURES[:, :3], ACTIONS), model.slow.copied(PICTURES[:, 3])
    assert torch.allclose(loss, 1 - ((p * y).sum(1) / p.norm(dim=1) / y.norm(dim=1)).mean(), atol=1e-5)


def test_a_summary_takes_any_number_of_views():
    model = _next()
    assert {model.summary(PICTURES[:, :n], ACTIONS[:, : n - 1]).shape for n in (1, 2, 3, 4)} == {(10, 16)}


def test_a_head_whose_output_matrix_is_zero_already_carries_nothing():
    model = _next()
    with torch.no_grad():
        model.aggregator.layers[1].self_attn.out_proj.weight[:, :8] = 0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rises = summary_heads(model, PICTURES, ACTIONS)
    assert rises.shape == (2, 2)
    assert rises[1, 0] == 0
    assert (rises.flatten()[[0, 1, 3]] != 0).all()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# what users give


@pytest.mark.parametrize(
    ("fitting", "loading", "views"), [(fit_split, load_split, 2), (fit_next_view, load_next_view, 4)]
)
def test_a_users_encoder_is_trained_in_place_and_comes_back_from_a_folder(fitting, loading, views, tmp_path):
    encoder = _encoder()
    before = encoder[1].weight.clone()
    options = {"settings": NEXT} if views == 4 else {}
    model = fitting(encoder, PICTURES[:, :views], ACTIONS[:, : views - 1], **options, training=SHORT)
    assert model.encoder.module is encoder
    assert not torch.equal(encoder[1].weight, before)
    model.save(tmp_path / "kept")
    again = loading(tmp_path / "kept", _encoder(seed=5))
    assert torch.equal(again.encoder(PICTURES[:, 0]), model.encoder(PICTURES[:, 0]))
    with pytest.raises(MismatchError, match="does not fit"):
        loading(tmp_path / "kept", view_mlp(36, 8, 0, hidden=12))
    with pytest.raises(InputError, match="holds no"):
        loading(tmp_path, _encoder())


def test_an_interrupted_run_with_a_slow_copy_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = fit_next_view(_encoder(), PICTURES, ACTIONS, NEXT, replace(SHORT, steps=6))
    stop = {"at": 3}

    def drawn(number):
        if number == stop["at"]:
            raise KeyboardInterrupt
        return view_batches(PICTURES, ACTIONS, 8, 0)(number)

    kept = replace(SHORT, steps=6, save_minutes=0.0)
    with pytest.raises(KeyboardInterrupt):
        fit_next_view(_encoder(), drawn, None, NEXT, kept, tmp_path / "run")
    stop["at"] = -1
    again = fit_next_view(_encoder(), drawn, None, NEXT, kept, tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_vision_transformer_is_an_encoder_too():
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=6, patch_size=3, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16,
    )  # fmt: skip
    trunk = Trunk(ViTModel(config, add_pooling_layer=False), frozen=False)
    before = {name: value.clone() for name, value in trunk.module.named_parameters()}
    model = fit_next_view(trunk, PICTURES, ACTIONS, NEXT, SHORT)
    assert model.encoder(PICTURES[:, 0]).shape == (10, 8)
    assert any(not torch.equal(value, before[name]) for name, value in trunk.module.named_parameters())
    with pytest.raises(InputError, match="frozen"):
        fit_split(Trunk(trunk.module), PICTURES, ACTIONS)


@pytest.mark.parametrize(
    ("views", "actions", "words"),
    [
        (PICTURES, None, "without actions"),
        (PICTURES[:, :1], ACTIONS[:, :0], "at least 2"),
        (PICTURES, ACTIONS[:, :2], "actions have shape"),
        (PICTURES, torch.full((10, 3, 2), float("nan")), "NaN"),
        ((PICTURES * 255).long(), ACTIONS, "floating-point"),
        (lambda number: {"views": PICTURES, "actions": ACTIONS}, ACTIONS, "leave actions away"),
    ],
)
def test_views_that_do_not_fit_are_refused(views, actions, words, any_shape):
    with pytest.raises(InputError, match=words):
        fit_next_view(_encoder(), views, actions, NEXT, SHORT)


def test_encoders_and_settings_that_do_not_fit_are_refused(any_shape):
    with pytest.raises(InputError, match=r"\[B, D\]"):
        fit_split(nn.Identity(), PICTURES, ACTIONS)
    with pytest.raises(InputError, match="leaves a part empty"):
        SplitViews(_encoder(), 8, 2, SplitSettings(share=0.99))
    with pytest.raises(InputError, match="do not divide"):
        NextView(_encoder(), 8, 2, NextViewSettings(action_width=7))
    with pytest.raises(InputError, match="give TrainSettings steps"):
        fit_next_view(_encoder(), PICTURES, ACTIONS, NEXT, TrainSettings(minutes=1))
    with pytest.raises(InputError, match="pool is"):
        ViewEncoder(_encoder(), "tokens")
    assert seq_jepa.TRAINING.steps == 1200
