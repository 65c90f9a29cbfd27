"""Nothing is lost: a write that is interrupted, wherever, leaves what was there before, or beside it under a name one can see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.errors import InputError
from manyheads.files import write_atomically, write_folder_atomically


def fill(text):
    return lambda folder: (folder / "a").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_old_file_is_whole_until_the_new_one_is_there(tmp_path):
    """To who looks while the new one is written, and to who opened it before."""
    file = tmp_path / "f"
    file.write_text("old")
    seen = []

    def write(path):
        path.write_text("new, and longer")
        seen.append(file.read_text())

    with file.open() as before:
        write_atomically(file, write, force=True)
        assert before.read() == "old"
    assert seen == ["old"] and file.read_text() == "new, and longer" and names(tmp_path) == ["f"]


def test_a_rename_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "f"
    file.write_text("old")

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full)
    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, lambda path: path.write_text("new"), force=True)
    assert file.read_text() == "old" and names(tmp_path) == ["f"]


@pytest.mark.parametrize("fails", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_folder_comes_back_when_either_rename_fails(tmp_path, monkeypatch, fails, error):
    folder = tmp_path / "d"
    write_folder_atomically(folder, fill("old"))
    rename, calls = Path.rename, []

    def failing(path, target):
        calls.append(path)
        if len(calls) == fails:
            raise error
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(error):
        write_folder_atomically(folder, fill("new"), force=True)
    assert (folder / "a").read_text() == "old" and names(tmp_path) == ["d"]


KILLED = """
import os, sys
from pathlib import Path
from manyheads.files import write_atomically, write_folder_atomically
target, kind, at = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
calls, rename = [], Path.rename

def dying(path, to):
    calls.append(path)
    if len(calls) == at:
        os._exit(9)
    return rename(path, to)

def write(path):
    (path / "a" if kind == "folder" else path).write_text("new")
    if at == 0:
        os._exit(9)

Path.rename = dying
(write_folder_atomically if kind == "folder" else write_atomically)(target, write, force=True)
"""


def killed(target, kind, at):
    command = [sys.executable, "-c", KILLED, str(target), kind, str(at)]
    return subprocess.run(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, check=False).returncode


def test_a_process_that_is_killed_while_writing_leaves_the_old_file(tmp_path):
    (tmp_path / "f").write_text("old")
    assert killed(tmp_path / "f", "file", 0) == 9
    assert (tmp_path / "f").read_text() == "old"


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_process_that_is_killed_at_any_point_leaves_the_old_folder_where_it_can_be_seen(tmp_path, at):
    """Between the two renames there is none of that name; the old one then lies beside, under a name that says so."""
    folder = tmp_path / "d"
    write_folder_atomically(folder, fill("old"))
    assert killed(folder, "folder", at) == 9
    visible = [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    if at < 2:
        assert (folder / "a").read_text() == "old"
    else:
        (kept,) = visible
        assert kept.name.startswith("d.old.") and (kept / "d" / "a").read_text() == "old"


def test_what_is_there_is_kept_unless_forced_and_a_file_is_no_folder(tmp_path):
    for write, name in ((write_atomically, "f"), (write_folder_atomically, "d")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(InputError, match="already exists"):
            write(tmp_path / name, lambda path: None)
    with pytest.raises(InputError, match="is a file"):
        write_folder_atomically(tmp_path / "d", fill("new"), force=True)
    assert (tmp_path / "f").read_text() == (tmp_path / "d").read_text() == "mine"
