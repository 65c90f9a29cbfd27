"""What every task family shares: an example, a template filler that returns spans, and a split by content."""

from __future__ import annotations

import random
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from string import Formatter
from typing import ClassVar, Literal

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number

Split = Literal["train", "test"]
Span = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """One prompt with its answer; `prompt + answer` is text as it would be read, no space is added in between.

    `foil` is the wrong answer to compare with, `corrupted` the twin prompt of the same shape whose answer is
    `corrupted_answer`; `spans` names character ranges of `prompt`; `accepted` lists further right answers and
    `continuation` is text that may follow the answer (the rest of a needle of several words, a full stop).
    """

    prompt: str
    answer: str
    foil: str | None = None
    corrupted: str | None = None
    corrupted_answer: str | None = None
    spans: dict[str, Span] = field(default_factory=dict)
    accepted: tuple[str, ...] = ()
    continuation: str = ""


class Task(ABC):
    """A family of prompts. A family fills in `draw`; its dataclass fields are what one may choose about it."""

    name: ClassVar[str]
    choices: ClassVar[Mapping[str, Collection[str]]] = {}  # setting -> what it may be
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}  # setting -> the least and the largest number it may be

    def __post_init__(self) -> None:
        """`InputError` for a setting out of its choices or its range; one that is None is open."""
        for name, allowed in self.choices.items():
            if getattr(self, name) is not None:
                check_choice(getattr(self, name), name, allowed)
        for name, (low, high) in self.ranges.items():
            value = getattr(self, name)
            if isinstance(low, int) and value is not None:
                check_integer(value, name, low, int(high))
            elif value is not None:
                check_number(value, name, low, high)
        if "shortest" in self.ranges and self.shortest > self.longest:  # type: ignore[attr-defined]
            raise InputError("shortest is larger than longest; give a smaller one.")

    @abstractmethod
    def draw(self, rng: random.Random, split: Split) -> Example:
        """One example with the content of `split`, all chance taken from `rng`."""

    def variants(self) -> dict[str, Task]:
        """The same family asked in other ways, by name: its other phrasings, where it has any."""
        now = getattr(self, "phrasing", None)
        others = [one for one in self.choices.get("phrasing", ()) if one != now]
        return {one: replace(self, phrasing=one) for one in others}  # type: ignore[type-var]

    def stream(self, seed: int = 0, split: Split = "test") -> Iterator[Example]:
        """Examples without end; the same seed gives the same ones. "train" and "test" share no content."""
        if split not in ("train", "test"):
            raise InputError(f'split is {split!r}; it must be "train" or "test".')
        rng = random.Random(f"{self.name}/{split}/{seed}")
        while True:
            yield self.draw(rng, split)

    def examples(self, n: int, seed: int = 0, split: Split = "test") -> list[Example]:
        """The first `n` examples of the stream."""
        if n < 1:
            raise InputError(f"n is {n}; ask for at least 1 example.")
        return list(islice(self.stream(seed, split), n))


def in_split(key: str, split: Split, share: int = 5) -> bool:
    """Whether content `key` belongs to `split`; one in `share` keys is held out for "test", the same ones always."""
    return (zlib.crc32(key.encode()) % share == 0) == (split == "test")


def of_split(family: str, items: Sequence[str], split: Split, share: int = 5) -> list[str]:
    """The items of `split` for one family (another family holds out other items)."""
    return [item for item in items if in_split(f"{family}/{item}", split, share)]


def fill_in(template: str, **parts: str) -> tuple[str, dict[str, Span]]:
    """Fill `{name}` fields, and return the span of each: `("Hi Mary", {"who": (3, 7)})`."""
    text, spans = "", {}
    for literal, name, _, _ in Formatter().parse(template):
        text += literal
        if name is not None:
            spans[name] = (len(text), len(text) + len(parts[name]))
            text += parts[name]
    return text, spans


def word_at(text: str, position: int) -> Span:
    """The span of the first word that starts at or after `position`, without punctuation."""
    start = position
    while start < len(text) and not text[start].isalnum():
        start += 1
    end = start
    while end < len(text) and text[end].isalnum():
        end += 1
    return start, end


def last_piece(text: str) -> Span:
    """The span of the last word or punctuation mark of `text`."""
    start = len(text) - 1
    while start > 0 and not text[start - 1].isspace() and text[start].isalnum() == text[start - 1].isalnum():
        start -= 1
    return start, len(text)


def other(rng: random.Random, items: Sequence[str], *not_these: str) -> str:
    """A random item that is none of `not_these`."""
    while (item := rng.choice(items)) in not_these:
        pass
    return item
