"""Methods beside a baseline: every number against one worked out by hand or by scipy."""

import math

import numpy as np
import pandas as pd
import pytest
from bars import Counting
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import sem, ttest_rel

from manyheads.errors import InputError
from manyheads.evaluation.comparison import COLUMNS, Comparison, compare

VALUES = {  # (dataset, seed): value
    "random": {("a", 0): 1.0, ("a", 1): 2.0, ("b", 0): 10.0, ("b", 1): 11.0},
    "found": {("a", 0): 2.0, ("a", 1): 4.0, ("b", 0): 11.0, ("b", 1): 13.0},
}


def table(values=VALUES, metric="score"):
    rows = [(m, d, s, metric, value) for m, cells in values.items() for (d, s), value in cells.items()]
    return pd.DataFrame(rows, columns=COLUMNS)


def of(comparison, method, metric="score"):
    return comparison.summary().set_index(["metric", "method"]).loc[(metric, method)]


def test_a_difference_is_paired_by_data_set_and_seed():
    """Values 2, 4, 11, 13 less 1, 2, 10, 11: differences 1, 2, 1, 2, whose error is that of neither method."""
    found = of(Comparison(table(), "random"), "found")
    assert (found["mean"], found["difference"], found["n"]) == (7.5, 1.5, 4)
    assert found["difference_stderr"] == pytest.approx(math.sqrt(1 / 3) / 2)
    assert found["stderr"] == pytest.approx(sem([2, 4, 11, 13])) and found["stderr"] > 8 * found["difference_stderr"]
    own = of(Comparison(table(), "random"), "random")
    assert (own["mean"], own["difference"], own["difference_stderr"]) == (6.0, 0.0, 0.0)
    assert of(Comparison(table(), "found"), "random")["difference"] == -1.5


@given(st.lists(st.tuples(*[st.floats(-5, 5)] * 2), min_size=3, max_size=12), st.randoms())
def test_the_paired_error_is_that_of_the_paired_t_test_in_whatever_order_the_rows_come(pairs, random):
    cells = [("ab"[i % 2], i // 2) for i in range(len(pairs))]
    rows = table(
        {
            name: dict(zip(cells, column, strict=True))
            for name, column in zip("xy", zip(*pairs, strict=True), strict=True)
        }
    )
    order = random.sample(range(len(rows)), len(rows))
    found = of(Comparison(rows.iloc[order], "y"), "x")
    x, y = np.array(pairs).T
    assert found["difference"] == pytest.approx((x - y).mean(), abs=1e-9)
    assert found["difference_stderr"] == pytest.approx(sem(x - y), abs=1e-9)
    if sem(x - y) > 1e-6:
        assert found["difference"] / found["difference_stderr"] == pytest.approx(ttest_rel(x, y).statistic, abs=1e-6)


def test_a_missing_value_does_not_count_nor_does_its_pair():
    values = {"random": VALUES["random"], "found": VALUES["found"] | {("b", 1): math.nan}}
    found = of(Comparison(table(values), "random"), "found")
    assert found["n"] == 3 and found["difference"] == pytest.approx(4 / 3) and found["mean"] == pytest.approx(17 / 3)
    one = of(Comparison(table({m: {("a", 0): v[("a", 0)]} for m, v in VALUES.items()}), "random"), "found")
    assert one["difference"] == 1.0 and one["n"] == 1 and math.isnan(one["difference_stderr"])


def test_metrics_stand_apart():
    both = pd.concat([table(), table({m: {k: -v for k, v in c.items()} for m, c in VALUES.items()}, "loss")])
    comparison = Comparison(both, "random")
    assert len(comparison.summary()) == 4 and of(comparison, "found", "loss")["difference"] == -1.5
    assert of(comparison, "found")["difference"] == 1.5
    frame = comparison.to_frame()
    assert list(frame) == COLUMNS and len(frame) == 16
    frame["value"] = 0.0
    assert comparison.summary()["mean"].any(), "the frame is a copy"


def test_every_method_runs_on_every_data_set_with_every_seed():
    counted, seen = [], []

    def method(bonus):
        def run(data, seed):
            seen.append((bonus, data, seed))
            return {"sum": data + 10 * seed + bonus, "seed": seed}

        return run

    result = compare(
        {"plain": method(0), "more": method(5)}, {"a": 1, "b": 2}, baseline="plain", seeds=(3, 4), bar=Counting(counted)
    )
    assert len(set(seen)) == len(seen) == 8 and counted == [1] * 8
    assert result.methods == ["plain", "more"]
    cells = result.to_frame().set_index(["method", "dataset", "seed", "metric"])["value"]
    assert cells["more", "b", 4, "sum"] == 47.0 and cells["plain", "a", 3, "sum"] == 31.0
    assert of(result, "more", "sum")["difference"] == 5.0 and of(result, "more", "seed")["difference"] == 0.0


def test_a_comparison_without_its_baseline_is_refused_by_name():
    with pytest.raises(InputError, match="'chance' is none of the methods random, found"):
        Comparison(table(), "chance")

    def never(data, seed):
        raise AssertionError("ran")

    with pytest.raises(InputError, match="'chance' is none of the methods one"):
        compare({"one": never}, {"a": 1}, baseline="chance")
    with pytest.raises(TypeError, match="baseline"):
        compare({"one": never}, {"a": 1})
    for data, seeds in (({}, (0,)), ({"a": 1}, ())):
        with pytest.raises(InputError, match="at least one"):
            compare({"one": never}, data, baseline="one", seeds=seeds)


def test_what_was_not_measured_alike_is_refused_by_name():
    rows = table()
    with pytest.raises(InputError, match="score of found on b with seed 1 is missing"):
        Comparison(rows.iloc[:-1], "random")
    with pytest.raises(InputError, match="score of random on b with seed 1 is missing"):
        Comparison(rows.drop(index=3), "random")
    with pytest.raises(InputError, match="score of random on a with seed 0 is there twice"):
        Comparison(pd.concat([rows, rows.iloc[:1]]), "random")
    with pytest.raises(InputError, match="seed is missing"):
        Comparison(rows.drop(columns="seed"), "random")
