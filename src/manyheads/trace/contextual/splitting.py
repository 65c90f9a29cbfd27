"""Splitting: the model's own forward on activations that carry the part of them that is due to a source.

Contextual decomposition (Hsu et al., arXiv:2407.00886) writes each activation as t = b + g, the part b that is due to a source
and the rest g. No modelling code is rewritten: a `Split` is a tensor whose rows are the total and, below it, the relevant parts
of n sources,

    [t; b_1; ...; b_n]      (1 + n) B rows,      g_i = t - b_i

so that all that is linear in each row (heads, slices, rotary embeddings, additions, weights) runs in the architecture's own code,
on all parts at once. The total is computed once for all sources and is the model's own forward pass. b + g = t holds by
construction, since g is never stored; only b needs rules. Elementwise, with 0/0 = 0:

    x W + c             b' = b W + c |b W| / (|b W| + |g W|)               likewise for a constant c added to a stream
    norm                b' = A(b) / sigma(t) + bias |b| / (|b| + |g|)      A: the norm's linear part (see `FoldedNorm`)
    activation          b' = act(t) - act(g)
    product             b' = t_1 t_2 - g_1 g_2                             gated MLPs: the activation's rule for two factors
    attention, "own"    b_z = softmax(mask(b_q b_k / sqrt(Dh))) b_v
    attention, "total"  b_z = softmax(mask(t_q t_k / sqrt(Dh))) b_v
    signs               where b g < 0 the larger of the two takes t, the other 0: b' = b clamped to lie between 0 and t;
                        after each of an MLP's matrices and each layer

Where act(0) = 0, b = 0 stays 0 and b = t stays t. With "own" patterns a source is followed through queries and keys too, with
"total" through values alone. An operation without a rule (a router's choice of experts, a
softmax outside of attention) is an `UnsupportedError`, never a guess. Departure: the paper adds 1e-8 to the denominators,
which takes a bias away from small activations.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers.activations import ACT2CLS

from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import Head, HeadLike
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import entering, leaving
from manyheads.model.norms import FoldedNorm
from manyheads.model.reading.attention import AttentionCall, Part, attending, replaced_forward
from manyheads.model.replay.recording import (
    Recording,
    first_logits,
    narrow_last_mlp,
    no_cache,
    only_last,
    repeated,
    starting_at,
)

Pattern = Literal["own", "total"]
ACTIVATIONS: tuple[Any, ...] = tuple(c[0] if isinstance(c, tuple) else c for c in ACT2CLS.values())


@dataclass(frozen=True)
class Parts:
    """An activation and, for each of n sources, the part that is due to it."""

    total: Float[Tensor, "B ..."]
    relevant: Float[Tensor, "n B ..."]

    @property
    def irrelevant(self) -> Float[Tensor, "n B ..."]:
        """The rest, g = t - b."""
        return self.total - self.relevant


class Split(Tensor):
    """Rows `[t; b_1; ...; b_n]` that pass through a model's own forward by the rules above."""

    sources: int

    @classmethod
    def of(cls, rows: Float[Tensor, "N ..."], sources: int) -> Split:
        """The first of `1 + sources` equal blocks of rows is the total, the others are relevant parts."""
        split = rows.as_subclass(cls)
        split.sources = sources
        return split

    @classmethod
    def joined(cls, total: Float[Tensor, "B ..."], relevant: Float[Tensor, "n B ..."]) -> Split:
        """The split tensor of a total and its relevant parts."""
        return cls.of(torch.cat([total[None], relevant]).flatten(0, 1), len(relevant))

    @property
    def rows(self) -> Float[Tensor, "N ..."]:
        """All rows as a plain tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @property
    def by_part(self) -> Float[Tensor, "{1+self.sources} B ..."]:
        """The rows as a plain tensor, total first, then one entry for each source."""
        return self.rows.unflatten(0, (1 + self.sources, -1))

    @property
    def parts(self) -> Parts:
        """Total and relevant parts as plain tensors."""
        return Parts(self.by_part[0], self.by_part[1:])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a torch function by its rule; `UnsupportedError` if it has none."""
        rule = RULES.get(func.__name__)
        if rule is None:
            raise UnsupportedError(
                f"this model calls {func.__name__}, which has no rule for split tensors; decompose another architecture."
            )
        return rule(func, *args, **(kwargs or {}))


# Rules for functions, by their names


def _natively(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Run functions that are linear in each row unchanged, on all rows."""
    split = next(a for value in args for a in (value if isinstance(value, (tuple, list)) else [value]) if _is(a))
    with torch._C.DisableTorchFunctionSubclass():
        return _wrapped(func(*args, **kwargs), split.sources)


def _wrapped(value: Any, sources: int) -> Any:
    if isinstance(value, Tensor):
        return Split.of(value, sources)
    if isinstance(value, (tuple, list)):
        return type(value)(_wrapped(part, sources) for part in value)
    return value


def _is(value: Any) -> bool:
    return isinstance(value, Split)


def _metadata(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Shape, type and device, which do not depend on values."""
    with torch._C.DisableTorchFunctionSubclass():
        answer = func(*args, **kwargs)
    if isinstance(answer, Tensor):
        raise UnsupportedError("a split tensor was read through an attribute (such as .T or .data) that has no rule.")
    return answer


def _along(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions along dimensions, which must not be the batch: it holds the parts."""
    ndim = (x[0] if isinstance(x, (tuple, list)) else x).ndim
    wanted = kwargs.get("dim", args[_DIM_AT.get(func.__name__, 0) :][: 2 if func.__name__ in _TWO else 1])
    wanted = wanted if isinstance(wanted, (tuple, list)) else [wanted]
    if not wanted or any(dim in (0, -ndim) for dim in wanted):
        raise UnsupportedError(f"{func.__name__} works along the batch, which holds the parts of a split tensor.")
    return _natively(func, x, *args, **kwargs)


def _permute(func: Any, x: Split, *dims: Any) -> Any:
    order = dims[0] if isinstance(dims[0], (tuple, list)) else dims
    if order[0] != 0:
        raise UnsupportedError("permute moves the batch, which holds the parts of a split tensor.")
    return _natively(func, x, *dims)


def _item(func: Any, x: Split, index: Any) -> Any:
    first = index[0] if isinstance(index, tuple) else index
    if first is not Ellipsis and not (isinstance(first, slice) and first == slice(None)):
        raise UnsupportedError("the model selects rows of a split tensor, which would separate its parts.")
    return _natively(func, x, index)


def _dropout(func: Any, x: Split, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if training and p > 0:
        raise UnsupportedError("the model is in training mode and drops activations at random; call eval() first.")
    return x


def _add(func: Any, a: Any, b: Any) -> Any:
    if _is(a) and _is(b):
        return _natively(torch.add, a, b)
    return _shifted(a, b) if _is(a) else _shifted(b, a)


def _sub(func: Any, a: Any, b: Any) -> Any:
    if _is(a) and _is(b):
        return _natively(torch.sub, a, b)
    return _shifted(a, -b) if _is(a) else _shifted(_natively(torch.neg, b), a)


def _shifted(x: Split, c: Any) -> Split:
    """`x + c`, with the constant divided between the parts by their magnitudes."""
    by_part = x.by_part
    if isinstance(c, Tensor) and c.ndim == x.ndim and c.shape[0] == x.shape[0]:
        c = c.unflatten(0, (1 + x.sources, -1))[0]
    shifted = torch.empty_like(by_part)
    torch.add(by_part[0], c, out=shifted[0])
    torch.addcmul(by_part[1:], _share(by_part[0], by_part[1:]), torch.as_tensor(c).to(by_part), out=shifted[1:])
    return Split.of(shifted.flatten(0, 1), x.sources)


def _share(total: Tensor, relevant: Tensor) -> Tensor:
    """|b| / (|b| + |g|), and 0 where both are 0: the share of a constant that goes to b."""
    # A constant is due to no source. Shared by magnitude, a part that is 0 gets nothing, and one that is all gets all of it.
    size = relevant.abs()
    return size / (total - relevant).abs_().add_(size).add_(torch.finfo(size.dtype).tiny)


def _mul(func: Any, a: Any, b: Any) -> Any:
    if not (_is(a) and _is(b)):
        return _natively(torch.mul, a, b)
    # b' is what the product loses when the source is removed, t -> g in both factors: the cross terms b_1 g_2 and g_1 b_2 go
    # to b. b_1 b_2 alone would give a source that acts through one factor (a gate) nothing.
    one, two = a.by_part, b.by_part
    product = one * two
    torch.addcmul(product[0], one[0] - one[1:], two[0] - two[1:], value=-1, out=product[1:])
    return Split.of(product.flatten(0, 1), a.sources)


def _div(func: Any, a: Any, b: Any) -> Any:
    if _is(b):
        raise UnsupportedError("there is no rule for dividing by a split tensor.")
    return _natively(torch.div, a, b)


def _matmul(func: Any, a: Any, b: Any) -> Any:
    if (_is(a) and _is(b)) or (_is(b) and b.ndim < 3):
        raise UnsupportedError("there is no rule for a product of two split tensors outside of attention.")
    return _natively(func, a, b)


def _linear(func: Any, x: Split, weight: Tensor, bias: Tensor | None = None) -> Split:
    mapped: Split = _natively(nn.functional.linear, x, weight)
    return mapped if bias is None else _shifted(mapped, bias)


def _addmm(func: Any, bias: Tensor, x: Split, weight: Tensor) -> Split:
    return _shifted(_natively(torch.mm, x, weight), bias)


def _activation(func: Any, x: Split, *args: Any, **kwargs: Any) -> Split:
    """act(t) - act(g): what the output loses when the source is removed. One call for all rows."""
    by_part = x.by_part
    values = func(torch.cat([by_part[:1], by_part[0] - by_part[1:]]).flatten(0, 1), *args, **kwargs)
    values = values.unflatten(0, (1 + x.sources, -1))
    torch.sub(values[0], values[1:], out=values[1:])
    return Split.of(values.flatten(0, 1), x.sources)


_DIM_AT = {"chunk": 1, "split": 1, "repeat_interleave": 1}
_TWO = ("transpose", "swapaxes")
RULES: Mapping[str, Callable[..., Any]] = {
    **dict.fromkeys(
        "__get__ size dim numel stride is_contiguous is_floating_point is_complex __len__ get_device".split(), _metadata
    ),
    **dict.fromkeys("view reshape flatten unflatten expand contiguous clone to float double half neg".split(), _natively),
    **dict.fromkeys("type_as pad __neg__ detach bfloat16".split(), _natively),
    **dict.fromkeys(
        "transpose swapaxes chunk split cat stack unbind select narrow unsqueeze squeeze repeat_interleave".split(), _along
    ),
    "permute": _permute,
    "__getitem__": _item,
    "dropout": _dropout,
    **dict.fromkeys("add __add__ __radd__ __iadd__".split(), _add),
    **dict.fromkeys("sub __sub__".split(), _sub),
    "__rsub__": lambda func, a, b: _sub(func, b, a),
    **dict.fromkeys("mul __mul__ __rmul__ __imul__ multiply".split(), _mul),
    **dict.fromkeys("div __truediv__ __itruediv__ true_divide".split(), _div),
    **dict.fromkeys("matmul __matmul__ mm bmm".split(), _matmul),
    "linear": _linear,
    "addmm": _addmm,
    **dict.fromkeys("gelu silu relu tanh sigmoid leaky_relu mish softplus hardswish".split(), _activation),
}  # fmt: skip


# Rules for modules


def _split_activation(forward: Callable[..., Any]) -> Callable[..., Any]:
    def split(x: Any, *args: Any, **kwargs: Any) -> Any:
        return _activation(forward, x, *args, **kwargs) if _is(x) else forward(x, *args, **kwargs)

    return split


def signed(x: Split) -> Split:
    """The sign rule. Where b and g = t - b differ in sign, b is outside of [0, t], and is clamped to the nearer end."""
    by_part = x.by_part.clone()
    torch.clamp(by_part[1:], by_part[0].clamp(max=0), by_part[0].clamp(min=0), out=by_part[1:])
    return Split.of(by_part.flatten(0, 1), x.sources)


def _signed_part(output: Tensor) -> Split | None:
    return signed(output) if isinstance(output, Split) else None


@dataclass
class _SplitAttention:
    """Attention on parts: a handler of the attention function that every layer calls."""

    n_heads: int
    pattern: Pattern
    offset: int = 0
    by_query_head: bool = False

    def touches(self, part: Part) -> bool:
        return False

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        return tensor

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        if not isinstance(call.query, Split):
            return call.z
        sources = call.query.sources
        query, key, value = (part.rows if _is(part) else part for part in (call.query, call.key, call.value))  # type: ignore[attr-defined]
        plain = replace(call, query=query, key=key, value=value)
        if self.pattern == "own":
            return Split.of(plain.z, sources)
        # With the total's pattern for all parts z is linear in the values, so parts of z sum to its total; softmaxes of parts
        # would not. One softmax then serves all parts: their values stand side by side in the last dimension.
        batch, width = len(query) // (1 + sources), value.shape[-1]
        wide = value.unflatten(0, (-1, batch)).permute(1, 2, 3, 0, 4).flatten(-2)
        z = replace(plain.rows(0, batch), value=wide).z.unflatten(-1, (-1, width))
        return Split.of(z.permute(3, 0, 1, 2, 4).flatten(0, 1), sources)


@dataclass(eq=False)
class Splitter:
    """Runs `model` on split activations. `attention` and `signs` choose among the rules above.

    `UnsupportedError` for architectures without Transformers' attention interface (BLOOM, MPT, Falcon) and, during a pass, for
    any operation or norm without a rule. Active edits are an error too.
    """

    model: HeadModel
    attention: Pattern = "total"
    signs: bool = False

    def __post_init__(self) -> None:
        if self.attention not in get_args(Pattern):
            raise InputError(f'attention is {self.attention!r}; choose "own" or "total".')
        if not self.model.layout.has_interface:
            raise UnsupportedError(
                f"{type(self.model.plain).__name__} computes attention by itself, so its patterns cannot be split; "
                "decompose a model that goes through Transformers' attention interface."
            )
        self.model.require_alike("contextual decomposition")
        self._norms: dict[int, FoldedNorm | UnsupportedError] = {}

    def tokens(
        self,
        inputs: Any,
        chosen: Bool[Tensor, "n B T"],
        *,
        read: Callable[[int, Parts], None] | None = None,
        keep: int | None = None,
    ) -> Parts:
        """Logits split for n sets of tokens: the relevant part is the stream that enters layer 0 at the chosen tokens.

        `read(layer, z)` gets every layer's z, split `[B, T, H, Dh]`. `keep`: logits of the last positions only.
        """
        batch = self.model.inputs(inputs)
        rows = next(len(value) for value in batch.values() if isinstance(value, Tensor) and value.ndim > 1)
        if chosen.ndim != 3 or chosen.shape[1] != rows:
            raise InputError(f"chosen has shape {list(chosen.shape)}; give [n, {rows}, T].")

        def enter(hidden: Tensor) -> Split:
            by_part = hidden.unflatten(0, (1 + len(chosen), -1))
            if chosen.shape[2] != by_part.shape[2]:
                raise InputError(
                    f"chosen has {chosen.shape[2]} columns; give {by_part.shape[2]}, one for each token that enters the model."
                )
            return Split.joined(by_part[0], by_part[1:] * chosen.to(hidden)[..., None])

        with self._splitting(0, enter, None, read):
            return self._logits(batch, rows, len(chosen), keep)

    def heads(
        self,
        recording: Recording,
        heads: Sequence[HeadLike],
        mean: Float[Tensor, "L T H Dh"] | Float[Tensor, "L H Dh"],
        *,
        read: Callable[[int, Parts], None] | None = None,
        keep: int | None = None,
    ) -> Parts:
        """Logits split for each of n heads: the relevant part is z - `mean` at the head, and 0 before it.

        Layers below the lowest of `heads` are replayed from `recording`. `read(layer, z)` gets z from that layer on, with the
        sources' parts set.
        """
        sources = [Head.of(h) for h in heads]
        self.model.head_set(sources)
        wanted = (recording.length, *self.model.shape[1:], self.model.head_dim)
        if not sources or tuple(mean.shape[1:]) not in (wanted, wanted[1:]):
            raise InputError(
                f"give one head at least and a mean of shape [L, {', '.join(map(str, wanted))}] or without positions; "
                f"got {len(sources)} heads and {list(mean.shape)}."
            )
        layer, n, layout = min(h.layer for h in sources), len(sources), self.model.layout

        def enter(hidden: Tensor) -> Split:
            by_part = hidden.unflatten(0, (1 + n, -1))
            return Split.joined(by_part[0], torch.zeros_like(by_part[1:]))

        def source(at: int, z: Parts) -> Parts:
            here = [(i, head.index) for i, head in enumerate(sources) if head.layer == at]
            relevant = z.relevant.clone() if here else z.relevant
            for i, h in here:
                relevant[i, :, :, h] = z.total[:, :, h] - mean[at, ..., h, :].to(z.total)
            return Parts(z.total, relevant)

        with (
            starting_at(layout, recording, layer, 1 + n),
            narrow_last_mlp(layout, recording, keep),
            self._splitting(layer, enter, source, read),
        ):
            return self._logits(recording.inputs, recording.batch, n, keep)

    def _logits(self, inputs: Mapping[str, Any], batch: int, n: int, keep: int | None) -> Parts:
        # The total's rows run through the model's own modules beside the parts. Every rule needs t where it acts (sigma(t),
        # act(t), the pattern), and a total from rewritten code could drift from the model without notice.
        module = self.model.plain
        given = {name: repeated(value, batch, 1 + n) for name, value in inputs.items()}
        with torch.no_grad():
            logits = first_logits(module(**given, **no_cache(module), **only_last(module, keep)))
        if not isinstance(logits, Split):
            raise UnsupportedError(
                f"{type(module).__name__} computes its logits from copies that lose the parts; decompose another architecture."
            )
        split = logits.parts
        return split if keep is None else Parts(split.total[:, -keep:], split.relevant[:, :, -keep:])

    @contextlib.contextmanager
    def _splitting(
        self,
        layer: int,
        enter: Callable[[Tensor], Split],
        source: Callable[[int, Parts], Parts] | None,
        read: Callable[[int, Parts], None] | None,
    ) -> Iterator[None]:
        """Inside the block, the stream is split where it enters `layer`, and every module above follows the rules."""
        layout = self.model.layout
        above = dict(enumerate(layout.blocks[layer:], layer))
        below = {id(m) for block in layout.blocks[:layer] for m in block.module.modules()}

        with contextlib.ExitStack() as stack:
            stack.enter_context(entering(layout.blocks[layer].module, enter))
            for at, block in above.items():
                if source is not None or read is not None:
                    stack.enter_context(entering(block.projection, partial(self._at_projection, at, source, read)))
                for module in _matrices(block.module, block.attention) if self.signs else ():
                    stack.enter_context(leaving(module, _signed_part))
            for module in self.model.plain.modules():
                if id(module) in below:
                    continue
                if isinstance(module, ACTIVATIONS):
                    stack.enter_context(replaced_forward(module, _split_activation))
                elif _is_norm(module):
                    stack.enter_context(replaced_forward(module, partial(self._split_norm, module)))
            handler = _SplitAttention(self.model.n_heads, self.attention)
            cores = {at: block.core for at, block in above.items()}
            stack.enter_context(attending(cores, dict.fromkeys(cores, handler), True))
            yield

    def _at_projection(self, layer: int, source: Any, read: Any, flat: Any) -> Split | None:
        by_part = flat.by_part.unflatten(-1, (self.model.n_heads, -1))
        z = Parts(by_part[0], by_part[1:])
        new = z if source is None else source(layer, z)
        if read is not None:
            read(layer, new)
        if new.relevant is z.relevant:
            return None
        return Split.joined(new.total.flatten(-2), new.relevant.flatten(-2))

    def _split_norm(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        norm = self._folded(module)

        def split(x: Tensor) -> Tensor:
            if not isinstance(x, Split):
                return forward(x)  # type: ignore[no-any-return]
            if isinstance(norm, UnsupportedError):
                raise norm
            by_part = x.by_part
            # With the total's sigma the norm is linear in its parts; each part's own sigma would break b + g = t.
            total, b = by_part[0], by_part[1:]
            relevant = norm.direction(b) / norm.sigma(total)
            if norm.bias.any():
                relevant = torch.addcmul(relevant, norm.bias, _share(total, b).to(relevant))
            return Split.joined(forward(total), relevant.to(x.dtype))

        return split

    def _folded(self, module: nn.Module) -> FoldedNorm | UnsupportedError:
        """Measured once, before its forward is replaced. A module that is no norm is an error only if parts reach it."""
        if id(module) not in self._norms:
            weight = getattr(module, "weight", None)
            given = weight if isinstance(weight, Tensor) else torch.empty(self.model.layout.hidden_size)
            dtype = torch.promote_types(given.dtype, torch.float32)
            try:
                norm = FoldedNorm.of(module, given.shape[-1])
                self._norms[id(module)] = replace(norm, gain=norm.gain.to(dtype), bias=norm.bias.to(dtype))
            except (UnsupportedError, ValueError, RuntimeError):
                name = type(module).__name__
                self._norms[id(module)] = UnsupportedError(
                    f"{name} is neither LayerNorm nor RMSNorm and has no rule; decompose another architecture."
                )
        return self._norms[id(module)]


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and not any(True for _ in module.children())


def _matrices(block: nn.Module, attention: nn.Module) -> Iterator[nn.Module]:
    """Modules of a layer after which the sign rule acts: matrices outside of attention, and the layer itself."""
    inside = set(attention.modules())
    for module in block.modules():
        weight = getattr(module, "weight", None)
        if module is block or (module not in inside and isinstance(weight, Tensor) and weight.ndim == 2):
            yield module
