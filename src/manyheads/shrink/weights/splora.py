"""SPLoRA (#78): prune heads and MLP units while a low-rank change learns to do without them; the weights stay as they are.

Hedegaard et al., arXiv:2211.10155 (structured pruning adapters), part of the thesis arXiv:2306.13474. Every linear map of the
layers becomes, for one task,

    W' = (W + C R) masked       W [F_out, F_in] frozen,  C [F_out, r],  R [r, F_in];  C R = 0 at first
    g(s) = max(0, 1 - s / k)    by which what the leaving heads and units write is multiplied at step s

so that training begins at the model itself and ends with heads and units gone (k: half of the steps). Then C R is added and they
are cut out. Which go is AMP's plan (`weights.amp`). Many tasks can share one W: each keeps its mask and C R (`PruningAdapter`).

The paper's settings: r = 16, R Kaiming-uniform. Departures: C begins at 0 (there at +-1e-4), for the exact start. The paper cuts
by gradients, some at a time; here the plan is made once and the mask closes slowly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.inputs import check_integer, check_number
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import frozen
from manyheads.model.linear import features_of
from manyheads.model.weights.copies import settled
from manyheads.progress import Bar
from manyheads.shrink.recovery import in_pieces, linear_maps
from manyheads.shrink.shrinking import shrinks
from manyheads.shrink.weights.amp import AMP
from manyheads.shrink.weights.pruning_adapter import Change, PruningAdapter, adapted
from manyheads.tasks.texts import passages
from manyheads.training import Batch, TrainSettings, epoch_rows, fit, next_token_loss

ADAPTING = TrainSettings(steps=100, rows=8, rate=1e-3, warmup=10, decay=0.5, weight_decay=0.0, precision="fp32")


@dataclass(frozen=True)
class SPLoRA:
    """Prune and adapt at once: `SPLoRA(0.3).convert(model)` is a small model, `.learn(model)` the adapter that makes it.

    `ratio` is the share of all parameters that goes. It learns from passages of `length` tokens of `texts` (None: prose that
    comes with Python), or from token ids. `closing` is the share of the steps over which the mask closes; 0: at once.
    """

    ratio: float = 0.3
    rank: int = 16
    texts: Sequence[str] | Int[Tensor, "N T"] | None = None
    n: int = 512
    length: int = 128
    closing: float = 0.5
    settings: TrainSettings = ADAPTING
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(self.ratio, "ratio", 0, 1)
        check_integer(self.rank, "rank", 1)
        check_number(self.closing, "closing", 0, 1)
        check_integer(self.length, "length", 2)

    def convert(self, model: HeadModel, *, folder: str | Path | None = None, bar: Bar = Bar()) -> HeadModel:
        """The small model; `model` stays as it is. What cannot be cut is refused before anything is learned, as by `learn`."""
        start = self._start(model)
        start.convert(model)
        return self._learned(model, start, folder, bar).convert(model)

    def learn(self, model: HeadModel, *, folder: str | Path | None = None, bar: Bar = Bar()) -> PruningAdapter:
        """The adapter of a task. With a `folder` an interrupted call goes on.

        `UnsupportedError` for a model whose heads or units cannot be told apart, `InputError` for a ratio that would leave none.
        """
        return self._learned(model, self._start(model), folder, bar)

    def _start(self, model: HeadModel) -> PruningAdapter:
        """The mask, and a change that changes nothing."""
        if settled(model) is not model:
            name = type(model.plain).__name__
            raise UnsupportedError(f"{name} has adapters already, or weights elsewhere; merge them first.")
        cut = AMP(self.ratio, prompts=self.texts, seed=self.seed).plan(model)
        generator = torch.Generator().manual_seed(self.seed)
        changes = {}
        for path, linear in linear_maps(model).items():
            read, made = features_of(linear)  # type: ignore[misc]
            R = nn.init.kaiming_uniform_(torch.empty(self.rank, read), a=math.sqrt(5), generator=generator)
            changes[path] = torch.zeros(made, self.rank, device=model.device), R.to(model.device)
        return PruningAdapter(cut.heads, cut.units, changes, model.fingerprint)

    def _learned(self, model: HeadModel, start: PruningAdapter, folder: str | Path | None, bar: Bar) -> PruningAdapter:
        ids = self.texts
        if not isinstance(ids, Tensor):
            ids = passages(model, in_pieces(ids, self.length), n=self.n, length=self.length, seed=self.seed)
        settings, gate = replace(self.settings, seed=self.seed), {"value": 1.0}
        closed = self.closing * (settings.steps or 0)
        learning = nn.ModuleList(nn.ParameterList(change) for change in start.changes.values())

        def batch(step: int) -> Batch:
            return {"input_ids": ids[epoch_rows(len(ids), settings.rows, step, self.seed)], "step": torch.tensor(step)}

        def loss(_: nn.Module, given: Batch) -> Float[Tensor, ""]:
            gate["value"] = max(0.0, 1 - int(given["step"]) / closed) if closed else 0.0
            return next_token_loss(model.plain, given)

        parts: list[Any] = list(learning)
        changes: dict[str, Change] = {path: (C, R) for path, (C, R) in zip(start.changes, parts, strict=True)}
        with frozen(model.plain), adapted(model, replace(start, changes=changes), gate):
            fit(learning, batch, settings, folder, loss=loss, device=model.device, bar=bar)
        return replace(start, changes={path: (C.detach(), R.detach()) for path, (C, R) in changes.items()})


@shrinks("splora", "weights", "heads and MLP units close while a low-rank change learns to do without them")
def _make(ratio: float) -> SPLoRA:
    return SPLoRA(ratio=ratio)
