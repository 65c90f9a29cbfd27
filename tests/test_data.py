"""Real data come from packages, and parts of a split share no row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manyheads.data import Labelled, digits, table, word_ratings
from manyheads.errors import InputError


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=12, max_size=60).filter(lambda x: len(set(x)) > 9), st.integers(0, 5))
def test_parts_have_every_row_once_and_equal_rows_together(values, seed):
    x = np.array(values, dtype=np.float64)[:, None]
    parts = Labelled(x, np.arange(len(x))).split((0.5, 0.25, 0.25), seed)
    assert sorted(np.concatenate([part.y for part in parts])) == list(range(len(x)))
    kinds = [set(part.x[:, 0]) for part in parts]
    assert not (kinds[0] & kinds[1] or kinds[0] & kinds[2] or kinds[1] & kinds[2])


def test_another_seed_gives_another_split_and_texts_split_as_well():
    texts = np.array([f"text {i % 40}" for i in range(80)])
    first, second = (Labelled(texts, np.arange(80)).split((0.5, 0.5), seed)[0] for seed in (0, 1))
    assert set(first.x) != set(second.x) and len(first) == 40


@pytest.mark.usefixtures("any_shape")
def test_what_cannot_be_split_is_refused():
    data = Labelled(np.zeros((4, 1)), np.zeros(4))
    with pytest.raises(InputError, match="1 different rows are too few"):
        data.split()
    with pytest.raises(InputError, match="add up to 1"):
        data.split((0.5, 0.6))
    with pytest.raises(InputError, match="3 rows and 4 targets"):
        Labelled(np.zeros((3, 1)), np.zeros(4))


def test_real_data_are_what_their_sources_say():
    images = digits()
    assert images.x.shape == (1797, 8, 8) and images.x.max() == 1.0 and len(images.names) == 10
    assert table("wine").x.shape == (178, 13) and table("diabetes").names == ()
    words, ratings = word_ratings()
    assert ratings.shape == (7520, 10) and np.abs(ratings).max() <= 4
    assert ratings[words.index("paranoiacs")].tolist() == [-1, 0, -1, -1, -3, 1, -2, 0, 1, -1]
    with pytest.raises(InputError, match="choose from breast_cancer"):
        table("cars")
