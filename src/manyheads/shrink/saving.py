"""Presses as folders: `press.json`, and the scores of heads where a press has them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadScores
from manyheads.inputs import read_object
from manyheads.shrink.cache.press import Press
from manyheads.shrink.shrinking import shrink_way
from manyheads.version import __version__


def save_press(press: Press, folder: str | Path, method: str, ratio: float, *, force: bool = False) -> Path:
    """Write the press that `shrink_way(method)(ratio)` makes, with its scores. Save what `press.settled(model)` gives."""
    about = {"method": method, "ratio": ratio, "version": __version__}
    scores = getattr(press, "scores", None)

    def write(into: Path) -> None:
        (into / "press.json").write_text(json.dumps(about, indent=1), "utf-8")
        if scores is not None:
            scores.save(into / "scores.parquet")

    return write_folder_atomically(folder, write, force=force)


def load_press(folder: str | Path) -> Press:
    """The press that `save_press` wrote. `InputError` for a folder that holds none.

    Scores know their model: used with another, they are refused.
    """
    folder = Path(folder)
    if not (folder / "press.json").is_file():
        raise InputError(f"{folder} holds no press: there is no press.json in it.")
    about = read_object(folder / "press.json")
    name, ratio = about.get("method"), about.get("ratio")
    if not isinstance(name, str) or isinstance(ratio, bool) or not isinstance(ratio, int | float):
        raise InputError(f"{folder / 'press.json'} names no method and ratio; make it anew.")
    found = shrink_way(name)
    press = found(float(ratio))
    if found.kind != "cache":
        raise InputError(f"{name} makes weights smaller, and is no press; open its checkpoint.")
    if (folder / "scores.parquet").is_file():
        press = replace(press, scores=HeadScores.load(folder / "scores.parquet"))
    made: Press = press
    return made
