"""Pictures with phrases that each mean one thing in them, and the words of phrases as numbers.

Users' own, or made here (`phrased_scenes.py`). A phrase is split at everything that is no letter, digit or apostrophe, in lower
case. The vocabulary is that of the phrases one trains on; every other word is one and the same unknown word.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.vision.finding.scenes import BoxScenes

MOST_WORDS = 40  # of a phrase, as in PLVL
PADDING, UNKNOWN = 0, 1


@dataclass(frozen=True)
class Phrased:
    """Pictures in [0, 1], and of each phrase: which picture, its words, and the box (left, top, right, bottom; pixels) and
    mask of what it means.

    `InputError` for shapes that do not fit, boxes outside the picture, empty masks, phrases without a word or of over 40.
    """

    pixels: Float[Tensor, "N 3 S S"]
    scene: Int[Tensor, "M"]
    phrases: tuple[str, ...]
    boxes: Float[Tensor, "M 4"]
    masks: Bool[Tensor, "M S S"]

    def __post_init__(self) -> None:
        BoxScenes(
            self.pixels, self.scene, self.boxes, torch.zeros_like(self.scene), ("thing",)
        )  # refuses what is wrong
        many, side = len(self.scene), self.pixels.shape[-1]
        if not many or len(self.phrases) != many or self.masks.shape != (many, side, side):
            raise InputError(
                f"there are {many} boxes, {len(self.phrases)} phrases and masks of shape {list(self.masks.shape)}; give as "
                f"many of each, at least one, and masks of {side} x {side}."
            )
        if not bool(self.masks.flatten(1).any(1).all()):
            raise InputError("a mask is empty; leave its phrase away.")
        for phrase in self.phrases:
            words_of(phrase)

    def take(self, rows: Int[Tensor, "R"]) -> Phrased:
        """These phrases, in this order, each with a picture of its own."""
        said = tuple(self.phrases[i] for i in rows.tolist())
        return Phrased(self.pixels[self.scene[rows]], torch.arange(len(rows)), said, self.boxes[rows], self.masks[rows])

    def shuffled(self, seed: int = 0) -> Phrased:
        """The same phrases in a random order over the same pictures: the control for what a picture alone gives away."""
        order = torch.randperm(len(self.phrases), generator=torch.Generator().manual_seed(seed))
        return replace(self, phrases=tuple(self.phrases[i] for i in order.tolist()))


class Vocabulary:
    """Words as numbers: 0 fills up, 1 is every unknown word, then `words` in their order."""

    def __init__(self, words: Sequence[str]) -> None:
        if not words or len(set(words)) < len(words):
            raise InputError(f"got {len(words)} words; give at least one, and none twice.")
        self.words = tuple(words)
        self._number = {word: i + 2 for i, word in enumerate(words)}

    def __len__(self) -> int:
        """Of numbers, so the words and two."""
        return len(self.words) + 2

    @classmethod
    def of(cls, phrases: Sequence[str]) -> Vocabulary:
        """Of all words of some phrases, by the alphabet."""
        return cls(sorted({word for phrase in phrases for word in words_of(phrase)}))

    def numbers(self, phrases: Sequence[str]) -> Int[Tensor, "B W"]:
        """A row a phrase, as long as the longest needs."""
        rows = [[self._number.get(word, UNKNOWN) for word in words_of(phrase)] for phrase in phrases]
        longest = max(len(row) for row in rows)
        return torch.tensor([row + [PADDING] * (longest - len(row)) for row in rows])

    def unknown(self, phrase: str) -> list[str]:
        """Words of a phrase that are not in here."""
        return [word for word in words_of(phrase) if word not in self._number]


def words_of(phrase: str) -> list[str]:
    """The words of a phrase. `InputError` for none or more than 40."""
    words = re.findall(r"[^\W_]+(?:'[^\W_]+)*", phrase.lower())
    if not 1 <= len(words) <= MOST_WORDS:
        raise InputError(f"the phrase {phrase[:60]!r} has {len(words)} words; give 1 to {MOST_WORDS}.")
    return words
