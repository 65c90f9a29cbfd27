"""Tutorials are Python scripts in the percent format; this makes notebooks and pages of them.

    python docs/percent.py --out notebooks        # a .ipynb for each script of docs/tutorials

A line `# %% [markdown]` begins a cell of text, whose lines are comments; a line `# %%` begins a cell of code.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"


@dataclass(frozen=True)
class Cell:
    """A part of a tutorial: text (Markdown) or code (Python)."""

    kind: str
    text: str


def cells(script: str) -> list[Cell]:
    """The cells of a script. What stands before the first one is an error, since it would be lost."""
    found: list[tuple[str, list[str]]] = []
    for line in script.splitlines():
        if line.startswith("# %%"):
            found.append(("markdown" if "[markdown]" in line else "code", []))
        elif found:
            found[-1][1].append(line)
        elif line.strip():
            raise ValueError(f"the line {line!r} stands before the first cell; begin with '# %% [markdown]'.")
    made = []
    for kind, lines in found:
        if kind == "markdown":
            wrong = [line for line in lines if line.strip() and not line.startswith("#")]
            if wrong:
                raise ValueError(f"the line {wrong[0]!r} stands in a cell of text; begin it with '# '.")
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        made.append(Cell(kind, "\n".join(lines).strip("\n")))
    return [cell for cell in made if cell.text.strip()]


def notebook(script: str) -> dict[str, Any]:
    """The script as a Jupyter notebook, version 4.5, without outputs."""

    def made(i: int, cell: Cell) -> dict[str, Any]:
        entry: dict[str, Any] = {"cell_type": cell.kind, "id": f"cell-{i}", "metadata": {}, "source": cell.text}
        return entry if cell.kind == "markdown" else entry | {"execution_count": None, "outputs": []}

    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {
        "cells": [made(i, cell) for i, cell in enumerate(cells(script))],
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


def markdown(script: str) -> str:
    """The script as a page of the documentation."""
    parts = [cell.text if cell.kind == "markdown" else f"```python\n{cell.text}\n```" for cell in cells(script)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Write the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the notebooks")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for script in sorted(TUTORIALS.glob("*.py")):
        made = json.dumps(notebook(script.read_text("utf-8")), indent=1, ensure_ascii=False)
        file = out / f"{script.stem}.ipynb"
        file.write_text(made + "\n", "utf-8")
        print(file)


if __name__ == "__main__":
    main()
