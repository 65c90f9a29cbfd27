"""What `manyheads shrink` measures, prints and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads import shrink
from manyheads.cli import app
from manyheads.errors import InputError, MismatchError
from manyheads.pages.shrink import costs_table
from manyheads.report import html_of
from manyheads.report.scatter import Point, scatter
from manyheads.shrink.measuring import Read, loss_after


@pytest.fixture(scope="module")
def ladon() -> mh.HeadModel:
    return mh.open_model()


@pytest.fixture(scope="module")
def found(ladon: mh.HeadModel) -> shrink.Shrunk:
    made = {("snapkv", 0.5): shrink.SnapKV(0.5), ("snapkv", 0.75): shrink.SnapKV(0.75)}
    return shrink.measure(ladon, made, lengths=(128, 256), contexts=1, rounds=3)


def test_what_is_measured_is_what_a_pass_shows(ladon: mh.HeadModel, found: shrink.Shrunk) -> None:
    a_token = 2 * 4 * ladon.n_layers * ladon.n_heads * ladon.head_dim
    assert found.before.kv_bytes == {128: 128 * a_token, 256: 256 * a_token}
    half, quarter = found.after
    assert half.kv_bytes[256] == pytest.approx(128 * a_token, rel=0.02)
    assert quarter.kv_bytes[256] == pytest.approx(64 * a_token, rel=0.02)
    assert found.before.parameters == sum(p.numel() for p in ladon.plain.parameters())
    assert found.before.decode == {128: 1.0, 256: 1.0}  # beside itself
    assert found.before.loss == pytest.approx(loss_after(ladon, shrink.Press(), 256), abs=1e-6)
    assert found.to_frame()["kv_bytes 256"].tolist() == [c.kv_bytes[256] for c in (found.before, half, quarter)]


def test_the_loss_of_a_cache_that_drops_nothing_is_the_models_own(ladon: mh.HeadModel) -> None:
    from manyheads.tasks.texts import passages

    rows = passages(ladon, None, n=2, length=64 + 64, seed=0)
    logits = ladon.logits(rows)[:, 63:-1].float().log_softmax(-1)
    own = -logits.gather(-1, rows[:, 64:, None]).mean()
    assert loss_after(ladon, shrink.Press(), 64, n=2) == pytest.approx(float(own), abs=1e-5)


def test_a_model_made_of_another_is_measured_with_its_tasks(ladon: mh.HeadModel) -> None:
    cut = ladon.bake(mh.Scale(ladon.heads, 0.0))  # no head writes anything: nothing of a context is left
    found = shrink.measure(
        ladon, {("none", 0.9): cut}, lengths=(128,), contexts=1, rounds=3, n=8, tasks=("ioi", "repeat")
    )
    assert found.before.tasks["ioi"] >= 0.9
    assert found.after[0].tasks["ioi"] <= 0.2
    assert found.after[0].loss > found.before.loss + 1.0
    assert found.after[0].needles == 0.0


def test_time_is_of_a_press_alone_and_not_of_what_it_finds_out_first(ladon: mh.HeadModel) -> None:
    read = Read(ladon, shrink.DuoAttention(0.5, 8, 32))
    ids = torch.randint(5, 4000, (1, 200))
    assert read.context(ids) > 0
    assert read.token(ids[:, :1]) > 0
    assert read.cache.lengths()[:, 0].unique().tolist() == [40, 201]


def test_the_table_and_the_page_show_every_cost(found: shrink.Shrunk) -> None:
    table = costs_table(found)
    assert table.row_count == 3
    page = html_of(found)
    assert page.count("<svg") >= 2
    assert "MB of cache at 256 tokens" in page
    assert "snapkv 0.75" in page or "ratio 0.75" in page


def test_cut_weights_and_cut_caches_have_pictures_of_their_own(found: shrink.Shrunk) -> None:
    lost = replace(found.before, method="amp", parameters=10, weight_bytes=40, loss=9.0)
    page = html_of(replace(found, after=[*found.after, lost]))
    pictures = [part.split("</svg>")[0] for part in page.split("<svg")[1:]]
    assert len(pictures) == 3
    assert ["amp" in picture for picture in pictures] == [False, False, True]
    assert ["snapkv" in picture for picture in pictures] == [True, True, False]


def test_a_picture_places_higher_values_higher() -> None:
    picture = str(scatter([Point("a", 1.0, 5.0), Point("b", 2.0, 9.0)], x_name="MB", y_name="loss"))
    heights = [float(part.split('"')[0]) for part in picture.split('cy="')[1:]]
    places = [float(part.split('"')[0]) for part in picture.split('cx="')[1:]]
    assert heights[0] > heights[1]
    assert places[0] < places[1]


def test_a_press_is_saved_with_its_scores_and_knows_its_model(ladon: mh.HeadModel, tmp_path: Path) -> None:
    press = shrink.shrink_way("duo")(0.25).settled(ladon)
    shrink.save_press(press, tmp_path / "press", "duo", 0.25)
    again = shrink.load_press(tmp_path / "press")
    assert again.windows(ladon) == press.windows(ladon)
    np.testing.assert_array_equal(again.scores.values, press.scores.values)
    other = ladon.bake(mh.Scale([(0, 0)], 0.5))
    with pytest.raises(MismatchError, match="not of this one"), again(other):
        pass
    with pytest.raises(InputError, match="no press"):
        shrink.load_press(tmp_path)
    (tmp_path / "press" / "press.json").write_text('{"method": "duo", "ratio": "much"}')
    with pytest.raises(InputError, match="names no method and ratio"):
        shrink.load_press(tmp_path / "press")


def test_the_command_writes_page_figures_and_presses(tmp_path: Path) -> None:
    out = tmp_path / "smaller"
    given = ["--method", "snapkv", "--ratio", "0.5", "--lengths", "128", "--rounds", "3", "--out", str(out)]
    told = CliRunner().invoke(app, ["shrink", "ladon", *given])
    assert told.exit_code == 0, told.output
    costs = json.loads((out / "costs.json").read_text())
    assert costs["after"][0]["method"] == "snapkv"
    assert (out / "report.html").is_file()
    assert shrink.load_press(out / "snapkv-0.5") == shrink.SnapKV(0.5)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--method", "squeeze"], "there is no method 'squeeze'"),
        (["--ratio", "half"], "--ratio is 'half'"),
        (["--ratio", "1.0"], "ratio 1 leaves nothing"),
        (["--ratio", "-0.1"], "at least 0"),
        (["--lengths", "0.5"], "--lengths is '0.5'"),
        (["--lengths", "100000"], "has positions for"),
    ],
)
def test_wrong_arguments_are_one_sentence(arguments: list[str], why: str) -> None:
    told = CliRunner().invoke(app, ["shrink", "ladon", *arguments])
    assert told.exit_code == 2
    assert why in " ".join(told.output.split())


@pytest.mark.parametrize(("given", "taught"), [([], True), (["--no-teach"], False)])
def test_recovery_learns_from_the_model_it_came_from_unless_told_otherwise(
    given: list[str], taught: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def recover(model: mh.HeadModel, **settings: Any) -> None:
        seen.update(settings, model=model)
        raise InputError("enough seen.")

    monkeypatch.setattr("manyheads.shrink.recovery.recover", recover)
    told = CliRunner().invoke(
        app, ["shrink", "ladon", "--method", "moh", "--ratio", "0.25", "--recover", "2048", *given]
    )
    assert told.exit_code == 2 and "enough seen" in told.output
    assert seen["tokens"] == 2048
    assert (seen["teacher"] is not None) == taught
    assert not taught or seen["teacher"].fingerprint == mh.open_model().fingerprint != seen["model"].fingerprint
