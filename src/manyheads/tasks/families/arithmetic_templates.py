"""Sums, differences, products and quotients of two digits in 36 phrasings each: the prompts of #14 (arXiv:2409.01659)."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece

# How an operation is written: between its operands (three ways), as a noun, and as a request.
_FORMS = {
    "+": (("+", "plus", "added to"), "sum", "{operator} {a} and {b}", "add"),
    "-": (("-", "minus", "less"), "difference", "{operator} {b} from {a}", "subtract"),
    "*": (("*", "times", "multiplied by"), "product", "{operator} {a} by {b}", "multiply"),
    "/": (("/", "divided by", "over"), "quotient", "{operator} {a} by {b}", "divide"),
}
_OF_PHRASES = (
    "{E} =",
    "{E} is",
    "{E} equals",
    "The result of {e} is",
    "Calculate {e}. The result is",
    "Q: What is {e}? A:",
    "Q: How much is {e}? A:",
    "Question: What does {e} equal? Answer:",
)
_OF_REQUESTS = ("{E}. The result is", "If you {e}, you get", "Q: {E}. A:", "Question: {E}. Answer:")
RESULT: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a // b if a % b == 0 else -1,  # only whole quotients are asked for
}


def phrasings(sign: str) -> tuple[tuple[str, str], ...]:
    """The 36 templates of an operation, each with the word that stands for `{operator}` in it."""
    between, noun, request, verb = _FORMS[sign]
    found = [(_filled(frame, "{a} {operator} {b}"), word) for word in between for frame in _OF_PHRASES]
    found += [(_filled(frame, "the {operator} of {a} and {b}"), noun) for frame in _OF_PHRASES]
    for frame in _OF_REQUESTS:
        found.append((_filled(frame, request), verb if "{e}" in frame else verb.capitalize()))
    return tuple(found)


@dataclass(frozen=True)
class ArithmeticTemplates(Task):
    """`Q: What is 3 times 2? A:` -> ` 6`: operands 1-9, results 0 to `largest`. Held out: a third of the pairs of operands.

    The foil is a near miss, the twin has other operands. `operation` is "+", "-", "*", "/" or None for all four. With `largest=9`
    answers are one digit, so one token where each digit is one. Spans: `a`, `operator`, `b`, `end`.
    """

    name: ClassVar[str] = "arithmetic_templates"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"operation": tuple(_FORMS)}
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"largest": (9, 81)}
    operation: str | None = None
    largest: int = 81

    def draw(self, rng: random.Random, split: Split) -> Example:
        sign = self.operation or rng.choice(tuple(_FORMS))
        pairs = [pair for pair in self._pairs(sign) if in_split(self._key(sign, pair), split, 3)]
        a, b = rng.choice(pairs)
        result = RESULT[sign](a, b)
        others = [pair for pair in self._pairs(sign) if RESULT[sign](*pair) != result]
        twin = rng.choice([pair for pair in others if len(str(RESULT[sign](*pair))) == len(str(result))] or others)
        near = rng.choice([r for d in (1, 2) for r in (result - d, result + d) if 0 <= r <= self.largest])
        template, word = rng.choice(phrasings(sign))
        prompt, spans = fill_in(template, a=str(a), b=str(b), operator=word)
        return Example(
            prompt=prompt,
            answer=f" {result}",
            foil=f" {near}",
            corrupted=fill_in(template, a=str(twin[0]), b=str(twin[1]), operator=word)[0],
            corrupted_answer=f" {RESULT[sign](*twin)}",
            spans=spans | {"end": last_piece(prompt)},
        )

    def _pairs(self, sign: str) -> list[tuple[int, int]]:
        digits = range(1, 10)
        return [(a, b) for a in digits for b in digits if 0 <= RESULT[sign](a, b) <= self.largest]

    def _key(self, sign: str, pair: tuple[int, int]) -> str:
        return f"{self.name}/{sign}/{sorted(pair) if sign in '+*' else pair}"


def _filled(frame: str, phrase: str) -> str:
    return frame.replace("{e}", phrase).replace("{E}", phrase[0].upper() + phrase[1:])
