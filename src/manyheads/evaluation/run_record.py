"""`RunRecord`: what an experiment ran so far, in a folder, so that an interrupted one goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.inputs import clause, read_object
from manyheads.version import __version__

RECORD = "experiment.json"


class RunRecord:
    """Rows (method, dataset, seed, metric, value) and the seconds that they took, on disk after every run.

    `InputError` if `folder` holds the record of another experiment, or of this one by other code; if not `strict`, no rows.
    """

    def __init__(self, folder: Path | None, name: str, code: str, *, strict: bool = True) -> None:
        self.path, self.name, self.code = None if folder is None else folder / RECORD, name, code
        self.rows: list[Any] = []
        self.seconds = 0.0
        if self.path is None or not self.path.exists():
            return
        try:
            kept = read_object(self.path)
            if (kept["name"], kept["version"], kept.get("code")) == (name, __version__, code):
                self.rows = [(str(m), str(d), int(s), str(k), _number(v)) for m, d, s, k, v in kept["rows"]]
                self.seconds = float(kept.get("seconds", 0.0))
                return
            found = f"a run of {kept['name']} by version {kept['version']}{'' if kept.get('code') == code else ' and other code'}"
        except (ValueError, KeyError, TypeError) as error:
            found = f"something else ({clause(error)})"
        if strict:
            raise InputError(f"{self.path.parent} holds {found}; give another folder, or remove it (run --again).")

    def has(self, method: str, dataset: str, seed: int) -> bool:
        """Whether a run is kept."""
        return any(row[:3] == (method, dataset, seed) for row in self.rows)

    def add(self, method: str, dataset: str, found: Mapping[int, Mapping[str, float]], seconds: float) -> None:
        """Keep the metrics of some seeds, and write the record."""
        for seed, metrics in found.items():
            self.rows += [(method, dataset, seed, metric, float(value)) for metric, value in metrics.items()]
        self.seconds += seconds
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rows = [(*row[:4], row[4] if math.isfinite(row[4]) else None) for row in self.rows]  # JSON has no NaN
            kept = {"name": self.name, "version": __version__, "code": self.code, "seconds": self.seconds, "rows": rows}
            text = json.dumps(kept)
            write_atomically(self.path, lambda file: file.write_text(text, "utf-8"), force=True)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
