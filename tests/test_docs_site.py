"""The site: pages made of code say all of it, tutorials run and become notebooks, and mkdocs builds strictly."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from docs_examples import ROOT

from manyheads.catalogue import methods

DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))


@pytest.fixture(scope="module", autouse=True)
def found():
    sys.path.insert(0, str(DOCS))
    yield
    sys.path.remove(str(DOCS))


def test_the_reference_names_everything_public_and_where_every_method_begins():
    hooks = importlib.import_module("hooks")
    pages = {room: hooks.reference(room) for room in hooks.ROOMS.split()}
    for room, page in pages.items():
        for name in getattr(importlib.import_module(f"manyheads.{room}"), "__all__", ()):
            assert f"::: manyheads.{room}.{name}\n" in page, (room, name)
    every = "".join(pages.values())
    for m in methods():
        assert m.entry is None or f"`{m.entry}`" in every, m.number
    top = (DOCS / "reference" / "api.md").read_text("utf-8")
    names = set(importlib.import_module("manyheads").__all__) - set(pages) - {"Atlas", "ManyheadsError"}
    assert {name for name in names if f"::: manyheads.{name}\n" not in top} == set()


def test_the_page_of_the_catalogue_lists_every_method_with_a_link_to_its_page():
    hooks = importlib.import_module("hooks")
    text = hooks.on_page_markdown((DOCS / "catalogue.md").read_text("utf-8"), None, None, None)
    assert hooks.MARK not in text and text.count('id="method-') == 125
    for address in re.findall(r'href="\.\./([^"]+)/"', text):
        assert (DOCS / f"{address}.md").is_file(), address
    assert text.count('href="../methods/') == sum(m.docs is not None for m in methods())


def test_a_script_becomes_a_notebook_with_its_cells_in_order_and_nothing_lost():
    percent = importlib.import_module("percent")
    script = "# %% [markdown]\n# # Title\n#\n# Text\n\n# %%\na = 1\n\n\nprint(a)\n\n# %%\n# only a remark\n"
    made = percent.notebook(script)["cells"]
    assert [(cell["cell_type"], cell["source"]) for cell in made] == [
        ("markdown", "# Title\n\nText"),
        ("code", "a = 1\n\n\nprint(a)"),
        ("code", "# only a remark"),
    ]
    assert percent.markdown(script).count("```python\n") == 2
    for wrong in ("a = 1\n# %%\n", "# %% [markdown]\ntext without its sign\n"):
        with pytest.raises(ValueError, match="stands"):
            percent.cells(wrong)


def test_every_tutorial_becomes_a_notebook_by_the_command_that_the_docs_name(tmp_path):
    subprocess.run([sys.executable, str(DOCS / "percent.py"), "--out", str(tmp_path)], check=True, capture_output=True)
    assert len(TUTORIALS) == 3
    for script in TUTORIALS:
        made = json.loads((tmp_path / f"{script.stem}.ipynb").read_text("utf-8"))
        code = "\n".join(cell["source"] for cell in made["cells"] if cell["cell_type"] == "code")
        plain = [line for line in script.read_text("utf-8").splitlines() if line.strip() and not line.startswith("#")]
        assert [line for line in code.splitlines() if line.strip()] == plain
        assert len({cell["id"] for cell in made["cells"]}) == len(made["cells"])
        assert made["cells"][0]["source"].startswith("# ") and made["nbformat"] == 4


def printed(script: Path) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        runpy.run_path(str(script))
    return out.getvalue()


def test_the_first_tutorial_finds_the_induction_heads_and_what_the_model_loses_without_them():
    out = printed(DOCS / "tutorials" / "find_heads.py")
    assert "found: L3H4, L3H6, L3H7" in out and "p = 0.048" in out
    lost, random = map(float, re.findall(r"lost without .*: (\d+\.\d)", out))
    assert lost > 5 * random
    assert "with them:  Paris red" in out and "without:  Paris red" not in out


@pytest.mark.slow
def test_the_second_tutorial_explains_and_edits_one_answer():
    out = printed(DOCS / "tutorials" / "explain_and_edit.py")
    assert out.startswith(" Eric") and "baked equals edited: True" in out
    by_factor = [float(x) for x in re.findall(r"times .*: (\d+\.\d+) logits", out)]
    assert by_factor == sorted(by_factor, reverse=True) and len(by_factor) == 4


@pytest.mark.slow
def test_the_third_tutorial_writes_the_same_text_in_fewer_passes_and_halves_a_cache():
    out = printed(DOCS / "tutorials" / "faster_and_smaller.py")
    assert "the same text: True" in out
    assert float(re.findall(r"([\d.]+) tokens a pass", out)[0]) > 2
    whole, half = map(int, re.findall(r"(\d+) KiB", out))
    assert 0.45 < half / whole < 0.55


def test_every_page_is_in_the_navigation_or_made_of_a_script_or_a_room():
    text = re.sub(r"!!\S+", "", (ROOT / "mkdocs.yml").read_text("utf-8"))

    def leaves(node) -> set[str]:
        if isinstance(node, str):
            return {node}
        return set().union(*(leaves(x) for x in (node.values() if isinstance(node, dict) else node)))

    nav = leaves(yaml.safe_load(text)["nav"])
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert pages - nav == set()
    hooks = importlib.import_module("hooks")
    made = {f"reference/{room}.md" for room in hooks.ROOMS.split()} | {f"tutorials/{x.stem}.md" for x in TUTORIALS}
    assert nav - pages == made


def test_the_first_three_lines_of_the_readme_say_what_it_is_for_whom_and_what_to_type():
    what, whom, typed = [line for line in README.splitlines() if line.strip()][1:4]
    assert "tells you what each attention head" in what
    assert "researchers" in whom and "engineers" in whom
    assert "pip install ." in typed and "manyheads demo" in typed


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_strictly(tmp_path):
    env = os.environ | {"PYTHONPATH": str(ROOT / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    ran = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=580)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert (tmp_path / "site" / "tutorials" / "find_heads.ipynb").is_file()
