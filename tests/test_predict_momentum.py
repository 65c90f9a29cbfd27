"""Blocks that learn each by itself: no gradient crosses, the mean follows, memory goes block by block."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.predict.auxiliary.infopro import InfoPro, Painter
from manyheads.predict.auxiliary.momentum import LocalBlocks, Residual, most_kept
from manyheads.training import ADAM

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.rand(16, 1, 6, 6, generator=DRAW), torch.randint(3, (16,), generator=DRAW)


def _network(lookahead="both", blocks=4, **options):
    torch.manual_seed(0)
    return LocalBlocks(
        [Residual(1 if i == 0 else 4, 4) for i in range(blocks)], [4] * blocks, 3, lookahead=lookahead, **options
    )


@pytest.mark.parametrize("infopro", [None, InfoPro((1, 6, 6))])
@pytest.mark.parametrize("lookahead", ["both", "ema", "none"])
def test_no_gradient_crosses_from_a_block_to_another(lookahead, infopro):
    model = _network(lookahead, infopro=infopro)
    for i, loss in enumerate(model.steps(X, Y)):
        model.zero_grad()
        loss.backward()
        for j, block in enumerate(model.blocks):
            moved = any(p.grad is not None and bool(p.grad.any()) for p in block.parameters())
            assert moved == (i == j)
        assert all(p.grad is None for p in model.means.parameters())
        others = [p.grad for j, head in enumerate(model.heads) if j != i for p in head.parameters()]
        others += [p.grad for j, painter in enumerate(model.painters) if j != i for p in painter.parameters()]
        assert all(grad is None for grad in others)
        if lookahead == "both" and i < 3:
            assert all(p.grad is not None for p in model.biases[i].parameters())


def test_the_mean_is_the_closed_form_of_what_it_followed():
    model = _network(decay=0.9)
    layer, mean = model.blocks[1].one, model.means[0]
    assert torch.equal(layer.weight, mean.weight)
    start, seen = layer.weight.detach().clone(), []
    for i in range(7):
        with torch.no_grad():
            layer.weight.add_(0.1 * (i + 1))
        seen.append(layer.weight.detach().clone())
        model.follow()
    wanted = 0.9**7 * start + sum(0.1 * 0.9 ** (6 - i) * value for i, value in enumerate(seen))
    torch.testing.assert_close(mean.weight, wanted, rtol=0, atol=1e-6)


def test_a_local_step_has_the_gradients_of_each_blocks_own_loss():
    model, other = _network(), _network()
    total = model.local_step(X, Y)
    losses = list(other.steps(X, Y))
    sum(losses).backward()
    torch.testing.assert_close(total, sum(losses).detach())
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert (mine.grad is None) == (theirs.grad is None)
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad)


def test_training_moves_every_block_and_the_mean_and_the_network_answers_without_the_helpers():
    model = _network()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.fit(lambda i: {"x": X, "y": Y}, replace(ADAM, steps=80, rate=1e-2))
    after = model.state_dict()
    for part in ("blocks.0.one", "blocks.3.two", "biases.0", "means.0", "heads.1", "heads.3"):
        assert not torch.equal(before[f"{part}.weight"], after[f"{part}.weight"]), part
    model.eval()
    x = X
    for block in model.blocks:
        x = block(x)
    assert torch.equal(model(X), model.heads[-1](x.mean((2, 3))))
    assert F.cross_entropy(model(X), Y) < 0.9


def test_local_steps_keep_one_block_at_a_time():
    model = _network(blocks=8)
    whole = most_kept(lambda: F.cross_entropy(model(X), Y).backward())
    local = most_kept(lambda: model.local_step(X, Y))
    alone = most_kept(lambda: next(iter(model.steps(X, Y))).backward())
    assert local < 0.45 * whole and local < 2.5 * alone


def test_blocks_of_tokens_learn_too_and_the_layer_to_look_at_can_be_named():
    torch.manual_seed(0)
    layers = [nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0) for _ in range(3)]
    model = LocalBlocks(layers, [8] * 3, 2, first=lambda block: block.linear1)
    x = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(1))
    y = (x[:, :, 0].mean(1) > 0).long()
    model.fit(lambda i: {"x": x, "y": y}, replace(ADAM, steps=60, rate=3e-3))
    assert model.heads[0].in_features == 16 and (model.eval()(x).argmax(-1) == y).float().mean() > 0.9


def test_weights_go_from_the_first_to_the_last_block_and_are_never_negative():
    plan = InfoPro((1, 6, 6), last=(0.0, 0.0))
    for blocks in (2, 3, 4, 8, 16):
        for i in range(blocks - 1):
            left = 1 - i / (blocks - 2) if blocks > 2 else 1.0
            assert (
                plan.weights(i, blocks) == pytest.approx((5 * left, 0.5 * left)) and min(plan.weights(i, blocks)) >= 0
            )
    assert InfoPro((4,)).weights(2, 4) == (0.0, 0.5)
    with pytest.raises(InputError, match="block"):
        plan.weights(3, 4)


def test_a_blocks_loss_is_reconstruction_and_label_as_weighted():
    model = _network(infopro=InfoPro((1, 6, 6), last=(1.0, 2.0)))
    x = X
    for i, loss in enumerate(model.steps(X, Y)):
        x = model.blocks[i](x).detach()
        if i == 3:
            wanted = F.cross_entropy(model.heads[3](x.mean((2, 3))), Y)
        else:
            seen = model.means[i](x) + model.biases[i](x)
            painted = model.painters[i](seen).sigmoid()
            bce = -(X * painted.log() + (1 - X) * (1 - painted).log()).mean()
            a, b = ((5.0, 0.5), (3.0, 1.25), (1.0, 2.0))[i]
            wanted = a * bce + b * F.cross_entropy(model.heads[i](seen.mean((2, 3))), Y)
        torch.testing.assert_close(loss, wanted)


def test_blocks_that_paint_their_input_again_keep_what_the_label_does_not_need():
    x = torch.randint(2, (256, 6), generator=torch.Generator().manual_seed(0)).float()
    y = x[:, 0].long()

    def left(infopro):
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(6 if i == 0 else 12, 12), nn.ReLU()) for i in range(3)]
        model = LocalBlocks(blocks, [12] * 3, 2, lookahead="none", infopro=infopro)
        model.fit(lambda i: {"x": x, "y": y}, replace(ADAM, steps=300, rate=1e-2))
        assert (model(x).argmax(-1) == y).all()
        painter = Painter(12, (6,))
        with torch.no_grad():
            states = model.blocks[1](model.blocks[0](x))
        for _ in range(100):
            loss = painter.loss(states, x)
            for p, grad in zip(
                painter.parameters(), torch.autograd.grad(loss, list(painter.parameters())), strict=True
            ):
                p.data -= grad
        return loss.item()

    assert left(InfoPro((6,), last=(5.0, 0.5))) < 0.5 * left(None)


def test_tables_and_tokens_are_painted_by_a_linear_map_and_scaled_inputs_are_restored():
    table = Painter(5, (3,))
    x, states = torch.rand(7, 3), torch.randn(7, 5)
    logits = states @ table.paint.weight.T + table.paint.bias
    torch.testing.assert_close(table.loss(states, x), F.binary_cross_entropy(logits.sigmoid(), x))
    assert Painter(5, (4, 3))(torch.randn(2, 4, 5)).shape == (2, 4, 3)
    assert Painter(5, (2, 8, 9))(torch.randn(2, 5, 4, 4)).shape == (2, 2, 8, 9)
    plan = InfoPro((1, 6, 6), restore=lambda given: given * 0.5 + 0.5)
    torch.testing.assert_close(plan.target(X * 2 - 1), X)
    model = LocalBlocks([nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 4)], [4] * 3, 2, infopro=InfoPro((3,)))
    assert torch.isfinite(model.local_step(x, torch.tensor([0, 1] * 3 + [0])))


@pytest.mark.usefixtures("any_shape")
def test_what_cannot_be_painted_again_is_refused():
    model = _network(infopro=InfoPro((1, 6, 6)))
    with pytest.raises(InputError, match=r"from -1 to 1; .* give restore="):
        model.local_step(torch.linspace(-1, 1, 16 * 36).reshape(16, 1, 6, 6), Y)
    with pytest.raises(InputError, match="from nan"):
        model.local_step(X * float("nan"), Y)
    with pytest.raises(InputError, match="made for numbers"):
        model.local_step(torch.ones(16, 1, 6, 6, dtype=torch.long), Y)
    with pytest.raises(InputError, match="made for numbers"):
        model.local_step(X[..., :5], Y)
    with pytest.raises(InputError, match="cannot paint"):
        Painter(4, (1, 6, 6)).loss(torch.randn(2, 4), torch.rand(2, 1, 6, 6))
    with pytest.raises(InputError, match="a weight in last"):
        InfoPro((1, 6, 6), last=(-1.0, 0.5))
    with pytest.raises(InputError, match="shape is"):
        InfoPro((1, 2, 3, 4))


def test_what_is_no_chain_of_blocks_is_refused():
    with pytest.raises(InputError, match="at least 2 blocks"):
        LocalBlocks([Residual(1, 4)], [4], 3)
    with pytest.raises(InputError, match="no layer with weights"):
        LocalBlocks([Residual(1, 4), nn.ReLU()], [4, 4], 3)
    with pytest.raises(InputError, match="lookahead"):
        _network("all")
