"""The attention of LongHeads (#46): each query head picks chunks for each token, and their positions are numbered anew.

Formulas and sources are in `long_heads.py`. Here are tensors alone: q, k and v before RoPE, of rows without padding.
Attention to the picked chunks is computed in two ways, by whichever is less work:

    gathered    the picked keys at positions 0 .. W-1, as the paper has them
    masked      all chunks, each key turned by its place in its chunk, each query by its distance to the chunk's start (the same
                relative angles), and what is not picked masked: large products instead of many copies
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

FEWEST = 4  # chunks: the first, the last two, and one to choose
LARGEST = 2**18  # scores a head that are held at once, or those of one chunk's queries to a window, if these are more

Rotate = Callable[[Tensor, Tensor], Tensor]
"""`(x [..., Dh], positions)` -> x as RoPE turns it there."""


@dataclass(frozen=True)
class ChunkAttention:
    """How tokens attend: the window W, chunks of w, how a chunk is summarised, and the model's own rotation and scale."""

    rotate: Rotate
    window: int
    chunk: int
    representation: str
    scale: float

    @property
    def n_picked(self) -> int:
        """n, the chunks that a token attends to."""
        return self.window // self.chunk

    def summarise(
        self, q: Float[Tensor, "b H Q Dh"], k: Float[Tensor, "b G Q Dh"], v: Float[Tensor, "b G Q Dh"]
    ) -> Float[Tensor, "b H C N Dh"]:
        """Summaries (N vectors each) of whole chunks, for each query head."""
        heads = q.shape[1]
        q, k, v = (widened(x, heads).unflatten(2, (-1, self.chunk)) for x in (q, k, v))
        return REPRESENTATIONS[self.representation](self, q, k, v)

    def attend(
        self,
        q: Float[Tensor, "b H T Dh"],
        keys: Float[Tensor, "b G S Dh"],
        values: Float[Tensor, "b G S Dv"],
        summaries: Float[Tensor, "b H C N Dh"],
    ) -> Float[Tensor, "b H T Dv"]:
        """The outputs of the last T of S tokens. `summaries` are of chunks 0, 1, ...; the last two are not needed."""
        stop = keys.shape[2]
        first = stop - q.shape[2]
        text = _Text(self, keys, values)
        parts = [text.near(q[:, :, : self.window - first], first)] if first < self.window else []
        at, largest = max(first, self.window), max(LARGEST, self.window * self.chunk)
        while at < stop:
            chunks = at // self.chunk + 1
            end = min(stop, chunks * self.chunk, at + max(1, largest // (chunks * self.chunk)))
            block = q[:, :, at - first : end - first]
            picked = self.pick(block, summaries[:, :, : chunks - 2])
            way = text.gathered if block.shape[2] * self.n_picked <= chunks else text.masked
            parts.append(way(block, at, picked))
            at = end
        return torch.cat(parts, 2)

    def pick(self, q: Float[Tensor, "b H Q Dh"], summaries: Float[Tensor, "b H C N Dh"]) -> Int[Tensor, "b H Q n"]:
        """The chunks of queries in chunk C + 1, in order: 0, the best of 1 .. C-1, and the last two."""
        chunks = summaries.shape[2]
        scores = torch.einsum("bhqd,bhcnd->bhqcn", q, summaries[:, :, 1:]).amax(-1)
        best = scores.topk(self.n_picked - 3, -1).indices.sort(-1).values + 1
        always = best.new_tensor([0, chunks, chunks + 1]).expand(*best.shape[:-1], 3)
        return torch.cat([always[..., :1], best, always[..., 1:]], -1)


@dataclass
class _Text:
    """What some rows have read so far: keys before RoPE, and values."""

    how: ChunkAttention
    keys: Float[Tensor, "b G S Dh"]
    values: Float[Tensor, "b G S Dv"]

    @cached_property
    def turned_chunks(self) -> Float[Tensor, "b G C w Dh"]:
        """Keys turned by their places in their chunks."""
        return self.how.rotate(self._chunks(self.keys), self._range(self.how.chunk))

    @cached_property
    def value_chunks(self) -> Float[Tensor, "b G C w Dv"]:
        return self._chunks(self.values)

    def near(self, q: Float[Tensor, "b H Q Dh"], first: int) -> Float[Tensor, "b H Q Dv"]:
        """Causal attention of the tokens from `first` on, all within the window."""
        heads, stop = q.shape[1], first + q.shape[2]
        positions = self._range(stop)
        k, v = self.how.rotate(self.keys[:, :, :stop], positions), self.values[:, :, :stop]
        seen = None if first == 0 else positions <= positions[first:, None]
        return F.scaled_dot_product_attention(
            self.how.rotate(q, positions[first:]),
            widened(k, heads),
            widened(v, heads),
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.how.scale,
        )

    def gathered(
        self, q: Float[Tensor, "b H Q Dh"], first: int, picked: Int[Tensor, "b H Q n"]
    ) -> Float[Tensor, "b H Q Dv"]:
        """Attention to the picked chunks' keys, one after the other at positions 0, 1, ...; the query at its own key's."""
        w, heads = self.how.chunk, q.shape[1]
        places = (picked[..., None] * w + self._range(w)).flatten(-2)  # [b, H, Q, W]
        position = first + self._range(q.shape[2])
        rows = torch.arange(len(q), device=q.device)[:, None, None, None]
        groups = (self._range(heads) // (heads // self.keys.shape[1]))[None, :, None, None]
        at = rows, groups, places.clamp(max=self.keys.shape[2] - 1)
        k = self.how.rotate(self.keys[at], self._range(self.how.window))
        turned = self.how.rotate(q, self.how.window - w + position % w)
        scores = (k @ turned[..., None])[..., 0] * self.how.scale
        pattern = _softmax(scores.masked_fill(places > position[:, None], -torch.inf))
        return (pattern[..., None, :] @ self.values[at])[..., 0, :]

    def masked(
        self, q: Float[Tensor, "b H Q Dh"], first: int, picked: Int[Tensor, "b H Q n"]
    ) -> Float[Tensor, "b H Q Dv"]:
        """The same attention, with the scores of all chunks."""
        w, n, groups, chunks = self.how.chunk, self.how.n_picked, self.keys.shape[1], first // self.how.chunk + 1
        place = first % w + self._range(q.shape[2])
        # The r-th picked chunk begins at position r w of the window, so its keys are this far behind the query:
        behind = (n - 1 - self._range(n)) * w + place[:, None]
        turned = self.how.rotate(q[:, :, :, None], behind)  # [b, H, Q, n, Dh]
        is_picked = torch.zeros(*q.shape[:3], chunks, dtype=torch.bool, device=q.device).scatter_(3, picked, True)
        rank = (is_picked.cumsum(-1) - 1).clamp(min=0)
        turned = turned.gather(3, rank[..., None].expand(*rank.shape, q.shape[3]))  # [b, H, Q, C, Dh]
        by_group = turned.unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # [b, G, C, hQ, Dh]
        scores = by_group @ self.turned_chunks[:, :, :chunks].transpose(-1, -2) * self.how.scale
        hidden = ~is_picked[..., None].expand(*is_picked.shape, w).clone()
        hidden[..., -1, :] |= self._range(w) > place[:, None]
        hidden = hidden.unflatten(1, (groups, -1)).flatten(2, 3)  # [b, G, hQ, C, w]
        scores = scores.transpose(2, 3).masked_fill(hidden, -torch.inf)
        z = _softmax(scores.flatten(-2)) @ self.value_chunks[:, :, :chunks].flatten(2, 3)
        return z.unflatten(2, (-1, q.shape[2])).flatten(1, 2)

    def _chunks(self, x: Float[Tensor, "b G S F"]) -> Float[Tensor, "b G C w F"]:
        """Cut into chunks; the last is filled with zeros, which are later than every query."""
        missing = -x.shape[2] % self.how.chunk
        return F.pad(x, (0, 0, 0, missing)).unflatten(2, (-1, self.how.chunk))

    def _range(self, n: int) -> Int[Tensor, "{n}"]:
        return torch.arange(n, device=self.keys.device)


def widened(x: Float[Tensor, "b G S F"], heads: int) -> Float[Tensor, "b {heads} S F"]:
    """Keys or values for each query head."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)


def _softmax(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1, dtype=torch.float32).to(scores.dtype)


# What stands for a chunk: (how, q, k, v [b, H, C, w, Dh]) -> [b, H, C, N, Dh]


def _released(how: ChunkAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    places = torch.arange(how.chunk, device=q.device)
    q, k = how.rotate(q, places), how.rotate(k, places)
    c = F.scaled_dot_product_attention(q, k, v, scale=how.scale).mean(-2, keepdim=True)
    return F.scaled_dot_product_attention(c, k, k, scale=how.scale)


def _keys(how: ChunkAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _released(how, q, k, how.rotate(k, torch.arange(how.chunk, device=q.device)))


def _mean(how: ChunkAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return k.mean(-2, keepdim=True)


def _tokens(how: ChunkAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return k


REPRESENTATIONS: dict[str, Callable[[ChunkAttention, Tensor, Tensor, Tensor], Tensor]] = {
    "released": _released,
    "keys": _keys,
    "mean": _mean,
    "tokens": _tokens,
}
