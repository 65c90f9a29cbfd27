"""Metrics that several rooms share, against their definitions."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from manyheads.errors import InputError
from manyheads.evaluation.metrics import auc, jaccard, log_probability, rank_correlation

scored = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=20)
paired = st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=2, max_size=20)
some = st.frozensets(st.integers(0, 6))


@given(scored)
def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_half(rows):
    scores, positive = (np.array(column) for column in zip(*rows, strict=True))
    yes, no = scores[positive], scores[~positive]
    if not len(yes) or not len(no):
        assert math.isnan(auc(scores, positive))
        return
    wanted = np.mean([(a > b) + 0.5 * (a == b) for a in yes for b in no])
    assert auc(scores, positive) == pytest.approx(wanted)
    assert auc(-scores, positive) == pytest.approx(1 - wanted)
    assert auc(scores.reshape(1, -1), positive.reshape(1, -1)) == pytest.approx(wanted), "of any shape"


@given(paired)
def test_rank_correlation_is_spearmans(rows):
    a, b = (np.array(column, float) for column in zip(*rows, strict=True))
    found = rank_correlation(a, b)
    if len(set(a)) == 1 or len(set(b)) == 1:
        assert math.isnan(found)
        return
    assert found == pytest.approx(spearmanr(a, b).statistic)
    assert rank_correlation(np.exp(a), -b) == pytest.approx(-found), "only the order counts"


@given(some, some)
def test_jaccard_is_the_shared_part_of_the_union(a, b):
    found = jaccard(a, b)
    assert found == jaccard(b, a) and 0 <= found <= 1
    assert (found == 1) == (a == b) and (found == 0) == (a != b and not a & b)
    assert jaccard({1, 2}, {2, 3, 4}) == 1 / 4


def test_values_of_other_shapes_are_refused():
    for metric in (auc, rank_correlation):
        with pytest.raises(InputError, match="cannot be compared"):
            metric(np.zeros(3), np.zeros(2, bool))


def test_a_log_probability_is_that_of_the_token_asked_for_at_each_place():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]]])) + 3.0
    assert torch.allclose(log_probability(logits, torch.tensor([[1, 2]])), torch.tensor([[0.25, 0.7]]).log())
    assert log_probability(logits.bfloat16(), torch.tensor([[1, 2]])).dtype == torch.float32
    assert torch.allclose(log_probability(logits[0], torch.tensor([0, 0])), torch.tensor([0.5, 0.1]).log())
