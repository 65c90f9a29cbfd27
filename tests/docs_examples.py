"""What the docs tell people to type: command lines and Python blocks of README.md and docs/**.md, as the tests use them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@dataclass(frozen=True)
class Line:
    """A command line: its page, its words, and whether it stands in a block (to be copied) or in a sentence."""

    page: str
    words: tuple[str, ...]
    block: bool

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def name_of(page: Path) -> str:
    """A page as it is named from the root of the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(text: str) -> list[tuple[str, str]]:
    """Every fenced block: its language, and what stands in it."""
    found = re.findall(r"^( *)```([^\n]*)\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [(info.split(" ")[0], re.sub(rf"^{indent}", "", body, flags=re.MULTILINE)) for indent, info, body in found]


def python_blocks(page: Path) -> list[str]:
    """The Python blocks of a page."""
    return [body for language, body in blocks(page.read_text("utf-8")) if language == "python"]


def command_lines() -> list[Line]:
    """Every `manyheads ...` of every page, each once a page."""
    found: dict[Line, None] = {}
    for page in PAGES:
        text = page.read_text("utf-8")
        for language, body in blocks(text):
            if language in ("", "sh", "bash", "text"):
                body = body.replace("\\\n", " ")
                for line in body.splitlines():
                    if line.strip().startswith("manyheads "):
                        found[Line(name_of(page), tuple(shlex.split(line, comments=True)[1:]), True)] = None
        prose = re.sub(r"^( *)```.*?^\1```", "", text, flags=re.DOTALL | re.MULTILINE)
        for span in re.findall(r"`([^`]+)`", prose):
            for part in " ".join(span.split()).split("; "):
                if part.startswith("manyheads "):
                    found[Line(name_of(page), tuple(shlex.split(part)[1:]), False)] = None
    return list(found)
