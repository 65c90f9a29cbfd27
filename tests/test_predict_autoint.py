"""Columns as tokens: order does not matter, a planted cross is found, kinds and numbers go together."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from manyheads.errors import InputError
from manyheads.predict.auxiliary.autoint import DEFAULT, AutoInt, FieldAttention, log_squared

QUICK = replace(DEFAULT, epochs=25, rate=3e-3)


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_another_order_of_columns_changes_nothing_but_the_order(variant):
    trunk = FieldAttention(5, dim=4, width=8, variant=variant)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 4, 1, 2])
    moved = FieldAttention(5, dim=4, width=8, variant=variant, seed=9)
    moved.load_state_dict(trunk.state_dict() | {"directions": trunk.directions[order]})
    torch.testing.assert_close(
        moved(x[:, order]).unflatten(1, (5, 8)), trunk(x).unflatten(1, (5, 8))[:, order], rtol=1e-5, atol=1e-5
    )


def test_one_layer_is_the_formula():
    trunk = FieldAttention(3, dim=4, width=6, heads=2, layers=1)
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    e = x[..., None] * trunk.directions
    q, k, v, r = (trunk.projections[0](e)).chunk(4, -1)
    out = torch.zeros(2, 3, 6)
    for h in range(2):
        part = slice(3 * h, 3 * h + 3)
        for m in range(3):
            weight = (q[:, None, m, part] * k[:, :, part]).sum(-1).softmax(-1)
            torch.testing.assert_close(trunk.patterns(x)[0, :, h, m], weight)
            out[:, m, part] = (weight[..., None] * v[:, :, part]).sum(1)
    torch.testing.assert_close(trunk(x), (out + r).relu().flatten(1))


def test_a_cross_of_two_columns_is_found_and_shown():
    rng = np.random.default_rng(0)
    bits = 2.0 * rng.integers(0, 2, (1500, 8)) - 1
    y = np.where((bits[:, 1] * bits[:, 6] > 0) ^ (rng.random(1500) < 0.05), "yes", "no")
    frame = pd.DataFrame(bits, columns=list("abcdefgh"))
    model = AutoInt(QUICK).fit(frame[:1000], y[:1000])
    assert (model.predict(frame[1000:]) == y[1000:]).mean() > 0.9
    first = model.interactions(frame).iloc[0]
    assert {first["a"], first["b"]} == {"b", "g"}
    assert model.predict_proba(frame[:3]).sum(1) == pytest.approx(1.0)


def test_kinds_and_numbers_cross_and_a_kind_never_seen_is_no_error():
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        {"size": rng.normal(5, 2, 1500), "colour": rng.choice(["red", "blue"], 1500), "old": rng.random(1500) < 0.5}
    )
    y = (frame["size"] > 5) ^ (frame["colour"] == "red")
    model = AutoInt(QUICK).fit(frame[:1200], y[:1200])
    assert (model.predict(frame[1200:]) == y[1200:]).mean() > 0.9
    assert list(model.classes_) == [False, True]
    other = frame[:4].assign(colour="green")
    assert np.isfinite(model.predict_proba(other)).all()


def test_the_papers_scaling_of_counts():
    assert log_squared(np.array([-1.0, 0.0, 2.0, 3.0, 100.0])).tolist() == [-1.0, 0.0, 2.0, 1.0, 21.0]


def test_bad_tables_are_refused():
    x = np.random.default_rng(0).normal(size=(20, 2))
    with pytest.raises(InputError, match="20 rows and y 19"):
        AutoInt().fit(x, np.zeros(19))
    model = AutoInt(replace(DEFAULT, epochs=1)).fit(x, np.arange(20) % 2)
    with pytest.raises(InputError, match="was fitted on"):
        model.predict(np.zeros((2, 3)))
    with pytest.raises(InputError, match="NaN"):
        model.predict(np.array([[0.0, np.nan]]))
    with pytest.raises(InputError, match="heads that divide it"):
        FieldAttention(3, width=7)
