"""Controls: p of an effect beside random ones, q of a family of claims, random sets of heads."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import false_discovery_control

from manyheads import HeadSet
from manyheads.atlas.circuits.repair import Repair
from manyheads.atlas.core.result import CausalCheck
from manyheads.atlas.facts.conflict_paths import Pruning
from manyheads.atlas.facts.memory_context import Rates
from manyheads.atlas.facts.mlp_decomposition import Decomposition
from manyheads.errors import InputError
from manyheads.evaluation.controls import TIE, Control, matched_sets, p_value, q_values, random_sets


def rates(memory):
    return Rates(context=1 - memory, memory=memory, other=0.0, recall=1.0, n=1)


steps = st.integers(-3, 3)
nulls = st.lists(steps, max_size=30)
chances = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_p_counts_the_observed_one_and_every_draw_as_large():
    assert p_value(2.0, [0.0, 1.0, 2.5, 3.0]) == 3 / 5
    assert p_value(4.0, [0.0, 1.0, 2.5, 3.0]) == 1 / 5
    assert p_value(-1.0, [0.0, 1.0]) == 1.0
    assert p_value(1.0, []) == 1.0, "nothing was tried against it"


def test_effects_that_differ_by_rounding_are_a_tie_and_a_tie_counts_against_the_claim():
    """Three heads that do nothing: without the rule the found one would seem to do more than two of the others."""
    assert p_value(1e-9, [0.0, -1e-9, 2e-9]) == 1.0
    assert p_value(0.3, [0.1 + 0.2 - 1e-8] * 4) == 1.0
    assert p_value(0.3, [0.3 - 2 * TIE] * 4) == 1 / 5, "further apart they differ"


@pytest.mark.parametrize(
    "result",
    [
        Repair(HeadSet(), 0.0, 0.3, 0.0, (0.3 - 1e-9,) * 20, 1),
        Decomposition(np.ones(1), np.ones(1), torch.ones(1), 0.3, np.full(20, 0.3 - 1e-9), 1.0),
        Pruning(HeadSet(), "zero", rates(0.0), rates(0.3), (rates(0.3 - 1e-9),) * 20),
    ],
    ids=lambda result: type(result).__name__,
)
def test_every_method_takes_rounding_for_a_tie(result):
    assert (result.p_value("memory") if isinstance(result, Pruning) else result.p_value) == 1.0


@given(steps, nulls)
def test_p_of_counts_is_the_share_of_draws_as_large_the_observed_one_counted_in(observed, null):
    everything = [observed, *null]
    assert p_value(observed, null) == sum(x >= observed for x in everything) / len(everything)


@given(steps, nulls)
def test_p_neither_knows_the_order_nor_the_place_of_zero_and_falls_with_the_effect(observed, null):
    p = p_value(observed, null)
    assert p == p_value(observed, null[::-1]) == p_value(observed + 5, [x + 5 for x in null])
    assert 1 / (1 + len(null)) <= p_value(observed + 1, null) <= p <= 1


def test_draws_without_a_value_do_not_count():
    assert p_value(1.0, [0.0, math.nan, 2.0]) == 2 / 3
    assert math.isnan(p_value(math.nan, [0.0, 1.0]))


def test_the_p_of_a_found_set_like_any_other_is_uniform():
    """Under the null every rank is as likely: p <= k / (1 + R) in a share k / (1 + R) of cases."""
    effects = np.random.default_rng(0).normal(size=(4000, 20))
    p = np.array([p_value(e[0], e[1:]) for e in effects])
    for k in (1, 5, 10, 20):
        assert (p <= k / 20 + 1e-9).mean() == pytest.approx(k / 20, abs=0.025)


def test_q_by_hand():
    """p 0.01, 0.04, 0.03, 0.20 of four: 4 * .01 / 1, 4 * .03 / 2 and 4 * .04 / 3 (the smaller for both), .20."""
    assert np.allclose(q_values([0.01, 0.04, 0.03, 0.20]), [0.04, 0.16 / 3, 0.16 / 3, 0.20])


@given(chances)
def test_q_is_that_of_benjamini_and_hochberg(p):
    assert np.allclose(q_values(p), false_discovery_control(p, method="bh"), rtol=1e-12, atol=0)


@given(chances, st.integers(0, 12))
def test_what_is_no_claim_neither_counts_nor_gets_a_q(p, at):
    with_gap = [*p[:at], math.nan, *p[at:]]
    q = q_values(with_gap)
    gap = min(at, len(p))
    assert math.isnan(q[gap]) and np.array_equal(np.delete(q, gap), q_values(p))
    assert (q_values(p) >= np.array(p)).all()


def test_the_false_share_of_what_q_calls_is_bounded():
    """80 empty claims and 20 true ones; of those with q <= 0.1 at most about a tenth is empty, where p <= 0.1 calls far more."""
    rng = np.random.default_rng(1)
    shares, by_p = [], []
    for _ in range(400):
        p = np.concatenate([rng.random(80), rng.random(20) * 1e-3])
        for called, found in ((q_values(p) <= 0.1, shares), (p <= 0.1, by_p)):
            found.append(called[:80].sum() / max(1, called.sum()))
    assert np.mean(shares) < 0.1 < 0.25 < np.mean(by_p)


@pytest.mark.usefixtures("any_shape")
@pytest.mark.parametrize("wrong", [[0.5, 1.2], [-0.1], [[0.5]]])
def test_what_is_no_p_has_no_q(wrong):
    with pytest.raises(InputError, match=r"each in \[0, 1\]"):
        q_values(wrong)


def test_a_control_is_the_mean_over_examples_of_the_found_set_and_of_each_random_one():
    effects = np.array([[1.0, 3.0, 8.0], [1.0, 1.0, 1.0], [5.0, 4.0, 6.0], [0.0, 0.0, 3.0]])
    control = Control.of(effects)
    assert control.effect == 4.0 and control.random == (1.0, 5.0, 1.0)
    assert control.stderr == pytest.approx(np.std([1, 3, 8], ddof=1) / np.sqrt(3))
    assert control.mean == pytest.approx(7 / 3) and control.spread == pytest.approx(np.std([1, 5, 1], ddof=1))
    assert control.p_value == 2 / 4 and control.least_p == 1 / 4


def test_one_example_has_no_standard_error_and_one_draw_no_spread():
    control = Control.of(np.array([[2.0], [1.0]]))
    assert control.effect == 2.0 and math.isnan(control.stderr) and math.isnan(control.spread)
    empty = Control.of(np.array([[2.0, 2.0]]))
    assert empty.stderr == 0.0 and math.isnan(empty.mean) and empty.p_value == empty.least_p == 1.0


def test_a_check_is_one_sided_and_its_sign_says_which_side():
    clean, ablated = np.array([1.0, 1.0]), np.array([[0.0, 0.4], [1.0, 0.9], [1.2, 1.4], [0.0, 0.0]])
    check = CausalCheck.of("x", "zero", HeadSet(["L0H1"]), "m", clean, ablated)
    assert (check.effect, check.clean, check.ablated, check.n) == (pytest.approx(0.8), 1.0, pytest.approx(0.2), 2)
    assert check.random_effects == pytest.approx((0.05, -0.3, 1.0)) and check.heads == ("L0H1",)
    assert check.p_value == 2 / 4
    assert CausalCheck.of("x", "scale 2", HeadSet(["L0H1"]), "m", clean, ablated, sign=-1).p_value == 3 / 4
    assert math.isnan(CausalCheck.of("x", "zero", HeadSet(["L0H1"]), "m", clean[:1], ablated[:, :1]).stderr)


shapes = st.tuples(st.integers(1, 3), st.integers(2, 6))


@given(st.data(), shapes, st.integers(0, 99))
def test_control_sets_match_the_layers_differ_and_are_never_the_found_one(data, shape, seed):
    every = [(layer, i) for layer in range(shape[0]) for i in range(shape[1])]
    found = HeadSet(data.draw(st.sets(st.sampled_from(every), min_size=1)), shape)
    sets = matched_sets(found, 8, seed)
    assert len(sets) == len(set(sets)) <= 8 and found not in sets
    counts = {layer: len(heads) for layer, heads in found.by_layer().items()}
    assert all({layer: len(heads) for layer, heads in one.by_layer().items()} == counts for one in sets)
    own = [bool(one & found) for one in sets]
    if all(2 * n <= shape[1] for n in counts.values()):
        assert own == sorted(own), "disjoint ones come first"


def test_a_small_layer_gives_all_the_sets_it_has():
    found = HeadSet(["L0H0"], (1, 4))
    assert set(matched_sets(found, 20)) == {HeadSet([f"L0H{i}"]) for i in (1, 2, 3)}
    assert matched_sets(HeadSet(["L0H0", "L0H1"], (1, 2)), 20) == []
    half = HeadSet(["L0H0", "L0H1"], (1, 4))
    assert matched_sets(half, 20, overlapping=False) == [HeadSet(["L0H2", "L0H3"])]
    assert len(matched_sets(half, 20)) == 5


@given(st.integers(0, 99))
def test_unmatched_sets_are_of_other_heads_of_any_layer(seed):
    found = HeadSet(["L0H0", "L0H1"], (4, 4))
    sets = random_sets(found, 10, seed)
    assert len(set(sets)) == 10 and all(len(one) == 2 and not one & found for one in sets)
    assert any(head.layer for one in sets for head in one)


def test_sets_of_an_unknown_model_are_refused():
    for draw in (matched_sets, random_sets):
        with pytest.raises(InputError, match="pass shape="):
            draw(HeadSet(["L0H0"]), 3)
