"""Maps of layers x positions, by exact patching or an estimate of it: where in the model and in the prompt a difference arises.

    value[layer, t]        L(clean, but the site's activation at position t taken from the corrupted run) - L(clean)
    normalised[layer, t]   value / (L(corrupted) - L(clean)), of means over rows: 0 no change, 1 the whole difference

in L's unit (Vig et al., arXiv:2004.12265; Meng et al., arXiv:2202.05262). Sites are `resid` (the stream entering a layer),
`attention_write`, `mlp_write` and `z`, where each head is patched separately. Everything above is recomputed.
A map of `attribution_patching` has the same form.

Patching replays the clean run from the patched layer on, the positions of one layer batched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.editing.edits import Patch
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering, first_tensor, leaving
from manyheads.model.reading.readers import Keep
from manyheads.model.replay.recording import Recording, only_last, replay, starting_at
from manyheads.model.replay.streaming import RowMetric, checked_rows
from manyheads.model.replay.sweeping import variants_at_once
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.report import Reported

MapSite = Literal["resid", "attention_write", "mlp_write", "z"]


@dataclass(frozen=True)
class PositionMap(Reported):
    """Changes of a metric, `patched - clean`, one a row, layer and position (and head, at `z`); `[B, L, T]` or `[B, L, T, H]`.

    `clean` and `corrupted` are the metric of the unpatched runs, `tokens[row]` the clean prompts' tokens as text.
    """

    site: str
    values: Float[np.ndarray, "B L T ..."]
    clean: Float[np.ndarray, "B"]
    corrupted: Float[np.ndarray, "B"]
    tokens: tuple[tuple[str, ...], ...]
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def mean(self) -> Float[np.ndarray, "L T ..."]:
        """Mean over rows; meaningful if rows are of one template."""
        return np.asarray(self.values.mean(0))

    @property
    def normalised(self) -> Float[np.ndarray, "L T ..."]:
        """The mean as a share of the whole difference."""
        return np.asarray(self.mean / (self.corrupted.mean() - self.clean.mean()))

    def to_frame(self) -> pd.DataFrame:
        """One row for each prompt, layer, position (and head): row, layer, position, token, (index,) change."""
        names = ["row", "layer", "position", "index"][: self.values.ndim]
        index = np.indices(self.values.shape).reshape(self.values.ndim, -1)
        frame = pd.DataFrame(dict(zip(names, index, strict=True)))
        tokens = np.array(self.tokens, dtype=object)
        frame.insert(3, "token", tokens[frame["row"], frame["position"]])
        return frame.assign(change=self.values.ravel())

    def by_token(self) -> pd.DataFrame:
        """Summed over layers (and heads), averaged over the occurrences of a token: token, change, stderr, n; largest
        magnitude first."""
        summed = self.values.sum(tuple(i for i in range(self.values.ndim) if i not in (0, 2)))
        frame = pd.DataFrame({"token": np.array(self.tokens, dtype=object).ravel(), "change": summed.ravel()})
        found = frame.groupby("token")["change"].agg(["mean", "sem", "size"]).reset_index()
        found.columns = pd.Index(["token", "change", "stderr", "n"])
        return found.sort_values("change", key=np.abs, ascending=False, kind="stable", ignore_index=True)


def patching_map(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: RowMetric,
    *,
    site: MapSite = "resid",
    positions: Sequence[int] | None = None,
    keep: int | None = None,
    max_tokens: int | None = None,
    bar: Bar = Bar(),
) -> PositionMap:
    """Patch every layer and position of `site` separately (formula above); with `positions` (default: all) the rest is NaN.

    `metric` gets the logits (of the last `keep` positions, if given) and returns one number a row. At `z` this is `L H T`
    replays; `attribution_patching` estimates them all at once. `bar` gets the number of layers done. `InputError` for
    another site, positions out of range, or inputs that differ in shape.
    """
    if site not in get_args(MapSite):
        raise InputError(f"site is {site!r}; choose from {', '.join(get_args(MapSite))}.")
    batch = model.inputs(clean)
    here, there = model.record(batch), model.record(corrupted)
    if (here.batch, here.length) != (there.batch, there.length):
        a, b = [here.batch, here.length], [there.batch, there.length]
        raise InputError(f"clean and corrupted inputs must have one shape; got {a} and {b} rows and tokens.")
    columns = _columns(positions, here.length)
    run = _MapRun(model, here, there, metric, keep, max_tokens)
    plain, other = (run.metric_of(r.logits if keep is None else r.logits[:, -keep:]) for r in (here, there))
    values = np.full((model.n_layers, here.length, *((model.n_heads,) if site == "z" else ()), here.batch), np.nan)
    for layer in range(model.n_layers):
        values[layer, columns] = run.heads(layer, columns) if site == "z" else run.at(site, layer, columns)
        bar(1)
    meta = Provenance.of(model, "activation patching", "arXiv:2202.05262", site=site).to_json()
    changes = np.moveaxis(values - plain, -1, 0)
    return PositionMap(site, changes, plain, other, token_texts(model, batch, here.batch, here.length), meta)


def token_texts(model: HeadModel, batch: dict[str, Any], rows: int, length: int) -> tuple[tuple[str, ...], ...]:
    """Each row's tokens as text; as ids without a tokenizer, as positions if the model reads no tokens."""
    ids = batch.get("input_ids")
    if ids is None or ids.shape != (rows, length):
        return (tuple(map(str, range(length))),) * rows
    names = {i: token_text(model, i) for i in ids.unique().tolist()}
    return tuple(tuple(names[i] for i in row) for row in ids.tolist())


def token_text(model: HeadModel, token: int) -> str:
    """A token as text, or its id without a tokenizer."""
    return str(token) if model.tokenizer is None else str(model.tokenizer.decode([token]))


def _columns(positions: Sequence[int] | None, length: int) -> list[int]:
    wanted = range(length) if positions is None else positions
    wrong = [p for p in wanted if not -length <= p < length]
    if wrong:
        raise InputError(f"position {wrong[0]} is outside a prompt of {length} tokens; give {-length} to {length - 1}.")
    return [p % length for p in wanted]


@dataclass
class _MapRun:
    """The replays of `patching_map`."""

    model: HeadModel
    clean: Recording
    other: Recording
    metric: RowMetric
    keep: int | None
    max_tokens: int | None

    def metric_of(self, logits: Tensor) -> Float[np.ndarray, "B"]:
        return np.asarray(checked_rows(self.metric(logits), self.clean.batch).detach().double().cpu())

    def heads(self, layer: int, columns: list[int]) -> Float[np.ndarray, "P H B"]:
        source = torch.stack(self.other.z)
        edits = [Patch([(layer, h)], source, positions=t) for t in columns for h in range(self.model.n_heads)]
        swept = self.model.sweep(self.clean, edits, self.metric, keep=self.keep, max_tokens=self.max_tokens)
        return np.asarray(swept.reshape(len(columns), self.model.n_heads, -1))

    def at(self, site: MapSite, layer: int, columns: list[int]) -> Float[np.ndarray, "P B"]:
        at_once = variants_at_once(self.clean, self.max_tokens)
        found = [
            self.metric_of(rows)
            for first in range(0, len(columns), at_once)
            for rows in self._patched(site, layer, columns[first : first + at_once]).split(self.clean.batch)
        ]
        return np.stack(found)

    def _patched(self, site: MapSite, layer: int, columns: list[int]) -> Tensor:
        n, plain = len(columns), self.model.plain
        with self._hooked(site, layer, columns), starting_at(self.model.layout, self.clean, layer, n):
            logits = replay(plain, self.clean, n, **only_last(plain, self.keep))
        return logits if self.keep is None else logits[:, -self.keep :]

    def _hooked(self, site: MapSite, layer: int, columns: list[int]) -> contextlib.AbstractContextManager[None]:
        block, source = self.model.layout.blocks[layer], self._source(site, layer)

        def swapped(value: Tensor) -> Tensor:
            return self._swapped(value, source, columns)

        if site == "resid":
            return entering(block.module, swapped)
        return leaving(block.attention_write if site == "attention_write" else block.mlp_write, swapped)

    def _source(self, site: MapSite, layer: int) -> Float[Tensor, "B T D"]:
        """The corrupted run's activation, before the residual scale that the model applies after the module."""
        if site == "resid" and layer:
            return first_tensor(self.other.outputs[layer - 1])
        keep = Keep(site, layers=[layer])
        self.model.look(self.other.inputs, keep)
        return keep.values[layer] / (1.0 if site == "resid" else self.model.layout.residual_scale)

    def _swapped(self, value: Tensor, source: Tensor, columns: list[int]) -> Tensor:
        """`value` with each variant's own column taken from the corrupted run."""
        # OPT flattens rows and positions.
        new = value.clone().reshape(len(columns), self.clean.batch, self.clean.length, -1)
        for i, t in enumerate(columns):
            new[i, :, t] = source[:, t].to(new)
        return new.reshape(value.shape)
