"""Random repeated tokens: the inputs on which heads that look by position or by repetition show, all in one pass.

Each row is `<bos> r_1 .. r_P r_1 .. r_P` with different random tokens r, so that nothing but position and repetition can be
attended to (Olsson et al., arXiv:2209.11895; Elhage et al. 2021). A `Reduction` is what one behaviour keeps of a layer's pattern
while the pattern is there, and how that becomes a score; most are the mean of one diagonal,

    score[l, h] = mean_{t in rows} pattern[l, h, t, t - offset]        in [0, 1], dimensionless

Nothing of size [T, T] is kept.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.tasks import repeated_tokens
from manyheads.tasks.texts import opening_token

MAX_TOKENS = 1024  # of one forward pass: larger ones leave the processor's caches


@dataclass(frozen=True)
class Copies:
    """Where the copies stand in a row: the first from `start` on, the second `period` tokens later."""

    start: int
    period: int


class Reduction(ABC):
    """A behaviour that is read off patterns on repeated tokens."""

    about: About

    @abstractmethod
    def reduce(self, pattern: Float[Tensor, "B H T T"], copies: Copies) -> Float[Tensor, "B H ..."]:
        """What is kept of one layer's pattern."""

    def score(self, kept: Float[np.ndarray, "N L H ..."]) -> tuple[Float[np.ndarray, "N L H"], dict[str, Any]]:
        """The score of each row, and what else goes into `meta`."""
        return kept, {}

    @staticmethod
    def together(
        reductions: Sequence[Reduction], model: HeadModel, *, n: int, seed: int, bar: Bar = Bar()
    ) -> dict[str, HeadScores]:
        """Scores of several reductions from the same passes: how the survey takes them."""
        scores = score_repeats(model, reductions, n=n, length=64, seed=seed, bar=bar)
        return {one.name: one for one in scores}


@dataclass(frozen=True)
class Diagonal(Reduction):
    """One diagonal of the pattern: `offset(P)` tokens back, on every query or in the second copy only."""

    about: About
    offset: Callable[[int], int]
    second_copy: bool

    def reduce(self, pattern: Float[Tensor, "B H T T"], copies: Copies) -> Float[Tensor, "B H"]:
        offset = self.offset(copies.period)
        first = copies.start + copies.period if self.second_copy else max(copies.start, offset)
        diagonal = pattern.diagonal(-offset, dim1=2, dim2=3)  # query t, key t - offset, from t = offset on
        return diagonal[..., first - offset :].float().mean(-1)


class Reductions(Reader):
    """Keeps what each reduction makes of each layer: `kept[r][l]` `[B, H, ...]`."""

    site = "attention"

    def __init__(self, reductions: Sequence[Reduction], copies: Copies) -> None:
        self.reductions, self.copies = reductions, copies
        self.kept: list[list[Tensor]] = [[] for _ in reductions]

    def read(self, call: AttentionCall) -> None:
        for reduction, kept in zip(self.reductions, self.kept, strict=True):
            kept.append(reduction.reduce(call.pattern, self.copies).cpu())


def repeats(model: HeadModel, n: int, length: int, seed: int) -> tuple[Int[Tensor, "N T"], int, int]:
    """The rows, the period P (`length`, less where positions or vocabulary do not reach), and where the first copy starts."""
    ids = usable_ids(model)
    first = opening_token(model)
    start = 0 if first is None else 1
    longest = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    period = min(length, len(ids), (longest - start - 2) // 2)
    if n < 1 or period < 2:
        raise InputError(f"repeated tokens need n >= 1 rows and a length of at least 2; got n={n}, length={length}.")
    rows = repeated_tokens(ids, n, period, seed)
    if first is not None:
        rows = torch.cat([torch.full((n, 1), first), rows], 1)
    return rows, period, start


def usable_ids(model: HeadModel) -> list[int]:
    """Token ids that stand for text: without the special ones."""
    special = set(getattr(model.tokenizer, "all_special_ids", None) or ())
    special |= {getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
    size = model.vocab_size if model.tokenizer is None else min(model.vocab_size, len(model.tokenizer))
    return [i for i in range(size) if i not in special]


def score_repeats(
    model: HeadModel,
    reductions: Sequence[Reduction],
    *,
    n: int,
    length: int,
    seed: int,
    bar: Bar = Bar(),
) -> list[HeadScores]:
    """Every reduction's scores from the same forward passes; one example is one row. Layers without heads are NaN."""
    for reduction in reductions:
        model.require_alike(reduction.about.name, every_layer=False)
    rows, period, start = repeats(model, n, length, seed)
    per_row: list[list[Tensor]] = [[] for _ in reductions]
    for chunk in rows.split(max(1, MAX_TOKENS // rows.shape[1])):
        reader = Reductions(reductions, Copies(start, period))
        model.look(chunk, reader)
        for kept, layers in zip(per_row, reader.kept, strict=True):
            kept.append(torch.stack(layers, 1))
        bar(len(chunk))
    scores = []
    for reduction, kept in zip(reductions, per_row, strict=True):
        found, more = reduction.score(np.asarray(torch.cat(kept)))
        values = np.full((len(found), *model.shape), np.nan)
        values[:, list(model.layout.attention_layers)] = found
        about = reduction.about
        if more:  # what else it says of each head is not spread over the layers
            model.require_alike(about.name)
        meta = Provenance.of(model, about.name, about.paper, seed, n=n, length=period).to_json() | more
        scores.append(HeadScores.from_examples(about.name, values, meta))
    return scores
