"""Why a head looks there: an attention score before the softmax, split over what wrote the query and what wrote the key.

Query position t and key position s read the streams x_t and x_s, each a sum of parts (embedding, heads, MLPs of the layers below;
`model.reading.writes`). With the denominators of all norms held at their own values, q and k are affine in these, so

    score(t, s) = c q(x_t) . k(x_s) + bias(t, s)
    value[i, j] = c (q(w_i(t)) - q(0)) . (k(w_j(s)) - k(0))       w_i: what part i wrote

A last row and column, `constant`, have q(0) and k(0); all values sum to `score - bias`. The idea is that of Elhage et al., "A
Mathematical Framework for Transformer Circuits" (2021). Here it is exact through norms, rotary embeddings, biases and norms of
queries and keys: parts run as rows of a batch through the architecture's own layer. c and the bias of positions (ALiBi) are read
off the model's own pattern, since a row's log-weights are c q.k + bias + a constant. Both the sum and the pattern are checked.
The bias is relative to the largest of its row. A softcap (Gemma 2) acts on the score afterwards.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike
from manyheads.model.editing.edits import PartEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attention import AttentionCall, replaced_forward
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.model.reading.writes import stream_parts
from manyheads.model.replay.recording import starting_at
from manyheads.model.replay.sweeping import variants_at_once

SEEN = 1e-6  # attention below this says nothing exact of its score


@dataclass(frozen=True)
class AttentionScore:
    """The score of one head at query position t and key position s, dimensionless (it is what the softmax exponentiates).

    `values[i, j]` is the share of query part i and key part j, named by `parts`; they sum to `score - bias`. `weight` is the
    pattern's entry, in [0, 1]; `softcap` the cap that the model puts on the score, if any.
    """

    head: Head
    query: int
    key: int
    parts: tuple[str, ...]
    values: Float[np.ndarray, "C C"]
    score: float
    bias: float
    weight: float
    softcap: float | None = None
    tokens: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def by_query(self) -> dict[str, float]:
        """What each part adds to the score as the query's writer, summed over keys' parts."""
        return dict(zip(self.parts, self.values.sum(1).tolist(), strict=True))

    @property
    def by_key(self) -> dict[str, float]:
        """What each part adds to the score as the key's writer, summed over queries' parts."""
        return dict(zip(self.parts, self.values.sum(0).tolist(), strict=True))

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: query, key, share; largest magnitude first."""
        pairs = [(i, j) for i in range(len(self.parts)) for j in range(len(self.parts))]
        rows = [(self.parts[i], self.parts[j], float(self.values[i, j])) for i, j in pairs]
        frame = pd.DataFrame(rows, columns=["query", "key", "share"])
        return frame.sort_values("share", key=lambda x: -x.abs(), ignore_index=True, kind="stable")


def attention_score(
    model: HeadModel,
    inputs: Any,
    head: HeadLike,
    query: int = -1,
    key: int | None = None,
    *,
    max_tokens: int | None = None,
) -> AttentionScore:
    """Split the score with which `head` looks from position `query` to `key` of the only row of `inputs` (formula above).

    Positions count tokens from 0, or from the end if negative. Without `key`: the position that the head attends to most.
    `InputError` for a position or head that is not there or that may not be seen. `UnsupportedError` where the sum or the
    pattern is not met: T5's and other learned biases of its kind inside the head, layers without a plain stream.
    """
    batch, head = model.inputs(inputs), Head.of(head)
    model.head_set([head])
    rows = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1)
    if rows != 1:
        raise InputError(f"an attention score belongs to one prompt; got {rows}.")
    seen = _Row.of(model, batch, head, query)
    at = int(seen.weights.argmax()) if key is None else _position(key, len(seen.weights), "key")
    if not bool(seen.allowed[at]):
        raise InputError(f"position {seen.query} may not look at position {at}: it is masked; give another key.")
    parts = stream_parts(model, batch, head.layer, [seen.query, at])
    q, k = _queries_and_keys(model, batch, head, parts.values, (seen.query, at), max_tokens)
    values = (seen.scale * q @ k.T).cpu().numpy()
    score = float(seen.scale * seen.dots[at] + seen.bias[at])
    if abs(values.sum() + float(seen.bias[at]) - score) > 1e-3 * (1 + np.abs(values).max()):
        raise UnsupportedError(
            f"queries and keys of {type(model.plain).__name__} are no sum over what wrote the residual stream, so their "
            "scores cannot be split."
        )
    tokenizer, ids = model.tokenizer, batch.get("input_ids")
    return AttentionScore(
        head=head,
        query=seen.query,
        key=at,
        parts=(*parts.names, "constant"),
        values=values,
        score=score,
        bias=float(seen.bias[at]),
        weight=float(seen.weights[at]),
        softcap=seen.cap,
        tokens=() if tokenizer is None or ids is None else tuple(tokenizer.decode([i]) for i in ids[0].tolist()),
        meta={"fingerprint": model.fingerprint},
    )


def _position(at: int, length: int, what: str) -> int:
    if not -length <= at < length:
        raise InputError(f"the {what} position is {at}; this prompt has {length} tokens, 0 to {length - 1}.")
    return at % length


@dataclass(frozen=True, eq=False)
class _NoQuery(PartEdit):
    """Makes queries zero, so that nothing but positions is left in a pattern."""

    def changed(self, layer: int, heads: list[int], x: Tensor) -> Tensor:
        """Zero."""
        return torch.zeros_like(x)


@dataclass(frozen=True)
class _Row:
    """One query's row of a head's pattern, and how its scores come about."""

    query: int
    weights: Float[Tensor, "S"]
    dots: Float[Tensor, "S"]
    allowed: Tensor
    scale: float
    bias: Float[Tensor, "S"]
    cap: float | None

    @classmethod
    def of(cls, model: HeadModel, batch: Any, head: Head, query: int) -> _Row:
        layer = head.layer
        patterns, products, masks = _read(model, batch, layer)
        at = _position(query, patterns.shape[2], "query")
        # Without content, q = 0, the pattern shows what positions alone add.
        with model.editing(_NoQuery([(layer, h) for h in range(model.n_heads)])):
            flat = _read(model, batch, layer)[0]
        pattern, dots, allowed, alone = (one[0, head.index, at] for one in (patterns, products, masks, flat))
        bias = torch.where(allowed, alone.log() - alone[allowed].log().max(), 0.0)
        bias = torch.where(bias.abs() < 1e-6, 0.0, bias)
        cap = getattr(model.config, "attn_logit_softcapping", None)
        stated = _stated_scale(model, layer)
        scale = stated if cap is not None else _slope(patterns, flat, products, masks, stated)
        found = cls(at, pattern, dots, allowed, scale, bias, None if cap is None else float(cap))
        found.check(model)
        return found

    def check(self, model: HeadModel) -> None:
        """The pattern's row must be what these scores give, up to the row's own constant."""
        scores = self.scale * self.dots
        scores = scores if self.cap is None else self.cap * (scores / self.cap).tanh()
        seen = self.allowed & (self.weights > SEEN)
        off = (self.weights.log() - scores - self.bias)[seen]
        if float((off - off.mean()).abs().max()) > 2e-3 * (1 + float(scores[seen].abs().max())):
            raise UnsupportedError(
                f"attention of {type(model.plain).__name__} adds to its scores what neither content nor position alone gives, "
                "so they cannot be split."
            )


def _read(model: HeadModel, batch: Any, layer: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pattern, q.k and what may be seen, each `[1, H, T, S]`, in float64."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []

    def read(call: AttentionCall) -> None:
        query, key = call.query.double(), call.key.double()
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        kept.append((call.pattern.detach().double(), query @ key.transpose(-1, -2), call.allowed))

    model.look(batch, ReadAttention(read, layers=[layer]))
    return kept[0]


def _slope(pattern: Tensor, flat: Tensor, dots: Tensor, allowed: Tensor, otherwise: float) -> float:
    """What q.k is multiplied with: the slope of the log-weights, less those without content, over all rows of the layer."""
    seen = allowed & (pattern > SEEN) & (flat > SEEN)
    logs = torch.where(seen, pattern.clamp_min(SEEN).log() - flat.clamp_min(SEEN).log(), 0.0)
    count = seen.sum(-1, keepdim=True).clamp_min(1)  # each row has a constant of its own
    x, y = (torch.where(seen, v - torch.where(seen, v, 0.0).sum(-1, keepdim=True) / count, 0.0) for v in (dots, logs))
    spread = float(x.square().sum())
    return float((x * y).sum()) / spread if spread > 1e-12 else otherwise


def _stated_scale(model: HeadModel, layer: int) -> float:
    """The scale that the attention module states, else 1/sqrt(Dh)."""
    core = model.layout.blocks[layer].core
    for name in ("scaling", "softmax_scale", "inv_norm_factor", "scale"):
        value = getattr(core, name, None)
        if isinstance(value, (int, float)) and value > 0:
            return float(value)
    return float(model.head_dim**-0.5)


def _queries_and_keys(
    model: HeadModel,
    batch: Any,
    head: Head,
    parts: Float[Tensor, "C 2 D"],
    at: tuple[int, int],
    max_tokens: int | None,
) -> tuple[Float[Tensor, "C1 Dh"], Float[Tensor, "C1 Dh"]]:
    """The query that each part makes at t, and the key at s; last what is there without any part."""
    recording = model.record(batch, keep=1, mlps=False)
    at_once = max(1, variants_at_once(recording, max_tokens) - 2)
    queries, keys, rest = [], [], None
    for some in parts.split(at_once):
        q, k = _through_layer(model, recording, head, some, at)
        rest = q[-1:], k[-1:]
        queries.append(q[:-1] - q[-1:])
        keys.append(k[:-1] - k[-1:])
    assert rest is not None
    return torch.cat([*queries, rest[0]]), torch.cat([*keys, rest[1]])


def _through_layer(
    model: HeadModel, recording: Any, head: Head, parts: Float[Tensor, "C 2 D"], at: tuple[int, int]
) -> tuple[Float[Tensor, "C1 Dh"], Float[Tensor, "C1 Dh"]]:
    rows = len(parts) + 2  # the whole, for the norms' denominators; the parts; nothing

    def enter(hidden: Tensor) -> Tensor:
        given = torch.zeros_like(hidden)
        given[0] = hidden[0]
        if at[0] != at[1]:
            given[1:-1, at[1]] = parts[:, 1].to(hidden)
        given[1:-1, at[0]] = parts[:, 0].to(hidden)
        return given

    block, layout = model.layout.blocks[head.layer], model.layout
    q, k = Keep("q", layers=[head.layer]), Keep("k", layers=[head.layer])
    inputs = {name: _repeated(value, rows) for name, value in recording.inputs.items()}
    with (
        starting_at(layout, recording, head.layer, rows),
        entering(block.module, enter),
        _frozen_norms(block.module, rows),
    ):
        model.look(inputs, q, k)
    query, key = q.values[head.layer][1:, at[0]].double(), k.values[head.layer][1:, at[1]].double()
    group = query.shape[1] // key.shape[1]
    return query[:, head.index], key[:, head.index // group]


def _repeated(value: Any, rows: int) -> Any:
    whole = isinstance(value, Tensor) and value.ndim > 1 and len(value) == 1
    return value.expand(rows, *value.shape[1:]) if whole else value


@contextlib.contextmanager
def _frozen_norms(block: nn.Module, rows: int) -> Iterator[None]:
    """Inside the block, every norm divides all rows by the denominator of the first."""
    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if "Norm" in type(module).__name__ and not any(True for _ in module.children()):
                stack.enter_context(replaced_forward(module, partial(_frozen, module, rows)))
        yield


def _frozen(module: nn.Module, rows: int, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    measured: list[FoldedNorm] = []

    def frozen(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.ndim < 3 or len(x) != rows:
            raise UnsupportedError(f"{type(module).__name__} is not given rows by themselves, so parts cannot pass it.")
        if not measured:
            with _own_forward(module, forward):
                measured.append(FoldedNorm.of(module, x.shape[-1]))
        norm = measured[0]
        whole = x[:1].double()
        parts = norm.direction(x[1:].double()) / norm.sigma(whole) + norm.bias
        return torch.cat([forward(x[:1], *args, **kwargs), parts.to(x)])

    return frozen


@contextlib.contextmanager
def _own_forward(module: nn.Module, forward: Callable[..., Tensor]) -> Iterator[None]:
    with replaced_forward(module, lambda _: forward):
        yield
