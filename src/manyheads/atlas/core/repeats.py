"""Random repeated tokens: the inputs on which heads that look by position or by repetition show, all in one pass.

Each row is `<bos> r_1 .. r_P r_1 .. r_P` with different random tokens r, so that nothing but position and repetition can be
attended to (Olsson et al., arXiv:2209.11895; Elhage et al. 2021). A `Reduction` is what one behaviour keeps of a layer's pattern
while the pattern is there, and how that becomes a score; most are the mean of one diagonal,

    score[l, h] = mean_{t in rows} pattern[l, h, t, t - offset]        in [0, 1], dimensionless

Nothing of size [T, T] is kept. Beside each score stands the same reduction of the pattern weighted by what is behind it
(Kobayashi et al., arXiv:2004.10102): a head that looks where its values are next to nothing, as sinks do, does little by it.

    weighted[t, s] = pattern[t, s] |v_s W_O| / sum over s' of pattern[t, s'] |v_s' W_O|
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
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
    """A behaviour that is read off patterns on repeated tokens. `by_content`: it needs the repetition, not only positions."""

    about: About
    by_content: bool = False

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
    """One diagonal of the pattern: `offset(P)` tokens back, on every query, or in the second copy only if `by_content`."""

    about: About
    offset: Callable[[int], int]
    by_content: bool  # then only queries of the second copy count

    def reduce(self, pattern: Float[Tensor, "B H T T"], copies: Copies) -> Float[Tensor, "B H"]:
        offset = self.offset(copies.period)
        first = copies.start + copies.period if self.by_content else max(copies.start, offset)
        diagonal = pattern.diagonal(-offset, dim1=2, dim2=3)  # query t, key t - offset, from t = offset on
        return diagonal[..., first - offset :].float().mean(-1)


class Reductions(Reader):
    """Keeps what each reduction makes of each layer's pattern, raw and weighted: `kept[r][l]`, `weighted[r][l]` `[B, H, ...]`.

    `gram[l]` is `W_O W_O^T` `[H, Dh, Dh]` of each layer.
    """

    site = "attention"

    def __init__(
        self, reductions: Sequence[Reduction], copies: Copies, gram: Mapping[int, Float[Tensor, "H Dh Dh"]]
    ) -> None:
        self.reductions, self.copies, self.gram = reductions, copies, gram
        self.kept: list[list[Tensor]] = [[] for _ in reductions]
        self.weighted: list[list[Tensor]] = [[] for _ in reductions]

    def read(self, call: AttentionCall) -> None:
        values = call.values_of(list(range(call.pattern.shape[1]))).float()
        lengths = torch.einsum("bhsd,hde,bhse->bhs", values, self.gram[call.layer].to(values), values)
        weighted = call.pattern.float() * lengths.clamp(min=0).sqrt()[:, :, None]
        weighted = weighted / weighted.sum(-1, keepdim=True).clamp(min=torch.finfo(weighted.dtype).tiny)
        for i, reduction in enumerate(self.reductions):
            self.kept[i].append(reduction.reduce(call.pattern, self.copies).cpu())
            self.weighted[i].append(reduction.reduce(weighted, self.copies).cpu())


def repeats(
    model: HeadModel, n: int, length: int, seed: int, *, copied: bool = True
) -> tuple[Int[Tensor, "N T"], int, int]:
    """The rows, the period P (`length`, less where positions or vocabulary do not reach), and where the first copy starts.

    Without `copied` other random tokens stand in the place of the second copy: rows of the same shape in which nothing repeats.
    """
    ids = usable_ids(model)
    first = opening_token(model)
    start = 0 if first is None else 1
    longest = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    period = min(length, len(ids), (longest - start - 2) // 2)
    if n < 1 or period < 2:
        raise InputError(f"repeated tokens need n >= 1 rows and a length of at least 2; got n={n}, length={length}.")
    rows = repeated_tokens(ids, n, period, seed)
    if not copied:
        rows[:, period:] = repeated_tokens(ids, n, period, seed + 1_000_003, copies=1)
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
    copied: bool = True,
    bar: Bar = Bar(),
) -> list[HeadScores]:
    """Every reduction's scores from the same forward passes; one example is one row. Layers without heads are NaN.

    `meta["norm_weighted"]` `[L, H]` are the scores of the weighted pattern. Without `copied` nothing repeats (see `repeats`).
    """
    for reduction in reductions:
        model.require_alike(reduction.about.name, every_layer=False)
    rows, period, start = repeats(model, n, length, seed, copied=copied)
    layers = model.layout.attention_layers
    gram = {layer: W @ W.mT for layer in layers for W in [model.W_O(layer).detach().float()]}
    per_row: list[list[Tensor]] = [[] for _ in reductions]
    weighted: list[list[Tensor]] = [[] for _ in reductions]
    for chunk in rows.split(max(1, MAX_TOKENS // rows.shape[1])):
        reader = Reductions(reductions, Copies(start, period), gram)
        model.look(chunk, reader)
        for i in range(len(reductions)):
            per_row[i].append(torch.stack(reader.kept[i], 1))
            weighted[i].append(torch.stack(reader.weighted[i], 1))
        bar(len(chunk))
    scores = []
    for reduction, kept, behind in zip(reductions, per_row, weighted, strict=True):
        found, more = reduction.score(np.asarray(torch.cat(kept)))
        values = np.full((len(found), *model.shape), np.nan)
        values[:, list(layers)] = found
        by_norm = np.full(model.shape, np.nan)
        by_norm[list(layers)] = reduction.score(np.asarray(torch.cat(behind)))[0].mean(0)
        about = reduction.about
        if more:  # what else it says of each head is not spread over the layers
            model.require_alike(about.name)
        if len(layers) == model.n_layers:
            more = {"norm_weighted": by_norm.round(4).tolist()} | more
        meta = Provenance.of(model, about.name, about.paper, seed, n=n, length=period).to_json() | more
        scores.append(HeadScores.from_examples(about.name, values, meta))
    return scores
