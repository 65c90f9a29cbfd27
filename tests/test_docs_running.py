"""The docs as they run: commands and Python blocks that need no download, in order, in a folder with the files that they read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from docs_examples import Line, command_lines
from typer.testing import CliRunner

import manyheads as mh
from manyheads import cli

# Lines that run in a second or two: what somebody types first.
QUICK = ("lab list", "predict list", "forecast methods", "shrink --method list", "methods", "trace ladon", "--help")
# What is added so that a line takes less time; its own words stay.
SHORTER = {
    r"(lab|predict) run ": ["--quick", "--seeds", "1"],
    r"lab watch": ["--steps", "20"],
    r"draft train": ["--texts", "16", "--length", "48", "--n", "8", "--steps", "4"],
    r"draft bench": ["--n", "1", "--max-new-tokens", "8", "--repeats", "1"],
    r"shrink ladon": ["--ratio", "0.5", "--lengths", "64", "--rounds", "1"],
    r"forecast (sales|series|elnino)": ["--windows", "1", "--epochs", "1"],
    r"forecast (compare|explain)": ["--windows", "1", "--epochs", "1"],
    r"edit .*--controls": ["--controls", "0"],
    r"edit (learn|ladon --goal .?learn)": ["--epochs", "1"],
}
# Lines that are parsed only (tests/test_docs_commands.py), and why.
NOT_RUN = {
    r"smollm2|gemma3|SmolLM2|gpt2|Qwen": "needs a download",
    r"\b(MODEL|FILE|FOLDER|NUMBER|NAME|A B)\b|FILE\.csv|edit1|Rachel \.\.\. to": "has placeholders",
    r"^fetch|^check ladon|install-completion": "needs a download, or changes the shell",
    r"^bench": "benchmarks have a test of their own",
    r"^demo": "test_first_steps runs it",
}


def line_of(line: Line) -> str:
    return " ".join(line.words)


def runs() -> list[Line]:
    """Each line once, in the order of pages; those of a page in their order, since one may read what another wrote."""
    found: dict[tuple[str, ...], Line] = {}
    for line in command_lines():
        if line.block and not any(re.search(pattern, line_of(line)) for pattern in NOT_RUN):
            found.setdefault(line.words, line)
    return list(found.values())


def run_line(line: Line, shorter: bool) -> None:
    words = ["texts.jsonl" if word == "*.jsonl" else word for word in line.words]  # what the shell makes of it
    if shorter:
        for pattern, more in SHORTER.items():
            if re.search(pattern, line_of(line)):
                names = {name for name in more if name.startswith("--")}
                words = [
                    w for i, w in enumerate(words) if w not in names and (i == 0 or words[i - 1] not in names)
                ] + more
        words += ["--force"] if any(w in ("--out", "--page") for w in words) else []
    result = CliRunner().invoke(cli.app, words, env={"COLUMNS": "160"})
    assert result.exit_code == 0, f"{words}\n{result.output}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the docs' commands read, under the names that the docs use."""
    made = tmp_path_factory.mktemp("docs")
    mh.data.series_frame("elnino").to_csv(made / "elnino.csv", index=False)
    mh.data.series_frame("elnino").tail(240).to_csv(made / "sales.csv", index=False)
    mh.data.series_frame("sunspots").to_csv(made / "series.csv", index=False)
    examples = mh.tasks.get_task("ioi").examples(60, 0, "train")
    rows = [{"prompt": e.prompt, "answer": e.answer, "foil": e.foil} for e in examples]
    (made / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    texts = [{"text": f"{e.prompt} {e.answer}. " * 4} for e in examples[:4]]
    (made / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts), "utf-8")
    for name, head in (("first", "L3H7"), ("second", "L3H6")):
        mh.HeadEdit.of(mh.open_model(), mh.Scale([head], 0.5), method="by hand", found="for a test").save(made / name)
    return made


@pytest.mark.parametrize(
    "line", [x for x in runs() if line_of(x).startswith(QUICK) and "--page" not in x.words], ids=str
)
def test_what_somebody_types_first_runs(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_line(line, shorter="--out" in line.words)


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in runs() if not line_of(x).startswith(QUICK)], ids=str)
def test_every_command_that_needs_no_download_runs(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    run_line(line, shorter=True)


# Pages whose Python blocks run one after another on the bundled model; of the others their reason.
FIRST = ("docs/lab.md", "docs/methods/previous-token.md")
