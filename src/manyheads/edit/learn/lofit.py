"""LoFiT (#30): choose a few heads by learned scalings, then learn one offset vector for each of them. Nothing else changes.

Yin, Ye and Durrett, arXiv:2406.01563 (NeurIPS 2024). With vectors A and v in R^Dh for each head, before the output projection,

    z'  = (1 + A) * z + v
    1   v = 0, train A of all heads on the answers' log-likelihood - lam sum|A|;   score[l, h] = ||A[l, h]||_2
    2   A = 0, train v of the heads with the largest scores

The result is constant in z, so it folds into the output projection's bias: sum_h v_h W_O[h]. As many numbers as heads times Dh
are learned, 20 to 200 times fewer than LoRA's. Random heads often do as well as chosen ones, since any head's column space can
carry a bias; always look at both (`heads=`).

The paper's settings: 3 % of all heads; lam 5e-4 to 5e-3 and rate 5e-3 in step 1, rate 1e-2 in step 2, 5 epochs of batches of 8,
initial A and v from N(0, 1e-3); on TruthfulQA it learns from preferences (`edit.learn.preferences`: give those as examples).
Departure: gradients are clipped at norm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.edit.learn.examples import Examples
from manyheads.edit.learn.preferences import Preferences
from manyheads.edit.learn.tuning import LEARNING, LearnedEdit, learn
from manyheads.errors import InputError
from manyheads.heads import HeadLike, HeadScores, HeadSet
from manyheads.model.editing.edits import Affine, Edit
from manyheads.model.editing.head_edit import HeadEdit
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Activation
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.training import TrainSettings

SHARE = 0.03
SPREAD = 1e-3  # of initial values
SELECTION, TUNING = replace(LEARNING, rate=5e-3), replace(LEARNING, rate=1e-2)


@dataclass(frozen=True, eq=False)
class _Stretch(Edit):
    """`z_h -> (1 + A_h) * z_h`, element by element."""

    A: Tensor = field(default_factory=lambda: torch.zeros(0))

    def edit_z(self, z: Activation) -> Tensor:
        return z.value * (1 + self.A[z.layer]).to(z.value)


class _Scalings(LearnedEdit):
    """A of every head."""

    def __init__(self, model: HeadModel, sparsity: float, seed: int) -> None:
        super().__init__(model)
        generator = torch.Generator().manual_seed(seed)
        self.sparsity = sparsity
        self.A = nn.Parameter(SPREAD * torch.randn(*model.shape, model.head_dim, generator=generator))

    def edit(self, length: int) -> Edit:
        return _Stretch(self.model.heads, A=self.A)

    def penalty(self) -> Tensor:
        return self.sparsity * self.A.abs().sum()


class _Offsets(LearnedEdit):
    """v of some heads."""

    def __init__(self, model: HeadModel, heads: HeadSet, seed: int) -> None:
        super().__init__(model)
        generator = torch.Generator().manual_seed(seed)
        self.heads = heads
        self.v = nn.Parameter(SPREAD * torch.randn(len(heads), model.head_dim, generator=generator))

    def edit(self, length: int) -> Edit:
        return Affine(self.heads, scales=torch.ones(len(self.heads)), shifts=self.v)


def lofit(
    model: HeadModel,
    examples: Examples,
    *,
    heads: Iterable[HeadLike] | int | None = None,
    dev: Examples | None = None,
    sparsity: float = 5e-4,
    selection: TrainSettings = SELECTION,
    tuning: TrainSettings = TUNING,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> HeadEdit:
    """Choose heads and learn their offsets (steps above): an edit to apply, save or bake.

    `heads` is how many to choose (default: 3 % of all, at least one), or those to tune without choosing. Examples are
    answers, or preferences. `dev` are held-out ones for early stopping.
    With a `folder`, the runs' states are kept in it and an interrupted call goes on. `bar` counts steps of training.
    """
    into = None if folder is None else Path(folder)
    found = "given"
    if heads is None or isinstance(heads, int):
        k = max(1, round(SHARE * len(model.heads))) if heads is None else heads
        if not 1 <= k <= len(model.heads):
            raise InputError(f"asked for {k} heads of {len(model.heads)}; choose 1 or more of them.")
        scores = select_heads(
            model,
            examples,
            sparsity=sparsity,
            settings=selection,
            folder=None if into is None else into / "selection",
            bar=bar,
        )
        chosen, found = scores.top(k), "largest learned scalings (LoFiT, step 1)"
    else:
        chosen = model.head_set(heads)
        if not chosen:
            raise InputError("no heads were given to tune; give one at least, or leave them to be chosen.")
    learned = _Offsets(model, chosen, tuning.seed)
    losses = learn(learned, examples, tuning, dev=dev, folder=None if into is None else into / "tuning", bar=bar)
    settings: dict[str, Any] = {"examples": len(examples), "tuning": vars(tuning)}
    if isinstance(examples, Preferences):
        settings["beta"] = examples.beta
    if found != "given":
        settings |= {"sparsity": sparsity, "selection": vars(selection)}
    return HeadEdit.of(
        model,
        Affine(chosen, scales=torch.ones(len(chosen)), shifts=learned.v.detach()),
        method="LoFiT",
        found=found,
        settings=settings,
        effect={"held-out loss": min(losses)} if losses else {},
    )


def select_heads(
    model: HeadModel,
    examples: Examples,
    *,
    sparsity: float = 5e-4,
    settings: TrainSettings = SELECTION,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> HeadScores:
    """Step 1: ||A||_2 of every head, one fit (so without a standard error)."""
    learned = _Scalings(model, sparsity, settings.seed)
    learn(learned, examples, settings, folder=folder, bar=bar)
    norms: Float[Tensor, "L H"] = learned.A.detach().norm(dim=-1)
    used = {"sparsity": sparsity, **vars(settings)}
    meta = Provenance(
        "LoFiT selection", "arXiv:2406.01563", used, settings.seed, fingerprint=model.fingerprint
    ).to_json()
    return HeadScores("lofit", norms.numpy(), np.full(model.shape, np.nan), len(examples), meta)
