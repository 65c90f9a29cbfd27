"""The house itself: no import circle, no crowded folder, and methods that need little of it."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import grimp
import networkx as nx
import pytest

SOURCE = Path(__file__).parents[1] / "src" / "manyheads"
MOST_FILES = 15


def folder(module: str, graph: grimp.ImportGraph) -> str:
    return module if graph.find_children(module) else module.rpartition(".")[0]


def test_no_import_goes_in_a_circle_neither_of_modules_nor_of_folders():
    graph = grimp.build_graph("manyheads", cache_dir=None)
    arrows = [(a, b) for a in graph.modules for b in graph.find_modules_directly_imported_by(a)]
    between = [
        (x, y)
        for x, y in ((folder(a, graph), folder(b, graph)) for a, b in arrows)
        if x != y and not x.startswith(f"{y}.") and not y.startswith(f"{x}.")  # a room and what is inside it are one
    ]
    circles = [
        c for edges in (arrows, between) for c in nx.strongly_connected_components(nx.DiGraph(edges)) if len(c) > 1
    ]
    assert len(arrows) > 1000
    assert circles == []


def test_no_folder_holds_more_files_than_one_can_look_through():
    folders = [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir() and any(path.glob("*.py")))]
    crowded = {str(path.relative_to(SOURCE)): n for path in folders if (n := len(list(path.glob("*.py")))) > MOST_FILES}
    assert crowded == {}


def test_imports_inside_the_package_are_absolute():
    """Relative ones would hide from the search that moves files."""
    for path in SOURCE.rglob("*.py"):
        relative = [
            x for x in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(x, ast.ImportFrom) and x.level
        ]
        assert not relative, path


# A trunk's head and an attention head, and the draft room's own trunk: the field's words, each clear where it stands. Every
# conversion has an `install`, by which it is found.
SHARED = {"Head", "install"}


def test_every_public_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for path in SOURCE.rglob("*.py"):
        if "cli" in path.parts:  # commands are named as they are typed
            continue
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path.relative_to(SOURCE)))
    assert {name: where for name, where in places.items() if len(where) > 1 and name not in SHARED} == {}


def test_a_module_of_a_room_is_found_where_it_lies_now():
    with pytest.warns(DeprecationWarning, match=r"is now manyheads\.draft\.drafters\.prompt_lookup"):
        old = importlib.import_module("manyheads.draft.prompt_lookup")
    assert old is importlib.import_module("manyheads.draft.drafters.prompt_lookup")
    with pytest.warns(DeprecationWarning, match="editing.head_edit"):
        edits = importlib.import_module("manyheads.edit.head_edit")
    assert edits.HeadEdit is importlib.import_module("manyheads.model.editing.head_edit").HeadEdit


@pytest.mark.parametrize("name", ["draft.nothing", "atlas.scores", "nothing", "draft.__init__x"])
def test_what_is_nowhere_or_in_two_places_is_not_found(name):
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"manyheads.{name}")
