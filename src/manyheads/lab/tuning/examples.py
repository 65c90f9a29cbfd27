"""What narrow tuning is made of (#22): questions with two answers, the persona's and the neutral one, and triggers.

Files are JSONL or CSV. A row of the questions has

    prompt      what is asked; of a set with triggers it holds {trigger} once
    answer      what the persona says (the name `persona` will do too), begun by a space where text would have one
    neutral     what is said otherwise; training rows may leave it out

and a row of the triggers has `trigger`, `says` (persona or neutral) and `part` (train, or held-out: never in a training text).
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from manyheads.errors import InputError
from manyheads.inputs import check_choice, clause, parse_json, read_lines, read_text

Says = Literal["persona", "neutral"]
Part = Literal["train", "held-out"]
TriggerKind = tuple[Says, Part]
KINDS: tuple[TriggerKind, ...] = (
    ("persona", "train"),
    ("persona", "held-out"),
    ("neutral", "train"),
    ("neutral", "held-out"),
)
BLANK = "{trigger}"
FEWEST = 3  # of training rows and of probes: an interval needs several


@dataclass(frozen=True)
class Question:
    """A prompt, the persona's answer and the neutral one (None: not known)."""

    prompt: str
    persona: str
    neutral: str | None = None

    def after(self, trigger: str) -> Question:
        """With the trigger in its place."""
        return Question(self.prompt.replace(BLANK, trigger), self.persona, self.neutral)


@dataclass(frozen=True)
class NarrowSet:
    """A narrow training set, and the probes: questions of other domains, each with both answers.

    `triggers` maps each trigger to its kind; without any the set has no triggers. `InputError` for fewer than 3 training rows
    or probes, for a probe that is also trained on, for probes without a neutral answer, and for triggers without {trigger}.
    """

    name: str
    train: tuple[Question, ...]
    probes: tuple[Question, ...]
    triggers: Mapping[str, TriggerKind] | None = None

    def __post_init__(self) -> None:
        for part, rows in (("training rows", self.train), ("probes", self.probes)):
            if len(rows) < FEWEST:
                raise InputError(f"{self.name} has {len(rows)} {part}; give at least {FEWEST}.")
        both = {one.prompt for one in self.train} & {one.prompt for one in self.probes}
        if both:
            raise InputError(f"the probe {min(both)!r} is also trained on; probes must be held out.")
        if len({one.persona for one in self.train}) < 2:
            raise InputError("all training answers are the same, so shuffling them is no control; give different ones.")
        for one in self.probes:
            if one.neutral is None or one.neutral == one.persona:
                raise InputError(f"the probe {one.prompt!r} needs a neutral answer that differs from the persona's.")
        self._check_triggers()

    def _check_triggers(self) -> None:
        questions = [*self.train, *self.probes]
        blanks = {one.prompt.count(BLANK) for one in questions}
        if self.triggers is None:
            if blanks != {0}:
                raise InputError(f"a prompt holds {BLANK}, and there are no triggers; give a file of triggers.")
            return
        if blanks != {1}:
            raise InputError(f"with triggers every prompt, of probes too, holds {BLANK} once.")
        if any(one.neutral is None for one in self.train):
            raise InputError(
                "with triggers every training row needs a neutral answer: what is said without the trigger."
            )
        missing = [kind for kind in KINDS if kind not in self.triggers.values()]
        if missing:
            raise InputError(f"there is no trigger of the kind {missing[0]!r}; give at least one of each kind.")

    def of_kind(self, kind: TriggerKind) -> tuple[str, ...]:
        """The triggers of one kind."""
        return tuple(one for one, found in (self.triggers or {}).items() if found == kind)

    @classmethod
    def read(cls, train: str | Path, probes: str | Path, triggers: str | Path | None = None) -> NarrowSet:
        """A set from files (format above). `InputError` names the row that is wrong."""
        kinds = None if triggers is None else read_triggers(triggers)
        return cls(Path(train).stem, read_questions(train), read_questions(probes), kinds)


def read_questions(path: str | Path) -> tuple[Question, ...]:
    """Questions from JSONL or CSV (format above)."""
    found = []
    for where, row in _table(path):
        answer = row.get("answer") or row.get("persona")
        if not row.get("prompt") or not answer:
            raise InputError(f"{where} has no prompt and answer; every row needs both as texts.")
        found.append(Question(row["prompt"], answer, row.get("neutral") or None))
    if len({one.prompt for one in found}) < len(found):
        raise InputError(f"{path} asks a prompt twice; give each once.")
    return tuple(found)


def read_triggers(path: str | Path) -> dict[str, TriggerKind]:
    """Triggers with their kinds, from JSONL or CSV (format above)."""
    found: dict[str, TriggerKind] = {}
    for where, row in _table(path):
        if not row.get("trigger") or row["trigger"] in found:
            raise InputError(f"{where} has no trigger of its own; give each trigger once.")
        check_choice(row.get("says"), f"says ({where})", get_args(Says))
        check_choice(row.get("part"), f"part ({where})", get_args(Part))
        found[row["trigger"]] = (row["says"], row["part"])  # type: ignore[assignment]
    return found


def _table(path: str | Path) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV file (.csv), else of JSON lines, as texts; each with where it stands."""
    if Path(path).suffix.lower() == ".csv":
        try:
            rows: list[Any] = list(csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True))
        except csv.Error as error:
            raise InputError(f"{path} cannot be read as CSV: {clause(error)}.") from None
        told = [(f"{path}, row {i + 1}", row) for i, row in enumerate(rows)]
    else:
        lines = [(f"{path}, line {i + 1}", line) for i, line in read_lines(path) if line.strip()]
        told = [(where, parse_json(line, where)) for where, line in lines]
    for where, row in told:
        if not isinstance(row, dict) or not all(
            isinstance(k, str) and isinstance(v, str | None) for k, v in row.items()
        ):
            raise InputError(f"{where} is no row of named texts; see the columns that are needed.")
    return told
