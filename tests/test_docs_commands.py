"""Every command and every Python block of the docs: commands exist with their options, names can be imported, cheap ones run."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import inspect
import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from io import StringIO
from typing import Any

import pytest
import typer
from docs_examples import PAGES, ROOT, Line, blocks, command_lines, name_of, python_blocks
from typer.exceptions import TyperException

import manyheads as mh
from manyheads import cli
from manyheads.errors import ManyheadsError
from manyheads.evaluation import experiments
from manyheads.shrink.shrinking import shrink_ways
from manyheads.trace.explaining import ways

ROOT_COMMAND = typer.main.get_command(cli.app)
LINES = command_lines()
BENCHMARKS = {path.stem: path for path in (ROOT / "benchmarks").rglob("*.py") if not path.stem.startswith("_")}
ELSEWHERE = {"lm_eval", "IPython", "kvpress", "ray", "chronos", "peft", "optuna", "nnsight", "torchjd", "datasets"}


def parsed(words: tuple[str, ...]) -> tuple[list[str], dict[str, Any]]:
    """The commands that `words` name, and what their options are. `TyperException` where the command line would say no."""
    command, rest, context, names, values = ROOT_COMMAND, list(words), None, [], {}
    while True:
        context = command.make_context(names[-1] if names else "manyheads", rest, parent=context)
        values |= context.params
        left = [*context._protected_args, *context.args] if hasattr(context, "_protected_args") else list(context.args)
        if not hasattr(command, "commands") or not left:
            return names, values
        name, command, rest = command.resolve_command(context, left)
        names.append(str(name))


def wrong(line: Line) -> str | None:
    """Why the command line does not take it, or None. In a sentence a command may stand without what it needs."""
    words = tuple(word for word in line.words if line.block or word not in ("...", "COMMAND"))
    for placeholder, value in {
        "GOAL": "prefer memory",
        "TASK": "ioi",
        "TOKENS": "1000",
        "<command>": "methods",
    }.items():
        words = tuple(word.replace(placeholder, value) for word in words)
    if words[:1] == ("--install-completion",):
        return None
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            names, values = parsed(words)
    except typer.Exit:
        return None
    except TyperException as error:
        said = error.format_message()
        return None if not line.block and re.match(r"(Missing|Option .* requires)", said) else said
    except ManyheadsError as error:
        return str(error)
    return unknown(names, values)


def unknown(names: list[str], values: dict[str, Any]) -> str | None:
    """Names that the command itself would refuse: experiments, benchmarks, behaviours, methods."""
    place, given = " ".join(names), {name: value for name, value in values.items() if value is not None}
    found: dict[str, tuple[set[str], Any]] = {
        "lab run": ({*experiments("lab")}, given.get("name")),
        "predict run": ({*experiments("predict"), *experiments("draft")}, given.get("name")),
        "forecast try": ({*experiments("forecast")}, given.get("name")),
        "bench": ({*BENCHMARKS}, given.get("name")),
        "atlas survey": ({*mh.atlas.behaviours()}, given.get("behaviours")),
        "trace": ({*ways()}, given.get("method")),
        "shrink": ({*shrink_ways(), "list"}, given.get("method")),
    }
    known, said = found.get(place, (set(), None))
    said = [] if said is None else said if isinstance(said, list | tuple) else [said]
    said = [part for one in said for part in str(one).split(",")]
    missing = [one for one in said if known and one not in known and not one.isupper()]
    return f"{place} knows no {missing}" if missing else None


def test_there_is_something_to_look_at():
    assert len(LINES) > 250 and sum(line.block for line in LINES) > 100
    assert sum(len(python_blocks(page)) for page in PAGES) > 100


def test_every_command_of_the_docs_exists_with_its_options():
    found = {str(line): why for line in LINES if (why := wrong(line))}
    assert not found


@pytest.mark.parametrize(
    "words, why",
    [
        (("atlass",), "No such command"),
        (("atlas", "ladon", "--colour"), "No such option"),
        (("edit", "scale", "ladon"), "Missing"),
        (("lab", "run", "nothing"), "knows no"),
        (("shrink", "ladon", "--method", "duo,nothing"), "knows no"),
    ],
)
def test_what_does_not_exist_is_seen(words, why):
    assert why in str(wrong(Line("a page", words, True)))
    assert (wrong(Line("a page", words, False)) is None) == (why == "Missing")


class Parsed(Exception):
    """A benchmark has read its arguments."""


BENCHED = [line for line in LINES if line.words[:1] == ("bench",) and len(line.words) > 2]


@pytest.mark.slow
@pytest.mark.parametrize("line", BENCHED, ids=str)
def test_every_benchmark_takes_the_arguments_that_the_docs_give_it(line, monkeypatch):
    def parse(app, *args, **kwargs):
        if not isinstance(app, typer.Typer):
            function, app = app, typer.Typer()
            app.command()(function)
        command, rest, context = typer.main.get_command(app), words, None
        while True:
            context = command.make_context(line.words[1], rest, parent=context)
            left = [*getattr(context, "_protected_args", ()), *context.args]
            if not hasattr(command, "commands") or not left:
                raise Parsed
            _, command, rest = command.resolve_command(context, left)

    def parse_old(self, args=None, namespace=None):
        _, left = known_args(self, args, namespace)
        assert not left, f"unknown arguments {left}"
        raise Parsed

    words = [
        word for word in line.words[2:] if not re.search(r"[\[\]|]|\.\.\.", word)
    ]  # `[--full | --rate 2e-3]` is a choice
    known_args = argparse.ArgumentParser.parse_known_args
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_old)
    monkeypatch.setattr(typer, "run", parse)
    monkeypatch.setattr(typer.Typer, "__call__", parse)
    monkeypatch.setattr(sys, "argv", [line.words[1], *words])
    file = BENCHMARKS[line.words[1]]
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(file.parent))
    with pytest.raises(Parsed):
        runpy.run_path(str(file), run_name="__main__")


def test_every_other_command_names_files_and_targets_that_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    seen = 0
    for page in PAGES:
        text = page.read_text("utf-8")
        spans = [line for language, body in blocks(text) if language in ("", "sh") for line in body.splitlines()]
        spans += [
            " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        ]
        for span in spans:
            if match := re.match(r"(?:\S*python )((?:recipes|benchmarks|docs)/\S+\.py)", span):
                seen += 1
                assert (ROOT / match[1]).is_file(), f"{page}: {span}"
            if match := re.match(r"make (\w+)", span):
                seen += 1
                assert match[1] in targets, f"{page}: {span}"
    assert seen > 10


# Python blocks.
BLOCKS = [(name_of(page), i, block) for page in PAGES for i, block in enumerate(python_blocks(page))]


@cache
def module_of(name: str) -> Any:
    return importlib.import_module(name)


def names_of(tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """Every name of manyheads that a block imports or reaches through `mh`, with what it is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "manyheads":
            module = module_of(node.module)
            for alias in node.names:
                try:
                    yield alias.asname or alias.name, getattr(module, alias.name)
                except AttributeError:
                    yield alias.asname or alias.name, module_of(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute):
            chain = ast.unparse(node)
            if re.fullmatch(r"mh(\.\w+)+", chain):
                found: Any = mh
                for part in chain.split(".")[1:]:
                    if not (inspect.ismodule(found) or inspect.isclass(found)):
                        break
                    found = getattr(found, part)
                else:
                    yield chain, found


@pytest.mark.parametrize("page, i, block", BLOCKS, ids=[f"{page}-{i}" for page, i, _ in BLOCKS])
def test_every_python_block_parses_and_its_names_and_arguments_exist(page, i, block):
    tree = ast.parse(block)
    for node in ast.walk(tree):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for name in modules:
            if name.split(".")[0] not in ELSEWHERE:
                assert importlib.util.find_spec(name) is not None, f"{page}: no module {name}"
    known = dict(names_of(tree))
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.Call)
            or (found := known.get(ast.unparse(node.func))) is None
            or not callable(found)
        ):
            continue
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            continue
        if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            continue
        strange = {k.arg for k in node.keywords if k.arg} - set(parameters)
        assert not strange, f"{page}: {ast.unparse(node.func)} takes no {strange}"


def test_names_that_do_not_exist_are_seen():
    for wrong_one in ("mh.atlas.inducton(model)", "from manyheads.atlas import nothing"):
        with pytest.raises((AttributeError, ImportError)):
            list(names_of(ast.parse(wrong_one)))
