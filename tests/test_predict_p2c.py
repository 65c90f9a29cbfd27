"""Prefer to classify: what preferences are worth, what consistency asks for, and what they teach a classifier."""

import math

import pytest
import torch
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation import experiment
from manyheads.learning import MultiHead, Trunk
from manyheads.predict.transfer.prefer_to_classify import (
    PreferSettings,
    PreferToClassifyHead,
    disagreement,
    inconsistency,
    logistic_votes,
    preference_batches,
    preference_target,
)

DRAW = torch.Generator().manual_seed(0)
STATES = torch.randn(8, 5, generator=DRAW)
Y = torch.tensor([1, 0, 2, 1])
SIDE = torch.tensor([1.0, 0.0, 1.0, 1.0])
GAP = torch.tensor([0.3, 0.0, 0.1, 0.0])


def _head(**settings):
    return PreferToClassifyHead(PreferSettings(5, 3, **settings))


def test_a_preference_stays_between_119_and_881_and_flips_with_its_pair():
    head = _head()
    scores = head(1e4 * STATES).scores
    assert scores.abs().max() <= 1 and scores.shape == (8, 3, 3)
    p = (scores[::2] - scores[1::2]).sigmoid()
    assert p.min() >= 0.1192 and p.max() <= 0.8808
    torch.testing.assert_close((scores[1::2] - scores[::2]).sigmoid(), 1 - p)
    # So the cross-entropy of a preference never gets to 0.
    assert float(-p.detach().log().max()) > 0.12


def test_scores_are_those_of_the_state_beside_the_label_times_ones():
    head = _head()
    for k, score in enumerate(head.preferences):
        by_hand = score(torch.cat([STATES, torch.full((8, 5), 2.0)], 1))[:, 0]
        torch.testing.assert_close(head(STATES).scores[:, k, 2], by_hand)


def test_the_loss_is_the_formula():
    head = _head(preference=0.7, consistency=0.4, diversity=0.2)
    target = preference_target(Y, SIDE, GAP)
    out = head(STATES)
    p, wanted = out.logits.softmax(1), torch.tensor(0.0)
    for i, y in enumerate(Y.tolist()):
        a, b = 2 * i, 2 * i + 1
        ce = -(p[a, y].log() + p[b, y].log()) / 2
        chance = (out.scores[a, :, y] - out.scores[b, :, y]).sigmoid()
        aim = 0.5 + 0.5 * float(SIDE[i])
        preference = -(aim * chance.log() + (1 - aim) * (1 - chance).log()).mean()
        apart = p[a, y] - p[b, y]
        consistency = (GAP[i] - apart).clamp_min(0) if SIDE[i] else apart.abs()
        cross = [
            -(chance[k] * chance[j].log() + (1 - chance[k]) * (1 - chance[j]).log())
            for k in range(3)
            for j in range(3)
            if k != j
        ]
        wanted = wanted + ce + 0.7 * preference + 0.4 * consistency - 0.2 * sum(cross) / 6
    torch.testing.assert_close(head.loss(out, target), wanted / 4)
    order = torch.randperm(8, generator=DRAW)
    torch.testing.assert_close(head.loss(head(STATES[order]), target[order]), wanted / 4)


def test_consistency_is_nothing_where_the_order_is_right_and_else_pushes_the_two_apart():
    p1, p2 = torch.tensor([0.8, 0.3], requires_grad=True), torch.tensor([0.6, 0.5], requires_grad=True)
    side = torch.ones(2)
    loss = inconsistency(p1, p2, side)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.0, 0.2]))
    loss.sum().backward()
    assert p1.grad.tolist() == [0.0, -1.0] and p2.grad.tolist() == [0.0, 1.0]
    torch.testing.assert_close(inconsistency(p1, p2, side, 0.5).detach(), torch.tensor([0.3, 0.7]))
    torch.testing.assert_close(inconsistency(p1, p2, torch.zeros(2)).detach(), torch.tensor([0.2, 0.2]))


def test_diversity_moves_one_side_only_and_is_the_entropy_where_heads_agree():
    same = torch.full((4, 3), 0.7)
    entropy = F.binary_cross_entropy_with_logits(same[0, 0], same[0, 0].sigmoid())
    torch.testing.assert_close(disagreement(same), entropy.expand(4))
    apart = torch.tensor([[2.0, -2.0]], requires_grad=True)
    disagreement(apart).sum().backward()
    # d CE(sigmoid(j), k held) / d j = sigmoid(j) - k, half of it from each of two ordered pairs.
    high = 1 / (1 + math.exp(-2))
    torch.testing.assert_close(apart.grad, torch.tensor([[high - (1 - high), (1 - high) - high]]) / 2)


def test_pairs_share_a_class_and_stay_together():
    target = preference_target(Y, SIDE)
    head = _head()
    with pytest.raises(InputError, match="has 1 rows"):
        head.loss(head(STATES[:7]), target[:7])
    mixed = target.clone()
    mixed[0, 0] = 0
    with pytest.raises(InputError, match="two classes"):
        head.loss(head(STATES), mixed)
    data = logistic_votes(0, 1)
    batch = preference_batches(data.x, data.y, data.share, 50)(3)
    rows = [int((data.x == row).all(1).nonzero()) for row in batch["input"]]
    y, share = data.y[rows], data.share[rows]
    assert torch.equal(y[::2], y[1::2]) and torch.equal(batch["y"][:, 0].long(), y)
    assert (share[::2] >= share[1::2]).all() and (share[::2] > share[1::2]).any()
    torch.testing.assert_close(batch["y"][::2, 3], share[::2] - share[1::2])
    assert torch.equal(batch["y"][:, 2] != 0, (share[::2] != share[1::2]).repeat_interleave(2))


@pytest.mark.parametrize("wrong", [{"heads": 0}, {"consistency": -1.0}, {"heads": 1}, {"diversity": float("nan")}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(InputError):
        _head(**wrong)


def test_a_head_comes_back_from_disk(tmp_path):
    trunk = torch.nn.Linear(5, 5)
    heads = MultiHead(Trunk(trunk), {"y": _head()})
    heads.save(tmp_path / "h")
    again = MultiHead.load(tmp_path / "h", Trunk(trunk))({"input": STATES})["y"]
    assert torch.equal(again.scores, heads({"input": STATES})["y"].scores)


def test_preferences_from_votes_make_a_better_classifier_than_labels():
    _better_than_labels(range(1))


@pytest.mark.slow
def test_preferences_from_votes_make_a_better_classifier_than_labels_in_ten_of_ten_seeds():
    _better_than_labels(range(10))


def _better_than_labels(seeds):
    tried = experiment("predict", "prefer-to-classify")
    more = []
    for seed in seeds:
        found = {name: tried.methods[name](lambda s: logistic_votes(s, 300), seed) for name in ("labels", "P2C")}
        more.append({metric: found["P2C"][metric] - found["labels"][metric] for metric in found["P2C"]})
    assert all(one["accuracy"] > 0 for one in more)
    assert sum(one["accuracy"] for one in more) / len(more) >= 0.005
    assert sum(one["order within a class"] for one in more) / len(more) >= 0.015
