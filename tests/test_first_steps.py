"""What somebody sees first: the README, the pages of docs and their examples, `manyheads demo`, help and completion."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

import manyheads as mh
from manyheads import catalogue, cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
INDEX = (ROOT / "docs" / "index.md").read_text("utf-8")
PAGES = sorted(path for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def python_blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def printed(code: str) -> tuple[str, str]:
    """What a block prints, and what its comments at the beginning of a line (`# ...` below a print) say that it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "example", "exec"), {})
    said = re.findall(r"^# ?(.*)$", code, re.MULTILINE)
    return out.getvalue(), "\n".join(said)


def words(text: str) -> list[str]:
    return text.split()


def test_the_first_example_of_the_docs_prints_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = python_blocks(INDEX)[0]
    last = code.splitlines()[-1]
    out, said = printed(f"{code}\n{last}")  # what it writes may be there already, from an earlier run
    assert "save_pretrained" in last and "red night" in said and words(out) == words(said)


def test_the_readme_example_runs_and_its_ablation_changes_the_answer(monkeypatch):
    """On the bundled model, since the hub cannot be reached from everywhere: other heads, the same lines."""
    (code,) = python_blocks(README)
    bundled = code.replace('"HuggingFaceTB/SmolLM2-135M-Instruct"', "")
    assert bundled != code and len([line for line in code.splitlines() if line.strip()]) <= 11
    out, _ = printed(bundled)
    heads, plain, without, *check = out.splitlines()
    assert heads == "L3H4, L3H6, L3H7" and plain != without and plain.startswith(" Paris red")
    assert re.fullmatch(r"lost: 1\d\.\d nats a token; without random heads [0-3]\.\d; p = 0\.048", check[0])
    promised = re.findall(r"```\n(L\d+H\d+.*?)```", README, re.DOTALL)[0].splitlines()
    assert len(promised) == len(out.splitlines()) and promised[1] != promised[2], "as many lines as it prints"


@pytest.mark.parametrize("text", [README, INDEX], ids=["README", "index"])
def test_the_status_is_that_of_the_catalogue(text):
    states = [method.state for method in catalogue.methods()]
    ready, partial = states.count("ready"), states.count("partial")
    plain = " ".join(text.replace("*", "").split())
    assert re.search(rf"{ready + partial}\b.{{0,60}}can be used today: {ready} are complete", plain), (
        "how many can be used"
    )
    assert re.search(rf"\b{partial} lack a part|of {partial} a part is missing", plain)
    assert f"{len(states)}" in plain


def test_links_of_the_docs_lead_to_files_and_headings():
    wrong = []
    for page in PAGES:
        text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(("http", "mailto:")):
                continue
            name, _, anchor = target.partition("#")
            file = (page.parent / name).resolve() if name else page
            headings = (
                re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
                if file.suffix == ".md" and file.is_file()
                else []
            )
            ids = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
            if not file.exists() or (anchor and anchor not in ids):
                wrong.append(f"{page.relative_to(ROOT)}: {target}")
    assert not wrong


def test_the_readme_begins_with_what_it_is_and_stays_short():
    assert len(README.split()) < 700 and README.count("](docs/") <= 6
    order = [
        "tells you what each attention head",
        "pip install .",
        "whl/cpu",
        "make test",
        'open_model("Hugging',
        "report.png",
    ]
    order += ["## Status", "## Read on"]
    places = [README.index(part) for part in order]
    assert places == sorted(places)


def test_the_citation_names_this_version():
    text = (ROOT / "CITATION.cff").read_text("utf-8")
    assert re.findall(r"^version: (.*)$", text, re.MULTILINE) == [mh.__version__]
    license_ = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["license"]
    assert f"license: {license_}" in text


def test_the_demo_shows_four_results_with_their_numbers():
    """The answers change with the ablation and with the edit, and drafting takes fewer passes than tokens."""
    started = time.process_time()  # of this process: a busy machine is no fault
    result = CliRunner().invoke(cli.app, ["demo"])
    assert result.exit_code == 0, result.output
    assert time.process_time() - started < 30
    text = " ".join(result.output.split())
    assert [int(i) for i in re.findall(r"(?:^|\s)(\d)\. (?:Which|Why|An|The)", text)] == [1, 2, 3, 4]
    assert re.search(r"the model Paris red without L3H4, L3H6, L3H7 red night", text)
    assert re.search(r"lose 1\d\.\d nats each; without random heads of the same layers [0-3]\.\d .*p = 0\.048", text)
    assert re.search(r"answers Cairo, just ahead of Athens.* L3H6 \+1\.\d\d reads mostly “Cairo”", text)
    assert re.search(r"the model Cairo with the edit Athens", text)
    before, after = map(int, re.findall(r"from (\d+)% to (\d+)%", text)[0])
    assert before < 70 < after
    tokens, passes = map(int, re.findall(r"(\d+) tokens took (\d+) passes", text)[0])
    assert tokens == 48 and passes < tokens / 3 and "The text is the same, token for token" in text


def command(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "160", **env}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=settings, timeout=60)


def test_the_package_runs_as_a_module():
    shown = command("-m", "manyheads", "--version")
    assert (shown.returncode, shown.stdout.strip()) == (0, f"manyheads {mh.__version__}")


def test_the_shell_can_complete_commands_and_options():
    program = "import sys; sys.argv = ['manyheads']; from manyheads.cli import main; main()"
    for line, at, wanted in (("manyheads at", "1", "atlas"), ("manyheads atlas survey --see", "3", "--seeds")):
        shown = command("-c", program, _MANYHEADS_COMPLETE="complete_bash", COMP_WORDS=line, COMP_CWORD=at)
        assert wanted in shown.stdout.split(), shown.stderr
    assert "--install-completion" in CliRunner().invoke(cli.app, ["--help"], env={"COLUMNS": "160"}).output


@pytest.mark.parametrize("asked", ["--help", "-h"])
def test_help_of_atlas_shows_the_options_of_the_survey_that_it_runs(asked):
    shown = CliRunner().invoke(cli.app, ["atlas", asked], env={"COLUMNS": "160"}).output
    assert all(option in shown for option in ("--out", "--behaviours", "--seeds", "--n-random", "--device-map"))
    assert all(name in shown for name in ("survey", "roles", "diff", "influence"))
