"""The docs as they run: commands and Python blocks that need no download, in order, in a folder with the files that they read."""

from __future__ import annotations

import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from docs_examples import PAGES, ROOT, Line, command_lines, name_of, python_blocks
from typer.testing import CliRunner

import manyheads as mh
from manyheads import cli

# Lines that run in a second or two: what somebody types first.
QUICK = ("lab list", "predict list", "forecast methods", "shrink --method list", "methods", "trace ladon", "--help")
# What is added so that a line takes less time; its own words stay.
SHORTER = {
    r"(lab|predict|judge|vision|brain|control|audio) run ": ["--quick", "--seeds", "1"],
    r"lab watch": ["--steps", "20"],
    r"lab reverse": ["--steps", "1", "--seeds", "2"],
    r"draft train": ["--length", "48", "--n", "10", "--steps", "4"],
    r"draft bench": ["--n", "1", "--max-new-tokens", "8", "--repeats", "1"],
    r"shrink ladon": ["--ratio", "0.5", "--lengths", "128", "--rounds", "3"],
    r"forecast (sales|series|elnino)": ["--windows", "2", "--epochs", "1"],
    r"forecast (compare|explain)": ["--windows", "2", "--epochs", "1"],
    r"edit .*--controls": ["--controls", "0"],
    r"edit (learn|ladon --goal .?learn)": ["--epochs", "1"],
}
# Lines that are parsed only (tests/test_docs_commands.py), and why.
NOT_RUN = {
    r"smollm2|gemma3|SmolLM2|gpt2|Qwen": "needs a download",
    r"\b(MODEL|FILE|FOLDER|NUMBER|NAME|A B)\b|FILE\.csv|edit1|Rachel \.\.\. to": "has placeholders",
    r"^fetch|^check ladon|install-completion": "needs a download, or changes the shell",
    r"^explore(?!.*--out)": "serves until it is stopped",
    r"^lab run --all": "takes eleven minutes",
    r"^vision predict": "needs pictures, and weights that take minutes to train",
    r"^bench": "benchmarks have a test of their own",
    r"^demo": "test_first_steps runs it",
    r"^plan config.json": "needs a config; test_memory_plan has one",
    r"^replicate": "test_replication runs it",
    r"^(predict|lab) show": "shows what a whole run left behind",
    r"^lab checkpoints": "needs a training's checkpoints",
    r"--module minigrid": "needs an environment's package",
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


def judged(made: Path) -> None:
    """Tables that the judges' commands name, with the columns that these ask for."""
    draw = np.random.default_rng(0)
    n = 120
    x = {name: draw.normal(size=n).round(2) for name in ("bmi", "pressure", "attendance", "age")}
    good = x["bmi"] + draw.normal(size=n) > 0
    words = {"repaid": ("no", "yes"), "course": ("bad", "good"), "left": ("yes", "no"), "outcome": ("ill", "well")}
    table = pd.DataFrame(x).assign(sex=draw.integers(1, 3, n), kind=np.where(good, "benign", "malignant"))
    for name, (low, high) in words.items():
        file = {"repaid": "people", "left": "students", "outcome": "patients"}.get(name, "diagnosed")
        table.drop(columns="kind").assign(**{name: np.where(good, high, low)}).to_csv(made / f"{file}.csv", index=False)
    both = pd.read_csv(made / "patients.csv").assign(course=np.where(good, "good", "bad"))
    both.to_csv(made / "patients.csv", index=False)
    table.to_csv(made / "cancer.csv", index=False)
    places = table.drop(columns="kind").assign(lon=draw.uniform(size=n), lat=draw.uniform(size=n), height=x["bmi"] * 2)
    places.assign(site=np.arange(n) % 12).to_csv(made / "trees.csv", index=False)
    soil = pd.DataFrame(draw.normal(size=(n, 5)), columns=["x", "y", "elev", "dist", "zinc"])
    soil.to_csv(made / "meuse.csv", index=False)
    stays = pd.DataFrame(draw.normal(size=(n, 3)), columns=["severity", "beds", "days"]).assign(
        hospital=np.arange(n) % 4
    )
    for name in ("hospitals", "new"):
        stays.assign(month=stays["hospital"], OT=stays["days"]).to_csv(made / f"{name}.csv", index=False)
    (made / "known.csv").write_text((made / "hospitals.csv").read_text("utf-8"), "utf-8")
    asked = [(f"f{i}", ("none", "helped")[i % 2], f"q{q}", draw.random(), q % 2) for i in range(12) for q in range(4)]
    columns = ["forecaster", "arm", "question", "forecast", "outcome"]
    pd.DataFrame(asked, columns=columns).to_csv(made / "answers.csv", index=False)
    sizes = np.arange(100, 1100, 100)
    pd.DataFrame({"size": sizes, "score": 97 - 60 * sizes**-0.35}).to_csv(made / "scores.csv", index=False)
    pd.DataFrame({"size": sizes, "loss": 1 + 3 * sizes**-0.3}).to_csv(made / "losses.csv", index=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What the docs' commands read, under the names that the docs use."""
    made = tmp_path_factory.mktemp("docs")
    mh.data.series_frame("elnino").to_csv(made / "elnino.csv", index=False)
    mh.data.series_frame("elnino").tail(240).to_csv(made / "sales.csv", index=False)
    mh.data.series_frame("sunspots").to_csv(made / "series.csv", index=False)
    mh.data.series_frame("interest").to_csv(made / "interest.csv", index=False)
    pd.DataFrame({"light": [200.0, None] * 10, "sound": [None, 350.0] * 10}).to_csv(made / "trials.csv", index=False)
    pd.DataFrame({"weak maximum": [5, None] * 10, "next minimum": [11.0] * 20}).to_csv(made / "cycles.csv", index=False)
    judged(made)
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
    monkeypatch.setenv("MANYHEADS_HOME", str(folder / "home"))  # experiments keep their runs there
    run_line(line, shorter="--out" in line.words)


@pytest.mark.slow
@pytest.mark.parametrize("line", [x for x in runs() if not line_of(x).startswith(QUICK)], ids=str)
def test_every_command_that_needs_no_download_runs(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MANYHEADS_HOME", str(folder / "home"))  # experiments keep their runs there
    run_line(line, shorter=True)


# Python blocks. Those of a page run one after another, since one may use what another made. These do not run, and why.
OWN_DATA = "uses data or a model of the reader's own"
DOWNLOAD = "needs a download"
LONG = "trains for minutes"
PAGES_NOT_RUN = {
    "README.md": "test_first_steps runs it on the bundled model",
    "docs/draft.md": "reads the drafter that its commands train",
    "docs/first-model.md": DOWNLOAD,
    "docs/index.md": "test_first_steps runs its first block; the second opens models of the hub",
    "docs/install.md": "its last block opens a model of the hub",
    "docs/forecast.md": OWN_DATA,
    "docs/methods/aardvark.md": OWN_DATA,
    "docs/methods/abrupt.md": LONG,
    "docs/methods/arithmetic.md": OWN_DATA,
    "docs/methods/attention-influence.md": OWN_DATA,
    "docs/methods/attention-output-saes.md": LONG,
    "docs/methods/autoint.md": OWN_DATA,
    "docs/methods/autotimes.md": OWN_DATA,
    "docs/methods/careers.md": OWN_DATA,
    "docs/methods/causalm.md": DOWNLOAD,
    "docs/methods/channel-clustering.md": OWN_DATA,
    "docs/methods/chimera.md": LONG,
    "docs/methods/chronos-2.md": OWN_DATA,
    "docs/methods/clover.md": LONG,
    "docs/methods/comparing.md": LONG,
    "docs/methods/confidence.md": OWN_DATA,
    "docs/methods/dual-heads.md": OWN_DATA,
    "docs/methods/emergent-heads.md": OWN_DATA,
    "docs/methods/fourier.md": OWN_DATA,
    "docs/methods/gating.md": LONG,
    "docs/methods/gpht.md": OWN_DATA,
    "docs/methods/hard-patches.md": OWN_DATA,
    "docs/methods/hydra.md": LONG,
    "docs/methods/in-context-language-learning.md": LONG,
    "docs/methods/induction-formation.md": LONG,
    "docs/methods/kv-prediction.md": LONG,
    "docs/methods/laws.md": LONG,
    "docs/methods/momentum.md": OWN_DATA,
    "docs/methods/multiple-choice.md": LONG,
    "docs/methods/ngrams.md": OWN_DATA,
    "docs/methods/olinear.md": OWN_DATA,
    "docs/methods/prithvi.md": OWN_DATA,
    "docs/methods/prompt-cam.md": DOWNLOAD,
    "docs/methods/safety.md": LONG,
    "docs/methods/smetimes.md": OWN_DATA,
    "docs/methods/softs.md": OWN_DATA,
    "docs/methods/time-llm.md": OWN_DATA,
    "docs/methods/tspulse.md": OWN_DATA,
    "docs/methods/vision-heads.md": OWN_DATA,
    "docs/model.md": DOWNLOAD,
    "docs/predict.md": OWN_DATA,
}


def outcome(page: Path, folder: Path) -> tuple[str, str]:
    """What the blocks of a page print, and what they say that they print (comments at the beginning of a line)."""
    printed, said = io.StringIO(), []
    names: dict[str, object] = {"__name__": "docs"}
    for block in python_blocks(page):
        if "lm_eval" in block:  # no package of ours
            continue
        with redirect_stdout(printed):
            exec(compile(block, str(page), "exec"), names)
        said += re.findall(r"^# ?(.*)$", block, re.MULTILINE)
    return printed.getvalue(), "\n".join(said)


@pytest.mark.parametrize("name", ["docs/faq.md", "docs/lab.md"])
def test_the_examples_of_short_pages_print_what_they_say(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed, said = outcome(ROOT / name, tmp_path)
    assert said.split() and printed.split() == said.split()


RUNNING = [name_of(page) for page in PAGES if python_blocks(page) and name_of(page) not in PAGES_NOT_RUN]


def test_most_pages_run_and_the_others_have_a_reason():
    assert set(PAGES_NOT_RUN) <= {name_of(page) for page in PAGES}
    assert len(RUNNING) > len(PAGES_NOT_RUN)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNNING)
def test_the_python_of_every_other_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome(ROOT / name, tmp_path)
