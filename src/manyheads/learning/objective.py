"""How several heads train: one loss of all, or each head's gradient at the trunk by itself; what is seen of it on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.files import write_atomically
from manyheads.inputs import clause, read_object
from manyheads.learning.attached import AttachedHeads
from manyheads.learning.balance import Balance, Equal
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.training import Progress, TrainSettings, fit

LOOKS = 50  # how often a run of known length compares gradients, unless it is told
EVERY = 100  # steps between looks where a clock ends the run
LOG = "heads.json"


@dataclass(frozen=True)
class Gradients:
    """The heads' gradients at the trunk at one step: `gram[i, j]` is the product of those of heads i and j.

    `seconds` is what the pass with a backward for each head took.
    """

    step: int
    heads: tuple[str, ...]
    gram: Float[Tensor, "H H"]
    seconds: float

    def rows(self) -> list[tuple[int, str, str, float, float, float]]:
        """A row a pair: step, both heads, cosine, and both norms."""
        norms = self.gram.diagonal().clamp_min(0).sqrt()
        cosine = self.gram / (norms[:, None] * norms).clamp_min(1e-30)
        n = len(self.heads)
        return [
            (self.step, self.heads[i], self.heads[j], float(cosine[i, j]), float(norms[i]), float(norms[j]))
            for i in range(n)
            for j in range(i + 1, n)
        ]


@dataclass
class GradientConflicts(Reported):
    """How the heads' gradients at the trunk agree, looked at in several steps or batches."""

    seen: list[Gradients] = field(default_factory=list)

    def to_frame(self) -> pd.DataFrame:
        """A row a step and pair of heads: step, a, b, cosine, norm_a, norm_b."""
        rows = [row for one in self.seen for row in one.rows()]
        return pd.DataFrame(rows, columns=["step", "a", "b", "cosine", "norm_a", "norm_b"])

    def summary(self) -> pd.DataFrame:
        """A row a pair: mean cosine with its standard error, the share of looks in which they conflict, mean norms."""
        pairs = self.to_frame().groupby(["a", "b"], sort=False)
        found = pairs.agg(
            cosine=("cosine", "mean"),
            stderr=("cosine", "sem"),
            conflicts=("cosine", lambda values: float((values < 0).mean())),
            norm_a=("norm_a", "mean"),
            norm_b=("norm_b", "mean"),
            n=("cosine", "size"),
        )
        return found.reset_index()


@dataclass
class HeadsRun(Reported):
    """A training run of several heads: its progress, each head's loss by step (`losses`), and the heads' conflicts."""

    progress: Progress
    losses: pd.DataFrame
    conflicts: GradientConflicts


def gradient_conflicts(
    heads: AttachedHeads, batches: Iterable[Mapping[str, Any]], share: float = 1.0
) -> GradientConflicts:
    """Compare the heads' gradients at the trunk on batches, without training: one backward pass a head and batch.

    `InputError` where the trunk is frozen, so that no gradient reaches it.
    """
    if heads.trunk.frozen:
        raise InputError("the trunk is frozen, so no gradient reaches it; give Trunk(model, frozen=False).")
    objective = _Objective(heads, Equal(), 1)
    for i, batch in enumerate(batches):
        objective((i, share, batch))
    return GradientConflicts(objective.seen)


def train_heads(
    heads: AttachedHeads,
    batches: Callable[[int], Mapping[str, Any]],
    settings: TrainSettings,
    folder: str | Path | None,
    *,
    balance: Balance,
    judge: Callable[[], float] | None,
    every: int | None,
    bar: Bar,
) -> HeadsRun:
    """`MultiHead.fit`, whose batches were checked."""
    if settings.steps is None and any(callable(one.weight) or one.tunes_from for one in heads.attached.values()):
        raise InputError("a head's schedule needs the length of the run in steps; give TrainSettings steps.")
    total = settings.steps or 0
    objective = _Objective(heads, balance, every or (max(1, total // LOOKS) if total else EVERY))
    log = None if folder is None else Path(folder) / LOG
    objective.recall(log)

    def numbered(i: int) -> tuple[int, float, Mapping[str, Any]]:
        return i, i / total if total else 0.0, batches(i)

    def after(progress: Progress, optimizer: torch.optim.Optimizer) -> None:
        if log is not None and (progress.step - 1) % objective.every == 0:
            objective.write(log)

    balance.begin(len(heads.attached))
    progress = fit(objective, numbered, settings, folder, judge=judge, after_step=after, bar=bar)
    heads.eval()
    rows = [(step, name, value) for step, found in sorted(objective.log.items()) for name, value in found.items()]
    return HeadsRun(progress, pd.DataFrame(rows, columns=["step", "head", "loss"]), GradientConflicts(objective.seen))


class _Objective(nn.Module):
    """The loss of a numbered batch. Where gradients of single heads are needed, they are taken here and handed to autograd."""

    def __init__(self, heads: AttachedHeads, balance: Balance, every: int) -> None:
        super().__init__()
        self.heads, self.balance, self.every = heads, balance, every
        self.names = list(heads.attached)
        self.log: dict[int, dict[str, float]] = {}
        self.seen: list[Gradients] = []

    def forward(self, numbered: tuple[int, float, Mapping[str, Any]]) -> Tensor:
        step, share, batch = numbered
        looks = step % self.every == 0
        apart = self.balance.needs_gradients or looks
        started = time.perf_counter()
        losses = self.heads.losses(batch, share)
        if not losses:
            raise InputError(f"batch {step} has no target of any head that trains.")
        weighted = {name: self.heads.attached[name].weight_at(share) * loss for name, loss in losses.items()}
        total = self._apart(step, share, weighted, started) if apart else self._whole(weighted)
        if looks:
            self.log[step] = {name: float(loss.detach()) for name, loss in losses.items()}
        if not bool(total.detach().isfinite()):
            wrong = [name for name, loss in losses.items() if not bool(loss.detach().isfinite())]
            whose = f"the loss of head {wrong[0]!r}" if wrong else "the sum of the losses"
            raise InputError(f"{whose} is not finite at step {step}; look at its targets, or give a lower rate.")
        return total

    def _whole(self, weighted: dict[str, Tensor]) -> Tensor:
        return self.balance.total(torch.stack(list(weighted.values())), self._numbers(weighted))

    def _numbers(self, names: Iterable[str]) -> list[int]:
        return [self.names.index(name) for name in names]

    def _apart(self, step: int, share: float, weighted: dict[str, Tensor], started: float) -> Tensor:
        """The same loss; its gradient at the trunk is made of each head's, by the balance's coefficients."""
        heads = self.heads
        shared = [] if heads.trunk.frozen else [p for p in heads.backbone.parameters() if p.requires_grad]
        reach = [name for name in weighted if shared and heads.attached[name].reaches(share)]
        if not reach:
            return self._whole(weighted)
        own = {name: [p for p in heads.heads[name].parameters() if p.requires_grad] for name in weighted}
        # One backward pass a head gives both its gradient at the trunk and its own layers'.
        found = {
            name: torch.autograd.grad(loss, [*shared, *own[name]], retain_graph=True, allow_unused=True)
            for name, loss in weighted.items()
        }
        at_trunk = [found[name][: len(shared)] for name in reach]
        gram = _gram(at_trunk)
        if step % self.every == 0:
            # What was seen after the state that a killed run goes on from is seen again.
            self.seen = [one for one in self.seen if one.step < step]
            self.seen.append(Gradients(step, tuple(reach), gram.cpu(), time.perf_counter() - started))
        if not self.balance.needs_gradients:
            return self._whole(weighted)
        values = torch.stack([weighted[name].detach() for name in reach])
        with torch.no_grad():
            c = self.balance.coefficients(values, gram.to(values.device), self._numbers(reach))
        given: dict[nn.Parameter, Tensor] = {}
        for one, gradients in zip(c, at_trunk, strict=True):
            _add(given, shared, gradients, one)
        for name, mine in own.items():
            _add(given, mine, found[name][len(shared) :])
        value = torch.stack([loss.detach() for loss in weighted.values()]).sum()
        out: Tensor = _Given.apply(value, tuple(given.values()), *given)
        return out

    def write(self, path: Path) -> None:
        seen = [(one.step, one.heads, one.gram.tolist(), one.seconds) for one in self.seen]
        text = json.dumps({"losses": self.log, "gradients": seen})
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write_text(text, "utf-8"), force=True)

    def recall(self, path: Path | None) -> None:
        """What an interrupted run saw."""
        if path is None or not path.exists():
            return
        try:
            kept = read_object(path)
            self.log = {int(step): found for step, found in kept["losses"].items()}
            self.seen = [Gradients(s, tuple(h), torch.tensor(g), t) for s, h, g, t in kept["gradients"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path} is damaged ({clause(error)}); remove it.") from None


class _Given(torch.autograd.Function):
    """A value whose gradients are given: `backward` hands them on."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> Any:
        return (None, None, *[outer * gradient for gradient in ctx.gradients])


def _gram(gradients: Sequence[Sequence[Tensor | None]]) -> Float[Tensor, "H H"]:
    n = len(gradients)
    out = torch.zeros(n, n)
    for i in range(n):
        for j in range(i, n):
            pairs = zip(gradients[i], gradients[j], strict=True)
            parts = [(a.float() * b.float()).sum() for a, b in pairs if a is not None and b is not None]
            out[i, j] = out[j, i] = torch.stack(parts).sum() if parts else 0.0
    return out


def _add(
    given: dict[nn.Parameter, Tensor],
    parameters: Sequence[nn.Parameter],
    gradients: Sequence[Tensor | None],
    by: Tensor | None = None,
) -> None:
    """Sum gradients up by parameter; heads may share one."""
    for p, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            more = gradient if by is None else by.to(gradient) * gradient
            given[p] = given[p] + more if p in given else more
