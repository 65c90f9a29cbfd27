"""Precise tuning (#14): train the weights of chosen heads, and of chosen MLPs, and nothing else.

Zhang et al., arXiv:2409.01659 (ICML 2024). Of each chosen head the slices of W_Q, W_K, W_V and W_O learn, with gradients times
H / h where h of a layer's H heads are chosen; every other number stays bit for bit what it was, under weight decay too, since
the slices alone are parameters (`manyheads.training.head_slices`).

Unlike offsets and scalings this changes weights by what they are, so the result is a model, not a head edit. In toys, tuning
chosen heads, random heads or everything learned the same and kept the same; compare before believing that choosing helped
(`manyheads bench arithmetic`). Adam divides each gradient by its own size, so under it H / h changes nothing; descent without
momentum (`optimizer="sgd"`) takes steps H / h times as long, unless they are clipped.

The paper's settings: 32 heads, rate 2e-5, batches of 128, 2 epochs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.edit.effects import LENGTH, TEXT_ROWS, SideEffects, side_effects
from manyheads.edit.learn.examples import Answered, Examples
from manyheads.edit.learn.tuning import LEARNING, train_module
from manyheads.errors import InputError
from manyheads.files import write_folder_atomically
from manyheads.heads import HeadLike
from manyheads.model import hooks
from manyheads.model.editing.edits import Scale
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.offloading import own_copy
from manyheads.model.opening import open_model
from manyheads.model.replay.recording import first_logits, no_cache
from manyheads.model.weights.baking import write_checkpoint
from manyheads.progress import Bar
from manyheads.tasks.texts import passages
from manyheads.training import TrainSettings, only_heads
from manyheads.version import __version__

SETTINGS = replace(LEARNING, rate=2e-5, epochs=2, rows=32)


def tune_heads(
    model: HeadModel,
    examples: Examples,
    heads: Iterable[HeadLike] | None,
    *,
    mlps: Iterable[int] = (),
    scaled: bool = True,
    dev: Examples | None = None,
    settings: TrainSettings = SETTINGS,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> HeadModel:
    """A copy of `model` in which the slices of `heads`, and the MLPs of layers `mlps`, have learned the answers of `examples`.

    Of an MLP the module learns through which it writes: all of it, or its last projection where attention runs beside it
    (GPT-NeoX, Falcon). With None for `heads` every weight learns: full tuning, to compare with. Without `scaled` the factor
    H / h is left out. `dev` ends a run early and keeps the best state. With a `folder` an interrupted call goes on. `bar`
    counts steps. `InputError` without examples or heads, or for a layer that is not there; `UnsupportedError` where q, k, v
    cannot be told apart.
    """
    layers = sorted(set(mlps))
    if any(not 0 <= layer < model.n_layers for layer in layers):
        raise InputError(f"MLPs {layers} do not all exist; this model has layers 0-{model.n_layers - 1}.")
    tuned = open_model(own_copy(model.plain), tokenizer=model.tokenizer)

    def log_p(module: nn.Module, some: Answered) -> Tensor:
        return some.log_p(first_logits(module(**some.inputs(tuned), **no_cache(tuned.plain))))

    thawed = [p for layer in layers for p in tuned.layout.blocks[layer].mlp_write.parameters()]
    with hooks.frozen(tuned.plain) if heads is None else only_heads(tuned, heads, scaled=scaled):
        for parameter in tuned.plain.parameters() if heads is None else thawed:
            parameter.requires_grad_(True)
        where = None if folder is None else Path(folder)
        train_module(tuned.plain, examples, settings, log_p, dev=dev, folder=where, bar=bar)
    module = tuned.plain.to(model.device).eval()
    return open_model(module, tokenizer=model.tokenizer)


def tuning_effects(
    model: HeadModel,
    tuned: HeadModel,
    *,
    tasks: Iterable[str] | None = None,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> SideEffects:
    """`side_effects` of what made `tuned` of `model`. Standard errors of shares are those of independent prompts, so wide.

    `bar` counts measures done, of both models.
    """
    names = None if tasks is None else list(tasks)
    whole = side_effects(model, _nothing(model), tasks=names, n=n, seed=seed, bar=bar)
    # What the model could do and `tuned` cannot is the damage: only the model says what is blind.
    after = side_effects(tuned, _nothing(tuned), tasks=names, n=n, seed=seed, blind=whole.blind, bar=bar).table
    table = whole.table
    a, b = table["before"], after["before"]
    table["after"], table["change"] = b, b - a
    table["stderr"] = np.sqrt((a * (1 - a) + b * (1 - b)).clip(lower=0) / table["n"]).where(table["n"] > 1)
    apart = _text_losses(tuned, seed) - _text_losses(model, seed)
    table.loc[table["measure"] == "text", "stderr"] = float(apart.std() / len(apart) ** 0.5)
    return SideEffects(table, whole.blind)


def save_tuned(
    model: HeadModel, tuned: HeadModel, folder: str | Path, about: Mapping[str, Any], *, force: bool = False
) -> Path:
    """Write `tuned` as an ordinary checkpoint, with a `manyheads_tuning.json` that says `about` it and what it was made of."""

    def write(into: Path) -> None:
        write_checkpoint(tuned, into)
        made = {"of": model.fingerprint, "fingerprint": tuned.fingerprint, "version": __version__}
        (into / "manyheads_tuning.json").write_text(json.dumps(dict(about) | made, indent=1) + "\n", "utf-8")

    return write_folder_atomically(folder, write, force=force)


def _nothing(model: HeadModel) -> HeadEdit:
    return HeadEdit.of(model, Scale([next(iter(model.heads))], 1.0), method="nothing")


def _text_losses(model: HeadModel, seed: int) -> Float[Tensor, "N"]:
    ids = passages(model, None, n=TEXT_ROWS, length=LENGTH, seed=seed).to(model.device)
    logits = model.logits(ids)[:, :-1].float()
    return (
        F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .unflatten(0, (len(ids), -1))
        .mean(1)
    )
