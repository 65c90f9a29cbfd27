"""Fusing heads by training: those of a group are blends of each other until they are one. `weights.dha` says which groups.

Chen et al., arXiv:2406.06567 (DHA). Head h of a group uses

    W~_h = sum_j w_hj W_j     over the group, w_hj [Dh], and w_hj = 1 if h = j else 0 at first: the same function
    max_lam min_{W, w}  L_lm + lam max(F - t, 0),    t = max(0, 1 - s / k) at step s
    F = sum_h,j ||w_hj - mean_h w_hj||^2 / (its value at first),   from 1 to 0, dimensionless

and in the end W~ = sum_j (mean_h w_hj) W_j is the one head of the group. Departures: see `weights.dha`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.model.headmodel import HeadModel
from manyheads.model.offloading import own_copy
from manyheads.model.weights.copies import layout_in
from manyheads.progress import Bar
from manyheads.shrink.weights.shared_heads import Grouping, Groups, Source, collapsed
from manyheads.training import Batch, Progress, TrainSettings, epoch_rows, fit, next_token_loss

SPEED = 100.0  # w moves a hundred times as far as the weights in a step: the paper's 1e-2 beside 1e-4
PULL = 20 * SPEED  # so does lam, and F is a share of the paper's sum: at SPEED it stayed near 2, and heads apart
FUSION = TrainSettings(
    steps=300, rows=8, rate=1e-4, warmup=1, decay=0.0, betas=(0.9, 0.999), weight_decay=0.0, clip=None, precision="fp32"
)
FUSED = 1e-3  # F at which a fusion ends


class Blend(nn.Module):
    """While heads fuse: `y_h = sum_j w_hj (x W_j + b_j)` over the members j of a head's group, at first `y_h = x W_h + b_h`."""

    def __init__(self, base: nn.Linear, groups: Groups, head_dim: int) -> None:
        super().__init__()
        self.base, self.head_dim = base, head_dim
        self.members = torch.tensor(groups)  # [C, g]
        n, size = self.members.shape
        self.order = self.members.flatten().argsort()
        self.drift = nn.Parameter(torch.zeros(n, size, size, head_dim, device=base.weight.device))

    @property
    def w(self) -> Float[Tensor, "C g g Dh"]:
        eye = torch.eye(self.drift.shape[1], device=self.drift.device)
        return eye[None, :, :, None] + SPEED * self.drift

    def forward(self, x: Tensor) -> Tensor:
        heads = self.base(x).unflatten(-1, (-1, self.head_dim))[..., self.members, :]  # [..., C, g, Dh]
        mixed = torch.einsum("chjd,...cjd->...chd", self.w.to(heads), heads).flatten(-3, -2)
        return mixed[..., self.order, :].flatten(-2)

    def apart(self) -> Float[Tensor, ""]:
        """How far the members' w are from their mean, in squares."""
        return (self.w - self.w.mean(1, keepdim=True)).square().sum()

    @property
    def at_first(self) -> int:
        """`apart` of w = 1 if h = j else 0."""
        n, size = self.members.shape
        return n * (size - 1) * self.head_dim

    def heads(self) -> Float[Tensor, "H F"]:
        """Every head's own W~, biases aside."""
        W = self.base.weight.detach().unflatten(0, (-1, self.head_dim))[self.members]
        return torch.einsum("chjd,cjdx->chdx", self.w.detach().to(W), W).flatten(0, 1)[self.order].flatten(1)

    def fused(self) -> dict[str, Tensor]:
        """The parameters of the groups' one head."""
        w = self.w.detach().mean(1)

        def one(tensor: Tensor) -> Tensor:
            by_head = tensor.detach().unflatten(0, (-1, self.head_dim))[self.members]  # [C, g, Dh, ...]
            return torch.einsum("cjd,cjd...->cd...", w.to(by_head), by_head).flatten(0, 1)

        return {name: one(parameter) for name, parameter in self.base.named_parameters()}


class _Fusing(nn.Module):
    """The loss of a fusion, max over lam and min over all else (formula above)."""

    def __init__(self, module: nn.Module, blends: Sequence[Blend], warmup: int) -> None:
        super().__init__()
        self.module, self.warmup = module, warmup
        self._blends = tuple(blends)  # in a tuple: they are parts of the module
        self.lam = nn.Parameter(torch.zeros(()))

    def apart(self) -> Float[Tensor, ""]:
        """F: 1 at first, 0 when all groups are one head."""
        total: Tensor = sum(blend.apart() for blend in self._blends)  # type: ignore[assignment]
        return total / max(1, sum(blend.at_first for blend in self._blends))

    def forward(self, batch: Batch) -> Float[Tensor, ""]:
        step = int(batch["step"])
        over = (self.apart() - max(0.0, 1 - step / self.warmup)).clamp(min=0)
        lam = PULL * self.lam
        # Descent on the last term is ascent in lam.
        return next_token_loss(self.module, batch) + lam.detach() * over - lam * over.detach()


def blended(source: Source, grouping: Grouping) -> tuple[nn.Module, dict[str, Blend]]:
    """A copy whose projections are blends, with them by their paths."""
    module = own_copy(source.model.plain)
    blends = {}
    for layer, kind, part in source.slices():
        base: Any = module.get_submodule(source.path(part))
        blends[source.path(part)] = Blend(base, grouping.of(layer, kind), source.model.head_dim)
        module.set_submodule(source.path(part), blends[source.path(part)])
    return module.requires_grad_(True), blends


def fusion_batches(ids: Int[Tensor, "N T"], settings: TrainSettings) -> Callable[[int], Batch]:
    """Batches of passages, with the step's number for t."""

    def batch(number: int) -> Batch:
        rows = epoch_rows(len(ids), settings.rows, number, settings.seed)
        return {"input_ids": ids[rows], "step": torch.tensor(number)}

    return batch


def fused(
    model: HeadModel,
    grouping: Grouping,
    ids: Int[Tensor, "N T"],
    settings: TrainSettings = FUSION,
    *,
    folder: Path | None = None,
    bar: Bar = Bar(),
) -> tuple[HeadModel, float]:
    """A copy whose groups were fused on `ids` and collapsed, and F where the fusion ended (formulas above).

    t falls to 0 over half of the steps. F that did not come near 0 says that the collapse changed the function: give more steps.
    """
    source = Source.of(model)
    module, blends = blended(source, grouping)
    fusing = _Fusing(module, list(blends.values()), max(1, (settings.steps or 1) // 2))

    def goes_on(progress: Progress, _: torch.optim.Optimizer) -> bool:
        return float(fusing.apart().detach()) >= FUSED

    fit(fusing, fusion_batches(ids, settings), settings, folder, after_step=goes_on, bar=bar)
    module.to(model.device).eval()
    heads = {path: blend.fused() for path, blend in blends.items()}
    for path, blend in blends.items():
        module.set_submodule(path, blend.base)
    trained = HeadModel(module, model.tokenizer, layout_in(module, source.model))
    return collapsed(trained, grouping, heads), float(fusing.apart().detach())
