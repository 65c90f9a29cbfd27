"""Systems tried again: verdicts are those of their experiments or tests, kept by number, and written as a page."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from manyheads.catalogue import method, methods
from manyheads.catalogue.headlines import headline
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.evaluation import Claim, Experiment, replication
from manyheads.evaluation.replication import kept_replications, replicate


def planted(says: str, value: float, fails: type[Exception] | None = None) -> Experiment:
    runs: list[int] = []

    def method_(data: str, seed: int) -> dict[str, float]:
        runs.append(seed)
        if fails is not None:
            raise fails("install the package")
        return {"score": value + 0.01 * seed}

    claims = (
        Claim(says, lambda v: v["ours", "score"], at_least=0.5),
        Claim("on what is left out", lambda v: v["ours", "score"], at_least=0.5, on="whole"),
    )
    one = Experiment(
        f"planted-{says}", (19,), "2410.22269", "Does it?", lambda quick: {"half": 0}, {"ours": method_}, "ours", claims
    )
    object.__setattr__(one, "runs", runs)
    return one


@pytest.fixture
def only(monkeypatch):
    """Let system 19 have these experiments, and no other any."""

    def have(*ones):
        monkeypatch.setattr(replication, "experiments_of", lambda: {19: tuple(("predict", one) for one in ones)})

    return have


def test_a_claim_gets_its_verdict_and_what_was_kept_is_not_run_again(only, tmp_path):
    good, bad = planted("good", 0.9), planted("bad", 0.1)
    only(good, bad)
    rows = replicate([19], tmp_path, seeds=2)
    assert [row.verdict for row in rows] == ["held", "not run", "not shown", "not run"], (
        "so little data refutes nothing"
    )
    assert [row.verdict for row in replicate([19], quick=False, seeds=2)][::2] == ["held", "missed"]
    assert (
        rows[0].measured.startswith("0.905 ±") and rows[0].measured.endswith("(2 of 2)") and rows[0].bound == ">= 0.5"
    )
    assert rows[0].command == "manyheads predict run planted-good --quick --seeds 2" and rows[0].baseline == "ours"
    runs = len(good.runs)
    assert replicate([19], tmp_path, seeds=2) == rows == kept_replications(tmp_path) and len(good.runs) == runs
    assert len(replicate([19], tmp_path, seeds=3)) == 4 and len(good.runs) > runs, "other seeds are another result"


def test_what_could_not_begin_says_why_and_is_tried_once_more(only, tmp_path):
    only(planted("broken", 0.9, InputError))
    (row,) = replicate([19], tmp_path)
    assert (row.verdict, row.measured) == ("not run", "install the package")
    only(planted("broken", 0.9))
    assert replicate([19], tmp_path)[0].verdict == "held"


def test_without_an_experiment_its_tests_decide(only, monkeypatch, tmp_path):
    only()
    tests = {
        "passed": "def test_it():\n    pass\n",
        "failed": "def test_it():\n    assert False\n",
        "not run": "import pytest\ndef test_it():\n    pytest.skip('no package')\n",
    }
    monkeypatch.setattr(replication, "ROOT", tmp_path)
    for verdict, text in tests.items():
        (tmp_path / "test_one.py").write_text(text)
        row = replace(method(11), tests=("test_one.py::test_it",))
        monkeypatch.setattr(replication, "methods", lambda row=row: [row])
        (found,) = replicate()
        assert found.verdict == verdict, found
    monkeypatch.setattr(replication, "methods", lambda: [replace(row, tests=("none.py::test_it",))])
    assert "repository" in replicate()[0].measured
    monkeypatch.setattr(replication, "methods", lambda: [replace(row, state="absent", tests=())])
    assert replicate()[0].verdict == "not built"


def test_the_command_writes_a_page_of_all_systems_and_their_verdicts(only, tmp_path):
    only(planted("good", 0.9))
    folder, page, table = tmp_path / "kept", tmp_path / "page.md", tmp_path / "verdicts.json"
    told = ["replicate", "19", "--folder", str(folder)]
    found = CliRunner().invoke(app, [*told, "--out", str(page)])
    assert found.exit_code == 0 and "held" in found.output, found.output
    text = page.read_text("utf-8")
    assert len(re.findall(r"^## \\#\d+ ", text, re.MULTILINE)) == 125 and text.count("Not tried yet.") == 124
    assert "1 held, 1 not run" in text and "| held |" in text and headline(19)[1] in text
    found = CliRunner().invoke(app, [*told, "--kept", "--out", str(table)])
    assert found.exit_code == 0 and json.loads(table.read_text()) == {"19": {"held": 1, "not run": 1}}
    for bad, said in [(["126"], "no system 126"), (["--out", "x.txt"], ".md or .json"), (["--seeds", "0"], "--seeds")]:
        failed = CliRunner().invoke(app, ["replicate", "--folder", str(folder), *bad])
        assert failed.exit_code == 2 and said in failed.output, failed.output
    nothing = CliRunner().invoke(app, ["replicate", "--kept", "--folder", str(tmp_path / "none")])
    assert nothing.exit_code == 2 and "keeps no result" in nothing.output
    (folder / "20.json").write_text("{}")
    assert "no result of" in CliRunner().invoke(app, [*told, "--kept"]).output


def test_every_paper_has_its_claim_and_its_figure():
    told = [headline(m.number) for m in methods()]
    assert len({claim for claim, _ in told}) == 125
    assert all(20 < len(claim) < 130 and not claim.endswith(".") and paper for claim, paper in told)
    with pytest.raises(InputError, match="1 to 125"):
        headline(126)


def test_a_room_whose_packages_are_missing_has_no_experiments_and_stops_nothing(monkeypatch):
    def missing(room):
        if room == "vision":
            raise InputError("install manyheads[vision]")
        return {"one": planted("good", 0.9)} if room == "predict" else {}

    monkeypatch.setattr(replication, "experiments", missing)
    found = replication.experiments_of.__wrapped__()
    assert [room for room, _ in found[19]] == ["predict"] and set(found) == {19}
