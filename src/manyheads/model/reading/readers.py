"""Readers: what looks at a forward pass and keeps a small reduction of what it saw.

A reader names one `site` and fills in one method, `read`. It is called once a layer and forward pass, after every edit:

    "attention"   AttentionCall: q, k, v, and the pattern (computed only if the reader asks)   every head's pattern rows sum to 1
    "q"           Activation of [B, T, H, Dh]: queries as attention uses them, after norms and rotary embedding
    "k", "v"      Activation of [B, S, Hkv, Dh]: keys and values alike; with a cache, S counts every token so far
    "z"           Activation of [B, T, H, Dh]: head outputs before the output projection
    "attention_write", "mlp_write"   Activation of [B, T, D]: what attention and MLP add to the residual stream
    "resid"       Activation of [B, T, D]: the residual stream entering a layer; layer `n_layers` is the last layer's output

Keys and values come a KV head. Where an edit changes them, which it does for each query head, or where a reader asks for it
(`by_query_head`), they are `[B, S, H, Dh]`, each query head's own. Then q, k and v are also parts of the graph: what the layer
goes on to compute depends on the very tensors that the reader was shown, so that it can ask for their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.model.reading.attention import AttentionCall, Part

Site = Literal["attention", "q", "k", "v", "z", "resid", "attention_write", "mlp_write"]
SITE_OF: Mapping[Part, Site] = {"query": "q", "key": "k", "value": "v"}


@dataclass(frozen=True)
class Activation:
    """A tensor of one layer in one forward pass. `offset` is how many tokens a KV cache held before this pass."""

    layer: int
    value: Tensor
    offset: int = 0

    def rows(self, start: int, stop: int) -> Activation:
        """The activation of batch rows `start:stop` alone."""
        return Activation(self.layer, self.value[start:stop], self.offset)


class Reader:
    """Base of all readers: set `site`, fill in `read`. `layers` limits where it looks (None: everywhere).

    `begin` is called whenever a `reading` block with the reader begins. A reader that keeps one pass starts afresh there; one
    that sums over passes has nothing to do.
    """

    site: ClassVar[Site] = "attention"
    layers: Collection[int] | None = None
    by_query_head: ClassVar[bool] = False

    def begin(self) -> None:
        """Forget what an earlier block left."""

    def read(self, call: Any) -> None:
        """Look at one layer of one forward pass."""
        raise TypeError(f"{type(self).__name__} has no read method of its own; fill it in.")

    def wants(self, layer: int) -> bool:
        """Whether this reader looks at `layer`."""
        return self.layers is None or layer in self.layers


@dataclass
class Keep(Reader):
    """Keeps one site's activations of one forward pass (the last, if there are several): `values[layer]`."""

    site: Site = "z"  # type: ignore[misc]
    layers: Collection[int] | None = None
    values: dict[int, Tensor] = field(default_factory=dict)

    def begin(self) -> None:
        """Forget the layers of an earlier block, which may have been others."""
        self.values.clear()

    def read(self, call: Activation) -> None:
        """Keep the tensor, detached from autograd; a copy where the layer may add to it in place (Falcon does)."""
        value = call.value.detach()
        self.values[call.layer] = value.clone() if self.site.endswith("write") else value

    def stacked(self) -> Float[Tensor, "L B T ..."]:
        """All layers as one tensor."""
        return torch.stack([self.values[layer] for layer in sorted(self.values)])


@dataclass
class KeepGraph(Keep):
    """Keeps q, k or v of one forward pass as parts of its graph, `[B, ., H, Dh]`: each query head's own, for its gradient."""

    by_query_head: ClassVar[bool] = True

    def read(self, call: Activation) -> None:
        """Keep the tensor itself, not a copy: its gradient is wanted."""
        self.values[call.layer] = call.value


@dataclass
class ReadAttention(Reader):
    """Calls `function(call)` for each layer's attention: the shortest way to a reader of one's own."""

    function: Callable[[AttentionCall], None]
    layers: Collection[int] | None = None

    def read(self, call: AttentionCall) -> None:
        self.function(call)
