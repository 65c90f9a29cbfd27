"""What mkdocs does while it builds the site: the pages that are made of code, so that they cannot fall behind it.

- `catalogue.md` gets the list of all methods, with fields that narrow it.
- `reference/ROOM.md` is made for each room: what the room offers by name (`__all__`), and the entries of its methods.
- `tutorials/NAME.md` and `tutorials/NAME.ipynb` are made of each script of `tutorials/`.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from percent import TUTORIALS, markdown, notebook

import manyheads

MARK = "<!-- the list of methods stands here in the built site -->"
ROOMS = " ".join(manyheads._ROOMS)


def reference(room: str) -> str:
    """The page of a room: its introduction, its public names, and where its methods begin."""
    from manyheads.catalogue import methods

    names = list(getattr(import_module(f"manyheads.{room}"), "__all__", ()))
    entries = {m.entry: m for m in methods() if m.entry and m.entry.startswith(f"manyheads.{room}.")}
    lines = [f"# manyheads.{room}", "", f"::: manyheads.{room}", "    options:"]
    lines += ["      members: false", "      show_root_heading: false", ""]
    for name in names:
        lines += [
            f"## {name}",
            "",
            f"::: manyheads.{room}.{name}",
            "    options:",
            "      show_root_heading: false",
            "",
        ]
    if entries:
        lines += ["## Where the methods of the catalogue begin", ""]
        lines += [f"- \\#{m.number} {m.name}: [`{entry}`][{entry}]" for entry, m in entries.items() if m.docs]
        lines += [""]
        for entry in entries:
            if entry.rpartition(".")[2] not in names:
                lines += [f"::: {entry}", "    options:", "      heading_level: 3", ""]
    return "\n".join(lines)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made of code."""
    from mkdocs.structure.files import File

    for room in ROOMS.split():
        files.append(File.generated(config, f"reference/{room}.md", content=reference(room)))
    for script in sorted(TUTORIALS.glob("*.py")):
        text = script.read_text("utf-8")
        page = markdown(text) + f"\n[As a notebook]({script.stem}.ipynb)\n"
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
        made = json.dumps(notebook(text), indent=1, ensure_ascii=False)
        files.append(File.generated(config, f"tutorials/{script.stem}.ipynb", content=made))
    return files


def on_page_markdown(text: str, page: Any, config: Any, files: Any) -> str:
    """Put the list of methods where the catalogue's page marks it."""
    if MARK not in text:
        return text
    from manyheads.catalogue import methods
    from manyheads.pages.catalogue.listing import listing, listing_css, listing_js

    shown = listing(methods(), docs=lambda path: f"../{path.removeprefix('docs/').removesuffix('.md')}/")
    style = "\n".join(line for line in listing_css().splitlines() if line)
    script = "\n".join(line for line in listing_js().splitlines() if line)
    return text.replace(MARK, f"<style>\n{style}\n</style>\n\n<div>{shown}</div>\n\n<script>\n{script}\n</script>")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """A table's empty corner is no heading."""
    return html.replace("<th></th>", "<td></td>")
