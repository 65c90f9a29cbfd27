"""Attention over a ragged cache, and the `with` block in which a model's generations use one.

Inside the block the decoder's every pass that begins with an empty cache gets a `RaggedCache` instead, and Transformers calls our
attention function, which works group by group:

    one new token       z_h = softmax(q_h K_h^T s) V_h  over all that head h holds, the new token among it: no mask
    several (a prompt)  the same under a causal mask; what was kept before is seen by all of them

Then `Press.compress` says which tokens stay. Positions are the true ones, for Transformers counts what was read and not what
was kept. Whether an architecture's attention is this one is tried on a tiny input when a block is entered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol
from weakref import WeakSet

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer

from manyheads.errors import InputError, MismatchError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import hooked
from manyheads.model.reading.attention import eager_of
from manyheads.shrink.cache.ragged import Group, RaggedCache, RaggedLayer, Window, merged

NAME = "manyheads_ragged"
_BLOCKS: dict[int, Compression] = {}  # id(core module) -> the block it is in, only while that lasts
_BEFORE: dict[int, str] = {}  # id(config) -> the attention that was in use before
_PROVED: WeakSet[nn.Module] = WeakSet()


class Keeper(Protocol):
    """What a block asks of its press (`press.Press`)."""

    @property
    def needs_hidden(self) -> bool:
        """Whether it wants to see what the attention modules are called with."""
        ...

    @property
    def streams_prompt(self) -> bool:
        """Whether streaming heads have their window while a prompt is read, too."""
        ...

    def windows(self, model: HeadModel) -> list[list[Window | None]]:
        """For each layer and KV head, its window, or None."""
        ...

    def after(
        self, layer: RaggedLayer, core: Any, query: Tensor, real: Tensor | None, hidden: Tensor | None, given: Any
    ) -> None:
        """After a layer's attention: drop what need not stay."""
        ...


class Compression:
    """A model inside the block of a press. `cache` is that of the last generation (None before the first)."""

    def __init__(self, model: HeadModel, press: Keeper, windows: list[list[Window | None]]) -> None:
        self.model, self.press = model, press
        self.cache: RaggedCache | None = None
        self._windows = windows
        self._current: RaggedCache | None = None  # that of the pass at work
        self._real: Bool[Tensor, "B Q"] | None = None
        self._hidden: dict[int, tuple[Any, dict[str, Any]]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that the last generation holds."""
        return self.cache.nbytes if self.cache is not None else 0

    def new_cache(self) -> RaggedCache:
        """An empty cache for `past_key_values`. A pass without one makes its own."""
        config = self.model.config.get_text_config(decoder=True)
        layers: list[Any] = list(DynamicCache(config=config).layers)
        for at, core in self._cores():
            if type(layers[at]) is DynamicLayer and self._windows[core]:
                layers[at] = RaggedLayer(self._windows[core])
        self.cache = RaggedCache(layers, self)
        return self.cache

    def _cores(self) -> Iterator[tuple[int, int]]:
        """Which layer of a cache belongs to which layer of the model."""
        for layer in self.model.layout.attention_layers:
            yield int(getattr(self.model.layout.blocks[layer].core, "layer_idx", layer)), layer

    @contextlib.contextmanager
    def active(self) -> Iterator[Compression]:
        """The block itself."""
        blocks = self.model.layout.blocks
        cores: list[Any] = [blocks[layer].core for layer in self.model.layout.attention_layers]
        configs = {id(core.config): core.config for core in cores}
        if any(id(core) in _BLOCKS for core in cores):
            raise UnsupportedError("this model's cache is compressed already; leave that block first.")
        with contextlib.ExitStack() as stack:
            for key, config in configs.items():
                _BEFORE[key] = config._attn_implementation
                stack.callback(_BEFORE.pop, key)
                stack.callback(setattr, config, "_attn_implementation_internal", _BEFORE[key])
                config._attn_implementation_internal = NAME
            stack.callback(self._close)  # also after an exception
            for core in cores:
                _BLOCKS[id(core)] = self
                stack.callback(_BLOCKS.pop, id(core))
                if self.press.needs_hidden:
                    stack.enter_context(hooked(core, before=self._see))
            stack.enter_context(hooked(self.model.plain.get_decoder(), before=self._begin, after=self._end))
            yield self

    def _see(self, core: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self._hidden[id(core)] = (hidden, kwargs)

    def _begin(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a pass of the decoder: its cache, and which of its tokens are no padding."""
        cache = kwargs.get("past_key_values")
        core = self.model.layout.blocks[self.model.layout.attention_layers[0]].core
        if core.config._attn_implementation != NAME:  # type: ignore[union-attr]
            raise UnsupportedError("a reader or an edit of attention is at work; read without a compressed cache.")
        use = kwargs.get("use_cache")
        if cache is None and not (self.model.config.use_cache if use is None else use):
            return None
        cache = self._ours(cache)
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
            raise UnsupportedError(
                "a compressed cache takes no attention mask of its own ([B, 1, T, S], as drafts have); give a mask [B, T]."
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        real = None if mask is None else mask[:, -length:].bool()
        self._real = None if real is None or bool(real.all()) else real
        if self._real is not None and bool((self._real[:, :-1] & ~self._real[:, 1:]).any()):
            raise InputError("a prompt is padded after or between its tokens; pad on the left.")
        self._current = cache
        for layer in cache.ragged:
            layer.open = True
        return args, {**kwargs, "past_key_values": cache}

    def _ours(self, cache: Any) -> RaggedCache:
        if isinstance(cache, RaggedCache):
            if cache.owner is not self:
                raise MismatchError(
                    "this cache was made in another block, perhaps by another model; begin with an empty one."
                )
            return cache
        if cache is None or (type(cache) is DynamicCache and cache.get_seq_length() == 0 and not cache.offloading):
            return self.new_cache()
        if type(cache) is DynamicCache:
            raise InputError("this cache holds tokens already, or is offloaded; begin with an empty one.")
        raise UnsupportedError(
            f"a {type(cache).__name__} cannot be compressed head by head; leave past_key_values and cache_implementation "
            "unset, and draft outside this block."
        )

    def _end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        self._close()

    def _close(self) -> None:
        for layer in self._current.ragged if self._current is not None else ():
            layer.open = False
        self._current, self._real = None, None
        self._hidden.clear()

    def attend(
        self, core: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        layer = self._current.layers[core.layer_idx] if self._current is not None else None
        if not isinstance(layer, RaggedLayer):
            return _other(core)(core, query, key, value, mask, **kwargs)
        special = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
        if special or hasattr(core, "sinks"):
            what = special[0] if special else "sinks"
            raise UnsupportedError(
                f"the attention of {type(core).__name__} has {what}, which a compressed cache does not compute."
            )
        scale = kwargs.get("scaling")
        if query.shape[2] == 1 and self._real is None:
            z = _step(layer, query, key, value, scale)
        else:
            z = _chunk(layer, query, key, value, self._real, scale, self.press.streams_prompt)
        hidden, given = self._hidden.get(id(core), (None, {}))
        self.press.after(layer, core, query, self._real, hidden, given)
        return z, None


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that Transformers calls in every layer while a block lasts."""
    return _BLOCKS[id(module)].attend(module, query, key, value, attention_mask, **kwargs)


def _other(core: Any) -> Any:
    """The attention that was in use before: for layers with a sliding window, and passes without a cache."""
    name = _BEFORE[id(core.config)]
    found: Any = AttentionInterface._global_mapping
    return eager_of(type(core)) if name == "eager" else found[name]


def _mask(config: Any, **kwargs: Any) -> Tensor | None:
    """Transformers' own mask, for those layers and passes."""
    masks: Any = AttentionMaskInterface._global_mapping
    mask: Tensor | None = masks[_BEFORE[id(config)]](config=config, **kwargs)
    return mask


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)


def _step(
    layer: RaggedLayer, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Float[Tensor, "B 1 H D"]:
    """One new token in every row."""
    rows, n_heads, _, width = query.shape
    queries = query.reshape(rows * layer.n_kv_heads, 1, -1, width)  # [B * Hkv, 1, H / Hkv, Dh]
    keys, values = key.flatten(0, 1)[:, 0], value.flatten(0, 1)[:, 0]
    out = queries.new_empty(*queries.shape[:3], value.shape[-1])
    layer.tokens = layer.tokens + 1
    for group in layer.groups:
        if len(group.members) == len(queries):
            group.append(keys, values)
            return _over(group, queries, scale).reshape(rows, 1, n_heads, -1)
        group.append(keys[group.members], values[group.members])
        out[group.members] = _over(group, queries[group.members], scale)
    return out.view(rows, 1, n_heads, -1)


def _over(group: Group, query: Float[Tensor, "G 1 R Dk"], scale: float | None) -> Float[Tensor, "G 1 R Dv"]:
    keys, values = group.held
    return scaled_dot_product_attention(query, keys[:, None], values[:, None], scale=scale)


def _chunk(
    layer: RaggedLayer,
    query: Float[Tensor, "B H Q Dk"],
    key: Float[Tensor, "B G Q Dk"],
    value: Float[Tensor, "B G Q Dv"],
    real: Bool[Tensor, "B Q"] | None,
    scale: float | None,
    streaming: bool,
) -> Float[Tensor, "B Q H Dv"]:
    """Several new tokens, rows of different numbers of them (the rest is padding on the left, whose z is zero)."""
    rows, n_heads, length, _ = query.shape
    repeats = n_heads // layer.n_kv_heads
    queries = query.unflatten(1, (layer.n_kv_heads, repeats)).flatten(0, 1)  # [B * Hkv, H / Hkv, Q, Dh]
    keys, values = key.flatten(0, 1), value.flatten(0, 1)
    out = queries.new_zeros(*queries.shape[:3], value.shape[-1])
    new = torch.full((rows,), length) if real is None else real.sum(1).cpu()
    layer.tokens = layer.tokens + new
    of_member = new.repeat_interleave(layer.n_kv_heads).to(query.device)
    groups = []
    for group in layer.groups:
        counts = of_member[group.members]
        for count in counts.unique().tolist():
            some = group if bool((counts == count).all()) else group.part((counts == count).nonzero()[:, 0])
            members, stored = some.members, some.length
            old = some.in_order
            held = [
                torch.cat([before, now[members, length - count :]], 1) if stored else now[members, length - count :]
                for before, now in zip(old, (keys, values), strict=True)
            ]
            if count:
                window = some.window if streaming else None
                out[members, :, length - count :] = _causal(
                    queries[members, :, length - count :], held[0], held[1], stored, window, scale
                )
            groups.append(Group(members, held[0], held[1], some.window))
    layer.groups = merged(groups)
    return out.unflatten(0, (rows, -1)).flatten(1, 2).transpose(1, 2)


def _causal(
    query: Float[Tensor, "G R N Dk"],
    keys: Float[Tensor, "G S Dk"],
    values: Float[Tensor, "G S Dv"],
    stored: int,
    window: Window | None,
    scale: float | None,
) -> Float[Tensor, "G R N Dv"]:
    """Attention of the last N of S tokens. With a window each sees the sinks and the last `recent` only: block by block, so
    that the work grows with the length and not with its square."""
    count = query.shape[2]
    if window is None or stored + count <= window.size:
        wide = [t[:, None].expand(-1, query.shape[1], -1, -1) for t in (keys, values)]
        if not stored:
            return scaled_dot_product_attention(query, wide[0], wide[1], is_causal=True, scale=scale)
        seen = torch.ones(count, stored + count, dtype=torch.bool, device=query.device).tril(stored)
        return scaled_dot_product_attention(query, wide[0], wide[1], attn_mask=seen, scale=scale)
    out = []
    column = torch.arange(stored + count, device=query.device)
    for start in range(0, count, window.recent):
        first, last = stored + start, min(stored + start + window.recent, stored + count)
        near = column[max(window.sinks, first - window.recent + 1) : last]
        columns = torch.cat([column[: min(window.sinks, last)], near])
        row = column[first:last, None]
        seen = (columns <= row) & ((row - columns < window.recent) | (columns < window.sinks))
        wide = [t[:, columns][:, None].expand(-1, query.shape[1], -1, -1) for t in (keys, values)]
        out.append(
            scaled_dot_product_attention(
                query[:, :, first - stored : last - stored], wide[0], wide[1], attn_mask=seen, scale=scale
            )
        )
    return torch.cat(out, 2)


def check_model(model: Any) -> None:
    """One sentence if the model's cache cannot be compressed, before any work."""
    if not isinstance(model, HeadModel):
        raise InputError(f"a press works on a model that open_model opened, not on a {type(model).__name__}.")
    name, layout = type(model.plain).__name__, model.layout
    if layout.crosses or getattr(model.config, "is_encoder_decoder", False) or layout.unembedding is None:
        raise UnsupportedError(f"{name} generates no text from a cache of its own; give a causal language model.")
    if not hasattr(model.plain, "get_decoder") or not model.is_causal:
        raise UnsupportedError(f"{name} is an encoder, which keeps no cache; give a causal language model.")
    if not layout.has_interface:
        raise UnsupportedError(
            f"{name} does not compute its attention through Transformers' interface, so its cache cannot be read head by head."
        )
    if model.plain.training:
        raise InputError("the model is in training mode; call module.eval() first.")


@torch.inference_mode()
def prove_ragged(model: HeadModel, whole: Keeper) -> None:
    """Once a model: under a press that drops nothing, a prompt and two single tokens have the logits of plain passes."""
    if model.plain in _PROVED:
        return
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.vocab_size, (2, 9), generator=generator).to(model.device)
    wanted = model.logits(ids)[:, 6:].float()
    block = Compression(model, whole, whole.windows(model))
    with block.active():
        cache = block.new_cache()
        if not cache.ragged:
            raise UnsupportedError(
                f"no layer of {type(model.plain).__name__} keeps all tokens: its windows are its own."
            )
        found = [model.plain(ids[:, :7], past_key_values=cache).logits[:, -1]]
        found += [model.plain(ids[:, i : i + 1], past_key_values=cache).logits[:, -1] for i in (7, 8)]
    error = (torch.stack(found, 1).float() - wanted).abs().max() / wanted.abs().max()
    if not error <= (1e-3 if model.plain.dtype in (torch.float32, torch.float64) else 5e-2):
        raise UnsupportedError(
            f"the attention of {type(model.plain).__name__} is more than softmax(q k^T) v: read from a compressed cache that "
            f"drops nothing, its logits are off by {float(error):.2g} of the largest."
        )
    _PROVED.add(model.plain)
