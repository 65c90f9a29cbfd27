from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from manyheads import cli
from manyheads.cli.common import keeping
from manyheads.errors import InputError, ManyheadsError, UnsupportedError

ROOT = Path(__file__).parents[1]


def run(*args: str) -> Result:
    return CliRunner().invoke(cli.app, list(args))


def command(*args: str) -> subprocess.CompletedProcess[str]:
    """The command line in a Python of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "manyheads.cli", *args], capture_output=True, text=True, env=env, timeout=120
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch):
    """Give the command line a command `fail` that raises the error it is given."""

    def add(error: BaseException) -> None:
        app = typer.Typer(cls=cli.app.info.cls, pretty_exceptions_enable=False)
        app.registered_callback = cli.app.registered_callback

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(cli, "app", app)

    return add


def test_methods_lists_all_of_them_with_number_room_and_state():
    shown = command("methods")
    assert shown.returncode == 0
    assert "Successor heads" in shown.stdout
    assert "Faceptor" in shown.stdout
    assert "125 methods" in shown.stdout


def test_methods_searches_with_several_words():
    found = json.loads(run("methods", "speculative", "decoding", "draft", "--json", "--by", "words").stdout)
    assert {m["room"] for m in found} == {"draft"}


def test_methods_says_what_to_type_and_where_to_read_and_shows_no_more_than_asked():
    """The issue's own question: what may reduce the memory of the cache stands among the first five."""
    found = json.loads(run("methods", "reduce kv memory", "--top", "5", "--json").stdout)
    assert len(found) == 5 and "manyheads shrink MODEL --method duo" in [m["command"] for m in found]
    table = " ".join(run("methods", "#47").stdout.replace("│", " ").split())
    assert "manyheads shrink MODEL --method duo" in table and "docs/methods/duo-attention.md" in table


def test_a_ranking_that_does_not_exist_is_refused_with_those_that_do():
    shown = run("methods", "heads", "--by", "taste")
    assert shown.exit_code == 2 and "meaning, tfidf, words" in shown.stderr


def test_methods_writes_its_page_once_and_again_only_when_forced(tmp_path):
    page = tmp_path / "methods.html"
    assert run("methods", "--page", str(page)).exit_code == 0
    assert run("methods", "--page", str(page)).exit_code == 2
    assert page.read_text("utf-8").count('id="method-') == 125


def test_methods_can_be_narrowed_to_a_room_and_a_state():
    found = json.loads(run("methods", "--room", "Atlas", "--state", "partial", "--json").stdout)
    assert found
    assert {(m["room"], m["state"]) for m in found} == {("atlas", "partial")}


def test_methods_says_of_partial_ones_what_is_missing_in_the_table_and_in_json():
    found = json.loads(run("methods", "--state", "partial", "--json").stdout)
    assert found and all(m["reason"] and m["tests"] for m in found)
    (row,) = json.loads(run("methods", "factual recall heads", "--state", "partial", "--json").stdout)[:1]
    table = " ".join(run("methods", "#75").stdout.replace("│", " ").split())
    assert row["number"] == 75 and all(word in table for word in row["reason"].split())
    assert json.loads(run("methods", "#11", "--json").stdout)[0]["reason"] is None


def test_a_search_that_finds_nothing_says_so_and_prints_no_table():
    shown = run("methods", "xylophone", "--by", "words")
    assert (shown.exit_code, shown.stdout) == (0, "")
    assert "no method" in shown.stderr
    assert json.loads(run("methods", "xylophone", "--by", "words", "--json").stdout) == []


@pytest.mark.parametrize(
    "args", [["methods", "--room", "kitchen"], ["methods", "--state", "done"], ["methods", "--colour"], ["mehods"]]
)
def test_wrong_input_is_named_and_leaves_with_2(args: list[str]):
    shown = run(*args)
    assert shown.exit_code == 2
    assert args[-1] in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_wrong_room_is_answered_with_the_rooms():
    assert "forecast" in run("methods", "--room", "kitchen").stderr


def test_both_ways_to_ask_for_the_version_agree():
    asked = [run("--version"), run("version")]
    assert [shown.exit_code for shown in asked] == [0, 0]
    assert asked[0].stdout == asked[1].stdout
    assert asked[0].stdout.startswith("manyheads 0.")


@pytest.mark.parametrize("error", [ManyheadsError("a [b] c."), InputError("a [b] c."), UnsupportedError("a [b] c.")])
def test_our_errors_are_one_sentence_and_2(failing, error: ManyheadsError):
    failing(error)
    shown = run("fail")
    assert (shown.exit_code, shown.stdout, shown.stderr) == (2, "", "a [b] c.\n")


def test_a_long_sentence_stays_on_one_line(failing):
    failing(InputError("word " * 100))
    assert run("fail").stderr.count("\n") == 1


def test_an_interruption_leaves_with_130_and_says_what_is_kept(failing):
    for said, shown in (("", "unfinished work was not kept"), ("all is kept in x", "all is kept in x")):
        failing(KeyboardInterrupt(said))
        result = run("fail")
        assert (result.exit_code, result.stderr) == (130, f"interrupted; {shown}\n")


def test_keeping_says_that_work_is_kept_only_where_it_is(tmp_path):
    for folder, said in ((tmp_path, f"kept in {tmp_path}, and the same command"), (tmp_path / "none", ""), (None, "")):
        with pytest.raises(KeyboardInterrupt) as caught, keeping(folder):
            raise KeyboardInterrupt
        assert said in str(caught.value) and bool(said) == bool(str(caught.value))


INTERRUPTED = """
import os, signal, sys

class Finder:
    def find_spec(self, name, *rest):
        if name == at:
            os.kill(os.getpid(), signal.SIGINT)

at = sys.argv[1]
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have it ignored
sys.meta_path.insert(0, Finder())
from manyheads.__main__ import main
sys.argv[1:] = ["atlas", "--no-checks", "-b", "induction"]
main()
"""


@pytest.mark.parametrize("at", ["manyheads.cli", "typer", "manyheads.catalogue", "torch"])
def test_an_interruption_while_modules_are_imported_is_one_line(at):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    shown = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, at], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert shown.returncode == 130 and shown.stderr.startswith("interrupted;") and shown.stderr.count("\n") == 1


def test_an_error_nobody_expected_is_one_line_with_the_way_to_its_traceback(failing):
    failing(ZeroDivisionError("division\nby zero"))
    shown = run("fail")
    assert shown.exit_code == 1
    assert "ZeroDivisionError: division by zero\n" in shown.stderr
    assert "manyheads --debug" in shown.stderr
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize("error", [ZeroDivisionError("here"), InputError("here")])
def test_debug_shows_the_traceback(failing, error: Exception):
    failing(error)
    assert run("--debug", "fail").exception is error


def test_help_and_the_catalogue_need_no_heavy_import():
    """A command line that loads torch to print a list of names is a second slower for nothing."""
    heavy = "{'torch', 'transformers', 'pandas', 'pyarrow', 'plotly', 'scipy', 'sklearn'}"
    code = (
        "import sys; from manyheads.cli import app; app(['methods', 'induction'], standalone_mode=False); "
        f"app(['--help'], standalone_mode=False); sys.exit(' '.join({heavy} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert shown.stderr.strip() == ""
    assert "Induction formation" in shown.stdout
