"""#44: the order of a head's matching is told apart from every other order, on patterns, planted heads and ladon."""

from functools import cache

import numpy as np
import pytest
import torch
from planted_ngram import INDUCTION, ORDER_2, planted
from transformers import LlamaForCausalLM

import manyheads as mh
from manyheads.atlas.core.causal import causal_check
from manyheads.atlas.patterns.ngram import ABOUTS, ngram, ngram_judge, ngram_rows, preferences
from manyheads.errors import InputError
from manyheads.lab.constructed import constructed
from manyheads.lab.ngram_layer import matches

ORDERS = (1, 2, 3, 4)
THRESHOLD = ABOUTS["ngram_1"].threshold


@cache
def ladon():
    return mh.open_model()


@cache
def built(shape, **settings):
    made = constructed(shape, **settings)
    return made, mh.open_model(made.module, tokenizer=made.tokenizer)


def rows_of(n=40, orders=ORDERS, seed=3):
    return ngram_rows(built("llama")[1], orders, n, seed)


def resting(weights):
    """Rows that sum to one: what matches nothing attends to the first token."""
    pattern = weights / weights.sum(-1, keepdim=True).clamp_min(1)
    pattern[..., 0] += 1 - pattern.sum(-1)
    return pattern


def test_the_match_matches_at_its_order_only_and_its_twin_at_all_below_with_the_same_tokens():
    rows = rows_of()
    for tokens, *columns in zip(rows.tokens.tolist(), rows.query, rows.after_match, rows.after_twin, strict=True):
        for order, (query, match, twin) in zip(ORDERS, zip(*(c.tolist() for c in columns), strict=True), strict=True):

            def agrees(end, upto, query=query, tokens=tokens):
                return tokens[end - upto : end] == tokens[query - upto + 1 : query + 1]

            assert agrees(match, order) and not agrees(match, order + 1)
            assert (order == 1 or agrees(twin, order - 1)) and not agrees(twin, order)
            assert order == 1 or sorted(tokens[match - order - 1 : match]) == sorted(tokens[twin - order - 1 : twin])
            assert max(match, twin) < query
            seen = [j for j in range(1, query) if tokens[j - 1] == tokens[query]]
            assert seen == sorted([match, twin] if order > 1 else [match])
    first = (rows.after_match < rows.after_twin).float().mean(0)
    assert ((first > 0.2) & (first < 0.8)).all()


def test_the_exact_head_of_an_order_scores_one_there_and_zero_at_every_other():
    rows = rows_of()
    exact = torch.stack([resting(m.double()) for m in matches(rows.tokens, ORDERS)], 1)
    scores = preferences(exact, rows)
    assert torch.equal(scores, torch.eye(len(ORDERS), dtype=torch.double).expand_as(scores))


def test_a_head_of_the_longest_match_scores_one_at_every_order():
    rows = rows_of()
    counted = torch.stack([m.double() for m in matches(rows.tokens, range(1, 6))]).sum(0)
    longest = (counted == counted.max(-1, keepdim=True).values) & (counted > 0)
    assert (preferences(resting(longest.double())[:, None], rows) == 1).all()


def test_heads_blind_to_order_score_zero_in_expectation():
    """Uniform, recency, and a head that counts how many of the last tokens stand near, in whatever order."""
    rows = rows_of(400)
    length = rows.tokens.shape[1]
    age = (torch.arange(length)[:, None] - torch.arange(length)).double()
    uniform = resting((age >= 0).double()).expand(400, -1, -1)
    recent = torch.where(age >= 0, -0.1 * age, -torch.inf).softmax(-1).expand(400, -1, -1)
    same = (rows.tokens[:, :, None] == rows.tokens[:, None]).double()
    shifts = [(i, j) for i in range(3) for j in range(1, 5)]  # the last 3 tokens, the 4 before a key
    windows = sum(torch.roll(same, shift, (1, 2)) for shift in shifts)
    bag = torch.where(age >= 0, 2 * windows, -torch.inf).softmax(-1)
    scores = preferences(torch.stack([uniform, recent, bag], 1), rows)
    assert (scores[:, :, 0] == 0).all()
    assert (scores.mean(0)[:, 1].abs() <= 4 * scores.std(0)[:, 1] / 400**0.5).all()
    assert (scores.mean(0)[1:3, 2].abs() <= 4 * scores.std(0)[1:3, 2] / 400**0.5 + 1e-9).all()
    seen = scores[:, 0, 2]
    assert seen.mean() > 4 * seen.std() / 400**0.5  # it does see which tokens are near


@pytest.mark.parametrize(("shape", "settings"), [("llama", {"seed": 2, "n_heads": 8, "n_kv_heads": 4}), ("gpt2", {})])
def test_an_induction_head_is_of_order_one_and_no_other(shape, settings):
    made, model = built(shape, **settings)
    scores = ngram(model, orders=ORDERS, n=32)
    assert scores["ngram_1"].above(THRESHOLD) == made.known["induction"]
    assert scores["ngram_1"][next(iter(made.known["induction"]))] > 0.9
    assert all(np.abs(scores[f"ngram_{n}"].values).max() < 0.15 for n in ORDERS[1:])


def test_a_planted_head_of_order_two_is_told_from_an_induction_head():
    scores = ngram(planted(), orders=ORDERS, n=32)
    found = {n: scores[f"ngram_{n}"].above(THRESHOLD) for n in ORDERS}
    assert found == {1: {INDUCTION}, 2: {ORDER_2}, 3: set(), 4: set()}
    assert scores["ngram_1"][INDUCTION] > 0.95 and abs(scores["ngram_2"][INDUCTION]) < 0.1
    assert scores["ngram_2"][ORDER_2] > 0.95 and abs(scores["ngram_1"][ORDER_2]) < 0.05


def test_where_order_two_decides_only_the_head_of_order_two_matters():
    model = planted()
    judge = ngram_judge(model, order=2, n=24)
    found = causal_check(model, "ngram_2", ngram(model, n=32)["ngram_2"].above(THRESHOLD), judge)
    induction = causal_check(model, "ngram_1", model.head_set([INDUCTION]), judge)
    assert found.clean > 5 and found.ablated < 0.1 * found.clean
    assert abs(induction.effect) < 0.3 * found.effect


def test_the_scores_are_their_formula_on_the_architectures_own_patterns():
    made, model = built("llama", seed=2, n_heads=8, n_kv_heads=4)
    rows = ngram_rows(model, (2, 1), 12, 5)
    made.module.set_attn_implementation("eager")
    with torch.no_grad():
        patterns = made.module(rows.tokens, output_attentions=True).attentions
    made.module.set_attn_implementation("sdpa")
    scores = ngram(model, orders=(2, 1), n=12, seed=5)
    for o, name in enumerate(("ngram_2", "ngram_1")):
        by_hand = [
            [p[i, :, rows.query[i, o], rows.after_match[i, o]] - p[i, :, rows.query[i, o], rows.after_twin[i, o]]]
            for p in patterns
            for i in range(12)
        ]
        per_row = torch.stack([torch.stack(row) for row in by_hand]).reshape(len(patterns), 12, -1).double()
        assert np.abs(scores[name].values - per_row.mean(1).numpy()).max() <= 1e-5
        assert np.abs(scores[name].stderr - per_row.std(1).numpy() / 12**0.5).max() <= 1e-5
        assert scores[name].n == 12 and scores[name].meta["method"] == name


def test_orders_that_do_not_fit_are_refused():
    model = built("llama")[1]
    for orders, n in (((), 4), ((1, 1), 4), ((0,), 4), ((1,), 0), ((300,), 4)):
        with pytest.raises(InputError):
            ngram(model, orders=orders, n=n)


def test_an_untrained_twin_of_ladon_has_no_ngram_heads():
    torch.manual_seed(0)
    twin = mh.open_model(LlamaForCausalLM(ladon().config).eval(), tokenizer=ladon().tokenizer)
    assert all(np.abs(scores.values).max() < 0.05 for scores in ngram(twin, n=32).values())


def test_wherever_ladon_has_heads_of_an_order_the_order_is_lost_without_them_not_without_random_ones():
    """Its induction heads are of order 1 at least; whatever order a set of two or more heads is found at, it must matter."""
    scores = ngram(ladon())
    assert scores["ngram_1"].above(THRESHOLD)
    for order, of in zip((1, 2, 3), ABOUTS, strict=True):
        heads = scores[of].above(THRESHOLD)
        if heads:
            check = causal_check(ladon(), of, heads, ngram_judge(ladon(), order=order), n_random=40)
            assert check.effect > 2 * np.mean(check.random_effects), order
            assert check.p_value <= 0.05 or len(check.random_effects) < 20, order
