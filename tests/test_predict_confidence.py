"""A class corrects a number: each of the four rules, what is drawn, and mirrored targets."""

import pytest
import torch

from manyheads.errors import InputError
from manyheads.learning import Trunk
from manyheads.learning.binned import bins_of, centres
from manyheads.predict.output.confidence import Correction, Span, confidence_heads, flipped
from manyheads.predict.trunks import mlp

SURE = torch.full((11,), 0.005).scatter(0, torch.tensor(7), 0.95)
LOST = torch.full((11,), 1 / 11)
TORN = torch.zeros(11).scatter(0, torch.tensor([3, 8]), torch.tensor([0.6, 0.4]))
P = torch.stack([SURE, SURE, SURE, LOST, TORN])
CENTRE = float(centres(11)[7])
NUMBER = torch.tensor([CENTRE, CENTRE + 2 / 11, -0.6, 0.2, 0.1])


def test_each_rule_is_taken_where_it_holds():
    correction = Correction()
    assert correction.rule(NUMBER, P).tolist() == [0, 0, 1, 2, 3]
    found = correction(NUMBER, P)
    assert torch.equal(found[[0, 1, 3]], NUMBER[[0, 1, 3]])
    assert abs(found[2] - CENTRE) < 1 / 11 and found[2] != CENTRE
    assert found[4] != NUMBER[4]
    plain = Correction(draws=0)(NUMBER, P)
    assert plain[2] == pytest.approx(CENTRE) and plain[4] == NUMBER[4]


def test_an_unsure_class_that_is_not_lost_draws_around_the_number():
    low = torch.zeros(11).scatter(0, torch.tensor([3, 4, 8]), torch.tensor([0.4, 0.35, 0.25]))  # entropy 1.08 nats
    assert Correction().rule(torch.zeros(1), low[None]).tolist() == [3]
    many = Correction(draws=20_000)(torch.full((200,), 0.1), TORN.expand(200, 11))
    spread = TORN.var(unbiased=False).sqrt() / 20_000**0.5
    assert float(many.mean()) == pytest.approx(0.1, abs=1e-3) and float(many.std()) == pytest.approx(
        float(spread), rel=0.3
    )


def test_draws_are_those_of_the_seed_and_stay_in_the_bin():
    number, p = torch.full((500,), -0.9), SURE.expand(500, 11)
    one, two, other = (Correction(draws=1, seed=seed)(number, p) for seed in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert (bins_of(one, 11) == 7).all() and one.max() - one.min() > 1.8 / 11


def test_a_mirrored_target_changes_its_sign_and_its_bin():
    number = torch.tensor([-0.8, -0.3, 0.0, 0.5])
    mirrored, bins = flipped(number, bins_of(number, 11), 11)
    assert torch.equal(mirrored, -number) and torch.equal(bins, bins_of(-number, 11))


def test_a_scale_goes_there_and_back_and_clips():
    scale = Span(-0.25, 0.25)
    assert scale(torch.tensor([-1.0, -0.25, 0.0, 0.125, 3.0])).tolist() == [-1.0, -1.0, 0.0, 0.5, 1.0]
    values = torch.linspace(-0.25, 0.25, 7)
    torch.testing.assert_close(scale.back(scale(values)), values)
    with pytest.raises(InputError, match="lower and a higher"):
        Span(1.0, 1.0)


def test_both_heads_have_half_of_the_loss():
    heads = confidence_heads(Trunk(mlp(3, 8), frozen=False), 8)
    assert [one.weight for one in heads.attached.values()] == [0.5, 0.5]
    out = heads({"input": torch.zeros(2, 3)})
    assert out["number"].shape == (2, 1) and out["bin"].shape == (2, 11)
