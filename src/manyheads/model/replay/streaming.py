"""One layer of a model at a time: reading and differentiating a deep model in the memory of a single layer.

A `Stream` keeps of a pass only the residual stream between the layers, `x_0 .. x_L`, each `[B, T, D]`. From it the model's own
forward can run a single block again, or only what stands above the last block (final norm, unembedding, scalings, caps:
whatever the architecture has there), with all else replaced by stubs. The chain rule then needs one block's graph at a time:

    g_L = dL/dx_L  through the head alone,        g_l = g_{l+1} . dx_{l+1}/dx_l  through block l alone

and the gradients at what a block computes on the way (z, q, k, v, the MLP's write) come out of the same products. Beside
the residual streams memory is that of one block's graph, however deep the model; a whole backward pass keeps every layer's
patterns and MLP activations. It costs one more forward pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import (
    caught,
    entering,
    first_tensor,
    frozen,
    hidden_of,
    hooked,
    leaving,
    with_first,
    with_hidden,
)
from manyheads.model.reading.attention import PARTS
from manyheads.model.reading.readers import SITE_OF, Keep, KeepGraph
from manyheads.model.replay.dispatch import stopping_after
from manyheads.model.replay.recording import Recording, first_logits, no_cache, only_last, starting_at

InnerSite = Literal["z", "query", "key", "value", "mlp_write"]
RowMetric = Callable[[Tensor], Tensor]  # logits [B, T, V] -> one number a row, [B]


@dataclass(frozen=True)
class Stream:
    """The residual stream of one pass between its layers. `first` enters layer 0, `recording.outputs` leave the layers."""

    model: HeadModel
    recording: Recording
    first: Float[Tensor, "B T D"]

    @classmethod
    def of(cls, model: HeadModel, inputs: Any, start: Float[Tensor, "B T D"] | None = None) -> Stream:
        """One pass without gradients, from `start` instead of the embedding's output if that is given.

        `UnsupportedError` where a layer reads anything else than what the layer below returned.
        """
        model.require_alike("a streamed pass")
        batch, blocks = model.inputs(inputs), model.layout.blocks
        first: list[Tensor] = []
        outputs: list[Any] = []

        def enter(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            hidden = hidden_of(args, kwargs)
            if not first:
                first.append(hidden if start is None else start.to(hidden))
                return with_hidden(args, kwargs, first[0])
            below = first_tensor(outputs[-1])
            if hidden is not below and not torch.equal(hidden, below.to(hidden)):
                raise UnsupportedError(
                    f"{type(model.plain).__name__} changes the residual stream between layers {len(outputs) - 1} and "
                    f"{len(outputs)}, so its layers cannot be run one at a time."
                )
            return None

        with contextlib.ExitStack() as stack:
            for block in blocks:
                stack.enter_context(
                    hooked(block.module, before=enter, after=lambda module, args, out: outputs.append(out))
                )
            with torch.no_grad():
                logits = first_logits(model.plain(**batch, **no_cache(model.plain), **only_last(model.plain, 1)))
        return cls(model, Recording(batch, outputs, [], [], [], logits), first[0])

    def resid(self, layer: int) -> Float[Tensor, "B T D"]:
        """The residual stream entering `layer`; `n_layers` is the last layer's output."""
        return self.first if layer == 0 else first_tensor(self.recording.outputs[layer - 1])

    def head(self, resid: Float[Tensor, "B T D"], keep: int | None = None) -> Tensor:
        """The logits (of the last `keep` positions) that the model makes of `resid` above its last layer."""
        outputs, plain = self.recording.outputs, self.model.plain
        with self._starting_at(self.model.n_layers, [*outputs[:-1], with_first(outputs[-1], resid)]):
            logits = first_logits(plain(**self.recording.inputs, **no_cache(plain), **only_last(plain, keep)))
        return logits if keep is None or logits.ndim < 3 else logits[:, -keep:]

    def block(
        self, layer: int, resid: Float[Tensor, "B T D"], sites: Collection[InnerSite] = ()
    ) -> tuple[Float[Tensor, "B T D"], dict[InnerSite, Tensor]]:
        """What layer `layer` makes of `resid`, and the activations at `sites` on the way there, all parts of one graph.

        z, q, k and v are `[B, T, H, Dh]` (k and v as each query head reads them, all after rotary embedding), an MLP's write
        `[B, T, D]` in its own unit, before a residual multiplier.
        """
        model, block = self.model, self.model.layout.blocks[layer]
        inner: dict[InnerSite, Tensor] = {}
        stop = Keep("mlp_write", layers=[layer])
        with contextlib.ExitStack() as stack:
            stack.enter_context(_catching(model, layer, sites, inner))
            stack.enter_context(self._starting_at(layer, self.recording.outputs))
            stack.enter_context(entering(block.module, lambda _: resid))
            left = stack.enter_context(caught(block.module))
            with stopping_after(model.layout, [stop]):
                model.plain(**self.recording.inputs, **no_cache(model.plain))
        return left[0], inner

    def activations(self, layer: int, sites: Collection[InnerSite]) -> dict[InnerSite, Tensor]:
        """The pass's activations at `sites` of one layer, without gradients."""
        if not sites:
            return {}
        with torch.no_grad():
            return self.block(layer, self.resid(layer), sites)[1]

    def gradients(
        self, metric: RowMetric, sites: Collection[InnerSite] = (), keep: int | None = None
    ) -> Iterator[LayerGradients]:
        """From the head (as layer `n_layers`) down: each layer's gradients of the metric's sum over rows.

        `InputError` for a metric that has no gradient, or not one number a row.
        """
        plain, n_layers = self.model.plain, self.model.n_layers
        # A leaf before each part cuts the graph there: no more than one part's graph is in memory.
        leaf = _leaf(self.resid(n_layers))
        with torch.enable_grad(), frozen(plain):
            rows = checked_rows(metric(self.head(leaf, keep)), len(leaf))
            if not rows.requires_grad:
                raise InputError("the metric does not depend on the logits by operations that have a gradient.")
            (above,) = grad(rows.sum(), leaf)
            del rows
        yield LayerGradients(n_layers, above)
        for layer in reversed(range(n_layers)):
            leaf = _leaf(self.resid(layer))
            with torch.enable_grad(), frozen(plain):
                out, inner = self.block(layer, leaf.clone(), sites)  # a clone: a layer may add in place
                above, *to_inner = grad(out, [leaf, *inner.values()], above.to(out))
                del out
            values = {site: value.detach() for site, value in inner.items()}
            given = dict(zip(inner, to_inner, strict=True))
            del inner, to_inner
            yield LayerGradients(layer, above, values, given)
            del values, given

    def _starting_at(self, layer: int, outputs: list[Any]) -> contextlib.AbstractContextManager[None]:
        return starting_at(self.model.layout, replace(self.recording, outputs=outputs), layer)


@dataclass(frozen=True)
class LayerGradients:
    """Gradients with respect to the residual stream entering `layer` and, with the activations themselves, at sites inside."""

    layer: int
    resid: Float[Tensor, "B T D"]
    values: dict[InnerSite, Tensor] = field(default_factory=dict)
    inner: dict[InnerSite, Tensor] = field(default_factory=dict)


def checked_rows(value: Any, n: int) -> Float[Tensor, "B"]:
    """`value`, if it is one number a row. `InputError` otherwise."""
    if not isinstance(value, Tensor) or value.shape != (n,):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"a metric returns a tensor with one number a row, [{n}]; it returned {shape}.")
    return value


@contextlib.contextmanager
def _catching(
    model: HeadModel, layer: int, sites: Collection[InnerSite], found: dict[InnerSite, Tensor]
) -> Iterator[None]:
    """Put what one block computes at `sites` into `found`, as it goes on through the graph."""
    layout = model.layout
    block = layout.blocks[layer]

    def z(flat: Tensor) -> Tensor:
        found["z"] = layout.by_heads(flat, layer)
        return layout.side_by_side(found["z"], layer)

    def mlp(written: Tensor) -> Tensor:
        # OPT flattens rows and positions; Falcon adds to it in place.
        found["mlp_write"] = written.reshape(batch[0], -1, written.shape[-1])
        return found["mlp_write"].reshape(written.shape).clone()

    keeps = {part: KeepGraph(SITE_OF[part], layers=[layer]) for part in PARTS if part in sites}
    with contextlib.ExitStack() as stack:
        batch = stack.enter_context(caught(block.module, side="input", keep=len))
        if "z" in sites:
            stack.enter_context(entering(block.projection, z))
        if "mlp_write" in sites:
            stack.enter_context(leaving(block.mlp_write, mlp))
        stack.enter_context(model.reading(*keeps.values()))
        yield
    found.update({part: keep.values[layer] for part, keep in keeps.items()})


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
