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
from manyheads.heads import Head
from manyheads.model.edit.edits import Edit
from manyheads.model.headmodel import HeadModel
from manyheads.model.read.attention import Part
from manyheads.model.read.readers import Keep
from manyheads.model.replay.dispatch import first_tensor, stopping_after
from manyheads.model.replay.recording import Recording, first_logits, no_cache, starting_at
from manyheads.model.replay.sweeping import only_last

InnerSite = Literal["z", "query", "key", "value", "mlp_write"]
RowMetric = Callable[[Tensor], Tensor]  # logits [B, T, V] -> one number a row, [B]
PARTS: tuple[Part, ...] = ("query", "key", "value")


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
                stack.callback(block.module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.module.register_forward_hook(lambda m, a, out: outputs.append(out)).remove)
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
        left: list[Tensor] = []
        caught: dict[InnerSite, Tensor] = {}
        stop = Keep("mlp_write", layers=[layer])
        with contextlib.ExitStack() as stack:
            stack.enter_context(_catching(model, layer, sites, caught))
            stack.enter_context(self._starting_at(layer, self.recording.outputs))
            for handle in (
                block.module.register_forward_pre_hook(lambda m, a, k: with_hidden(a, k, resid), with_kwargs=True),
                block.module.register_forward_hook(lambda m, a, out: left.append(first_tensor(out))),
            ):
                stack.callback(handle.remove)
            with stopping_after(model.layout, [stop]):
                model.plain(**self.recording.inputs, **no_cache(model.plain))
        return left[0], caught

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
                out, caught = self.block(layer, leaf.clone(), sites)  # a clone: a layer may add in place
                above, *inner = grad(out, [leaf, *caught.values()], above.to(out))
                del out
            values = {site: value.detach() for site, value in caught.items()}
            given = dict(zip(caught, inner, strict=True))
            del caught, inner
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
def frozen(module: nn.Module) -> Iterator[None]:
    """While this lasts no parameter asks for a gradient, so that a graph keeps nothing on its behalf."""
    were = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in were:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in were:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _catching(
    model: HeadModel, layer: int, sites: Collection[InnerSite], caught: dict[InnerSite, Tensor]
) -> Iterator[None]:
    """Put what one block computes at `sites` into `caught`, as it goes on through the graph."""
    block, n_heads = model.layout.blocks[layer], model.n_heads
    batch: list[int] = []

    def z(_: nn.Module, args: Any) -> Any:
        caught["z"] = args[0].unflatten(-1, (n_heads, -1))
        return (caught["z"].flatten(-2), *args[1:])

    def mlp(_: nn.Module, args: Any, output: Any) -> Any:
        written = first_tensor(output)
        caught["mlp_write"] = written.reshape(batch[0], -1, written.shape[-1])  # OPT flattens rows and positions
        return with_first(output, caught["mlp_write"].reshape(written.shape).clone())  # Falcon adds to it in place

    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        batch.append(hidden_of(args, kwargs).shape[0])

    with contextlib.ExitStack() as stack:
        stack.callback(block.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        if "z" in sites:
            stack.callback(block.projection.register_forward_pre_hook(z).remove)
        if "mlp_write" in sites:
            stack.callback(block.mlp_write.register_forward_hook(mlp).remove)
        parts = tuple(part for part in PARTS if part in sites)
        if parts:
            heads = [Head(layer, h) for h in range(n_heads)]
            stack.enter_context(model.editing(_Catch(heads, wanted=parts, caught=caught)))
        yield


@dataclass(frozen=True, eq=False)
class _Catch(Edit):
    """Changes nothing: notes q, k and v, widened to the query heads, as parts of the graph."""

    wanted: tuple[Part, ...] = PARTS
    caught: dict[InnerSite, Tensor] = field(default_factory=dict)

    @property
    def acts_in_attention(self) -> bool:
        return True

    def parts(self) -> frozenset[Part]:
        return frozenset(self.wanted)

    def change(self, layer: int, part: Part, tensor: Tensor) -> Tensor:
        self.caught[part] = tensor.transpose(1, 2)
        return self.caught[part].transpose(1, 2)


def hidden_of(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a block's arguments."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def with_hidden(args: Any, kwargs: dict[str, Any], new: Tensor) -> Any:
    """A block's arguments with another residual stream."""
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


def with_first(output: Any, new: Tensor) -> Any:
    """A module's output with another first tensor."""
    return new if isinstance(output, Tensor) else (new, *output[1:])


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_()
