"""An encoder of users' own, as several systems train it; views of users; and a slow copy that gives targets."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.learning import Trunk
from manyheads.learning.trunk import POOLS, Pool
from manyheads.training import drawn_rows

ViewBatches = Callable[[int], Mapping[str, Tensor]]
"""Batch number -> {"views": [B, V, ...], "actions": [B, V - 1, A]}, a pure function of the number."""


class ViewEncoder(nn.Module):
    """Pictures to one vector each: any module with output [B, D], or the pooled last states of a `Trunk` that is not frozen."""

    def __init__(self, given: nn.Module | Trunk, pool: Pool = "mean") -> None:
        super().__init__()
        if isinstance(given, Trunk) and given.frozen:
            raise InputError("the trunk is frozen and would learn nothing; give Trunk(model, frozen=False).")
        if pool not in POOLS or pool == "tokens":
            raise InputError(f"pool is {pool!r}; give mean, first or last.")
        self.module: nn.Module = given.module if isinstance(given, Trunk) else given
        self.of_trunk, self.pool = isinstance(given, Trunk), pool

    def forward(self, pictures: Float[Tensor, "B ..."]) -> Float[Tensor, "B D"]:
        """One vector a picture."""
        if self.of_trunk:
            states: Tensor = Trunk(self.module, frozen=False).states(pictures, -1, self.pool)
            return states
        found: Tensor = self.module(pictures)
        return found

    @torch.no_grad()
    def width(self, pictures: Float[Tensor, "B ..."]) -> int:
        """D, by reading pictures once. `InputError` where the output is not one vector of floating-point numbers a picture."""
        mode = self.training
        self.eval()  # so that running means of batch norms stay as they are
        try:
            found = self(pictures)
        finally:
            self.train(mode)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pictures):
            shape = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InputError(f"the encoder gave {shape} for {len(pictures)} pictures; give one whose output is [B, D].")
        return found.shape[1]


def view_batches(
    views: Float[Tensor, "N V ..."] | ViewBatches,
    actions: Float[Tensor, "N W A"] | None,
    rows: int,
    seed: int,
    *,
    least: int = 2,
) -> ViewBatches:
    """Batches of things seen from several sides: rows of tensors, or what a function of the batch number draws.

    `actions[n, m]` says how view m became view m + 1 (W = V - 1). `InputError` for shapes that do not fit, fewer than `least`
    views, or numbers that are not finite.
    """
    if not isinstance(views, Tensor):
        if actions is not None:
            raise InputError("a function that draws views draws their actions too; leave actions away.")
        _check_views(views(0), least)
        return views
    if actions is None:
        raise InputError("views without actions say nothing of what changes; give actions [N, V - 1, A].")
    _check_views({"views": views, "actions": actions}, least)
    kept, done = views, actions

    def batch(number: int) -> Mapping[str, Tensor]:
        chosen = drawn_rows(len(kept), rows, number, seed)
        return {"views": kept[chosen], "actions": done[chosen]}

    return batch


class SlowCopy(nn.Module):
    """A copy that follows a module: after every step each parameter moves by 1 - decay towards the module's.

    Parameters only: running means of batch norms are its own. The decay rises from `base` to 1 over the run,
    1 - (1 - base) (cos(pi share) + 1) / 2.
    """

    def __init__(self, module: nn.Module, base: float) -> None:
        super().__init__()
        self.copied, self.base = copy.deepcopy(module).requires_grad_(False), base

    def forward(self, *given: Tensor) -> Tensor:
        """What the copy says, without gradients."""
        with torch.no_grad():
            out: Tensor = self.copied(*given)
        return out

    @torch.no_grad()
    def follow(self, module: nn.Module, share: float) -> None:
        """Move towards `module`, `share` of the run being over."""
        decay = 1 - (1 - self.base) * (math.cos(math.pi * min(share, 1.0)) + 1) / 2
        for old, new in zip(self.copied.parameters(), module.parameters(), strict=True):
            old.lerp_(new.detach(), 1 - decay)


def _check_views(batch: Mapping[str, Tensor], least: int) -> None:
    views, actions = batch["views"], batch["actions"]
    if views.ndim < 3 or not views.is_floating_point() or views.shape[1] < least or not len(views):
        raise InputError(
            f"views have shape {list(views.shape)} of {views.dtype}; give [N, V, ...], floating-point, V at least {least}."
        )
    if actions.ndim != 3 or actions.shape[:2] != (len(views), views.shape[1] - 1) or not actions.is_floating_point():
        raise InputError(
            f"actions have shape {list(actions.shape)}; {views.shape[1]} views of {len(views)} things take "
            f"[{len(views)}, {views.shape[1] - 1}, A]."
        )
    for name, tensor in batch.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise InputError(f"{name} hold NaN or infinity; give finite numbers.")
