"""An unmodified Transformers model whose passes can be read, edited and run again. `HeadModel` adds what changes weights."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadSet
from manyheads.model import generating
from manyheads.model.editing.edits import Edit
from manyheads.model.fingerprint import Fingerprint
from manyheads.model.inputs import Text, as_batch, check_ids, check_mask, kept_tokens, padded_sides, with_positions
from manyheads.model.layout import Layout
from manyheads.model.layouts.inputs import decoded, tiny_inputs
from manyheads.model.linear import bias_of, features_of, projection_matrix
from manyheads.model.proving.door import prove
from manyheads.model.reading.readers import Keep, ReadAttention, Reader, Site
from manyheads.model.replay import sweeping
from manyheads.model.replay.dispatch import Dispatch, stopping_after
from manyheads.model.replay.recording import Recording, first_logits, no_cache, only_last, record
from manyheads.progress import Bar


class OpenedModel:
    """A Transformers model whose layout is known: what it is, what it reads, its passes read, edited and run again.

    With no reader and no edit active it *is* the Transformers model: same kernels, bitwise the same logits. The module is
    never changed permanently; `module` is the very object that was opened.
    """

    def __init__(self, module: Any, tokenizer: Any, layout: Layout) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.layout = layout
        self.plain: Any = getattr(module, "_orig_mod", module)
        self.proof = prove(self.plain, layout)
        self._dispatch = Dispatch(self.plain, layout, self.proof)
        self._fingerprint = Fingerprint(self.plain)

    def __repr__(self) -> str:
        size = f"{self.n_layers} layers x {self.n_heads} heads"
        return f"{type(self).__name__}({type(self.plain).__name__}, {size}, head_dim {self.head_dim})"

    # What it is

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return self.layout.n_layers

    @property
    def n_heads(self) -> int:
        """Query heads in each layer; the largest number where layers differ (`layout.counts`)."""
        return self.layout.n_heads

    @property
    def n_kv_heads(self) -> int:
        """Key/value heads in each layer; fewer than `n_heads` under grouped-query attention."""
        return self.layout.n_kv_heads

    @property
    def head_dim(self) -> int:
        """Width of one head's z."""
        return self.layout.head_dim

    @property
    def shape(self) -> tuple[int, int]:
        """`(n_layers, n_heads)`."""
        return self.n_layers, self.n_heads

    @property
    def heads(self) -> HeadSet:
        """Every head; a hybrid's layers without attention have none. Where layers differ, those missing count as silent."""
        return HeadSet(((layer, h) for layer in self.layout.attention_layers for h in range(self.n_heads)), self.shape)

    @property
    def config(self) -> Any:
        return self.plain.config

    @property
    def device(self) -> torch.device:
        """The device that inputs go to."""
        weight = getattr(self.layout.embedding, "weight", None)
        return weight.device if isinstance(weight, Tensor) and not weight.is_meta else torch.device("cpu")

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model knows. `UnsupportedError` for a model that reads no tokens."""
        if not self.reads_tokens:
            raise UnsupportedError(f"{type(self.plain).__name__} reads no tokens; use a model of text for this.")
        return int(self.layout.embedding.weight.shape[0])  # type: ignore[index, operator]

    @property
    def reads_tokens(self) -> bool:
        """Whether its inputs are token ids."""
        weight = getattr(self.layout.embedding, "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 2 and "input_ids" in tiny_inputs(self.plain)

    @cached_property
    def is_causal(self) -> bool:
        """Whether tokens see only what came before them. `UnsupportedError` for a model that reads no tokens."""
        if not self.reads_tokens:
            raise UnsupportedError(f"{type(self.plain).__name__} reads no tokens; use a model of text for this.")
        # Asked of the attention itself: configs do not state it in one way.
        seen: list[bool] = []
        reader = ReadAttention(
            lambda call: seen.append(bool(call.allowed[0, 0, 0, 1])), layers=[self.layout.attention_layers[0]]
        )
        self.look(tiny_inputs(self.plain), reader)
        return not seen[0]

    @property
    def fingerprint(self) -> str:
        """Hash of config and weights as they are now, 16 hex digits: what saved scores and edits are checked against."""
        return self._fingerprint.current()

    def head_set(self, heads: Any) -> HeadSet:
        """A HeadSet of this model. `InputError` if a head is out of range."""
        found = HeadSet(heads, self.shape)
        self._check_layers(head.layer for head in found)
        return found

    def require_alike(self, what: str, *, every_layer: bool = True, even: bool | None = None) -> None:
        """`UnsupportedError` where `what` needs heads of one width that read their own sequence, and of every layer.

        `even`: it needs as many in every layer, too; by default it does if it needs heads in every layer.
        """
        name, layout = type(self.plain).__name__, self.layout
        widths = {self._width_of(layer) for layer in layout.attention_layers}
        if len(widths) > 1:
            raise UnsupportedError(f"heads of {name} differ in width from layer to layer, and {what} needs one width.")
        if layout.counts is not None and (every_layer if even is None else even):
            raise UnsupportedError(
                f"layers of {name} have between {min(layout.counts)} and {max(layout.counts)} heads, and {what} needs as many in "
                "each; use the model that it was made from."
            )
        if every_layer and len(layout.attention_layers) < self.n_layers:
            raise UnsupportedError(
                f"of the layers of {name} only {', '.join(map(str, layout.attention_layers))} have heads, and {what} needs heads "
                "in every layer."
            )
        if layout.crosses:
            raise UnsupportedError(
                f"these heads of {name} read another sequence than their own, and {what} has but one."
            )

    def _width_of(self, layer: int) -> tuple[int, int]:
        """How wide the heads of a layer are, and what they write."""
        features = features_of(self.layout.blocks[layer].projection)
        assert features is not None
        return features[0] // self.layout.heads_in(layer), features[1]

    def _check_layers(self, layers: Iterable[int]) -> None:
        without = sorted(set(layers) - set(self.layout.attention_layers))
        if without:
            raise InputError(
                f"layer {without[0]} of {type(self.plain).__name__} has no attention and so no heads; those that have are "
                f"{', '.join(map(str, self.layout.attention_layers))}."
            )

    def _check_edit(self, edit: Edit) -> None:
        edit.check(*self.shape)
        self._check_layers(head.layer for head in edit.head_set)

    # Inputs

    def inputs(self, inputs: Text | Int[Tensor, "B T"] | Int[Tensor, "T"] | Mapping[str, Any]) -> dict[str, Any]:
        """What the module's forward takes, on its device: from text (left-padded), token ids or ready-made inputs.

        Padding would move learned or rotary positions, so `position_ids` are added where the model takes them (`inputs`). An
        encoder-decoder without `decoder_input_ids` decodes its own inputs, shifted right behind its start token.
        `InputError` for ids out of range and rows without a token, `UnsupportedError` for padding that would change logits.
        """
        batch = decoded(self.plain, as_batch(inputs, self.tokenizer))
        if "input_ids" in batch and self.reads_tokens:
            check_ids(batch["input_ids"], self.vocab_size)
        check_mask(batch)
        for side in padded_sides(batch.get("attention_mask")):
            self.proof.require(f"padding on the {side}")
        batch = with_positions(self.plain, batch, self.proof.first_position)
        return {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    # Running

    def __call__(self, inputs: Text | Tensor | Mapping[str, Any], **kwargs: Any) -> Any:
        """The module's own output; edits and readers that are active apply."""
        batch = self.inputs(inputs)
        return self._running(**batch, **kwargs)

    @property
    def _running(self) -> Any:
        # Compiled code does not see hooks, so the plain module runs while any are there.
        active = self._dispatch.edits or self._dispatch.readers
        return self.plain if active else self.module

    def logits(self, inputs: Text | Tensor | Mapping[str, Any], **kwargs: Any) -> Tensor:
        """Logits of one forward pass without gradients and without a cache."""
        batch = self.inputs(inputs)
        with torch.no_grad():
            return first_logits(self._running(**batch, **no_cache(self.plain), **kwargs))

    def generate(self, inputs: Text | Tensor | Mapping[str, Any], **kwargs: Any) -> Any:
        """`module.generate`: ids in, ids out, prompt included; text in, text out, the new part only.

        One text gives one text, or a list where several are asked for (`num_return_sequences`). Several prompts give one
        list, all texts of the first prompt before those of the second, as Transformers orders rows. With
        `return_dict_in_generate` the answer is Transformers' own; for text in it also has a list `texts`. Edits that name
        rows, or hold values for each, follow their prompts through beams and returned sequences. `UnsupportedError` for an
        encoder; `InputError` for a prompt that is empty, out of range or padded on the right.
        """
        return generating.generated(self, inputs, **kwargs)

    # Reading and editing

    @contextlib.contextmanager
    def reading(self, *readers: Reader) -> Iterator[None]:
        """Let `readers` see every forward pass inside the `with` block; what they kept before is forgotten (`Reader.begin`)."""
        for reader in readers:
            reader.begin()
        with self._dispatch.active(readers=readers):
            yield

    @contextlib.contextmanager
    def editing(self, *edits: Edit) -> Iterator[Self]:
        """Apply `edits`, in order, to every forward pass inside the `with` block; nested blocks apply after outer ones."""
        for edit in edits:
            self._check_edit(edit)
        with self._dispatch.active(edits=edits):
            yield self

    def read(self, inputs: Text | Tensor | Mapping[str, Any], *readers: Reader, keep: int | None = None) -> Tensor:
        """One forward pass seen by `readers`; returns its logits, of the last `keep` positions only if that is given."""
        with self.reading(*readers):
            return self.logits(inputs, **only_last(self.plain, keep))

    def look(self, inputs: Text | Tensor | Mapping[str, Any], *readers: Reader) -> None:
        """A forward pass that ends where `readers` have seen all they want: what lies above, and the logits, are not computed."""
        with self.reading(*readers), stopping_after(self.layout, readers):
            self.logits(inputs)

    def read_site(self, inputs: Text | Tensor | Mapping[str, Any], site: Site) -> Float[Tensor, "L B T ..."]:
        """One site's activations in all layers (see `reading`). `resid` has `n_layers + 1` of them.

        A hybrid's layers without attention are NaN, but for `resid`. `UnsupportedError` where layers differ in shape, and for
        `mlp_write` where more is added, or a norm follows each addition: the writes do not sum to the next stream there.
        """
        blocks = [self.layout.blocks[layer] for layer in self.layout.attention_layers]
        if site == "mlp_write" and any(block.post_norms or len(block.additions) > 2 for block in blocks):
            why = "a norm after each addition" if blocks[0].post_norms else "another attention's output too"
            raise UnsupportedError(
                f"layers of {type(self.plain).__name__} have {why}, so that resid + attention_write + mlp_write is not the next "
                f"resid; read {site} with a Keep reader, and see additions in model.layout.blocks."
            )
        keep = Keep(site)
        self.look(inputs, keep)
        shapes = sorted({tuple(value.shape) for value in keep.values.values()})
        if len(shapes) > 1:
            raise UnsupportedError(
                f"{site} of {type(self.plain).__name__} differs in shape from layer to layer ({', '.join(map(str, shapes))}); "
                "read it layer by layer with a Keep reader."
            )
        if not keep.values:
            raise UnsupportedError(f"no layer of {type(self.plain).__name__} that has heads has {site}.")
        if site != "resid":
            missing = torch.full_like(next(iter(keep.values.values())), torch.nan)
            keep.values = {layer: keep.values.get(layer, missing) for layer in range(self.n_layers)}
        return keep.stacked()

    def read_z(self, inputs: Text | Tensor | Mapping[str, Any]) -> Float[Tensor, "L B T H Dh"]:
        """Every head's output before the output projection."""
        return self.read_site(inputs, "z")

    def mean_z(self, inputs: Text | Tensor | Mapping[str, Any], *, by_position: bool = False) -> Float[Tensor, "L ..."]:
        """Mean z over rows and positions, `[L, H, Dh]`, or over rows only, `[L, T, H, Dh]`: for `Ablate(heads, "mean", ...)`.

        Padding does not count in either.
        """
        batch = self.inputs(inputs)
        z, kept = self.read_z(batch), kept_tokens(batch)
        if kept is None or z.shape[2] != kept.shape[1]:
            return z.mean(1 if by_position else (1, 2))
        weight = kept.to(z.device, z.dtype)[None, :, :, None, None]
        over = 1 if by_position else (1, 2)
        # A position that is padding in every row has no mean; nobody can ask for it, and 0 is as good as any.
        return (z * weight).sum(over) / weight.sum(over).clamp(min=1)

    def record(
        self, inputs: Text | Tensor | Mapping[str, Any], *, keep: int | None = None, mlps: bool = True
    ) -> Recording:
        """One clean pass kept for replays (see `replay`), with the logits of the last `keep` positions (None: of all).

        Without `mlps` it does not keep what MLPs wrote, which only a replay that freezes or sends them needs.
        """
        return record(self.plain, self.layout, self.inputs(inputs), keep, mlps)

    def sweep(
        self,
        inputs: Text | Tensor | Mapping[str, Any] | Recording,
        edits: Sequence[Edit],
        metric: Callable[[Tensor], Tensor | float],
        *,
        keep: int | None = None,
        max_tokens: int | None = None,
        bar: Bar = Bar(),
    ) -> Float[np.ndarray, "V ..."]:
        """`metric(logits)` under each edit by itself: replayed from the edit's lowest layer, variants of a layer batched.

        `metric` gets logits `[B, T, V]` (`[B, keep, V]`, the last `keep` positions, if `keep` is given, which is cheaper) and
        returns a number or one number a row. The result has a row for each edit. `max_tokens` bounds the tokens of one batched
        forward pass (default: 1,024).
        """
        recording = inputs if isinstance(inputs, Recording) else self.record(inputs, keep=1, mlps=False)
        for edit in edits:
            self._check_edit(edit)
        return sweeping.sweep(self.plain, self.layout, self._dispatch, recording, edits, metric, keep, max_tokens, bar)

    # Weights

    def W_O(self, layer: int) -> Float[Tensor, "H Dh D"]:
        """The output projection by heads: head h adds `z_h @ W_O[h]` to the attention output."""
        self._check_layers([layer])
        n = self.layout.heads_in(layer)
        heads = projection_matrix(self.layout.blocks[layer].projection).unflatten(0, (n, -1))
        return heads if n == self.n_heads else nn.functional.pad(heads, (0, 0, 0, 0, 0, self.n_heads - n))

    def bias_O(self, layer: int) -> Float[Tensor, "D"] | None:
        """The output projection's bias, if it has one."""
        self._check_layers([layer])
        return bias_of(self.layout.blocks[layer].projection)
