"""Pictures of users: upright, of any mode and size, or refused by one sentence; and the command on them."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.vision.core import predicting
from manyheads.vision.core.pictures import as_picture, letterbox, read_picture

QUARTERS = np.array([[[1, 0, 0], [0, 1, 0]], [[0, 0, 1], [1, 1, 1]]], dtype=float).repeat(12, 0).repeat(16, 1)


def written(path, values=QUARTERS, **settings):
    as_picture(values).save(path, **settings)
    return path


def test_a_picture_comes_as_it_is_seen(tmp_path):
    assert read_picture(written(tmp_path / "a.png")) == pytest.approx(QUARTERS)
    for turn, seen in [
        (6, np.rot90(QUARTERS, -1)),
        (8, np.rot90(QUARTERS)),
        (3, QUARTERS[::-1, ::-1]),
        (2, QUARTERS[:, ::-1]),
    ]:
        exif = Image.Exif()
        exif[0x0112] = turn
        assert read_picture(written(tmp_path / f"{turn}.png", exif=exif)) == pytest.approx(seen), turn


def test_grey_sixteen_bits_palette_and_alpha_are_read(tmp_path):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    Image.fromarray(np.round(65535 * ramp).astype(np.uint16)).save(tmp_path / "deep.png")
    Image.fromarray(np.round(255 * ramp).astype(np.uint8)).save(tmp_path / "grey.png")
    for name in ("deep", "grey"):
        found = read_picture(tmp_path / f"{name}.png")
        assert found.shape == (16, 16, 3) and np.abs(found - ramp[..., None]).max() < 0.003, name
    clear = np.zeros((16, 16, 4), np.uint8)
    clear[:8] = (255, 0, 0, 255)
    Image.fromarray(clear).save(tmp_path / "clear.png")
    found = read_picture(tmp_path / "clear.png")
    assert found[0, 0] == pytest.approx([1, 0, 0]) and found[-1, -1] == pytest.approx([1, 1, 1])
    as_picture(QUARTERS).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "few.gif")
    assert np.abs(read_picture(tmp_path / "few.gif") - QUARTERS).max() < 0.05


def test_what_is_no_picture_is_refused_by_one_sentence(tmp_path):
    whole = written(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "half.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "words.png").write_text("not a picture")
    (tmp_path / "empty.png").write_bytes(b"")
    written(tmp_path / "small.png", QUARTERS[:4])
    for name in ("half.jpg", "words.png", "empty.png", "small.png", "none.png", "."):
        with pytest.raises(InputError) as refused:
            read_picture(tmp_path / name)
        assert "\n" not in str(refused.value)


def test_too_many_pixels_are_refused_before_they_are_read(tmp_path):
    Image.new("1", (10_000, 10_000)).save(tmp_path / "bomb.png")
    with pytest.raises(InputError, match="10000 x 10000"):
        read_picture(tmp_path / "bomb.png")


@settings(max_examples=25, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(16, 64))
def test_a_point_of_a_letterbox_goes_back_to_where_it_was(height, width, size):
    picture = np.zeros((height, width, 3))
    box = letterbox(picture, size, fill=1.0)
    corners = np.array([[0.0, 0.0], [width, height]])
    inside = corners * box.scale + np.array(box.shift)
    assert box.back(inside) == pytest.approx(corners)
    dark = (box.pixels[0] < 0.5).nonzero()
    assert dark.min(0).values.tolist() == pytest.approx(inside[0][::-1], abs=1) and box.pixels.shape == (3, size, size)
    assert (dark.max(0).values + 1).tolist() == pytest.approx(inside[1][::-1], abs=1.01)


@pytest.fixture
def bright(monkeypatch):
    """A system that says how bright a picture is."""

    def load(folder):
        return lambda picture: mh.vision.Sight([{"bright": float(picture.mean())}], picture, ("seen",))

    monkeypatch.setitem(predicting._PREDICTORS._found, "bright", load)


def test_the_command_sees_every_file_and_one_that_is_bad_stops_no_other(tmp_path, bright):
    files = [str(written(tmp_path / "a.png")), str(tmp_path / "none.png"), str(written(tmp_path / "b.jpg"))]
    out = tmp_path / "out"
    told = CliRunner().invoke(app, ["vision", "predict", "bright", *files, "--out", str(out)])
    assert told.exit_code == 1 and "there is no file" in " ".join(told.output.split())
    assert {path.name for path in out.iterdir()} == {"a.json", "a.png", "b.json", "b.png"}
    assert json.loads((out / "a.json").read_text())["found"] == [{"bright": pytest.approx(QUARTERS.mean())}]
    assert read_picture(out / "a.png") == pytest.approx(QUARTERS)
    again = CliRunner().invoke(app, ["vision", "predict", "bright", files[0], "--out", str(out)])
    assert again.exit_code == 2 and "--force" in again.output
    assert (
        CliRunner().invoke(app, ["vision", "predict", "bright", files[0], "--out", str(out), "--force"]).exit_code == 0
    )
    (tmp_path / "c").mkdir()
    twins = [files[0], str(written(tmp_path / "c" / "a.png"))]
    assert (
        "called 'a'"
        in CliRunner().invoke(app, ["vision", "predict", "bright", *twins, "--out", str(tmp_path / "o")]).output
    )
    unknown = CliRunner().invoke(app, ["vision", "predict", "nothing", files[0], "--out", str(tmp_path / "o")])
    assert unknown.exit_code == 2 and "no method 'nothing'" in unknown.output
