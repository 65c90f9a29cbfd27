"""What a method that shrinks a key/value cache fills in: which tokens each head keeps.

    with SnapKV(compression_ratio=0.5)(model) as block:
        model.generate(prompt)
    block.nbytes                                     # of keys and values, as they lie in memory

A method is a dataclass. It either says once which heads stream (`windows`), or looks at a prompt after each layer's attention and
says what stays (`compress`). Those that give every token a number fill in `score` alone (`ScorePress`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number
from manyheads.model.headmodel import HeadModel
from manyheads.shrink.cache.attending import Compression, check_model, prove_ragged
from manyheads.shrink.cache.ragged import RaggedLayer, Window, merged


@dataclass
class CacheCall:
    """One layer's cache just after its attention, as a method sees it: all rows and KV heads side by side.

    Heads that hold fewer tokens than others have theirs on the right; `held` says where. `queries` are the newest ones,
    rotated like the keys. `tokens` counts what each row has read. `hidden` and `given` are what the attention module was called
    with, where the method asked for it (`needs_hidden`).
    """

    core: Any
    queries: Float[Tensor, "B H W Dk"]
    keys: Float[Tensor, "B G S Dk"]
    values: Float[Tensor, "B G S Dv"]
    held: Bool[Tensor, "B G S"]
    tokens: Int[Tensor, "B"]
    hidden: Float[Tensor, "B Q D"] | None = None
    given: Any = None


@dataclass(frozen=True)
class Press:
    """Keeps everything: a ragged cache with the logits of a plain one. The base of those that do not."""

    needs_hidden: ClassVar[bool] = False
    streams_prompt: ClassVar[bool] = False
    newest: ClassVar[int] = 0  # how many of the newest queries a call has

    def windows(self, model: HeadModel) -> list[list[Window | None]]:
        """For each layer and KV head, its window; None where it keeps what `compress` says."""
        return [[None] * n for n in kv_heads(model)]

    def settled(self, model: HeadModel) -> Press:
        """The same press with all that it must find out about `model` first: what is saved and used again."""
        return self

    def compress(self, call: CacheCall) -> Bool[Tensor, "B G S"] | None:
        """Which of the tokens held stay; None for all."""
        return None

    def due(self, layer: RaggedLayer, new: int) -> bool:
        """Whether to look at a layer after `new` tokens."""
        return False

    @contextlib.contextmanager
    def __call__(self, model: HeadModel) -> Iterator[Compression]:
        """A block in which the model's generations keep less. `UnsupportedError` for a model whose cache cannot be read
        head by head; `InputError` for what is no opened model. Neither the model nor what ran before it is changed."""
        check_model(model)
        prove_ragged(model, Press())
        with Compression(model, self, self.windows(model)).active() as block:
            yield block

    def after(
        self, layer: RaggedLayer, core: Any, query: Tensor, real: Tensor | None, hidden: Tensor | None, given: Any
    ) -> None:
        """After a layer's attention: drop what need not stay."""
        if self.newest:
            before = [] if layer.queries is None else [layer.queries]
            layer.queries = torch.cat([*before, query], 2)[:, :, -self.newest :].clone()
        if not self.due(layer, query.shape[2]):
            return
        newest = query if layer.queries is None else layer.queries
        keys, values, held = _side_by_side(layer)
        kept = self.compress(CacheCall(core, newest, keys, values, held, layer.tokens, hidden, given))
        if kept is None:
            return
        kept, groups = kept.flatten(0, 1), []
        for group in layer.groups:
            some = kept[group.members][:, kept.shape[1] - group.length :]
            groups += [group] if group.window is not None else group.keeping(some)
        layer.groups = merged(groups)


def kv_heads(model: HeadModel) -> list[int]:
    """KV heads of each layer, 0 where a layer has no attention."""
    layout, layers = model.layout, set(model.layout.attention_layers)

    def of(layer: int) -> int:
        if layout.counts is None:
            return layout.n_kv_heads
        return layout.heads_in(layer) // int(getattr(layout.blocks[layer].core, "num_key_value_groups", 1))

    return [of(layer) if layer in layers else 0 for layer in range(model.n_layers)]


def _side_by_side(layer: RaggedLayer) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values `[B, G, S, D]` and where they are held, `[B, G, S]`. What streaming heads hold is not in it."""
    whole = layer.groups[0]
    total = sum(len(group.members) for group in layer.groups)
    if len(whole.members) == total and whole.window is None:
        keys, values = (t.unflatten(0, (-1, layer.n_kv_heads)) for t in whole.held)
        return keys, values, torch.ones(keys.shape[:3], dtype=torch.bool, device=keys.device)
    longest = max((group.length for group in layer.groups if group.window is None), default=0)
    keys, values = (whole.keys.new_zeros(total, longest, t.shape[-1]) for t in (whole.keys, whole.values))
    held = torch.zeros(total, longest, dtype=torch.bool, device=keys.device)
    for group in layer.groups:
        if group.window is None and group.length:
            old, values_of = group.held
            keys[group.members, longest - group.length :] = old
            values[group.members, longest - group.length :] = values_of
            held[group.members, longest - group.length :] = True
    keys, values, held = (t.unflatten(0, (-1, layer.n_kv_heads)) for t in (keys, values, held))
    return keys, values, held


@dataclass(frozen=True)
class ScorePress(Press):
    """Keeps the tokens that score highest in each head, after each prompt (or chunk of one).

    `compression_ratio` is the share of a row's tokens that a head drops; `tokens` is how many it keeps instead. With `every`,
    heads are cut to that again after so many new tokens while text is generated; without, what is generated stays.
    """

    compression_ratio: float | None = None
    tokens: int | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if (self.compression_ratio is None) == (self.tokens is None):
            raise InputError(
                f"{type(self).__name__} takes a compression_ratio or a number of tokens to keep, one of the two."
            )
        if self.compression_ratio is not None:
            ratio = check_number(self.compression_ratio, "compression_ratio", 0.0, 1.0)
            if ratio == 1.0:
                raise InputError("compression_ratio 1 leaves no token at all; give a share below 1.")
        if self.tokens is not None:
            check_integer(self.tokens, "tokens", 1)
            if self.tokens < self.newest:
                raise InputError(
                    f"{type(self).__name__} always keeps the {self.newest} newest tokens; tokens={self.tokens} are too few."
                )
        if self.every is not None:
            check_integer(self.every, "every", 1)

    def score(self, call: CacheCall) -> Float[Tensor, "B G S"]:
        """How much each token matters to each head; infinite for those that stay in any case."""
        raise TypeError(f"{type(self).__name__} does not say how tokens are scored.")

    def due(self, layer: RaggedLayer, new: int) -> bool:
        return new > 1 or (self.every is not None and layer.seen % self.every == 0)

    def budget(self, call: CacheCall) -> Int[Tensor, "B"]:
        """Tokens that a head keeps, for each row."""
        if self.tokens is not None:
            return call.tokens.clamp(max=self.tokens)
        assert self.compression_ratio is not None
        kept = [math.ceil(round((1 - self.compression_ratio) * int(n), 6)) for n in call.tokens]
        return torch.tensor(kept).clamp(min=self.newest)

    def compress(self, call: CacheCall) -> Bool[Tensor, "B G S"]:
        scores = self.score(call).masked_fill(~call.held, -math.inf)
        return highest(scores, self.budget(call)[:, None].to(scores.device)) & call.held


def highest(scores: Float[Tensor, "*B S"], count: Int[Tensor, "*#B"]) -> Bool[Tensor, "*B S"]:
    """Where the `count` highest scores of each row are. Of equal ones the newer (the one to the right) stays."""
    order = scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order)
    )
    return rank.flip(-1) < count[..., None]
