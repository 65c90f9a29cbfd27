"""Activation patching and path patching, on replay.

Activation patching puts a head's output from one run into another and lets everything after it react. Path patching
(Wang et al., arXiv:2211.00593; Goldowsky-Dill et al., arXiv:2304.05969) lets only one path react, from a sender to receivers:

  1. from the sender's layer on, run with every head frozen to its clean z (MLPs recomputed, or frozen too) and the sender's
     output from the corrupted run; note what reaches the receivers (the logits, or the query, key or value of chosen heads)
  2. run clean with only those receiver inputs replaced (nothing left to do where the receiver is the logits)

Both replay the clean run from the sender's layer, and batch the senders of one layer. A sweep over all heads runs about half as
many layers, without attention, as 2 L H forward passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike
from manyheads.model.editing.edits import Edit, Patch, Positions, Swap, Variants
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import first_tensor, leaving
from manyheads.model.reading.attention import Part
from manyheads.model.reading.readers import ReadAttention
from manyheads.model.replay.dispatch import stopping_after
from manyheads.model.replay.recording import (
    Recording,
    frozen_attention,
    frozen_mlps,
    narrow_mlps,
    only_last,
    projects_last,
    repeated,
    replay,
    starting_at,
)
from manyheads.model.replay.sweeping import as_number, variants_at_once
from manyheads.progress import Bar

Metric = Callable[[Tensor], Tensor | float]


class Mlp(NamedTuple):
    """One layer's MLP as a sender."""

    layer: int


class Receiver(NamedTuple):
    """A head's input, as the end of a path."""

    head: Head
    part: Part


@dataclass(frozen=True)
class Effects:
    """The metric with each sender patched, and in the two unpatched runs. `values` has a row a sender, in order."""

    senders: tuple[Head | Mlp, ...]
    values: Float[np.ndarray, "S *B"]
    clean: Float[np.ndarray, "*B"]
    corrupted: Float[np.ndarray, "*B"]

    @property
    def normalised(self) -> Float[np.ndarray, "S"]:
        """`(patched - clean) / (corrupted - clean)`, of the means over rows: 0 nothing changed, 1 all of the difference."""
        axes = tuple(range(1, self.values.ndim))
        return (self.values.mean(axes) - self.clean.mean()) / (self.corrupted.mean() - self.clean.mean())

    def by_head(self, n_layers: int, n_heads: int) -> Float[np.ndarray, "L H"]:
        """Change of the metric's mean, `patched - clean`, as a table of heads; NaN where a head was no sender."""
        table = np.full((n_layers, n_heads), np.nan)
        for sender, value in zip(self.senders, self.values, strict=True):
            if isinstance(sender, Head):
                table[sender] = value.mean() - self.clean.mean()
        return table


def activation_patching(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    heads: Iterable[HeadLike] | None = None,
    positions: Positions | None = None,
    keep: int | None = None,
    max_tokens: int | None = None,
) -> Effects:
    """The metric of the clean run with each head's z, in turn, taken from the corrupted run (at `positions`; None: all)."""
    senders = tuple(Head.of(h) for h in (model.heads if heads is None else heads))
    recording, other = (model.record(inputs, keep=keep, mlps=False) for inputs in (clean, corrupted))
    _same_shape(recording, other)
    source = torch.stack(other.z)
    edits = [Patch([head], source, positions=positions) for head in senders]
    values = model.sweep(recording, edits, metric, keep=keep, max_tokens=max_tokens)
    return Effects(senders, values, *_unpatched(recording, other, metric, keep))


def path_patching(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: Metric,
    *,
    senders: Sequence[HeadLike | Mlp] | None = None,
    receivers: Sequence[tuple[HeadLike, Part]] | None = None,
    mlps: Literal["recomputed", "frozen"] = "recomputed",
    positions: Positions | None = None,
    keep: int | None = None,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> Effects:
    """The metric of the clean run when each sender's corrupted output reaches only `receivers` (None: the logits).

    `senders` are heads or `Mlp(layer)`; None is every head. `receivers` are `(head, "query" | "key" | "value")`; under
    grouped-query attention the key or value as that one query head reads it. `positions` limits where the receivers' inputs
    are replaced, or, where the receiver is the logits, where the sender is. A sender at or above every receiver changes nothing.
    `bar` counts senders.
    """
    who = tuple(s if isinstance(s, Mlp) else Head.of(s) for s in (model.heads if senders is None else senders))
    ends = None if receivers is None else [Receiver(Head.of(head), part) for head, part in receivers]
    model.head_set([s for s in who if isinstance(s, Head)])
    if ends is not None:
        if not ends:
            raise InputError("no receivers given; leave them out to patch paths to the logits.")
        model.head_set([end.head for end in ends])
    recording = model.record(clean, keep=keep, mlps=mlps == "frozen")
    other = model.record(corrupted, keep=keep, mlps=any(isinstance(s, Mlp) for s in who))
    _same_shape(recording, other)
    run = _PathRun(model, recording, other, mlps == "frozen", positions, keep)
    values: list[np.ndarray | None] = [None] * len(who)
    by_layer: dict[int, list[int]] = {}
    for i, sender in enumerate(who):
        by_layer.setdefault(sender.layer, []).append(i)
    at_once = variants_at_once(recording, max_tokens)
    for layer, members in by_layer.items():
        for start in range(0, len(members), at_once):
            chunk = members[start : start + at_once]
            logits = run.patched(layer, [who[i] for i in chunk], ends)
            for i, rows in zip(chunk, logits.split(recording.batch), strict=True):
                values[i] = as_number(metric(rows))
            bar(len(chunk))
    return Effects(who, np.stack([v for v in values if v is not None]), *_unpatched(recording, other, metric, keep))


@dataclass
class _PathRun:
    """The replays that `path_patching` is made of."""

    model: HeadModel
    clean: Recording
    other: Recording
    freeze_mlps: bool
    positions: Positions | None
    keep: int | None

    @cached_property
    def source(self) -> Float[Tensor, "L B T H Dh"]:
        """The corrupted run's z."""
        return torch.stack(self.other.z)

    def patched(self, layer: int, senders: Sequence[Head | Mlp], ends: Sequence[Receiver] | None) -> Tensor:
        """Logits `[n B, T, V]` with each of the n senders of one layer patched along its path."""
        n = len(senders)
        if ends is None:
            return self._send(layer, senders, self.positions, top=self.model.n_layers)
        ends = [end for end in ends if end.head.layer > layer]
        if not ends:
            logits = self.clean.logits if self.keep is None else self.clean.logits[:, -self.keep :]
            return repeated(logits, self.clean.batch, n)
        received = self._receive(layer, senders, ends)
        bottom = min(end.head.layer for end in ends)
        model = self.model
        where = self.positions
        if isinstance(where, Tensor) and where.ndim == 2:  # columns of each row: the rows are there n times
            where = where.repeat(n, 1)
        swaps = [Swap([e.head], e.part, received[e.part], positions=where) for e in ends]
        with model.editing(*swaps), starting_at(model.layout, self.clean, bottom, n):
            return self._cut(replay(model.plain, self.clean, n, **only_last(model.plain, self.keep)))

    def _columns(self, n: int) -> Int[Tensor, "R P"] | None:
        """Where the receivers' inputs are replaced, for each row of a pass of n variants; None for everywhere."""
        if self.positions is None:
            return None
        columns = torch.as_tensor(self.positions)
        columns = columns.reshape(1, -1) if columns.ndim < 2 else columns
        columns = torch.where(columns < 0, columns + self.clean.length, columns).to(self.model.device)
        rows = n * self.clean.batch
        return columns.expand(rows, -1) if len(columns) == 1 else columns.repeat(n, 1)

    def _receive(
        self, layer: int, senders: Sequence[Head | Mlp], ends: Sequence[Receiver]
    ) -> dict[Part, dict[int, Tensor]]:
        """The receivers' q, k and v (k and v widened to the query heads), read in the run of step 1."""
        parts: dict[Part, dict[int, Tensor]] = {"query": {}, "key": {}, "value": {}}
        model = self.model

        def note(call: Any) -> None:
            group = model.n_heads // call.key.shape[1]
            parts["query"][call.layer] = call.query
            parts["key"][call.layer] = call.key.repeat_interleave(group, 1)
            parts["value"][call.layer] = call.value.repeat_interleave(model.n_heads // call.value.shape[1], 1)

        layers = {end.head.layer for end in ends}
        reader = ReadAttention(note, layers=layers)
        with model.reading(reader), stopping_after(model.layout, [reader]):  # nothing above the receivers is asked for
            self._send(layer, senders, None, top=max(layers), seeing=layers, read=self._columns(len(senders)))
        return parts

    def _send(
        self,
        layer: int,
        senders: Sequence[Head | Mlp],
        positions: Positions | None,
        *,
        top: int,
        seeing: Iterable[int] = (),
        read: Int[Tensor, "R P"] | None = None,
    ) -> Tensor:
        """Step 1: heads frozen to the clean run (attention computed only in `seeing`), the senders' outputs from the other.

        `read` are the columns, of each row of the pass, at which anything is read of it (None: all).
        """
        model, layout, n, batch = self.model, self.model.layout, len(senders), self.clean.batch
        above = range(layer, model.n_layers)
        # Where attention modules do more than project, a frozen z cannot stand for them: they run, and z is patched back.
        seeing = set(seeing) | (set() if projects_last(layout, self.clean) else set(above))
        thawed = [(low, h) for low in sorted(seeing) if low >= layer for h in range(model.n_heads)]
        edits: list[Edit] = []
        if thawed:
            edits.append(Patch(thawed, torch.stack([repeated(z, batch, n) for z in self.clean.z])))
        patches = [Patch([s] if isinstance(s, Head) else [], self.source, positions=positions) for s in senders]
        edits.append(Variants.of(patches, batch))
        with contextlib.ExitStack() as stack:
            stack.enter_context(model.editing(*edits))
            stack.enter_context(starting_at(layout, self.clean, layer, n))
            frozen = [low for low in above if low not in seeing]
            stack.enter_context(frozen_attention(layout, self.clean, frozen, n))
            if self.freeze_mlps:
                stack.enter_context(frozen_mlps(layout, self.clean, above, n))
            elif len(layout.attention_layers) == model.n_layers:
                # With every head's z that of the clean run no position reads another: what is not read need not be computed.
                whole = top == model.n_layers and not seeing
                stack.enter_context(narrow_mlps(layout, self.clean, self.keep if whole else read, above))
            stack.enter_context(self._mlp_senders(layer, senders, positions))
            return self._cut(replay(model.plain, self.clean, n, **only_last(model.plain, self.keep)))

    @contextlib.contextmanager
    def _mlp_senders(self, layer: int, senders: Sequence[Head | Mlp], positions: Positions | None) -> Any:
        """Replace the MLP's write in the rows of the senders that are MLPs."""
        batch = self.clean.batch
        rows = [i for i, sender in enumerate(senders) if isinstance(sender, Mlp)]
        corrupted = self.other.mlp[layer]

        def patched(plain: Tensor) -> Tensor:
            new = first_tensor(corrupted).reshape(batch, self.clean.length, -1)  # OPT flattens rows and positions
            shape, plain = plain.shape, plain.reshape(len(senders) * batch, self.clean.length, -1).clone()
            for i in rows:
                part = slice(i * batch, (i + 1) * batch)
                plain[part] = _at(plain[part], new, positions)
            return plain.reshape(shape)

        with leaving(self.model.layout.blocks[layer].mlp_write, patched) if rows else contextlib.nullcontext():
            yield

    def _cut(self, logits: Tensor) -> Tensor:
        return logits if self.keep is None else logits[:, -self.keep :]


def _at(old: Tensor, new: Tensor, positions: Positions | None) -> Tensor:
    if positions is None:
        return new.to(old)
    wanted = torch.as_tensor(positions, device=old.device)
    wanted = wanted.reshape(1, -1) if wanted.ndim < 2 else wanted
    wanted = torch.where(wanted < 0, wanted + old.shape[1], wanted)
    columns = torch.arange(old.shape[1], device=old.device)
    where = (columns[None, :, None] == wanted[:, None, :]).any(-1)
    return torch.where(where[..., None], new.to(old), old)


def _unpatched(
    clean: Recording, corrupted: Recording, metric: Metric, keep: int | None
) -> tuple[np.ndarray, np.ndarray]:
    def value(recording: Recording) -> np.ndarray:
        return as_number(metric(recording.logits if keep is None else recording.logits[:, -keep:]))

    return value(clean), value(corrupted)


def _same_shape(clean: Recording, corrupted: Recording) -> None:
    if len({z.shape[-1] for z in clean.z}) > 1:
        raise UnsupportedError("heads differ in width from layer to layer, and patching all of them needs one width.")
    a, b = (clean.batch, clean.length), (corrupted.batch, corrupted.length)
    if a != b:
        raise InputError(
            f"clean and corrupted inputs must have one shape; got {list(a)} and {list(b)} rows and tokens."
        )
