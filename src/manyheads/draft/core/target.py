"""The trunk's own next token: its distribution after every node of a tree, and how it is sampled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from manyheads.draft.core.tree import Tree
from manyheads.errors import InputError


@dataclass
class Target:
    """Sampling settings with the meaning they have in Transformers' `generate`; temperature 0 is greedy decoding.

    `processors` see `(ids so far, logits)` after the repetition rules and before temperature, as in `generate`. `rules` are all
    processors of each row that the settings and the model's generation config make (`rules.governed`). `InputError` for
    values out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    processors: Sequence[LogitsProcessor] = ()
    seed: int = 0
    generator: torch.Generator | None = field(default=None, init=False, repr=False)
    rules: list[LogitsProcessorList] = field(default_factory=list, init=False, repr=False)
    warpers: LogitsProcessorList = field(default_factory=LogitsProcessorList, init=False, repr=False)

    def __post_init__(self) -> None:
        finite = math.isfinite(self.temperature) and math.isfinite(self.repetition_penalty)
        if (
            not finite
            or not (self.temperature >= 0 and 0 < self.top_p <= 1 and self.repetition_penalty > 0)
            or min(self.top_k, self.no_repeat_ngram) < 0
        ):
            raise InputError(
                f"temperature {self.temperature}, top_k {self.top_k}, top_p {self.top_p}, repetition_penalty "
                f"{self.repetition_penalty}, no_repeat_ngram {self.no_repeat_ngram}: give finite numbers, temperature >= 0, "
                "top_k >= 0, top_p in (0, 1], repetition_penalty > 0, no_repeat_ngram >= 0."
            )
        if self.temperature not in (0.0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(self.temperature))
        if self.top_k and self.temperature:
            self.warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1 and self.temperature:
            self.warpers.append(TopPLogitsWarper(self.top_p))

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy (temperature 0)."""
        return self.temperature == 0.0

    def on(self, device: torch.device) -> Target:
        """This target, with its random generator reset on `device`."""
        self.generator = torch.Generator(device).manual_seed(self.seed)
        return self

    def scores(
        self,
        logits: Float[Tensor, "B Q V"],
        text: Sequence[list[int]],
        trees: Sequence[Tree] | None = None,
        tokens: Int[Tensor, "B N"] | None = None,
    ) -> Float[Tensor, "B Q V"]:
        """Logits after the rules on the text so far: node i of row b continues `text[b]` and the tokens of its path."""
        if not any(self.rules):
            return logits
        out = logits.clone().float()
        for row, (ids, scores) in enumerate(zip(text, out, strict=True)):
            drafted = [] if tokens is None else tokens[row].tolist()
            for node in range(len(scores)):
                tree = None if trees is None else trees[row]
                if tree is not None and node > len(tree):
                    continue
                path = [] if tree is None else [drafted[i - 1] for i in tree.path(node)]
                so_far = torch.tensor([ids + path], device=logits.device)
                scores[node] = self.rules[row](so_far, scores[node][None])[0]  # type: ignore[arg-type]
        return out

    def probabilities(self, scores: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """The distribution that is sampled from."""
        flat = scores.flatten(0, -2).float()
        nothing = flat.new_zeros(len(flat), 0, dtype=torch.long)
        return self.warpers(nothing, flat).softmax(-1).view(scores.shape)  # type: ignore[arg-type]

    def choose(self, scores: Float[Tensor, "B Q V"], places: Int[Tensor, "B Q"]) -> Int[Tensor, "B Q"]:
        """The trunk's own choice of the token at each place of its row's text: the best one, or one drawn.

        A draw depends on the seed, the row and the place only: the same seed gives the same text, whatever was guessed.
        """
        if self.greedy:
            return scores.argmax(-1)
        return (self.probabilities(scores) / self._noise(places, scores.shape[-1])).argmax(-1)

    def _noise(self, places: Int[Tensor, "B Q"], size: int) -> Float[Tensor, "B Q V"]:
        """Exponential variables e: argmax of probability / e is a draw from the distribution."""
        distinct, where = places.unique(return_inverse=True)
        generator = torch.Generator(places.device)
        table = places.new_empty(len(distinct), len(places), size, dtype=torch.float32)
        for number, place in enumerate(distinct.tolist()):
            # Multiplied to mix the bits: near seeds may give correlated streams.
            generator.manual_seed((1_000_003 * self.seed + place) * 0x9E3779B97F4A7C15 % 2**63)
            table[number].exponential_(generator=generator)
        return table[where, torch.arange(len(places), device=places.device)[:, None]]


def draw(probabilities: Float[Tensor, "*N V"], generator: torch.Generator | None) -> Int[Tensor, "*N"]:
    """One token drawn from each distribution."""
    return torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])
