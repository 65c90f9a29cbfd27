"""Nothing is lost: a write that is interrupted, wherever, leaves what was there before, or beside it under a name one can see."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from manyheads.errors import InputError
from manyheads.files import check_output, working_folder, write_atomically, write_folder_atomically


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
from manyheads.files import check_output, working_folder, write_atomically, write_folder_atomically
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


# Before the work begins


def refused_output(path, *words, **how):
    with pytest.raises(InputError) as caught:
        check_output(path, **how)
    said = str(caught.value)
    assert "\n" not in said and len(said) < 600 and all(word in said for word in words), said


def test_what_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = names(tmp_path)
    for path in (tmp_path / "file" / "x", tmp_path / "file" / "x" / "y", "/dev/null/x", "/proc/x", "/proc/self/x/y"):
        refused_output(path, "cannot write")
        refused_output(path, "cannot write", force=True)
    refused_output(tmp_path / "dangling", "already exists")
    refused_output(tmp_path / "dangling" / "x", "cannot write")
    for name in ("n" * 300, "é" * 150, "n" * 300 + "/x", "/".join(["n" * 200] * 25), "a\0b", "x/.."):
        refused_output(tmp_path / name, "choose another name", force=True)
    for name in (".", "", "..", "/", str(Path.cwd()), str(Path.cwd().parent)):
        refused_output(name, "already exists")
        refused_output(name, "choose another name", force=True)
    refused_output(tmp_path / "file", "is a file", force=True, folder=True)
    refused_output(tmp_path, "is a folder", force=True, folder=False)
    assert names(tmp_path) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    refused_output(tmp_path / "x", "cannot write")
    tmp_path.chmod(0o700)


def test_what_can_be_written_passes_and_leaves_no_trace(tmp_path):
    for name in ("x", "a/b/c", "n" * 255, "é" * 127):
        check_output(tmp_path / name)
        assert names(tmp_path) == []
    for name in ("n" * 255, "é" * 127):
        write_atomically(tmp_path / name, lambda path: path.write_text("new"))
        write_folder_atomically(tmp_path / f"{name[:-1]}d", fill("new"))
        write_folder_atomically(tmp_path / f"{name[:-1]}d", fill("newer"), force=True)
    assert len(names(tmp_path)) == 4
    (tmp_path / "link").symlink_to(tmp_path / ("n" * 255))
    write_atomically(tmp_path / "link", lambda path: path.write_text("other"), force=True)
    assert (tmp_path / "link").read_text() == "other" and (tmp_path / ("n" * 255)).read_text() == "new"


def test_an_output_is_no_input_of_the_command_and_no_folder_that_holds_one(tmp_path):
    docs = tmp_path / "in" / "docs.jsonl"
    docs.parent.mkdir()
    docs.write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(docs)
    os.link(docs, tmp_path / "hard.jsonl")
    for out in (
        docs,
        docs.parent,
        tmp_path,
        tmp_path / "link.jsonl",
        tmp_path / "hard.jsonl",
        docs.parent / ".." / "in",
    ):
        refused_output(out, "lost", force=True, inputs=["a hub/id", docs])
    check_output(docs.parent / "scores", force=True, inputs=[docs])
    (tmp_path / "other.jsonl").write_text("{}")
    check_output(tmp_path / "other.jsonl", force=True, inputs=[docs])


@pytest.mark.parametrize("writer, content", [(write_atomically, "file"), (write_folder_atomically, "folder")])
def test_what_another_program_writes_in_the_meantime_stays(tmp_path, writer, content):
    """Two runs of one command with one output: the second to end does not replace the first one's result."""
    target = tmp_path / "out"

    def slow(path):
        if content == "file":
            target.write_text("first")
            path.write_text("second")
        else:
            write_folder_atomically(target, fill("first"))
            fill("second")(path)

    with pytest.raises(InputError, match="already exists"):
        writer(target, slow)
    kept = target if content == "file" else target / "a"
    assert kept.read_text() == "first" and names(tmp_path) == ["out"]


def test_a_file_that_grows_over_its_limit_is_an_error_of_the_disk_and_leaves_nothing(tmp_path):
    """safetensors has an error of its own for what is an `OSError` elsewhere."""
    code = (
        "import resource, sys, torch; from manyheads.files import write_atomically; from safetensors.torch import save_file\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: write_atomically(sys.argv[1], lambda path: save_file({'a': torch.zeros(10**5)}, path))\n"
        "except OSError as error: print('disk', error)"
    )
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    shown = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, env=env, check=False
    )
    assert shown.stdout.startswith("disk") and names(tmp_path) == []


def test_a_working_folder_of_something_else_is_refused(tmp_path):
    for name, note in (("a", None), ("b", b"\xff"), ("c", b"{}")):
        (tmp_path / name).mkdir()
        if note is not None:
            (tmp_path / name / "request.json").write_bytes(note)
        with (
            pytest.raises(InputError, match="not the work of this call; so do"),
            working_folder(tmp_path / name, {"x": 1}, advice="so do"),
        ):
            pass
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(InputError), working_folder(tmp_path / "dangling", {"x": 1}):
        pass
