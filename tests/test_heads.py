"""Heads, sets of heads and scores: parsing, set algebra, matched random sets, saving."""

import copy

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads import Head, HeadScores, HeadSet
from manyheads.errors import InputError, MismatchError

heads = st.builds(Head, st.integers(0, 5), st.integers(0, 7))
sets = st.builds(lambda found: HeadSet(found, (6, 8)), st.sets(heads, max_size=20))


@given(st.integers(0, 99999), st.integers(0, 99999))
def test_a_head_is_written_as_it_is_parsed(layer, index):
    assert Head.parse(str(Head(layer, index))) == (layer, index)


@given(st.text())
def test_any_text_is_a_head_or_one_sentence(text):
    try:
        head = Head.parse(text)
    except InputError as error:
        assert "L3H5" in str(error)
    else:
        assert Head.parse(str(head)) == head


@given(
    st.one_of(st.none(), st.floats(), st.binary(), st.lists(st.integers(), max_size=4), st.tuples(st.text(), st.text()))
)
def test_any_value_is_a_head_or_an_input_error(value):
    try:
        assert Head.of(value).layer >= 0
    except InputError:
        pass


def test_public_examples():
    assert Head.parse("L3H5") == Head(3, 5) and str(Head(3, 5)) == "L3H5"
    assert list(HeadSet(["L4H7", (3, 5), Head(0, 1)])) == [(0, 1), (3, 5), (4, 7)]
    assert HeadSet("L3H5") == HeadSet([Head(3, 5)]) == HeadSet(Head(3, 5))
    assert str(HeadSet(["L4H7", "L0H1"])) == "L0H1, L4H7"


@given(sets, sets)
def test_set_algebra_is_that_of_sets_and_keeps_the_shape(a, b):
    for operation in ("__or__", "__and__", "__sub__", "__xor__"):
        result = getattr(a, operation)(b)
        assert isinstance(result, HeadSet) and result.shape == (6, 8)
        assert set(result) == getattr(frozenset(a), operation)(frozenset(b))
    assert copy.deepcopy(a) == a


@given(sets, st.integers(0, 100))
def test_matched_random_sets_have_as_many_heads_in_each_layer(found, seed):
    counts = {layer: len(indices) for layer, indices in found.by_layer().items()}
    for control in found.matched_random(5, seed):
        assert {layer: len(indices) for layer, indices in control.by_layer().items()} == counts
        for layer, count in counts.items():
            shared = len({h for h in control if h.layer == layer} & set(found))
            assert shared == max(0, 2 * count - 8), "found heads are drawn only where the layer has no others"
    assert found.matched_random(5, seed) == found.matched_random(5, seed)


@given(sets, st.integers(0, 100))
def test_matched_random_sets_that_may_overlap_have_the_same_counts(found, seed):
    for control in found.matched_random(3, seed, disjoint=False):
        assert {layer: len(i) for layer, i in control.by_layer().items()} == {
            layer: len(i) for layer, i in found.by_layer().items()
        }


def test_matched_random_sets_differ_and_cover_the_layer():
    drawn = HeadSet(["L0H0"], (1, 8)).matched_random(200, 0)
    assert {h.index for s in drawn for h in s} == set(range(1, 8))


def test_out_of_range_heads_are_named():
    with pytest.raises(InputError, match="L99H0 is out of range: this model has layers 0-5 with heads 0-7"):
        HeadSet(["L99H0"], (6, 8))
    with pytest.raises(InputError, match="does not know its model"):
        HeadSet(["L0H0"]).matched_random(1)


def scores():
    rng = np.random.default_rng(0)
    return HeadScores.from_examples("induction", rng.random((9, 6, 8)), {"fingerprint": "abc", "seed": 3})


def test_scores_are_mean_and_standard_error():
    per_example = np.arange(12.0).reshape(3, 2, 2)
    result = HeadScores.from_examples("x", per_example)
    assert np.allclose(result.values, per_example.mean(0)) and result.n == 3
    assert np.allclose(result.stderr, 4 / np.sqrt(3))
    assert result.top(1) == HeadSet(["L1H1"]) and result["L0H1"] == 5.0
    assert result.above(6.0) == HeadSet(["L1H0", "L1H1"])
    assert [str(h) for h, _ in result.ranked()] == ["L1H1", "L1H0", "L0H1", "L0H0"]


def test_a_missing_entry_does_not_count_and_leaves_the_other_heads_alone():
    per_example = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan], [8.0, 6.0, np.nan], [0.0, np.nan, 5.0]])
    result = HeadScores.from_examples("x", per_example[:, None])
    assert result.n == 4
    assert np.array_equal(result.values, [[3.0, 4.0, 5.0]])
    whole = np.std([1.0, 3.0, 8.0, 0.0], ddof=1) / np.sqrt(4)
    assert np.allclose(result.stderr, [[whole, np.std([2.0, 6.0], ddof=1) / np.sqrt(2), np.nan]], equal_nan=True)
    none = HeadScores.from_examples("x", np.full((3, 1, 2), np.nan))
    assert np.isnan(none.values).all() and np.isnan(none.stderr).all() and none.n == 3
    assert np.isnan(HeadScores.from_examples("x", np.ones((1, 1, 2))).stderr).all()


def test_scores_survive_saving_and_refuse_another_model(tmp_path):
    original = scores()
    again = HeadScores.load(original.save(tmp_path / "s.parquet"), fingerprint="abc")
    assert np.array_equal(again.values, original.values) and np.array_equal(again.stderr, original.stderr)
    assert (again.name, again.n, again.meta) == (original.name, original.n, original.meta)
    with pytest.raises(MismatchError, match="holds scores of model abc, not of this model, xyz"):
        HeadScores.load(tmp_path / "s.parquet", fingerprint="xyz")
    with pytest.raises(InputError, match="already exists"):
        original.save(tmp_path / "s.parquet")
    assert [p.name for p in tmp_path.iterdir()] == ["s.parquet"]


@given(st.binary(max_size=200))
def test_any_file_is_scores_or_one_sentence(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "s.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a file of head scores"):
        HeadScores.load(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    from manyheads.files import write_atomically, write_folder_atomically

    def interrupted(path):
        (path / "half" if path.is_dir() else path).write_text("half")
        raise KeyboardInterrupt

    (tmp_path / "f").write_text("old")
    (tmp_path / "d").mkdir()
    for write, name in ((write_atomically, "f"), (write_folder_atomically, "d")):
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / name, interrupted, force=True)
    assert (tmp_path / "f").read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d", "f"]
