"""Contextual decomposition (#9, CD-T): how much of an answer is due to some tokens, or to a head, in one forward-like pass.

Hsu et al., arXiv:2407.00886. Every activation is b + g, the part due to the source and the rest (rules in
`trace.contextual.splitting`). Sources are tokens (b: their embedded streams, g: the others') or a head s, before which b = 0
and at which, with mu the mean of its z at each position over a corrupted set,

    g_z = mu[s],    b_z = z[s] - mu[s]

    effect(s)  = b_logit[answer] - b_logit[foil]                      in logits, signed; need not sum to the total
    R(s, T)    = sum_t ||b_z[T, t]||_1 / (||g_z[T, t]||_1 + 1e-8)     on every head T of a later layer, >= 0, unsigned

The heads of one layer share one batch and one total; layers below are replayed; R is summed while z is read.
Departures: one sweep gives R for all later heads, so that no target needs its own pass. By default the pattern is the total's and
there is no sign rule: on our models this finds the heads that matter better (see the docs).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import Head, HeadLike, HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.tasks import TaskBatch
from manyheads.trace.contextual.splitting import Parts, Pattern, Splitter
from manyheads.trace.explaining import Found, components, explains

MAX_TOKENS = 2048  # of all parts of one pass
TOLERANCE = 1e-8
Column = int | Int[Tensor, "B"]


class WordEffect(NamedTuple):
    """The effect of the characters `start:stop` of a text on its answer, in logits."""

    word: str
    start: int
    stop: int
    effect: float


@dataclass(frozen=True)
class HeadEffects:
    """The effect of each source head on the answer, and on every later head.

    `logit[i]` is effect(s) of each example, in logits; `reach[i]` is R(s, T) `[L, H]`, a mean over examples, NaN for heads not
    above source i. `total` is the model's own logit difference.
    """

    sources: tuple[Head, ...]
    shape: tuple[int, int]
    logit: Float[np.ndarray, "S N"]
    reach: Float[np.ndarray, "S L H"]
    total: Float[np.ndarray, "N"]
    meta: dict[str, Any] = field(default_factory=dict)

    def scores(self) -> HeadScores:
        """The signed effect on the logit difference; NaN for heads that were not a source."""
        values = np.full((self.logit.shape[1], *self.shape), np.nan)
        for head, effect in zip(self.sources, self.logit, strict=True):
            values[:, head.layer, head.index] = effect
        return HeadScores.from_examples("contextual", values, dict(self.meta))

    def on(self, target: HeadLike | None = None) -> Float[np.ndarray, "L H"]:
        """Size of every head's effect on `target`, R(s, T), or on the logits (None), |mean b|; NaN where there is no path."""
        table = np.full(self.shape, np.nan)
        end = None if target is None else Head.of(target)
        for i, head in enumerate(self.sources):
            table[head] = abs(self.logit[i].mean()) if end is None else self.reach[i][end]
        return table


def token_effects(
    model: HeadModel,
    inputs: Any,
    answers: Int[Tensor, "B"],
    foils: Int[Tensor, "B"] | None = None,
    *,
    chosen: Bool[Tensor, "n B T"] | None = None,
    column: Column = -1,
    attention: Pattern = "total",
    signs: bool = False,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> Float[np.ndarray, "n B"]:
    """`b_logit[answer] - b_logit[foil]` of n sets of tokens, each a row of `chosen`; None: each column alone.

    The default foil of a row is the token with the largest logit apart from the answer. `column` is the position of the answer
    (unused for a classifier's logits `[B, C]`). `bar` counts sets. `UnsupportedError` as in `Splitter`.
    """
    batch = model.inputs(inputs)
    splitter = Splitter(model, attention, signs)
    rows = _rows(batch)
    contrast = _Contrast.of(answers, foils, column, rows, model.device)
    if chosen is None:
        length = next(v for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1).shape[1]
        chosen = torch.eye(length, dtype=torch.bool)[:, None].expand(-1, rows, -1)
    at_once = max(1, (max_tokens or MAX_TOKENS) // (rows * chosen.shape[2]) - 1)
    effects = []
    for some in chosen.to(model.device).split(at_once):
        logits = splitter.tokens(batch, some, keep=contrast.keep)
        effects.append(contrast.difference(logits)[1])
        bar(len(some))
    return np.concatenate(effects)


def word_effects(
    model: HeadModel,
    text: str,
    answer: str | int,
    foil: str | int | None = None,
    *,
    column: int = -1,
    attention: Pattern = "total",
    signs: bool = False,
) -> list[WordEffect]:
    """The effect of every word of `text` on its answer, summed over the word's tokens.

    `answer` and `foil` are one token each, or its id (or a class's number). Tokens that the tokenizer adds, such as `<bos>`, are
    words without characters. `InputError` without a fast tokenizer.
    """
    tokenizer = model.tokenizer
    if tokenizer is None or not tokenizer.is_fast:
        raise InputError("word effects need a fast tokenizer, which gives character offsets; open the model with one.")
    encoding = tokenizer(text, return_offsets_mapping=True)
    ids, words = torch.tensor([encoding.input_ids]), encoding.word_ids(0)
    one = torch.tensor([_token(tokenizer, answer)])
    other = None if foil is None else torch.tensor([_token(tokenizer, foil)])
    effects = token_effects(model, ids, one, other, column=column, attention=attention, signs=signs)[:, 0]
    found: dict[Any, list[int]] = {}
    for i, word in enumerate(words):
        found.setdefault(("added", i) if word is None else word, []).append(i)
    spans = [(encoding.offset_mapping[at[0]][0], encoding.offset_mapping[at[-1]][1], at) for at in found.values()]
    return [WordEffect(text[start:stop], start, stop, float(effects[at].sum())) for start, stop, at in spans]


def head_effects(
    model: HeadModel,
    inputs: Any,
    mean: Float[Tensor, "L T H Dh"] | Float[Tensor, "L H Dh"],
    answers: Int[Tensor, "B"],
    foils: Int[Tensor, "B"] | None = None,
    *,
    heads: Iterable[HeadLike] | None = None,
    column: Column = -1,
    attention: Pattern = "total",
    signs: bool = False,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> HeadEffects:
    """Decompose from each of `heads` (None: all) to the logit difference and to every later head.

    `mean` is `model.mean_z(corrupted, by_position=True)`. Means are by position, so give prompts of one template. Padded
    positions do not count in R. `foils` and `column` as for `token_effects`; `bar` counts heads times examples.
    """
    batch = model.inputs(inputs)
    splitter = Splitter(model, attention, signs)
    n, rows = model.n_heads, _rows(batch)
    sources = tuple(sorted({Head.of(h) for h in (model.heads if heads is None else heads)}))
    model.head_set(sources)
    if not sources:
        raise InputError("got no heads to decompose from; give at least one, or leave `heads` out for all.")
    contrast = _Contrast.of(answers, foils, column, rows, model.device)
    layers = [[s for s in sources if s.layer == layer] for layer in sorted({s.layer for s in sources})]
    logit, total = np.zeros((len(sources), rows)), np.zeros(rows)
    reach = np.zeros((len(sources), *model.shape))
    for start, some, part in _chunks(batch, contrast, rows, n, mean.shape[1] if mean.ndim == 4 else 0, max_tokens):
        recording = model.record(some)
        stop, first = start + recording.batch, 0
        weight = _weight(recording.inputs, recording.length)
        for members in layers:
            here = slice(first, first + len(members))
            sums = _Reach(members[0].layer, reach[here], weight)
            parts = splitter.heads(recording, members, mean, keep=part.keep, read=sums)
            total[start:stop], logit[here, start:stop] = part.difference(parts)
            first += len(members)
            bar(len(members) * recording.batch)
    for i, head in enumerate(sources):
        reach[i, : head.layer + 1] = np.nan
    meta = Provenance.of(
        model, "contextual decomposition", "arXiv:2407.00886", attention=attention, signs=signs
    ).to_json()
    return HeadEffects(sources, model.shape, logit, reach / rows, total, meta)


@dataclass(frozen=True)
class _Reach:
    """Adds R(s, T), summed over examples, for every head above the sources' layer."""

    layer: int
    table: Float[np.ndarray, "n L H"]
    weight: Float[Tensor, "B T"] | None

    def __call__(self, layer: int, z: Parts) -> None:
        if layer <= self.layer:
            return
        ratio = z.relevant.abs().sum(-1) / z.irrelevant.abs_().sum(-1).add_(TOLERANCE)
        ratio = ratio if self.weight is None else ratio * self.weight[..., None]
        self.table[:, layer] += ratio.sum((1, 2)).double().cpu().numpy()


@dataclass(frozen=True)
class _Contrast:
    """Which logits are compared, and at which position."""

    answers: Int[Tensor, "B"]
    foils: Int[Tensor, "B"] | None
    column: Column

    @classmethod
    def of(cls, answers: Tensor, foils: Tensor | None, column: Column, rows: int, device: torch.device) -> _Contrast:
        for name, given in (("answers", answers), ("foils", foils)):
            if given is not None and given.shape != (rows,):
                raise InputError(
                    f"{name} have shape {list(given.shape)}; give one token id for each of the {rows} rows."
                )
            if given is not None and (given < 0).any():
                raise InputError(f"{name} holds negative ids; drop these examples.")
        if isinstance(column, Tensor):
            column = column.to(device)
        return cls(answers.to(device), None if foils is None else foils.to(device), column)

    @property
    def keep(self) -> int | None:
        return 1 if isinstance(self.column, int) and self.column == -1 else None

    def rows(self, start: int, stop: int) -> _Contrast:
        column = self.column[start:stop] if isinstance(self.column, Tensor) else self.column
        return _Contrast(self.answers[start:stop], None if self.foils is None else self.foils[start:stop], column)

    def difference(self, logits: Parts) -> tuple[np.ndarray, np.ndarray]:
        """The total's difference `[B]` and the parts' `[n, B]`."""
        total, relevant = self._at(logits.total[None])[0], self._at(logits.relevant)
        row = torch.arange(len(self.answers), device=total.device)
        foils = self.foils
        if foils is None:
            foils = total.scatter(1, self.answers[:, None], -torch.inf).argmax(-1)
        values = torch.cat([total[None], relevant])
        both = (values[:, row, self.answers] - values[:, row, foils]).double().cpu().numpy()
        return both[0], both[1:]

    def _at(self, logits: Float[Tensor, "n B T V"] | Float[Tensor, "n B V"]) -> Float[Tensor, "n B V"]:
        if logits.ndim == 3:
            return logits
        if isinstance(self.column, int):
            return logits[:, :, self.column]
        return logits[:, torch.arange(logits.shape[1], device=logits.device), self.column]


def _chunks(
    batch: Mapping[str, Any], contrast: _Contrast, rows: int, n: int, length: int, max_tokens: int | None
) -> Iterator[tuple[int, dict[str, Any], _Contrast]]:
    """Rows in chunks, so that the sources of one layer fit into one pass."""
    width = length or next(v for v in batch.values() if isinstance(v, Tensor) and v.ndim > 1).shape[1]
    size = max(1, (max_tokens or MAX_TOKENS) // (width * (1 + n)))
    for start in range(0, rows, size):
        stop = min(rows, start + size)
        some = {
            name: value[start:stop] if isinstance(value, Tensor) and value.ndim and len(value) == rows else value
            for name, value in batch.items()
        }
        yield start, some, contrast.rows(start, stop)


def _rows(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1)


def _weight(inputs: Mapping[str, Any], length: int) -> Float[Tensor, "B T"] | None:
    mask = inputs.get("attention_mask")
    return mask.float() if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == length else None


def _token(tokenizer: Any, given: str | int) -> int:
    if isinstance(given, int):
        return given
    ids: Sequence[int] = tokenizer(given, add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise InputError(
            f"{given!r} is {len(ids)} tokens; an answer or foil must be one token; give its text or its id."
        )
    return ids[0]


@explains(
    "decomposition", "the part of the difference of the two logits that contextual decomposition assigns to each head"
)
def _explain(model: HeadModel, batch: TaskBatch) -> Found:
    """Means of heads come from the corrupted prompt, or else from the prompt itself."""
    given = batch.inputs
    expected = model.mean_z(given) if batch.corrupted_ids is None else model.mean_z(batch.twins, by_position=True)
    effects = head_effects(model, given, expected, batch.answer_ids, batch.foil_ids)
    return components(model, "decomposition", effects.logit.mean(1).reshape(model.shape)), {}
