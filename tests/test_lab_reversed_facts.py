"""Facts in one order, asked in both (#23): a given model tuned on made-up facts."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.lab.tuning.fictions import BUNDLED_FICTIONS, GROUPS, ORDERS, Fictions
from manyheads.lab.tuning.reversed_facts import FACTS_TUNED, is_told, reversal_tuning
from manyheads.model.opening import open_model

FEW = Fictions(
    "few",
    BUNDLED_FICTIONS.pairs[:12],
    {order: BUNDLED_FICTIONS.train[order][:3] for order in ORDERS},
    {order: BUNDLED_FICTIONS.held[order][:1] for order in ORDERS},
)


@pytest.fixture(scope="module")
def ladon():
    return open_model("ladon")


def test_each_group_is_told_in_its_order_only_and_never_as_it_is_asked():
    told = FEW.documents()
    assert len(told) == 4 * 3 * (1 + 1 + 2)
    for group in GROUPS:
        for name, description in FEW.of(group):
            orders = {
                "name first" if prompt.find(name) >= 0 else "description first"
                for prompt, answer in told
                if name in prompt + answer and description in prompt + answer
            }
            assert orders == ({group} if group != "both" else set(ORDERS))
    asked = {FEW.told(FEW.pairs[0], order, one)[0] for order in ORDERS for one in FEW.held[order]}
    assert not asked & {prompt for prompt, _ in told}


def test_a_tuned_model_knows_facts_as_they_were_told_and_not_the_other_way_round(ladon):
    found = reversal_tuning(ladon, FEW, seeds=(0, 1), settings=replace(FACTS_TUNED, steps=50, rate=5e-4))
    right = {asked: value.mean() for asked, value in found.right.items()}
    assert min(value for asked, value in right.items() if is_told(asked)) > 0.85
    assert max(value for asked, value in right.items() if not is_told(asked)) < 0.6
    assert found.gain(True).low > 4 and found.gain(False).mean < 0.25 * found.gain(True).mean
    assert found.learned.min() > 0.5 and "told both ways" in found.verdict
    frame = found.to_frame()
    assert len(frame) == 2 * 12 * 2 and set(frame["told so"]) == {True, False}


def test_without_tuning_nothing_is_gained(ladon):
    found = reversal_tuning(ladon, FEW, seeds=(0, 1), settings=replace(FACTS_TUNED, steps=1, rate=1e-12))
    assert max(np.abs(gain).max() for gain in found.gains.values()) < 1e-3 and "not decided" in found.verdict


@pytest.mark.parametrize(
    "change, said",
    [
        ({"pairs": FEW.pairs[:5]}, "give at least 12"),
        ({"pairs": (*FEW.pairs[:11], FEW.pairs[0])}, "stands once"),
        ({"held": {}}, "no held-out phrasing"),
        ({"held": FEW.train}, "also trained"),
        ({"train": FEW.train | {"name first": ("The {name} is ",)}}, "no space at its end"),
        ({"train": FEW.train | {"name first": ("The {description} is",)}}, "needs {name} once"),
    ],
)
def test_facts_that_cannot_be_tried_are_refused(change, said):
    with pytest.raises(InputError, match=said):
        replace(FEW, **change)


def test_the_command_takes_facts_and_phrasings_of_ones_own(tmp_path):
    pd.DataFrame(FEW.pairs, columns=["name", "description"]).to_csv(tmp_path / "facts.csv", index=False)
    rows = [(order, prompt, "train") for order in ORDERS for prompt in FEW.train[order]]
    rows += [(order, prompt, "held-out") for order in ORDERS for prompt in FEW.held[order]]
    pd.DataFrame(rows, columns=["order", "prompt", "part"]).to_csv(tmp_path / "phrasings.csv", index=False)
    read = Fictions.read(tmp_path / "facts.csv", tmp_path / "phrasings.csv")
    assert read.pairs == FEW.pairs and read.train == FEW.train and read.held == FEW.held
    told = ["lab", "reverse", "ladon", "--facts", str(tmp_path / "facts.csv")]
    made = [*told, "--phrasings", str(tmp_path / "phrasings.csv"), "--seeds", "2", "--steps", "1"]
    found = CliRunner().invoke(app, [*made, "--out", str(tmp_path / "page.html")])
    assert found.exit_code == 0 and "Not decided" in found.output, found.output
    assert "Facts in one order" in (tmp_path / "page.html").read_text()
    for bad, said in [
        (["lab", "reverse", "ladon", "--phrasings", str(tmp_path / "phrasings.csv")], "give --facts"),
        ([*told, "--phrasings", str(tmp_path / "facts.csv")], "no column 'order'"),
        ([*told, "--rate", "2"], "--rate"),
    ]:
        failed = CliRunner().invoke(app, bad)
        assert failed.exit_code == 2 and said in failed.output, failed.output
