"""Repeated sequences: a list of unrelated words comes twice, and the second copy can be predicted (induction)."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Span, Split, Task, of_split, other
from manyheads.tasks.lexicon import WORDS


@dataclass(frozen=True)
class Repeat(Task):
    """`cup lamp tree ... cup lamp` -> ` tree`. Held out: a fifth of the words.

    Spans: `source` is the answer in the first copy, `previous` the word before it, `last` the last word of the prompt.
    """

    name: ClassVar[str] = "repeat"
    # 45 words are held out
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"shortest": (2, 44), "longest": (2, 1_000_000)}
    shortest: int = 5
    longest: int = 24

    def draw(self, rng: random.Random, split: Split) -> Example:
        pool = of_split(self.name, WORDS, split)
        words = rng.sample(pool, rng.randint(self.shortest, min(self.longest, len(pool) - 1)))
        known = rng.randint(1, len(words) - 1)
        separator = rng.choice([" ", ", "])
        prompt, where = _join(words + words[:known], separator, rng.choice(["", "List: "]))
        prompt = prompt + ("," if separator == ", " else "")
        swapped = other(rng, pool, *words)
        start, end = where[known]
        return Example(
            prompt=prompt,
            answer=" " + words[known],
            foil=" " + other(rng, words, words[known], words[known - 1]) if len(words) > 2 else None,
            corrupted=prompt[:start] + swapped + prompt[end:],
            corrupted_answer=" " + swapped,
            spans={"source": where[known], "previous": where[known - 1], "last": where[-1]},
        )


def repeated_tokens(
    vocab_ids: Sequence[int] | int, n: int, length: int, seed: int = 0, copies: int = 2
) -> Int[Tensor, "{n} {copies}*{length}"]:
    """`n` rows of `length` different random token ids, each row repeated `copies` times; needs no tokenizer.

    `vocab_ids` are the ids to draw from, or a vocabulary size.
    """
    ids = torch.arange(vocab_ids) if isinstance(vocab_ids, int) else torch.tensor(list(vocab_ids))
    if length < 1 or length > len(ids):
        raise InputError(f"length is {length}, but {len(ids)} token ids allow 1 to {len(ids)} different ones a row.")
    generator = torch.Generator().manual_seed(seed)
    rows = torch.stack([ids[torch.randperm(len(ids), generator=generator)[:length]] for _ in range(n)])
    return rows.repeat(1, copies)


def _join(words: list[str], separator: str, text: str) -> tuple[str, list[Span]]:
    """The words joined, and the span of each."""
    where = []
    for i, word in enumerate(words):
        text += separator if i else ""
        where.append((len(text), len(text) + len(word)))
        text += word
    return text, where
