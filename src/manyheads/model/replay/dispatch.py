"""The hooks that `reading` and `editing` use: installed where something is active, and nowhere else.

In every layer edits run first, in the order their blocks were entered, then readers. With nothing active there is no hook at
all, and a HeadModel is the Transformers model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.model.editing.edits import Edit
from manyheads.model.hooks import first_tensor, hidden_of, hooked, stoppable, uncompiled, with_hidden
from manyheads.model.layout import Layout
from manyheads.model.proof import Proof
from manyheads.model.reading.attention import AttentionCall, Part, attending
from manyheads.model.reading.readers import SITE_OF, Activation, Reader


class Dispatch:
    """The active edits and readers of one model."""

    def __init__(self, module: nn.Module, layout: Layout, proof: Proof) -> None:
        self.module, self.layout, self.proof = module, layout, proof
        self.edits: list[Edit] = []
        self.readers: list[Reader] = []
        self.offset = 0
        self._installed: contextlib.ExitStack | None = None

    @contextlib.contextmanager
    def active(self, edits: Sequence[Edit] = (), readers: Sequence[Reader] = ()) -> Iterator[None]:
        """Add edits and readers for the length of a `with` block; whatever happens inside, they are gone after it."""
        for reader in readers:
            self.proof.require(reader.site)
        if any(edit.acts_in_attention for edit in edits):
            self.proof.require("attention")
        before = list(self.edits), list(self.readers)
        self.edits += edits
        self.readers += readers
        # All hooks are made anew, and not added: what a layer needs depends on everything that is active in it.
        try:
            self._install()
            yield
        finally:
            self.edits, self.readers = before
            self._install()

    @contextlib.contextmanager
    def instead(self, edits: Sequence[Edit]) -> Iterator[None]:
        """These edits in place of those that are active, for the length of a `with` block."""
        before = self.edits
        if edits is before:
            yield
            return
        try:
            self.edits = list(edits)
            self._install()
            yield
        finally:
            self.edits = before
            self._install()

    def _install(self) -> None:
        if self._installed is not None:
            self._installed.close()
            self._installed = None
        if not self.edits and not self.readers:
            return
        with contextlib.ExitStack() as stack:
            self._hook_offset(stack)
            stack.enter_context(uncompiled(self.module))
            attention = {}
            for layer, block in enumerate(self.layout.blocks):
                at = _LayerDispatch(self, layer)
                if at.edits or at.readers("z"):
                    stack.enter_context(hooked(block.projection, before=at.before_projection))
                for site in ("attention_write", "mlp_write"):
                    if at.readers(site):
                        stack.enter_context(hooked(block.module, before=at.note_stream))
                        stack.enter_context(hooked(getattr(block, site), after=at.after(site)))
                if at.readers("resid"):
                    stack.enter_context(hooked(block.module, before=at.before_block))
                if at.in_attention or at.reads_attention:
                    attention[layer] = at
            self._hook_last_resid(stack)
            if attention:
                cores = {layer: block.core for layer, block in enumerate(self.layout.blocks)}
                stack.enter_context(attending(cores, attention, self.layout.has_interface))
            self._installed = stack.pop_all()

    def _hook_offset(self, stack: contextlib.ExitStack) -> None:
        # On the module that holds the layers: `generate` of an adapter's wrapper goes past the outermost one.
        def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            cache = kwargs.get("past_key_values")
            self.offset = int(cache.get_seq_length()) if cache is not None else 0

        stack.enter_context(hooked(_holder(self.module, self.layout), before=note))

    def _hook_last_resid(self, stack: contextlib.ExitStack) -> None:
        last = self.layout.n_layers
        readers = [reader for reader in self.readers if reader.site == "resid" and reader.wants(last)]
        if not readers:
            return

        def note(_: nn.Module, args: Any, output: Any) -> None:
            for reader in readers:
                reader.read(Activation(last, first_tensor(output), self.offset))

        stack.enter_context(hooked(self.layout.blocks[-1].module, after=note))


def _holder(module: nn.Module, layout: Layout) -> nn.Module:
    """The innermost module that calls all layers."""
    ends = {layout.blocks[0].module, layout.blocks[-1].module}
    around = [part for part in module.modules() if ends <= set(part.modules()) and not isinstance(part, nn.ModuleList)]
    return around[-1] if len(ends) > 1 else module


class _LayerDispatch:
    """The edits and readers of one layer; also the `attention.Handler` of that layer."""

    def __init__(self, dispatch: Dispatch, layer: int) -> None:
        self.dispatch, self.layer = dispatch, layer
        self.n_heads, self.uneven = dispatch.layout.n_heads, dispatch.layout.counts is not None
        self.stream: torch.Size | None = None  # the shape of the residual stream in this pass
        self.edits = [edit for edit in dispatch.edits if edit.indices(layer)]
        # Where one edit acts in the attention, all of the layer's do, so that they apply in their order.
        self.in_attention = any(edit.acts_in_attention for edit in self.edits)
        # Where a layer changes the heads' outputs after attention, z is what the projection reads, and is edited there.
        self.z_edits = [edit for edit in self.edits if not (edit.acts_in_attention and dispatch.proof.gated)]
        if self.in_attention and not dispatch.proof.gated:
            self.z_edits = []
        self._readers: dict[str, list[Reader]] = {}
        for reader in dispatch.readers:
            if reader.wants(layer):
                self._readers.setdefault(reader.site, []).append(reader)
        self._changed = frozenset(part for edit in self.edits for part in edit.parts())
        self._read = frozenset(part for part, site in SITE_OF.items() if site in self._readers)
        self.by_query_head = bool(self._changed & {"key", "value"}) or any(
            reader.by_query_head for site in ("k", "v") for reader in self.readers(site)
        )

    def readers(self, site: str) -> list[Reader]:
        return self._readers.get(site, [])

    @property
    def reads_attention(self) -> bool:
        return bool(self._read) or "attention" in self._readers

    def before_projection(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        layout = self.dispatch.layout
        flat = hidden_of(args, kwargs)
        rowless = flat.ndim == 2  # images cut up and put one after the other (Qwen2-VL's vision): one row
        heads = layout.by_heads(flat[None] if rowless else flat, self.layer)
        z = Activation(self.layer, heads, self.dispatch.offset)
        for edit in self.z_edits:
            z = Activation(self.layer, edit.edit_z(z), z.offset)
        for reader in self.readers("z"):
            reader.read(z)
        made = layout.side_by_side(z.value, self.layer)
        return with_hidden(args, kwargs, made[0] if rowless else made) if self.z_edits else None

    def before_block(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = hidden_of(args, kwargs)
        for reader in self.readers("resid"):
            reader.read(Activation(self.layer, hidden, self.dispatch.offset))

    def note_stream(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stream = hidden_of(args, kwargs).shape

    def after(self, site: str) -> Any:
        readers = self.readers(site)
        scale = self.dispatch.layout.residual_scale

        def note(_: nn.Module, args: Any, output: Any) -> None:
            value = first_tensor(output)
            value = value if scale == 1.0 else value * scale
            stream = self.stream
            if stream is not None and value.ndim != len(stream) and value.numel() == stream.numel():
                value = value.view(stream)  # OPT flattens rows and positions
            for reader in readers:
                reader.read(Activation(self.layer, value, self.dispatch.offset))

        return note

    def touches(self, part: Part) -> bool:
        return part in self._changed or part in self._read

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        for edit in self.edits if part in self._changed else ():
            tensor = edit.change(self.layer, part, tensor)
        if part not in self._read:
            return tensor
        layout = self.dispatch.layout
        # Falcon repeats its KV heads before attention gets them.
        repeated = part != "query" and not self.by_query_head and tensor.shape[1] != layout.n_kv_heads
        shown = tensor[:, :: layout.n_heads // layout.n_kv_heads] if repeated else tensor
        seen = Activation(self.layer, shown.transpose(1, 2), self.offset)
        for reader in self.readers(SITE_OF[part]):
            reader.read(seen)
        # The layer goes on with what was shown, so that a reader can ask for its gradient.
        return tensor if repeated else seen.value.transpose(1, 2)

    @property
    def offset(self) -> int:
        return self.dispatch.offset

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        blocked = None
        for edit in self.edits:
            more = edit.block(self.layer, shape, self.offset, device)
            blocked = more if blocked is None else blocked if more is None else blocked | more
        return blocked

    def attend(self, call: AttentionCall) -> Tensor:
        for reader in self.readers("attention"):
            reader.read(call)
        z = call.z
        for edit in self.edits if self.in_attention else ():
            if edit.acts_in_attention:
                z = edit.attend(call, z)
            elif edit not in self.z_edits:
                z = edit.edit_z(Activation(self.layer, z, self.offset))
        return z


@contextlib.contextmanager
def stopping_after(layout: Layout, readers: Sequence[Reader]) -> Iterator[None]:
    """End the forward pass inside the `with` block after the last module that one of `readers` looks at."""
    last = max((layer for layer in range(layout.n_layers + 1) for r in readers if r.wants(layer)), default=0)
    block = layout.blocks[min(last, layout.n_layers - 1)]
    inside = all(r.site in ("attention", "q", "k", "v", "z") for r in readers if r.wants(last))
    with stoppable() as stop, hooked(block.attention if inside else block.module, after=stop):
        yield
