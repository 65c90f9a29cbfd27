"""GIM, gradient interaction modifications: attribution patching by a gradient that self-repair does not hide.

Edin et al., arXiv:2505.17630. If others compensate for the loss of a component, its gradient is close to zero although it
matters. The forward pass is unchanged; in the backward pass

    norm(x) = direction(x) / sigma(x)     sigma, the norm's denominator, is a constant
    p = softmax(s)                        ds = J(softmax(s / T)) dp, at temperature T = 2, so that keys of small weight count
    q, k, v                               their gradients are multiplied by 1/4, 1/4, 1/2: shared among the factors

With this gradient, nodes are scored as in `attribution_patching`, in the metric's unit:

    score[site, l, t] = <a'[l, t] - a[l, t], dL/da[l, t]>

The authors' package also halves the gradients of a gated MLP's two branches; here MLPs are unchanged. One gradient is still
zero where attention is saturated: in a planted induction circuit it finds the induction head, but not the previous-token head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.editing.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import hooked
from manyheads.model.norms import FoldedNorm
from manyheads.provenance import Provenance
from manyheads.tasks import TaskBatch
from manyheads.trace.circuits.attribution_patching import NodeScores, NodeSite, attribution_patching
from manyheads.trace.explaining import LOST, Found, components, explains

PAPER = "arXiv:2505.17630"
SHARES = {"query": 0.25, "key": 0.25, "value": 0.5}


@dataclass(frozen=True, eq=False)
class GradientRule(Edit):
    """Changes no value: gradients through the attention of the layers of `heads` follow the rules above."""

    temperature: float = 2.0
    shares: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    @property
    def acts_in_attention(self) -> bool:
        """True: the rule changes the pattern's gradient."""
        return True

    def parts(self) -> frozenset[Any]:
        """q, k and v, whose gradients are scaled."""
        return frozenset(self.shares)

    def change(self, layer: int, part: Any, tensor: Tensor) -> Tensor:
        """The same tensor, its gradient times its share."""
        return _as_before(tensor, tensor * self.shares[part])

    def attend(self, call: Any, z: Tensor) -> Tensor:
        """The same z, with the gradient of the softer pattern."""
        p = call.pattern
        # softmax(s / T) is p^(1/T), normed; T times it has the paper's Jacobian, J(softmax(s / T)), with respect to s.
        logits = p.clamp_min(torch.finfo(p.dtype).tiny).log().masked_fill(p == 0, -torch.inf)
        soft = self.temperature * (logits / self.temperature).softmax(-1)
        heads = list(range(p.shape[1]))
        return _as_before(z, torch.einsum("bhts,bhsd->bthd", _as_before(p, soft), call.values_of(heads)))


def gim(
    model: HeadModel,
    clean: Any,
    corrupted: Any,
    metric: Any,
    *,
    sites: Collection[NodeSite] = ("z", "mlp_write", "resid"),
    temperature: float = 2.0,
    keep: int | None = None,
) -> NodeScores:
    """Score every node by the modified gradient (formulas above). Arguments, costs and errors as in `attribution_patching`.

    `InputError` for a temperature below 1; `UnsupportedError` for attention sinks, since rows then do not sum to one.
    """
    if not temperature >= 1:
        raise InputError(f"temperature is {temperature}; give 1 (the softmax's own gradient) or more.")
    if any(hasattr(block.core, "sinks") for block in model.layout.blocks):
        raise UnsupportedError(f"{type(model.plain).__name__} has attention sinks, for which GIM has no rule.")
    with model.editing(GradientRule(model.heads, temperature=temperature)), constant_denominators(model.plain):
        found = attribution_patching(model, clean, corrupted, metric, sites=sites, keep=keep)
    return replace(found, meta=Provenance.of(model, "GIM", PAPER, temperature=temperature, shares=SHARES).to_json())


@contextlib.contextmanager
def constant_denominators(module: nn.Module) -> Iterator[None]:
    """Inside the block, the denominators of norms in `module` are constants for gradients; values are unchanged."""

    def held(norm: FoldedNorm) -> Any:
        return lambda _, args, out: _as_before(out, norm.direction(args[0]) / norm.sigma(args[0]).detach())

    with contextlib.ExitStack() as stack:
        for part in module.modules():
            if "norm" in type(part).__name__.lower() and isinstance(width := getattr(part, "weight", None), Tensor):
                norm = FoldedNorm.of(part, width.shape[-1])
                stack.enter_context(hooked(part, after=held(norm)))
        yield


def _as_before(value: Tensor, path: Tensor) -> Tensor:
    """`value` with the gradient of `path`."""
    return value.detach() + (path - path.detach()).to(value.dtype)


@explains("gim", f"an estimate of {LOST} a component is patched, self-repair left out", needs_twin=True)
def _explain(model: HeadModel, batch: TaskBatch) -> Found:
    found = gim(model, batch.inputs, batch.twins, batch.logit_difference, sites=("z", "mlp_write"), keep=1)
    return components(model, "gim", -found.heads.mean(0), -found.mlps.mean(0)), {}
