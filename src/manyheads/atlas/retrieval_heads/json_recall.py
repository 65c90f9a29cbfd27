"""The proxy task of AttentionInfluence (#17): look a random key up in a JSON object and repeat its sentence.

Hua et al., arXiv:2505.07293, score heads on 800 of these: 32-character random keys with web sentences of at most 30 tokens,
three solved examples, one query, just under 4,096 tokens. This one is made for short contexts: fewer pairs, shorter keys,
sentences from our lexicon. The solved examples look up other keys of the same object.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import ClassVar

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Split, Task
from manyheads.tasks.families.needle import filler


@dataclass(frozen=True)
class JsonRecall(Task):
    """`{"x7Kq": "It was a red barn.", ...} ... {"x7Kq": "` -> `It`, then ` was a red barn.`

    `pairs` keys of `key_length` letters and digits, `solved` of them looked up before the last is asked for. The foil begins
    another value. Spans: `needle` (the value to copy), `key` and `query` (the key in the object and at the end).
    """

    name: ClassVar[str] = "json_recall"
    pairs: int = 6
    key_length: int = 6
    solved: int = 3

    def draw(self, rng: random.Random, split: Split) -> Example:
        if not 0 <= self.solved < self.pairs:
            raise InputError(f"{self.solved} solved examples and a query need more than {self.pairs} pairs.")
        keys = [
            "".join(rng.choices(string.ascii_letters + string.digits, k=self.key_length)) for _ in range(self.pairs)
        ]
        values = [filler(rng) for _ in keys]
        asked = rng.sample(range(self.pairs), self.solved + 1)
        lines = [f'"{key}": "{value}"' for key, value in zip(keys, values, strict=True)]
        body = "{" + ", ".join(lines) + "}\n" + "".join(f"{{{lines[i]}}}\n" for i in asked[:-1])
        key, value = keys[asked[-1]], values[asked[-1]]
        prompt = f'{body}{{"{key}": "'
        first = value.split()[0]
        at = body.index(lines[asked[-1]])
        start = at + len(f'"{key}": "')
        others = [v.split()[0] for v in values if v.split()[0] != first]
        return Example(
            prompt=prompt,
            answer=first,
            foil=others[0] if others else None,
            spans={
                "needle": (start, start + len(value)),
                "key": (at + 1, at + 1 + len(key)),
                "query": (len(body) + 2, len(body) + 2 + len(key)),
            },
            continuation=value[len(first) :],
        )
