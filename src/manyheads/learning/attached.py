"""Heads on a trunk: what each reads, what it is compared with, and whether its gradient reaches the trunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_choice, check_number, clause
from manyheads.learning.head import Head
from manyheads.learning.trunk import POOLS, Layer, Pool, Trunk
from manyheads.model.headmodel import HeadModel

MISSING = -100  # a class that is not given, as in PyTorch: such rows do not count
Gradient = Literal["flows", "stops", "reversed"]


@dataclass(frozen=True)
class Attached:
    """A head, and how it sits on the trunk.

    It reads `layer` as `pool` says (`learning.trunk`), and is compared with the batch's entry `target` (default: the head's own
    name; several names give it a tuple of them, and all states as they are; () gives it None). With "tokens" it gets the states
    of the tokens that have a target, and are no padding, as rows. `weight` is a number, or a function of the share of the run;
    at 0 the head is not run. `stays`: whether it is still there at inference.
    """

    head: Head
    target: str | tuple[str, ...] | None = None
    layer: Layer = -1
    pool: Pool = "mean"
    weight: float | Callable[[float], float] = 1.0
    gradient: Gradient = "flows"
    tunes_from: float = 0.0
    stays: bool = True

    def __post_init__(self) -> None:
        check_choice(self.pool, "pool", POOLS)
        check_choice(self.gradient, "gradient", ("flows", "stops", "reversed"))
        check_number(self.tunes_from, "tunes_from", 0.0, 1.0)
        if not callable(self.weight):
            check_number(self.weight, "weight", 0.0)

    def weight_at(self, share: float) -> float:
        """The weight at a share of the run."""
        return float(self.weight(share) if callable(self.weight) else self.weight)

    def reaches(self, share: float) -> bool:
        """Whether its gradient reaches the trunk then."""
        return self.gradient != "stops" and share >= self.tunes_from


class AttachedHeads(nn.Module):
    """Heads on a trunk. Its parameters are those of the heads, and of the trunk unless that is frozen."""

    def __init__(self, trunk: Trunk | HeadModel | nn.Module, heads: Mapping[str, Attached | Head]) -> None:
        super().__init__()
        self.trunk = trunk if isinstance(trunk, Trunk) else Trunk(trunk)
        self.attached: dict[str, Attached] = {}
        for name, given in heads.items():
            one = given if isinstance(given, Attached) else Attached(given)
            if not name.isidentifier():
                raise InputError(f"a head is called {name!r}; give a name of letters, digits and underscores.")
            self.attached[name] = replace(one, target=name) if one.target is None else one
        if not self.attached:
            raise InputError("there are no heads; give at least one.")
        self.heads = nn.ModuleDict({name: one.head for name, one in self.attached.items()})
        if not self.trunk.frozen:
            self.backbone = self.trunk.backbone

    def forward(self, batch: Any) -> dict[str, Any]:
        """The outputs of the heads that stay, by name. With "tokens" they are `[B, T, ...]`, padding and all."""
        staying = {name: one for name, one in self.attached.items() if one.stays}
        states, _ = self._states(batch, staying, share=1.0)
        return {name: one.head(states[name]) for name, one in staying.items()}

    def losses(self, batch: Mapping[str, Any], share: float = 1.0) -> dict[str, Tensor]:
        """The loss of each head that trains at this share of the run and has a target in the batch, before weights."""
        active = {name: one for name, one in self.attached.items() if one.weight_at(share)}
        outputs = self._outputs(batch, active, share)
        return {name: self.attached[name].head.loss(*pair) for name, pair in outputs.items()}

    def check(self, batch: Mapping[str, Any]) -> None:
        """Try every head on a batch. `InputError` names the head that does not fit, and says why."""
        for name, one in self.attached.items():
            with torch.no_grad(), self._named(name):
                if missing := [entry for entry in _names(one.target) if entry not in batch]:
                    raise InputError(f"the batch has no {missing[0]!r}, only {', '.join(map(str, batch))}.")
                for output, target in self._outputs(batch, {name: one}, 1.0).values():
                    _check_target(output, target)
                    loss = one.head.loss(output, target)
                    if loss.ndim:
                        raise InputError(f"its loss has shape {list(loss.shape)}; a loss is one number.")
                    if not bool(loss.isfinite()):
                        raise InputError(f"its loss on the first batch is {float(loss)}; look at its targets' range.")

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
        """A row a head and metric, with columns head, metric, value: the loss, and what the head measures, over all rows."""
        mode, pairs = self.training, dict[str, list[tuple[Any, Any]]]()
        self.eval()
        try:
            for batch in batches:
                for name, pair in self._outputs(batch, self.attached, 1.0).items():
                    pairs.setdefault(name, []).append(pair)
        finally:
            self.train(mode)
        rows = []
        for name, found in pairs.items():
            output, target = (_joined([pair[i] for pair in found]) for i in (0, 1))
            head = self.attached[name].head
            rows.append((name, "loss", float(head.loss(output, target))))
            rows += [(name, metric, value) for metric, value in head.metrics(output, target).items()]
        return pd.DataFrame(rows, columns=["head", "metric", "value"])

    def _states(
        self, batch: Any, heads: Mapping[str, Attached], share: float
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        reached = any(one.reaches(share) for one in heads.values())
        # While only probes train, the trunk is read as a frozen one is: no gradients, no dropout.
        with self.trunk.without_gradients() if not reached else contextlib.nullcontext():
            found, mask = self.trunk.read(batch, [(one.layer, one.pool) for one in heads.values()])
        states = {}
        for (name, one), state in zip(heads.items(), found, strict=True):
            if not one.reaches(share):
                state = state.detach()
            elif one.gradient == "reversed":
                state = _Reversed.apply(state)
            states[name] = state
        return states, mask

    def _outputs(
        self, batch: Mapping[str, Any], heads: Mapping[str, Attached], share: float
    ) -> dict[str, tuple[Any, Any]]:
        given = {name: one for name, one in heads.items() if all(entry in batch for entry in _names(one.target))}
        if not given:
            return {}
        states, mask = self._states(batch, given, share)
        out = {}
        for name, one in given.items():
            rows, target = _rows(states[name], one.target, batch, mask if one.pool == "tokens" else None)
            if len(rows):
                out[name] = one.head(rows), target
        return out

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except (InputError, UnsupportedError) as error:
            raise InputError(f"head {name!r}: {error}") from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"head {name!r} does not fit: {clause(error)}.") from error


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: Tensor) -> Tensor:
        return states.view_as(states)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


def _names(target: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return (target,) if isinstance(target, str) else target or ()


def _rows(
    states: Tensor, target: str | tuple[str, ...] | None, batch: Mapping[str, Any], mask: Tensor | None
) -> tuple[Tensor, Any]:
    """The states that have a target, as rows, with their targets. Several targets, or none, leave the rows to the head."""
    if not isinstance(target, str):
        return states, tuple(batch[name] for name in target) if target else None
    wanted = batch[target]
    if not isinstance(wanted, Tensor):
        return states, wanted
    wanted = wanted.to(states.device)
    if states.ndim == 3 and wanted.shape[:2] == states.shape[:2]:
        real = torch.ones_like(states[..., 0], dtype=torch.bool) if mask is None else mask.to(states.device) > 0
        given = real & (wanted != MISSING) if _classes(wanted) else real
        return states[given], wanted[given]
    if len(wanted) != len(states):
        raise InputError(f"it has states of shape {list(states.shape)} and targets of shape {list(wanted.shape)}.")
    given = wanted != MISSING
    if not _classes(wanted) or bool(given.all()):
        return states, wanted
    return states[given], wanted[given]


def _classes(target: Tensor) -> bool:
    return not target.is_floating_point() and target.dtype != torch.bool and target.ndim < 3


def _check_target(output: Any, target: Any) -> None:
    if not isinstance(target, Tensor):
        return
    if target.is_floating_point() and not bool(target.isfinite().all()):
        raise InputError("its targets hold NaN or infinity; leave such rows out.")
    if isinstance(output, Tensor) and _classes(target) and output.ndim == target.ndim + 1 and target.numel():
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= output.shape[-1]:
            raise InputError(f"its targets go from {low} to {high}, and it has {output.shape[-1]} outputs.")


def _joined(parts: list[Any]) -> Any:
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    if isinstance(first, tuple):
        joined = [_joined([part[i] for part in parts]) for i in range(len(first))]
        return type(first)(*joined) if hasattr(first, "_fields") else tuple(joined)
    return first
