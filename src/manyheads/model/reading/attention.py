"""Seeing q, k, v and patterns: the attention function we register with Transformers, and a tap for those without one.

Architectures that go through Transformers' `AttentionInterface` call `_attention` while a reader or an edit asks for it.
It computes the architecture's own attention (softcaps, sinks and biases included) and hands an `AttentionCall` to the
readers and edits of that layer. The pattern is only computed when somebody looks at it.

BLOOM, MPT and Falcon have no such interface. While their own forward runs, `_Tap` watches what every attention must compute:
`q k^T`, the softmax and `pattern v`, or PyTorch's fused product of the three. It makes the same `AttentionCall` of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from manyheads.errors import UnsupportedError

NAME = "manyheads"
Part = Literal["query", "key", "value"]
PARTS: tuple[Part, ...] = ("query", "key", "value")


@dataclass
class AttentionCall:
    """One layer's attention in one forward pass, as readers and edits see it.

    `query` is `[B, H, T, Dh]`, `key` and `value` `[B, Hkv, S, Dh]` (with a cache, S counts every token so far), after rotary
    embedding and query/key norms. `mask` is what is added to the scores, `[B, 1, T, S]`, or None. `offset` is how many tokens
    the cache held before this pass.
    """

    layer: int
    query: Float[Tensor, "B H T Dh"]
    key: Float[Tensor, "B G S Dh"]
    value: Float[Tensor, "B Gv S Dv"]
    mask: Float[Tensor, "#B #H #T S"] | None
    offset: int
    _eager: Callable[..., tuple[Tensor, Tensor]] = field(repr=False)
    _fast: Callable[..., Tensor] | None = field(default=None, repr=False)
    _pattern: Tensor | None = field(default=None, repr=False)
    _z: Tensor | None = field(default=None, repr=False)

    @property
    def pattern(self) -> Float[Tensor, "B H T S"]:
        """Post-softmax attention. Rows sum to one, save what an attention sink takes (GPT-OSS)."""
        if self._pattern is None:
            self._z, self._pattern = self._eager(self.query, self.key, self.value, self.mask)
        return self._pattern

    @property
    def z(self) -> Float[Tensor, "B T H Dv"]:
        """Each head's output before the output projection."""
        if self._z is None:  # by SDPA where it gives the same, which never makes the [T, S] pattern
            if self._fast is None:
                self._z, self._pattern = self._eager(self.query, self.key, self.value, self.mask)
            else:
                self._z = self._fast(self.query, self.key, self.value, self.mask)
        return self._z

    def pattern_rows(self, rows: slice | Tensor) -> Float[Tensor, "B H R S"]:
        """The pattern of some queries only (`rows` indexes T), without computing the rest."""
        if self._pattern is not None:
            return self._pattern[:, :, rows]
        mask = self.mask[:, :, rows] if self.mask is not None and self.mask.shape[2] > 1 else self.mask
        return self._eager(self.query[:, :, rows], self.key, self.value, mask)[1]

    @property
    def allowed(self) -> Bool[Tensor, "B H T S"]:
        """Which keys each query may attend to. A query that may attend to none (padding) counts as allowed all."""
        shape = (self.query.shape[0], self.query.shape[1], self.query.shape[2], self.key.shape[2])
        if self.mask is None:
            return torch.ones((), dtype=torch.bool, device=self.query.device).expand(shape)
        allowed = (self.mask > torch.finfo(self.mask.dtype).min / 2).expand(shape)
        return allowed | ~allowed.any(-1, keepdim=True)

    @property
    def first_column(self) -> int:
        """The token column of the first key: not 0 once a sliding window's cache has forgotten the columns before."""
        return max(0, self.offset + self.query.shape[2] - self.key.shape[2])

    def values_of(self, heads: list[int]) -> Float[Tensor, "B h S Dv"]:
        """The values that the query heads `heads` read: their KV group's."""
        group = self.query.shape[1] // self.value.shape[1]
        return self.value[:, [h // group for h in heads]]

    def rows(self, start: int, stop: int) -> AttentionCall:
        """The call seen by batch rows `start:stop` alone."""

        def some(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[start:stop]

        return AttentionCall(
            self.layer,
            self.query[start:stop],
            self.key[start:stop],
            self.value[start:stop],
            some(self.mask),
            self.offset,
            self._eager,
            self._fast,
            some(self._pattern),
            some(self._z),
        )


@runtime_checkable
class Handler(Protocol):
    """What a HeadModel does in a layer's attention while something is active there."""

    n_heads: int

    @property
    def by_query_head(self) -> bool:
        """Whether `change` takes keys and values widened to the query heads, `[B, H, S, Dh]`, not `[B, Hkv, S, Dh]`."""
        ...

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        """Edit q, k or v, then show it to the readers."""
        ...

    def touches(self, part: Part) -> bool:
        """Whether somebody edits or reads this part."""
        ...

    @property
    def offset(self) -> int:
        """How many tokens a KV cache held before this pass."""
        ...

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        """Attention edges to cut, boolean and broadcastable to `shape` `[B, H, T, S]`, or None."""
        ...

    def attend(self, call: AttentionCall) -> Tensor:
        """Show the call to the readers; return z as the edits want it, `[B, T, H, Dh]`."""
        ...


_HANDLERS: dict[int, tuple[int, Handler]] = {}  # id(core module) -> (layer, handler), only while active


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The attention function that Transformers calls in each layer while a reader or an edit is active."""
    eager_function = eager_of(type(module))
    attention_mask = additive(attention_mask, query.dtype)
    if id(module) not in _HANDLERS:
        return eager_function(module, query, key, value, attention_mask, **kwargs)
    layer, handler = _HANDLERS[id(module)]
    n_own = n_heads = query.shape[1]
    if getattr(handler, "uneven", False):  # layers differ in their heads, which few handlers know of
        # Keys and values for each query head, and zeros for the heads that this layer does not have.
        n_heads = handler.n_heads
        key, value = _widen(key, n_own), _widen(value, n_own)
        query, key, value = (_with_missing(part, n_heads) for part in (query, key, value))
    query = _changed(handler, "query", query)
    if handler.by_query_head:  # both, since attention wants as many keys as values
        key, value = _widen(key, n_heads), _widen(value, n_heads)
    key, value = _changed(handler, "key", key), _changed(handler, "value", value)
    blocked = handler.block((query.shape[0], n_heads, query.shape[2], key.shape[2]), query.device)
    if blocked is not None:
        attention_mask = cut(
            torch.zeros_like(blocked, dtype=query.dtype) + (0 if attention_mask is None else attention_mask), blocked
        )

    def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        q, k, v = (part[:, :n_own] for part in (q, k, v))
        with _groups(module, q.shape[1] // k.shape[1]):
            z, pattern = eager_function(module, q, k, v, _of_heads(mask, n_own), **kwargs)
        missing = n_heads - n_own
        return (_with_missing(z, n_heads, 2), nn.functional.pad(pattern, (0, 0, 0, 0, 0, missing), value=torch.nan))

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part[:, :n_own] for part in (q, k, v))
        with _groups(module, q.shape[1] // k.shape[1]):
            function = AttentionInterface._global_mapping["sdpa"]
            # The mask we asked for is causal by itself; with is_causal SDPA would not take one.
            z = function(module, q, k, v, _of_heads(mask, n_own), **{**kwargs, "is_causal": False})[0]
        return _with_missing(z, n_heads, 2)

    fast = sdpa if _sdpa_is_exact(module, kwargs) else None
    call = AttentionCall(layer, query, key, value, attention_mask, handler.offset, eager, fast)
    z = handler.attend(call)
    return z[:, :, :n_own].contiguous(), call._pattern


def _with_missing(tensor: Tensor, n_heads: int, dim: int = 1) -> Tensor:
    """Zeros for the heads that a layer does not have."""
    missing = n_heads - tensor.shape[dim]
    return nn.functional.pad(tensor, (0, 0) * (tensor.ndim - 1 - dim) + (0, missing)) if missing else tensor


def _of_heads(mask: Tensor | None, n: int) -> Tensor | None:
    """A mask that all heads share, or that of the first `n` of them."""
    return mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask[:, :n]


def eager_of(kind: type) -> Callable[..., tuple[Tensor, Tensor]]:
    """The eager attention of an attention class: its module's, or that of the class it was made from."""
    modules = (sys.modules.get(base.__module__) for base in kind.__mro__)
    found = (getattr(module, "eager_attention_forward", None) for module in modules)
    function = next((f for f in found if f is not None), None)
    if function is None:
        raise UnsupportedError(
            f"{kind.__name__} has no eager attention, neither of its own nor of a class that it was made from."
        )
    return function


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask as what is added to scores. Eager attention would add 0 and 1 where a mask says false and true."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def cut(scores: Float[Tensor, "B H T S"], blocked: Bool[Tensor, "#B #H #T S"]) -> Float[Tensor, "B H T S"]:
    """Scores (or what is added to them) with the blocked edges cut. A query that would be left with no key keeps those it has."""
    low = torch.finfo(scores.dtype).min  # not -inf, which would make a row without keys NaN
    left = (scores > low / 2) & ~blocked
    return scores.masked_fill(blocked & left.any(-1, keepdim=True), low)


def _sdpa_is_exact(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether SDPA computes what the architecture's eager attention does: nothing capped, no sinks, no biases."""
    special = ("softcap", "s_aux", "position_bias")
    return not any(kwargs.get(name) is not None for name in special) and not hasattr(module, "sinks")


@contextlib.contextmanager
def _groups(module: nn.Module, n: int) -> Iterator[None]:
    """Tell the architecture's attention function how many query heads share a KV head in the tensors it is given."""
    before = getattr(module, "num_key_value_groups", None)
    if before == n:
        yield
        return
    module.num_key_value_groups = n  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del module.num_key_value_groups
        else:
            module.num_key_value_groups = before


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, eager_mask)


@contextlib.contextmanager
def attending(cores: Mapping[int, nn.Module], handlers: Mapping[int, Handler], has_interface: bool) -> Iterator[None]:
    """Route the attention of the layers in `handlers` through them; everything is put back at the end."""
    configs: dict[int, Any] = {id(core.config): core.config for core in cores.values() if hasattr(core, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    with contextlib.ExitStack() as stack:
        for key, config in configs.items() if has_interface else ():
            config._attn_implementation_internal = NAME
            stack.callback(setattr, config, "_attn_implementation_internal", before[key])
        for layer, handler in handlers.items():
            core = cores[layer]
            if has_interface:
                stack.enter_context(_registered(core, layer, handler))
            else:
                stack.enter_context(_tapped(core, layer, handler))
        yield


@contextlib.contextmanager
def _registered(core: nn.Module, layer: int, handler: Handler) -> Iterator[None]:
    before = _HANDLERS.get(id(core))
    _HANDLERS[id(core)] = (layer, handler)
    try:
        yield
    finally:
        if before is None:
            del _HANDLERS[id(core)]
        else:
            _HANDLERS[id(core)] = before


@contextlib.contextmanager
def replaced_forward(module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Give one module `make(its forward)` as its forward for a while, also where Accelerate has put one there already."""
    own = module.__dict__.get("forward")
    module.forward = make(module.forward)
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.forward = own


@contextlib.contextmanager
def _tapped(core: nn.Module, layer: int, handler: Handler) -> Iterator[None]:
    def make(forward: Callable[..., Any]) -> Callable[..., Any]:
        def tapped(*args: Any, **kwargs: Any) -> Any:
            with _Tap(layer, handler):
                return forward(*args, **kwargs)

        return tapped

    with replaced_forward(core, make):
        yield


_PRODUCTS = {
    torch.matmul,
    torch.bmm,
    torch.baddbmm,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.bmm,
    torch.Tensor.baddbmm,
}
_FUSED = torch.nn.functional.scaled_dot_product_attention
_SOFTMAXES = {torch.softmax, torch.nn.functional.softmax, torch.Tensor.softmax}


class _Tap(TorchFunctionMode):
    """Sees the products of one attention forward: `q k^T`, then the softmax, then `pattern v`; or all three fused."""

    # These attentions keep q, k and v in local variables, where no hook reaches. To write their forward again would lose ALiBi,
    # caches and scalings that differ by class and version; torch's own calls are the one place that all of them pass.

    def __init__(self, layer: int, handler: Handler) -> None:
        super().__init__()
        self.layer, self.handler = layer, handler
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.mask: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            return self._product(func, args, kwargs)
        if func is _FUSED:
            return self._fused(*args, **kwargs)
        if func in _SOFTMAXES and self.key is not None:
            return func(self._scores(args[0]), *args[1:], **kwargs)
        return func(*args, **kwargs)

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        named = [kwargs[n] for n in ("batch1", "batch2") if n in kwargs]
        left, right = named or args[-2:]
        if left.ndim < 3 or right.ndim < 3:  # a projection, not a product of heads
            return func(*args, **kwargs)
        # Told apart by their order alone: the first product is q k^T, and the one after the softmax pattern v.
        if self.key is None:
            left, right = self._query_key(left, right)
        elif self.mask is not None:
            return self._pattern_value(left, right)
        if named:
            return func(*args, **{**kwargs, "batch1": left, "batch2": right})
        return func(*args[:-2], left, right, **kwargs)

    def _fused(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **_: Any,
    ) -> Tensor:
        handler, length, total = self.handler, query.shape[2], key.shape[2]
        if is_causal:
            attn_mask = torch.ones(length, total, dtype=torch.bool, device=query.device).tril()
        attn_mask = additive(attn_mask, query.dtype)
        query, key, value = (_changed(handler, p, t) for p, t in zip(PARTS, (query, key, value), strict=True))
        blocked = handler.block((query.shape[0], handler.n_heads, length, total), query.device)
        if blocked is not None:
            attn_mask = cut(
                torch.zeros_like(blocked, dtype=query.dtype) + (0 if attn_mask is None else attn_mask), blocked
            )
        if attn_mask is not None:
            attn_mask = attn_mask.expand(query.shape[0], -1, -1, -1) if attn_mask.ndim == 4 else attn_mask[None, None]
        factor = query.shape[-1] ** -0.5 if scale is None else scale

        def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
            k, v = _widen(k, q.shape[1]), _widen(v, q.shape[1])
            scores = q @ k.transpose(-1, -2) * factor
            pattern = torch.softmax(scores if mask is None else scores + mask, -1)
            return (pattern @ v).transpose(1, 2), pattern

        def fast(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            k, v = _widen(k, q.shape[1]), _widen(v, q.shape[1])
            return _FUSED(q, k, v, attn_mask=mask, scale=factor).transpose(1, 2)

        call = AttentionCall(self.layer, query, key, value, attn_mask, handler.offset, eager, fast)
        return handler.attend(call).transpose(1, 2)

    def _query_key(self, query: Tensor, key_t: Tensor) -> tuple[Tensor, Tensor]:
        n_heads = self.handler.n_heads
        flat = query.ndim == 3
        self.query = query.unflatten(0, (-1, n_heads)) if flat else query
        self.key = (key_t.unflatten(0, (-1, n_heads)) if flat else key_t).transpose(-1, -2)
        self.query = _changed(self.handler, "query", self.query)
        self.key = _changed(self.handler, "key", self.key)
        key_t = self.key.transpose(-1, -2)
        return (self.query.flatten(0, 1), key_t.flatten(0, 1)) if flat else (self.query, key_t)

    def _scores(self, scores: Tensor) -> Tensor:
        assert self.query is not None and self.key is not None
        flat = scores.ndim == 3  # XGLM
        scores = scores.unflatten(0, (-1, self.handler.n_heads)) if flat else scores
        batch, n_heads, length, total = scores.shape
        blocked = self.handler.block((batch, n_heads, length, total), scores.device)
        low = torch.finfo(scores.dtype).min
        if blocked is not None:
            scores = cut(scores, blocked)
        # The mask is in the scores by now. Only which keys are cut can be read off again, which is what `allowed` asks.
        self.mask = torch.zeros_like(scores).masked_fill(scores < low / 2, low)
        return scores.flatten(0, 1) if flat else scores

    def _pattern_value(self, pattern: Tensor, value: Tensor) -> Tensor:
        assert self.query is not None and self.key is not None
        flat = pattern.ndim == 3
        n_heads = self.query.shape[1]
        pattern = pattern.unflatten(0, (-1, n_heads)) if flat else pattern
        value = value.unflatten(0, (-1, n_heads)) if flat else value
        value = _changed(self.handler, "value", value)
        call = AttentionCall(self.layer, self.query, self.key, value, self.mask, self.handler.offset, _unavailable)
        call._pattern = pattern
        call._z = (pattern @ value).transpose(1, 2)
        z = self.handler.attend(call).transpose(1, 2)
        return z.flatten(0, 1) if flat else z


def _changed(handler: Handler, part: Part, tensor: Tensor) -> Tensor:
    """What the handler makes of q, k or v, `[B, ., ., Dh]`."""
    if not handler.touches(part):
        return tensor
    return handler.change(part, _widen(tensor, handler.n_heads) if handler.by_query_head else tensor)


def _widen(tensor: Tensor, n_heads: int) -> Tensor:
    """Keys or values for each query head instead of each group."""
    return tensor if tensor.shape[1] == n_heads else tensor.repeat_interleave(n_heads // tensor.shape[1], 1)


def _unavailable(*_: Tensor | None) -> tuple[Tensor, Tensor]:
    raise AssertionError("a tapped call always has its pattern")
