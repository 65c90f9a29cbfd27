"""Two-operand addition and subtraction, with results from 0 to 100 as long as no operand is larger."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece

LIMIT = 100  # of results
TRIES = 10_000
TEMPLATES = {
    "+": ("{a} + {b} =", "Q: What is {a} plus {b}? A:", "The sum of {a} and {b} is"),
    "-": ("{a} - {b} =", "Q: What is {a} minus {b}? A:", "The difference of {a} and {b} is"),
}


@dataclass(frozen=True)
class Arithmetic(Task):
    """`37 + 25 =` -> ` 62`. Held out: a tenth of the pairs of operands (of a sum: in both orders).

    The foil is a near miss, the twin has another second operand. `operation` is "+", "-" or None for both. `operands` are the
    least and the largest one: (1, 9) for tokenizers that write each digit apart, and for models that know no others. Spans:
    `a`, `b`, `end`.
    """

    name: ClassVar[str] = "arithmetic"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"operation": tuple(TEMPLATES)}
    operation: str | None = None
    operands: tuple[int, int] = (0, 100)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.operands) != 2 or not 0 <= self.operands[0] <= self.operands[1]:
            raise InputError(f"operands is {self.operands}; give the least and the largest, such as (1, 9).")

    def variants(self) -> dict[str, Task]:
        """One-digit operands."""
        return {} if self.operands[1] <= 9 else {"operands 1-9": replace(self, operands=(1, 9))}

    def draw(self, rng: random.Random, split: Split) -> Example:
        sign = self.operation or rng.choice("+-")
        a, b = self._pair(rng, sign, split)
        low, high = self.operands
        most = max(LIMIT, high)
        near = rng.choice(
            [r for d in (1, 2, 10) for r in (_result(sign, a, b) - d, _result(sign, a, b) + d) if 0 <= r <= most]
        )
        others = range(low, high + 1)
        seconds = [c for c in others if c != b and 0 <= _result(sign, a, c) <= most and len(str(c)) == len(str(b))]
        template = rng.choice(TEMPLATES[sign])
        prompt, spans = fill_in(template, a=str(a), b=str(b))
        twin = rng.choice(seconds) if seconds else None
        return Example(
            prompt=prompt,
            answer=f" {_result(sign, a, b)}",
            foil=f" {near}",
            corrupted=None if twin is None else fill_in(template, a=str(a), b=str(twin))[0],
            corrupted_answer=None if twin is None else f" {_result(sign, a, twin)}",
            spans={"a": spans["a"], "b": spans["b"], "end": last_piece(prompt)},
        )

    def _pair(self, rng: random.Random, sign: str, split: Split) -> tuple[int, int]:
        low, high = self.operands
        for _ in range(TRIES):
            a, b = rng.randint(low, high), rng.randint(low, high)
            pair = (min(a, b), max(a, b)) if sign == "+" else (a, b)
            if 0 <= _result(sign, a, b) <= max(LIMIT, high) and in_split(f"arithmetic/{sign}/{pair}", split, 10):
                return a, b
        raise InputError(
            f"operands from {low} to {high} leave no pair for {sign} in the {split} split; give a wider range."
        )


def _result(sign: str, a: int, b: int) -> int:
    return a + b if sign == "+" else a - b
