"""Rotary angles: the one engine of the methods that replace or re-number them.

RoPE turns pair i of a head's channels, at position m, by `m w_i`:

    (a, b)  ->  (a cos - b sin, a sin + b cos) * scale        angle m * w_i in radians, i = 0 .. R/2 - 1

Turns of one pair add up, and a turn common to query and key cancels in their product. So a method that changes angles turns q and
k *before* the model's own RoPE, by an angle for each token, head and pair, and needs nothing of the model's code.

So a *conversion* hangs a small module with the new parameters into a model, which turns what comes out of its query and key
projections (or of the norms after them). It begins where no angle is changed.

Architectures pair channels in two ways (i with i + R/2, or 2i with 2i + 1), and may turn only the first R of Dh channels. That
is measured in each layer, not looked up: in two passes all tokens are given one position, once 0 and once another. Relative
positions are 0 in both, so that nothing else differs, and each query of the second pass must be the first one's, turned.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught, hooked
from manyheads.model.layout import tiny_inputs
from manyheads.model.reading.readers import Keep

_HELD = 3  # the position of the second pass; its slow pairs turn by more than rounding


@dataclass(frozen=True)
class Pairs:
    """Which channels of a head are turned together: the first `width`, i with i + width/2, or 2i with 2i + 1."""

    width: int
    interleaved: bool = False

    def split(self, x: Float[Tensor, "*N Dh"]) -> tuple[Tensor, Tensor]:
        """Both channels of each pair, `[*N, width/2]` each."""
        turned = x[..., : self.width]
        if self.interleaved:
            return turned[..., 0::2], turned[..., 1::2]
        first, second = turned.chunk(2, -1)
        return first, second

    def join(self, first: Tensor, second: Tensor, x: Float[Tensor, "*N Dh"]) -> Tensor:
        """`x` with these pairs in place of its own; what RoPE leaves alone stays."""
        turned = torch.stack([first, second], -1).flatten(-2) if self.interleaved else torch.cat([first, second], -1)
        return (
            turned
            if self.width == x.shape[-1]
            else torch.cat([turned, x[..., self.width :].expand(*turned.shape[:-1], -1)], -1)
        )

    def rotate(self, x: Float[Tensor, "*N Dh"], angle: Float[Tensor, "*M R"], scale: float = 1.0) -> Tensor:
        """`x` with each pair turned by `angle` (radians; broadcast to `x`) and lengthened by `scale`."""
        # Angles are long sums, so they stay float32 however coarse x is; Transformers casts cos and sin alike.
        cos, sin = (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)
        a, b = self.split(x)
        return self.join(a * cos - b * sin, b * cos + a * sin, x)


@dataclass(frozen=True)
class Rope:
    """A model's own rotary embedding, as measured: its module, its pairs."""

    module: Any
    pairs: Pairs

    @property
    def frequencies(self) -> Float[Tensor, "R"]:
        """`w_i`, radians a token."""
        return self.module.inv_freq

    def rotate(self, x: Float[Tensor, "*N Dh"], positions: Int[Tensor, "*M"]) -> Tensor:
        """`x` as the model's RoPE turns it at these positions (broadcast to `x` but for its channels)."""
        frequencies = self.frequencies.to(x.device)
        return self.pairs.rotate(x, positions[..., None].to(frequencies) * frequencies, self.module.attention_scaling)


def rope_of(model: HeadModel, what: str) -> Rope:
    """The rotary embedding of all layers of `model`, measured. `UnsupportedError` says why `what` cannot be done without."""
    name = type(model.plain).__name__
    found = [module for module in model.plain.modules() if isinstance(getattr(module, "inv_freq", None), Tensor)]
    if not found:
        raise UnsupportedError(
            f"{name} has no rotary embedding with one table of frequencies, and {what} changes its angles."
        )
    if len(found) > 1:
        raise UnsupportedError(
            f"{name} has {len(found)} rotary embeddings, and {what} needs one that all layers share."
        )
    if any(isinstance(module, Turning) for module in model.plain.modules()):
        raise UnsupportedError(f"the rotary angles of this {name} are changed already, and {what} needs a model's own.")
    rotary: Any = found[0]
    kind = getattr(rotary, "rope_type", "default")
    if kind in ("dynamic", "longrope"):
        raise UnsupportedError(
            f"the rotary angles of {name} ({kind}) depend on the length of the text, and {what} needs fixed ones."
        )
    if not model.layout.has_interface or not hasattr(rotary, "attention_scaling"):
        raise UnsupportedError(
            f"{name} does not hand its queries and keys to Transformers' attention interface, and {what} needs that."
        )
    model.require_alike(what)
    width = 2 * len(rotary.inv_freq)
    still, turned = _queries(model, rotary, 0), _queries(model, rotary, _HELD)
    for interleaved in (False, True):
        pairs = Pairs(width, interleaved)
        angle = _HELD * rotary.inv_freq
        if all(_equal(pairs.rotate(still[layer], angle), turned[layer]) for layer in still):
            return Rope(rotary, pairs)
    raise UnsupportedError(
        f"{name} does not turn the queries of every layer by the angles of its rotary embedding, and {what} would be wrong there."
    )


def still(_: nn.Module, args: Any, output: Any) -> Any:
    """A hook on a rotary embedding: it turns nothing."""
    cos, sin = output
    return torch.ones_like(cos), torch.zeros_like(sin)


def _queries(model: HeadModel, rotary: nn.Module, position: int) -> dict[int, Tensor]:
    """Queries of every layer, `[B, T, H, Dh]` each, where all tokens have this position."""
    keep = Keep("q")
    with _held(rotary, position):
        model.look(tiny_inputs(model.plain), keep)
    return keep.values


@contextmanager
def _held(rotary: nn.Module, position: int) -> Iterator[None]:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) > 1:
            return (args[0], torch.full_like(args[1], position), *args[2:]), kwargs
        return args, {**kwargs, "position_ids": torch.full_like(kwargs["position_ids"], position)}

    with hooked(rotary, before=before):
        yield


# Conversions

_SITES = (("q_proj", "k_proj"), ("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"))


@dataclass(frozen=True)
class Frame:
    """What a conversion knows of a model: its pairs, the modules of a layer that give q and k before RoPE, and its sizes."""

    pairs: Pairs
    query: str
    key: str
    heads: int
    groups: int
    hidden: int

    @classmethod
    def of(cls, model: HeadModel, what: str) -> Self:
        """Measured. `UnsupportedError` where q and k before RoPE are no module's outputs."""
        if getattr(model.plain, "hf_quantizer", None) is not None:
            raise UnsupportedError(
                f"{type(model.plain).__name__} is quantised, and {what} is to be trained; open it unquantised."
            )
        rope = rope_of(model, what)
        query, key = _sites_of(model, rope, what)
        return cls(rope.pairs, query, key, model.n_heads, model.n_kv_heads, model.layout.hidden_size)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a config."""
        return asdict(self)

    @classmethod
    def from_json(cls, kept: dict[str, Any]) -> Self:
        """What `to_json` gave."""
        return cls(**kept | {"pairs": Pairs(**kept["pairs"])})

    def layers(self, module: nn.Module) -> list[nn.Module]:
        """The attention modules of a model, from the first layer on."""
        return [part for part in module.modules() if hasattr(part, self.query) and hasattr(part, self.key)]


class Turning(nn.Module):
    """Turns queries and keys before RoPE, by `angle`. Its parameters are new ones of the model it hangs in."""

    def __init__(self, frame: Frame) -> None:
        super().__init__()
        self.frame = frame

    def angle(self, x: Float[Tensor, "B T N Dh"], is_query: bool) -> Float[Tensor, "#B T N R"]:
        """Radians for each head and pair of queries (N = H) or keys (N = Hkv)."""
        raise TypeError(f"{type(self).__name__} does not say by which angle it turns; fill in `angle`.")

    def attach(self, layer: nn.Module) -> None:
        """Turn this layer's queries and keys from now on."""
        # Hooks that stay, and not modules around the projections: those would rename the weights of every checkpoint.
        layer.get_submodule(self.frame.query).register_forward_hook(self._turn_queries)
        layer.get_submodule(self.frame.key).register_forward_hook(self._turn_keys)

    def _turn_queries(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._turned(output, self.frame.heads, True)

    def _turn_keys(self, _: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._turned(output, self.frame.groups, False)

    def _turned(self, output: Tensor, heads: int, is_query: bool) -> Tensor:
        x = by_heads(output, heads)
        return self.frame.pairs.rotate(x, self.angle(x, is_query)).reshape(output.shape)


def by_heads(x: Float[Tensor, "B T *F"], heads: int) -> Float[Tensor, "B T {heads} Dh"]:
    """A projection's output, or that of a norm after it, by heads."""
    return x.unflatten(-1, (heads, -1)) if x.ndim == 3 else x


def rotary_in(module: nn.Module) -> Any:
    """The rotary embedding of a module for which `rope_of` found one."""
    return next(part for part in module.modules() if isinstance(getattr(part, "inv_freq", None), Tensor))


def _sites_of(model: HeadModel, rope: Rope, what: str) -> tuple[str, str]:
    """The names of the modules of each layer whose outputs attention uses as q and k where RoPE turns nothing."""
    cores = [block.core for block in model.layout.blocks]
    for names in _SITES:
        if all(hasattr(core, name) for core in cores for name in names):
            queries, keys = ([getattr(core, name) for core in cores] for name in names)
            q, k = Keep("q"), Keep("k")
            with hooked(rope.module, after=still), caught(*queries) as made_q, caught(*keys) as made_k:
                model.read(tiny_inputs(model.plain), q, k)
            if all(
                _equal(by_heads(made, heads), wanted)
                for outputs, keep, heads in ((made_q, q, model.n_heads), (made_k, k, model.n_kv_heads))
                for made, wanted in zip(outputs, keep.values.values(), strict=True)
            ):
                return names
    known = " or ".join(" and ".join(names) for names in _SITES)
    raise UnsupportedError(
        f"{type(model.plain).__name__} makes q and k otherwise than by {known}, and {what} would not know where to turn them."
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    share = 1e-4 if a.dtype in (torch.float32, torch.float64) else 5e-2
    return a.shape == b.shape and bool((a - b).abs().max() <= share * b.abs().max())
