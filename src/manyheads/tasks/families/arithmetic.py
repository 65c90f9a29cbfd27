"""Two-operand addition and subtraction with results from 0 to 100."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from manyheads.tasks.base import Example, Split, Task, fill_in, in_split, last_piece

TEMPLATES = {
    "+": ("{a} + {b} =", "Q: What is {a} plus {b}? A:", "The sum of {a} and {b} is"),
    "-": ("{a} - {b} =", "Q: What is {a} minus {b}? A:", "The difference of {a} and {b} is"),
}


@dataclass(frozen=True)
class Arithmetic(Task):
    """`37 + 25 =` -> ` 62`. Held out: a tenth of the pairs of operands (of a sum: in both orders).

    The foil is a near miss, the twin has another second operand. `operation` is "+", "-" or None for both. Spans: `a`,
    `b`, `end`.
    """

    name: ClassVar[str] = "arithmetic"
    choices: ClassVar[Mapping[str, Collection[str]]] = {"operation": tuple(TEMPLATES)}
    operation: str | None = None

    def draw(self, rng: random.Random, split: Split) -> Example:
        sign = self.operation or rng.choice("+-")
        a, b = _operands(rng, sign, split)
        near = rng.choice(
            [r for d in (1, 2, 10) for r in (_result(sign, a, b) - d, _result(sign, a, b) + d) if 0 <= r <= 100]
        )
        seconds = [c for c in range(101) if c != b and 0 <= _result(sign, a, c) <= 100 and len(str(c)) == len(str(b))]
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


def _operands(rng: random.Random, sign: str, split: Split) -> tuple[int, int]:
    while True:
        a, b = rng.randint(0, 100), rng.randint(0, 100)
        pair = (min(a, b), max(a, b)) if sign == "+" else (a, b)
        if 0 <= _result(sign, a, b) <= 100 and in_split(f"arithmetic/{sign}/{pair}", split, 10):
            return a, b


def _result(sign: str, a: int, b: int) -> int:
    return a + b if sign == "+" else a - b
