"""What an unfinished survey keeps on disk, so that the same call goes on where it stopped."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manyheads.atlas.core.result import CausalCheck
from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.heads import HeadScores
from manyheads.inputs import clause, read_object


@dataclass(frozen=True)
class SurveyState:
    """The results of an unfinished survey in `folder`, a file each; None keeps nothing.

    NAME.parquet are scores, effects-JUDGE.parquet what ablating each head alone costs, check-NAME-MODE.json a causal check, and
    NAME.json what was found out before (how many examples, what a family is worth).
    """

    folder: Path | None

    def scores(self, name: str) -> HeadScores | None:
        file = self._file(f"{name}.parquet")
        return HeadScores.load(file) if file is not None and file.is_file() else None

    def keep(self, found: Mapping[str, HeadScores]) -> None:
        for name, scores in found.items():
            if (file := self._file(f"{name}.parquet")) is not None:
                scores.save(file, force=True)

    def check(self, name: str, mode: str) -> CausalCheck | None:
        saved = self.note(f"check-{name}-{mode}")
        try:
            return None if saved is None else CausalCheck.from_json(saved)
        except (KeyError, TypeError, ValueError) as error:
            file = self._file(f"check-{name}-{mode}.json")
            raise InputError(f"{file} is damaged ({clause(error)}); remove it, and it is computed again.") from None

    def keep_check(self, check: CausalCheck) -> None:
        self.keep_note(f"check-{check.behaviour}-{check.mode}", asdict(check))

    def note(self, name: str) -> dict[str, Any] | None:
        file = self._file(f"{name}.json")
        return read_object(file) if file is not None and file.is_file() else None

    def keep_note(self, name: str, note: Mapping[str, Any]) -> None:
        if (file := self._file(f"{name}.json")) is not None:
            text = json.dumps(note, indent=1)
            write_atomically(file, lambda path: path.write_text(text, "utf-8"), force=True)

    def _file(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / re.sub(r"[^\w.-]", "_", name)
