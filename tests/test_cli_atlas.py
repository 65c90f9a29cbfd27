"""`manyheads atlas` and `manyheads bench` on the command line: what they write, and what they say to wrong input."""

import json
from importlib import import_module

import pandas as pd
import pytest
from typer.testing import CliRunner

from manyheads.cli import app
from manyheads.lab.constructed import constructed

SMALL = ["--behaviours", "induction,previous_token", "--n", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = constructed("llama", seed=0)
    path = tmp_path_factory.mktemp("models") / "constructed"
    made.module.save_pretrained(path)
    made.tokenizer.save_pretrained(path)
    return path, made


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_atlas_prints_and_writes_what_it_found(folder, tmp_path, monkeypatch):
    path, made = folder
    monkeypatch.setattr("manyheads.atlas.surveys.budget.MOST_SETS", 24)  # what fits into the time planned is far more
    result = run("atlas", path, *SMALL, "--out", tmp_path / "atlas")
    assert result.exit_code == 0, result.output
    (head,) = made.known["induction"]
    assert str(head) in result.output
    assert sorted(p.name for p in (tmp_path / "atlas").iterdir()) == [
        "atlas.json",
        "effects.parquet",
        "explorer.html",
        "patterns.safetensors",
        "report.html",
        "scores.parquet",
    ]
    page = (tmp_path / "atlas" / "explorer.html").read_text("utf-8")
    assert '"previous_token"' in page and "http" not in page.split("<script")[0], (
        "the same page as the live one, from disk"
    )
    frame = pd.read_parquet(tmp_path / "atlas" / "scores.parquet")
    best = frame[frame.behaviour == "induction"].sort_values("score").iloc[-1]
    assert best["head"] == str(head)
    assert best["score"] > 0.9
    saved = json.loads((tmp_path / "atlas" / "atlas.json").read_text())
    assert saved["card"]["command"].startswith("manyheads")
    assert {check["behaviour"] for check in saved["checks"]} == {"induction", "previous_token"}


def test_an_existing_folder_is_refused_before_any_work_and_replaced_by_force(folder, tmp_path, monkeypatch):
    path, _ = folder
    out = tmp_path / "atlas"
    out.mkdir()
    (out / "precious").write_text("x")
    with monkeypatch.context() as patched:
        patched.setattr(import_module("manyheads.atlas.surveys.run"), "survey", lambda *a, **k: 1 / 0)
        result = run("atlas", path, *SMALL, "--out", out)
    assert result.exit_code == 2
    assert "already exists" in result.output
    assert (out / "precious").exists()
    assert run("atlas", path, *SMALL, "--out", out, "--budget", "0", "--force").exit_code == 0
    assert not (out / "precious").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["./nowhere"], "no such folder"),
        (["no-such-hub/id"], "cannot open a model at no-such-hub/id"),
        (["{file}"], "is a file; give the folder"),
        (["{empty}"], "there is no config.json"),
        (["{model}", "--behaviours", "telepathy"], "unknown behaviour telepathy"),
        (["{model}", "--n-random", "3"], "20"),
        (["{model}", "--dtype", "float7"], "float7"),
    ],
)
def test_wrong_input_gets_one_sentence_and_exit_code_2(folder, tmp_path, arguments, sentence):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    names = {"{file}": tmp_path / "file", "{empty}": tmp_path / "empty", "{model}": folder[0]}
    result = run("atlas", *(names.get(a, a) for a in arguments))
    assert result.exit_code == 2, result.output
    assert sentence in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_ctrl_c_exits_130_and_writes_no_atlas(folder, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("manyheads.atlas.surveys.run"), "causal_check", stop)
    result = run("atlas", folder[0], *SMALL, "--out", tmp_path / "atlas")
    assert result.exit_code == 130
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.work"]


def test_an_unknown_benchmark_is_named_with_those_that_are_there():
    result = run("bench", "teapots")
    assert result.exit_code == 2
    assert "choose from agreement, amp, architectures, arithmetic, atlas" in result.output


def test_a_benchmark_gets_its_own_options():
    result = run("bench", "atlas", "--models", "teapots")
    assert result.exit_code == 2
    assert "there is no model teapots; choose from ladon, gpt2-small" in " ".join(result.output.split())


def test_an_interrupted_survey_keeps_what_it_has_and_the_same_command_goes_on(folder, tmp_path, monkeypatch):
    path, _ = folder
    run_module, registry = (import_module(f"manyheads.atlas.{name}") for name in ("surveys.run", "core.registry"))
    command = ["atlas", path, "-b", "induction", "--n", "4", "--budget", "0", "--out", tmp_path / "atlas"]
    whole = run(*command[:-1], tmp_path / "whole")
    assert whole.exit_code == 0
    check, done = run_module.causal_check, []

    def interrupted(*given, **settings):
        if len(done) == 1:
            raise KeyboardInterrupt
        done.append(check(*given, **settings))
        return done[-1]

    with monkeypatch.context() as patched:
        patched.setattr(run_module, "causal_check", interrupted)
        result = run(*command)
    work = tmp_path / "atlas.work"
    assert result.exit_code == 130
    assert result.stderr.endswith(
        f"interrupted; what was done is kept in {work}, and the same command goes on from there\n"
    )
    assert len(list(work.glob("check-*.json"))) == 1 and (work / "induction.parquet").is_file()
    assert not (tmp_path / "atlas").exists()

    other = run(*command, "--seed", "1")
    assert other.exit_code == 2 and "is not the work of this call" in other.stderr
    with monkeypatch.context() as patched:
        patched.setattr(registry, "_scored", lambda *given: 1 / 0)
        patched.setattr(run_module, "causal_check", lambda *g, **s: done.append(check(*g, **s)) or done[-1])
        assert run(*command).exit_code == 0
    assert len(done) == 2 and not work.exists()
    for name in ("scores", "effects"):
        pd.testing.assert_frame_equal(
            *(pd.read_parquet(tmp_path / one / f"{name}.parquet") for one in ("atlas", "whole"))
        )
    first, second = (json.loads((tmp_path / one / "atlas.json").read_text()) for one in ("atlas", "whole"))
    assert first["checks"] == second["checks"] and first["scores"] == second["scores"]


def test_an_input_is_never_the_output(folder, tmp_path):
    path, _ = folder
    docs = tmp_path / "docs.jsonl"
    docs.write_text('{"text": "one two three"}\n')
    result = run("atlas", "influence", docs, "--model", path, "--out", docs, "--force", "--heads", "L0H0")
    assert result.exit_code == 2 and "would be lost" in result.stderr
    assert docs.read_text() == '{"text": "one two three"}\n'
    for out in (path, path.parent):
        result = run("atlas", path, *SMALL, "--out", out, "--force")
        assert result.exit_code == 2 and "would be lost" in result.stderr
    assert (path / "config.json").is_file()


def test_a_comparison_is_of_the_behaviours_asked_for(folder, tmp_path):
    written = tmp_path / "atlas"
    assert run("atlas", folder[0], *SMALL, "--no-checks", "--out", written).exit_code == 0
    result = run("atlas", "diff", written, written, "-b", "induction", "--out", tmp_path / "diff")
    assert result.exit_code == 0, result.output
    assert set(pd.read_parquet(tmp_path / "diff" / "heads.parquet").behaviour) == {"induction"}
    result = run("atlas", "diff", written, written, "-b", "zzz")
    assert result.exit_code == 2 and "has no 'zzz'; it has" in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["edit", "scale", "./none", "L0H0", "--factor", "nan", "--out", "{out}"],
        ["edit", "scale", "./none", "L0H0", "--factor", "1e39", "--out", "{out}"],
        ["edit", "apply", "./none", "e", "caf\udce9"],
        ["edit", "apply", "./none", "e", "text", "--strength", "inf"],
        ["atlas", "influence", "{out}", "--out", "{out}.parquet", "--keep", "nan"],
        ["atlas", "influence", "{out}", "--out", "{out}.parquet", "--keep", "1.5"],
        ["atlas", "./none", "--seed", "-1"],
        ["atlas", "./none", "--seed", "9" * 30],
        ["atlas", "./none", "--n", "0"],
        ["atlas", "./none", "--n", "1000000000"],
    ],
)
def test_numbers_and_texts_are_checked_before_any_model_is_looked_for(arguments, tmp_path):
    result = run(*(str(a).format(out=tmp_path / "out") for a in arguments))
    assert result.exit_code == 2 and "./none" not in result.output
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_sentence(folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", str(tmp_path / "atlas"))

    monkeypatch.setattr(import_module("manyheads.atlas.core.result").Atlas, "save", full)
    result = run("atlas", folder[0], "-b", "induction", "--n", "4", "--no-checks", "--out", tmp_path / "atlas")
    assert result.exit_code == 2 and result.stderr.rstrip().endswith(f"{tmp_path / 'atlas'}: No space left on device.")
