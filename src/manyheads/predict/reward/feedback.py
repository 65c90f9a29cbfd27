"""What people said of answers, as files of JSON lines: which of two they prefer, or a rating.

    {"prompt": "...", "chosen": "...", "rejected": "...", "margin": 2}          the margin may be missing (1), 0 is a tie
    {"prompt": "...", "response": "...", "rating": 3.5}
    {"prompt": "...", "response": "..."}                                       to be scored; pairs can be scored, too

A file may hold both kinds. Every line is looked at before any work begins, and an error names its number.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manyheads.errors import InputError
from manyheads.inputs import check_number, parse_json, read_lines


@dataclass(frozen=True)
class AnswerPair:
    """Two answers to a prompt, the first of which is preferred with a strength `margin`; 0 is a tie."""

    prompt: str
    chosen: str
    rejected: str
    margin: float = 1.0


@dataclass(frozen=True)
class RatedAnswer:
    """An answer to a prompt and its rating, higher for better."""

    prompt: str
    response: str
    rating: float


@dataclass(frozen=True)
class Feedback:
    """Preferences and ratings."""

    pairs: tuple[AnswerPair, ...] = ()
    rated: tuple[RatedAnswer, ...] = ()

    @property
    def answers(self) -> list[tuple[str, str]]:
        """Every prompt with every answer to it, each once, in the order of the file."""
        both = [[(one.prompt, one.chosen), (one.prompt, one.rejected)] for one in self.pairs]
        return list(dict.fromkeys([*itertools.chain(*both), *((one.prompt, one.response) for one in self.rated)]))

    @property
    def compared(self) -> tuple[AnswerPair, ...]:
        """The pairs that are no tie; without any, every two answers to one prompt whose ratings differ."""
        if self.pairs:
            return tuple(pair for pair in self.pairs if pair.margin)
        by_prompt: dict[str, list[RatedAnswer]] = {}
        for one in self.rated:
            by_prompt.setdefault(one.prompt, []).append(one)
        out = []
        for answers in by_prompt.values():
            for a, b in itertools.islice(itertools.combinations(answers, 2), MOST_PAIRS):
                if a.rating != b.rating and a.response != b.response:
                    high, low = (a, b) if a.rating > b.rating else (b, a)
                    out.append(AnswerPair(a.prompt, high.response, low.response, high.rating - low.rating))
        return tuple(out)


MOST_PAIRS = 20_000  # of the ratings of one prompt


def read_feedback(path: str | Path, *, least: int = 1) -> Feedback:
    """The preferences and ratings of a file. `InputError` names the line that is wrong, or says that there are too few."""
    pairs, rated = list[AnswerPair](), list[RatedAnswer]()
    for row, where in _rows(path):
        if "rating" in row:
            rating = check_number(row["rating"], f"rating in {where}")
            rated.append(RatedAnswer(_text(row, "prompt", where), _text(row, "response", where), rating))
        else:
            pairs.append(_pair(row, where))
    found = len(pairs) + len(rated)
    if found < least:
        raise InputError(
            f"{path} holds {found} {'line' if found == 1 else 'lines'} of feedback; give at least {least}."
        )
    return Feedback(tuple(pairs), tuple(rated))


def read_answers(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a file to be scored, each with a prompt and a response, or with chosen and rejected. `InputError` as above."""
    rows = []
    for row, where in _rows(path):
        _text(row, "prompt", where)
        for name in answers_of(row, where):
            _text(row, name, where)
        rows.append(row)
    if not rows:
        raise InputError(f"{path} holds no answers; give lines with a prompt and a response.")
    return rows


def answers_of(row: dict[str, Any], where: str = "the line") -> Sequence[str]:
    """The names of the answers in a row: response, or chosen and rejected."""
    if "response" in row:
        return ("response",)
    if "chosen" in row and "rejected" in row:
        return ("chosen", "rejected")
    raise InputError(f"{where} has neither a response nor chosen and rejected; it has {', '.join(row) or 'nothing'}.")


def split_feedback(feedback: Feedback, share: float, seed: int = 0) -> tuple[Feedback, Feedback]:
    """Two parts, the second with about this share. A prompt is in one of them only, if there are ten or more prompts."""
    prompts = {one.prompt for one in feedback.pairs} | {one.prompt for one in feedback.rated}
    apart = len(prompts) >= 10
    pairs = [one.prompt if apart else f"pair {i}" for i, one in enumerate(feedback.pairs)]
    rated = [one.prompt if apart else f"rated {i}" for i, one in enumerate(feedback.rated)]
    different = sorted({*pairs, *rated})
    order = np.random.default_rng(seed).permutation(len(different))
    second = {different[i] for i in order[: max(1, round(share * len(different)))]}

    def part(there: bool) -> Feedback:
        return Feedback(
            tuple(one for one, key in zip(feedback.pairs, pairs, strict=True) if (key in second) is there),
            tuple(one for one, key in zip(feedback.rated, rated, strict=True) if (key in second) is there),
        )

    return part(False), part(True)


def unseen_feedback(test: Feedback, feedback: Feedback) -> Feedback:
    """The test without what was learned from: pairs of the same two answers, and answers that were rated."""
    seen = {(one.prompt, frozenset((one.chosen, one.rejected))) for one in feedback.pairs}
    rated = {(one.prompt, one.response) for one in feedback.rated}
    return Feedback(
        tuple(one for one in test.pairs if (one.prompt, frozenset((one.chosen, one.rejected))) not in seen),
        tuple(one for one in test.rated if (one.prompt, one.response) not in rated),
    )


def _rows(path: str | Path) -> list[tuple[dict[str, Any], str]]:
    found = []
    for number, line in read_lines(path):
        if line.strip():
            where = f"{path}, line {number + 1}"
            row = parse_json(line, where)
            if not isinstance(row, dict):
                raise InputError(f'{where} is no object with names; give one such as {{"prompt": ..., ...}} a line.')
            found.append((row, where))
    return found


def _pair(row: dict[str, Any], where: str) -> AnswerPair:
    chosen, rejected = _text(row, "chosen", where), _text(row, "rejected", where)
    if chosen == rejected:
        raise InputError(f"{where} has the same text as chosen and as rejected; leave it out.")
    margin = check_number(row.get("margin", 1.0), f"margin in {where}", 0.0)
    return AnswerPair(_text(row, "prompt", where), chosen, rejected, margin)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    if name not in row:
        raise InputError(f"{where} has no {name}; it has {', '.join(row) or 'nothing'}.")
    value = row[name]
    if not isinstance(value, str) or (name != "prompt" and not value.strip()):
        raise InputError(f"{name} in {where} is {repr(value)[:40]}; give a text.")
    return value
