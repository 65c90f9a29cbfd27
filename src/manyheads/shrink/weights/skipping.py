"""Routed heads (`weights.moh`) that a token did not choose are not computed: no row of q, of attention, of the output projection.

out_t = sum over the heads h that t chose of  g_h z_h W_O[h]          the same sum as with masked heads, without its zeros
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.linear import is_plain
from manyheads.model.reading.attention import AttentionCall, Part, attending, replaced_forward
from manyheads.shrink.weights.moh import HeadRouter, routers


@contextlib.contextmanager
def skipping(model: HeadModel) -> Iterator[None]:
    """While this lasts unselected heads are skipped: rows of q, rows of attention, and their part of the output projection.

    Routing by queries needs every query, so there q stays whole. `UnsupportedError` for an attention that does not go through
    Transformers' `AttentionInterface`, or projections that are no `nn.Linear`. Readers and edits do not act meanwhile.
    """
    layout, name = model.layout, type(model.plain).__name__
    if not layout.has_interface or len(routers(model.plain)) < model.n_layers:
        raise UnsupportedError(f"{name} has no routed heads that can be skipped.")
    skips = {layer: _Skip(router, router.n_heads) for layer, router in enumerate(routers(model.plain))}
    with contextlib.ExitStack() as stack:
        for layer, skip in skips.items():
            query: Any = model.plain.get_submodule(skip.router.query)
            output = layout.blocks[layer].projection
            if not all(isinstance(linear, nn.Linear) and is_plain(linear) for linear in (query, output)):
                raise UnsupportedError(
                    f"the projections of {name} are no plain nn.Linear, and cannot be skipped in part."
                )
            if skip.router.learned and query.out_features == model.n_heads * model.head_dim:
                stack.enter_context(replaced_forward(query, partial(skip.queries, query)))
            stack.enter_context(replaced_forward(output, partial(skip.output, output)))
        stack.enter_context(attending({i: layout.blocks[i].core for i in skips}, skips, True))
        yield


@dataclass
class _Skip:
    """One layer's queries, attention and output projection for the chosen heads of each token alone."""

    router: HeadRouter
    n_heads: int
    by_query_head: bool = False
    offset: int = 0

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        return tensor

    def touches(self, part: Part) -> bool:
        return False

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> None:
        return None

    def tokens(self, head: int) -> Any:
        """The tokens that use a head, of all rows one after the other: an index of them."""
        assert self.router.selected is not None
        if head < self.router.shared:
            return slice(None)
        return self.router.selected.flatten(0, -2)[:, head - self.router.shared].nonzero()[:, 0]

    def queries(self, linear: Any, _: Any) -> Any:
        def forward(x: Tensor) -> Tensor:
            flat, made = x.flatten(0, -2), x.new_zeros(x.shape[:-1].numel(), linear.out_features)
            for h in range(self.n_heads):
                rows, part = self.tokens(h), _at(self.router.starts[h], self.router.head_dim)
                bias = None if linear.bias is None else linear.bias[part]
                made[rows, part] = F.linear(flat[rows], linear.weight[part], bias)
            return made.unflatten(0, x.shape[:-1])

        return forward

    def attend(self, call: AttentionCall) -> Float[Tensor, "B T H Dh"]:
        B, H, T, _ = call.query.shape
        z = call.query.new_zeros(B, T, H, call.value.shape[-1])
        group = H // call.key.shape[1]
        for h, b in itertools.product(range(H), range(B)):
            rows, key = self.tokens(h), slice(h // group, h // group + 1)
            at = rows if isinstance(rows, slice) else rows[rows // T == b] % T
            if isinstance(at, Tensor) and not len(at):
                continue
            one = call.rows(b, b + 1)
            mask = one.mask if one.mask is None or one.mask.shape[2] == 1 else one.mask[:, :, at]
            query = one.query[:, h : h + 1, at]
            z[b, at, h] = replace(one, query=query, key=one.key[:, key], value=one.value[:, key], mask=mask).z[0, :, 0]
        return z

    def output(self, linear: Any, _: Any) -> Any:
        def forward(z: Tensor) -> Tensor:
            flat, made = z.flatten(0, -2), z.new_zeros(z.shape[:-1].numel(), linear.out_features)
            for h in range(self.n_heads):
                rows, part = self.tokens(h), _at(h * self.router.head_dim, self.router.head_dim)
                made[rows] += flat[rows, part] @ linear.weight[:, part].T
            return (made if linear.bias is None else made + linear.bias).unflatten(0, z.shape[:-1])

        return forward


def _at(start: int, width: int) -> slice:
    return slice(start, start + width)
