"""Re-running a model from layer l on, without knowing its forward signature.

One clean pass is recorded. A replay calls the model's own forward again, with stubs in the place of the layers below l. The stubs
hand on what was recorded; masks, position embeddings, the layers above and the head run as the architecture has them.
Variants of one layer (such as each head ablated) share one batch: the inputs are repeated, and each variant's edit acts on its
own rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.hooks import caught, first_tensor, hidden_of, leaving, with_first
from manyheads.model.inputs import repeated_inputs, takes
from manyheads.model.layout import Absent, Layout
from manyheads.model.reading.attention import replaced_forward

Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Recording:
    """A clean forward pass: the residual stream `[B, T, D]` after each layer, z, and what the modules returned.

    Of `attention` only the form is kept (its tensor is on the device `meta`), but for the first layer's; of `mlp` too, unless
    the writes were asked for.
    """

    inputs: dict[str, Any]
    outputs: list[Any]
    z: list[Float[Tensor, "B T H Dh"]]
    attention: list[Any]
    mlp: list[Any]
    logits: Tensor

    @property
    def batch(self) -> int:
        return first_tensor(self.outputs[0]).shape[0]

    @property
    def length(self) -> int:
        return first_tensor(self.outputs[0]).shape[1]


def record(module: nn.Module, layout: Layout, inputs: Inputs, keep: int | None = None, mlps: bool = True) -> Recording:
    """One forward pass without gradients, keeping what a replay may need: `O(L B T D)` memory, no patterns.

    Of the logits, those of the last `keep` positions; all if it is None. Without `mlps` what MLPs wrote is not kept: a replay
    that computes them anew does not need it, and it is a third of the memory.
    """

    first, *others = (layout.blocks[layer] for layer in layout.attention_layers)
    blocks = [first, *others]
    with (
        caught(*(block.module for block in layout.blocks), keep=_whole) as outputs,
        # The projection makes of z what attention returned: one layer shows whether it does (`projects_last`).
        caught(first.attention, keep=_whole) as first_attention,
        caught(*(block.attention for block in others), keep=_form) as other_attention,
        # A copy: Falcon adds the attention output to its MLP output in place.
        caught(*(block.mlp_write for block in layout.blocks), keep=_copy if mlps else _form) as mlp,
        caught(*(block.projection for block in blocks), side="input", keep=_whole) as flat,
        torch.no_grad(),
    ):
        logits = first_logits(module(**inputs, **no_cache(module), **only_last(module, keep)))
    z = [
        layout.by_heads(x[None] if x.ndim == 2 else x, at) for at, x in zip(layout.attention_layers, flat, strict=True)
    ]
    logits = logits[:, -keep:] if keep is not None and logits.ndim > 2 else logits
    rows = next((len(value) for value in inputs.values() if isinstance(value, Tensor) and value.ndim > 1), 1)
    stream = first_tensor(outputs[0]).shape
    if len(stream) < 3 or stream[0] != rows:
        raise UnsupportedError(
            f"passes of {type(module).__name__} cannot be run again from a layer on: its residual stream, {list(stream)}, is not "
            "[rows, positions, width]; read and edit it pass by pass."
        )
    attention = [*first_attention, *other_attention]
    if len(blocks) < layout.n_layers:
        missing = torch.full_like(z[0], torch.nan)  # so that nothing read of a layer without heads passes for a number
        z, attention = _spread(layout, z, missing), _spread(layout, attention)
    if len(mlp) < layout.n_layers:
        found = iter(mlp)
        mlp = [None if isinstance(block.mlp_write, Absent) else next(found) for block in layout.blocks]
    return Recording(dict(inputs), outputs, z, attention, mlp, logits)


def _spread(layout: Layout, found: list[Any], missing: Any = None) -> list[Any]:
    """What was found in the layers that have heads, by layer."""
    by_layer = dict(zip(layout.attention_layers, found, strict=True))
    return [by_layer.get(layer, missing) for layer in range(layout.n_layers)]


def _whole(output: Any) -> Any:
    return output


def _copy(output: Any) -> Any:
    return with_first(output, first_tensor(output).clone())


def _form(output: Any) -> Any:
    return with_first(output, torch.empty_like(first_tensor(output), device="meta"))


def first_logits(output: Any) -> Tensor:
    """The logits of a model's output, or its first tensor where it has none (a bare trunk)."""
    logits = getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output[0]


def only_last(module: nn.Module, keep: int | None) -> dict[str, int]:
    """What makes a forward pass compute the logits of the last `keep` positions only, where the model can."""
    return {"logits_to_keep": keep} if keep is not None and takes(module, "logits_to_keep") else {}


def no_cache(module: nn.Module) -> dict[str, bool]:
    """`use_cache=False` for models that would otherwise fill a cache."""
    return {"use_cache": False} if getattr(module.config, "use_cache", None) is not None else {}


def repeated(value: Any, batch: int, n: int) -> Any:
    """`value` with its batch dimension repeated `n` times, looking into tuples and lists; anything else unchanged."""
    if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch and n > 1:
        return value.repeat(n, *[1] * (value.ndim - 1))
    if isinstance(value, (tuple, list)):
        return type(value)(repeated(part, batch, n) for part in value)
    return value


@contextlib.contextmanager
def starting_at(
    layout: Layout, recording: Recording, layer: int, n: int = 1, skip_attention: bool = False
) -> Iterator[None]:
    """While this lasts, a forward pass over the recording's inputs, repeated `n` times, computes only the layers from `layer` on.

    With `skip_attention`, layer `layer` computes no attention either: its recorded z goes through the (hooked) output
    projection. Only valid where the attention module returns the projection's output, `projects_last`.
    """

    def stub(recorded: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: repeated(recorded, recording.batch, n)

    def hand_on(*args: Any, **kwargs: Any) -> Any:
        return hidden_of(args, kwargs)

    with contextlib.ExitStack() as stack:
        # Only the stub just below `layer` hands on the recorded stream, `n` times. Those below it pass their input through, so
        # that `n` copies of every layer's output are not made for nothing.
        for below in range(layer):
            recorded = recording.outputs[below]
            last = below == layer - 1
            replacement = stub(recorded) if last else _passing(recorded, hand_on)
            stack.enter_context(replaced_forward(layout.blocks[below].module, lambda _, r=replacement: r))  # type: ignore[misc]
        if skip_attention and layer < layout.n_layers:
            stack.enter_context(frozen_attention(layout, recording, [layer], n))
        yield


def _passing(recorded: Any, hand_on: Callable[..., Any]) -> Callable[..., Any]:
    """A stub that hands on its input in the form in which the layer returned its output."""
    if isinstance(recorded, Tensor):
        return hand_on
    return lambda *args, **kwargs: with_first(recorded, hand_on(*args, **kwargs))


@contextlib.contextmanager
def frozen_attention(layout: Layout, recording: Recording, layers: Sequence[int], n: int = 1) -> Iterator[None]:
    """While this lasts, attention of `layers` is not computed: the recorded z goes through the (hooked) output projection."""

    def frozen(layer: int) -> Callable[..., Any]:
        block, recorded = layout.blocks[layer], recording.attention[layer]

        def forward(*args: Any, **kwargs: Any) -> Any:
            # Through the projection itself, since edits and readers of z are hooks on it.
            z = layout.side_by_side(recording.z[layer], layer)
            out = block.projection(repeated(z, recording.batch, n))
            return with_first(recorded, out)

        return forward

    with contextlib.ExitStack() as stack:
        for layer in set(layers) & set(layout.attention_layers):
            replacement = frozen(layer)
            stack.enter_context(
                replaced_forward(layout.blocks[layer].attention, lambda _, r=replacement: r)  # type: ignore[misc]
            )
        yield


@contextlib.contextmanager
def frozen_mlps(layout: Layout, recording: Recording, layers: Sequence[int], n: int = 1) -> Iterator[None]:
    """While this lasts, the MLPs of `layers` write what was recorded."""

    def recorded(layer: int) -> Callable[[Tensor], Tensor]:
        write = first_tensor(recording.mlp[layer])
        write = write.repeat(n, *[1] * (write.ndim - 1))
        return lambda _: write.clone()  # a copy: Falcon adds to it in place

    with contextlib.ExitStack() as stack:
        for layer in set(layers) & set(layout.attention_layers):
            stack.enter_context(leaving(layout.blocks[layer].mlp_write, recorded(layer)))
        yield


def narrow_last_mlp(layout: Layout, recording: Recording, keep: int | None) -> contextlib.AbstractContextManager[None]:
    """While this lasts, the last layer's MLP runs at the last `keep` positions only, those whose logits are asked for.

    Nothing after the last MLP mixes positions, so what it writes at the others is never read. It is a large share of a replay
    from a high layer.
    """
    return narrow_mlps(layout, recording, keep, [layout.n_layers - 1])


@contextlib.contextmanager
def narrow_mlps(
    layout: Layout, recording: Recording, keep: int | Int[Tensor, "R P"] | None, layers: Iterable[int]
) -> Iterator[None]:
    """While this lasts, the MLPs of `layers` write zeros but at the last `keep` positions, or at those named for each row of the
    pass: right where none else is read.

    An MLP runs whole where it returns more than a tensor (some mixtures of experts) or flattens positions (OPT).
    """

    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def narrow(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(keep, Tensor):
                where = keep[..., None]
                some = forward(hidden.gather(1, where.expand(-1, -1, hidden.shape[-1])), *args, **kwargs)
                nothing = some.new_zeros(*hidden.shape[:2], some.shape[-1])
                return nothing.scatter(1, where.expand_as(some), some)
            written = forward(hidden[:, -keep:].contiguous(), *args, **kwargs)  # type: ignore[operator]
            return nn.functional.pad(written, (0, 0, hidden.shape[1] - keep, 0))  # type: ignore[operator]

        return narrow

    with contextlib.ExitStack() as stack:
        few = keep.shape[1] if isinstance(keep, Tensor) else keep
        if few is not None and few < recording.length and recording.logits.ndim == 3:
            for layer in layers:
                recorded = recording.mlp[layer]
                if isinstance(recorded, Tensor) and recorded.ndim == 3:
                    stack.enter_context(replaced_forward(layout.blocks[layer].mlp_write, make))
        yield


def projects_last(layout: Layout, recording: Recording) -> bool:
    """Whether attention modules return just what their output projection returned, so that `frozen_attention` is exact."""
    layer = layout.attention_layers[0]  # one layer stands for all: the layout fits every block
    with torch.no_grad():
        projected = layout.blocks[layer].projection(layout.side_by_side(recording.z[layer], layer))
    returned = first_tensor(recording.attention[layer])
    return returned.shape == projected.shape and bool(torch.allclose(returned, projected, rtol=1e-3, atol=1e-5))


def replay(module: nn.Module, recording: Recording, n: int = 1, **kwargs: Any) -> Tensor:
    """Logits of a forward pass over the recording's inputs repeated `n` times, without gradients; use inside `starting_at`."""
    inputs = repeated_inputs(recording.inputs, recording.batch, n)
    with torch.no_grad():
        return first_logits(module(**inputs, **no_cache(module), **kwargs))
