"""Sweeps: one metric under many edits, each by itself, at a fraction of the cost of as many forward passes.

A variant whose edit begins in layer l is replayed from l (see `replay`); variants of one layer are batched; where nothing but
z is edited, layer l's attention is not computed again either. The layers run for V variants of a model with L layers, in
batches of n: `L + sum_l ceil(V_l / n) (L - l)`, against `V L` for as many full passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.model.editing.edits import Edit, Variants
from manyheads.model.layout import Layout
from manyheads.model.replay.dispatch import Dispatch
from manyheads.model.replay.recording import Recording, narrow_last_mlp, only_last, projects_last, replay, starting_at
from manyheads.progress import Bar

MAX_TOKENS = 1024  # of one batched pass: larger ones leave the processor's caches and are slower


def sweep(
    module: nn.Module,
    layout: Layout,
    dispatch: Dispatch,
    recording: Recording,
    edits: Sequence[Edit],
    metric: Callable[[Tensor], Tensor | float],
    keep: int | None,
    max_tokens: int | None,
    bar: Bar = Bar(),
) -> Float[np.ndarray, "V ..."]:
    """`HeadModel.sweep`: a row of results an edit, of the clean pass in `recording`."""
    results: list[np.ndarray | None] = [None] * len(edits)
    at_once = variants_at_once(recording, max_tokens)
    by_layer: dict[int, list[int]] = {}
    # Below its lowest edited layer a variant computes what the clean pass did, so its replay starts there. Variants that start
    # in the same layer share one replay; an edit of no head only runs the model's head.
    for i, edit in enumerate(edits):
        by_layer.setdefault(min((h.layer for h in edit.head_set), default=layout.n_layers), []).append(i)
    skipping = projects_last(layout, recording)
    kwargs = only_last(module, keep)
    for layer, variants in sorted(by_layer.items()):
        for start in range(0, len(variants), at_once):
            chunk = variants[start : start + at_once]
            some = Variants.of([edits[v] for v in chunk], recording.batch)
            skip = (
                skipping and not some.acts_in_attention
            )  # edits of z come after the pattern, which is as it was recorded
            with (
                dispatch.active(edits=[some]),
                starting_at(layout, recording, layer, len(chunk), skip),
                narrow_last_mlp(layout, recording, keep),
            ):
                logits = replay(module, recording, len(chunk), **kwargs)
            logits = logits if keep is None else logits[:, -keep:]
            for v, rows in zip(chunk, logits.split(recording.batch), strict=True):
                results[v] = as_number(metric(rows))
            bar(len(chunk))
    return np.stack([r for r in results if r is not None]) if edits else np.zeros(0)


def variants_at_once(recording: Recording, max_tokens: int | None) -> int:
    """How many variants of a recording share one pass; by default about `MAX_TOKENS` tokens."""
    return max(1, (max_tokens or MAX_TOKENS) // (recording.batch * recording.length))


def as_number(value: Tensor | float) -> np.ndarray:
    """A metric's value as a float64 array: a number, or one number a row."""
    plain = value.detach().to("cpu", torch.float64).numpy() if isinstance(value, Tensor) else value
    array = np.asarray(plain, dtype=np.float64)
    if array.ndim > 1:
        raise InputError(f"a metric returns a number or one number a row, not an array of shape {array.shape}.")
    return array
