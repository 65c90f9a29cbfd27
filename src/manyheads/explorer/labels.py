"""What users say of heads: a JSON file of labels that others can load, tied to its model by the fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from manyheads.errors import InputError, MismatchError
from manyheads.explorer.asking import Label, Labels
from manyheads.files import write_atomically
from manyheads.inputs import read_object
from manyheads.version import __version__


class LabelFile:
    """Labels of one model, kept in `path` if there is one, else for this session. Saved whole at every change."""

    def __init__(self, path: Path | None, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint
        self.labels: list[Label] = self._load() if path is not None and path.exists() else []

    def put(self, labels: Labels) -> None:
        """Replace all labels."""
        self.labels = list(labels.labels)
        if self.path is not None:
            text = json.dumps(self.json(), indent=1, ensure_ascii=False)
            write_atomically(self.path, lambda to: Path(to).write_text(text, "utf-8"), force=True)

    def json(self) -> dict[str, Any]:
        """The file's content."""
        rows = [label.model_dump() for label in self.labels]
        return {"fingerprint": self.fingerprint, "version": __version__, "labels": rows}

    def _load(self) -> list[Label]:
        assert self.path is not None
        saved = read_object(self.path)
        if saved.get("fingerprint") != self.fingerprint:
            raise MismatchError(
                f"{self.path} holds labels of the model {saved.get('fingerprint')}, not of this one, {self.fingerprint}."
            )
        try:
            return Labels(labels=saved.get("labels", [])).labels
        except ValidationError as error:
            where = ".".join(map(str, error.errors()[0]["loc"]))
            raise InputError(f"{self.path} is no file of labels: {where}: {error.errors()[0]['msg']}.") from None
