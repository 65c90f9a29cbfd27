"""A key/value cache in which every head of every row keeps its own number of tokens, in plain PyTorch.

Heads that hold equally many tokens lie together in one `Group`, `[G, S, Dh]`: so a layer of retrieval heads and streaming
heads is two tensors, and nothing is padded. Attention over a group needs no mask, for all that it holds is in the past; in what
order it lies does not matter either, for keys were rotated at their true positions before they came here. So a streaming
head is a ring that writes over its oldest token.

    bytes = sum over heads of (tokens kept) * (Dh_k + Dh_v) * bytes of a number,   and at most 1/64 more, the room to grow

Padding is never kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from manyheads.errors import UnsupportedError

_ROOM = 64  # a group that is full grows by 1/64 of itself: one copy in so many tokens, and at most so much unused


@dataclass(frozen=True)
class Window:
    """What a streaming head keeps: its row's first `sinks` tokens and the last `recent`, the newest among them."""

    sinks: int
    recent: int

    @property
    def size(self) -> int:
        return self.sinks + self.recent


class Group:
    """The heads of one layer that hold equally many tokens. `members` numbers them, row * n_kv_heads + KV head.

    With a `window` the group holds `window.size` tokens at most: the sinks, then a ring whose oldest token is at `oldest`.
    """

    def __init__(
        self,
        members: Int[Tensor, "G"],
        keys: Float[Tensor, "G S Dk"],
        values: Float[Tensor, "G S Dv"],
        window: Window | None = None,
    ) -> None:
        """Keys and values come in the order of their tokens; of more than a window holds, the window's are kept."""
        self.members, self.window = members, window
        if window is not None and keys.shape[1] > window.size:
            keys, values = (_within(tensor, window) for tensor in (keys, values))
        self.length = keys.shape[1]
        self.oldest = window.sinks if window is not None else 0
        room = self._room(self.length)
        self.keys, self.values = _widened(keys, room), _widened(values, room)

    def _room(self, length: int) -> int:
        room = length + length // _ROOM
        return room if self.window is None else min(room, self.window.size)

    @property
    def nbytes(self) -> int:
        """Bytes that its tensors hold in memory, the room to grow among them."""
        return self.keys.untyped_storage().nbytes() + self.values.untyped_storage().nbytes()

    @property
    def held(self) -> tuple[Float[Tensor, "G S Dk"], Float[Tensor, "G S Dv"]]:
        """Keys and values, in whatever order they lie."""
        return self.keys[:, : self.length], self.values[:, : self.length]

    @property
    def in_order(self) -> tuple[Float[Tensor, "G S Dk"], Float[Tensor, "G S Dv"]]:
        """Keys and values in the order of their tokens."""
        if self.window is None or self.oldest == self.window.sinks:
            return self.held
        sinks, at = self.window.sinks, self.oldest
        keys, values = (torch.cat([t[:, :sinks], t[:, at:], t[:, sinks:at]], 1) for t in (self.keys, self.values))
        return keys, values

    def append(self, keys: Float[Tensor, "G Dk"], values: Float[Tensor, "G Dv"]) -> None:
        """One more token for every member."""
        at = self.length
        if self.window is not None and at == self.window.size:
            at = self.oldest
            self.oldest = at + 1 if at + 1 < self.window.size else self.window.sinks
        else:
            self.length += 1
            if self.keys.shape[1] < self.length:
                room = self._room(self.length)
                self.keys, self.values = _widened(self.keys, room), _widened(self.values, room)
        self.keys[:, at], self.values[:, at] = keys, values

    def part(self, which: Int[Tensor, "P"], members: Int[Tensor, "P"] | None = None) -> Group:
        """A copy of some of its members, perhaps under other numbers."""
        keys, values = self.in_order
        return Group(self.members[which] if members is None else members, keys[which], values[which], self.window)

    def keeping(self, kept: Bool[Tensor, "G S"]) -> list[Group]:
        """What is left of it where every member keeps some tokens (columns in order), as groups of equally many."""
        keys, values = self.in_order
        counts = kept.sum(1)
        groups = []
        for count in counts.unique().tolist():
            of = (counts == count).nonzero()[:, 0]
            columns = kept[of].nonzero()[:, 1].view(len(of), count)
            groups.append(
                Group(self.members[of], keys[of[:, None], columns], values[of[:, None], columns], self.window)
            )
        return groups


def _within(tensor: Float[Tensor, "G S D"], window: Window) -> Float[Tensor, "G W D"]:
    return torch.cat([tensor[:, : window.sinks], tensor[:, tensor.shape[1] - window.recent :]], 1)


def _widened(tensor: Float[Tensor, "G S D"], room: int) -> Float[Tensor, "G R D"]:
    """A tensor of its own with space for `room` tokens: a view would keep alive all that it was cut from."""
    wide = tensor.new_empty(tensor.shape[0], room, tensor.shape[2])
    wide[:, : tensor.shape[1]] = tensor
    return wide


def merged(groups: Sequence[Group]) -> list[Group]:
    """Groups that hold equally many tokens under one window, joined."""
    alike: dict[tuple[Window | None, int], list[Group]] = {}
    for group in groups:
        alike.setdefault((group.window, group.length), []).append(group)
    return [_joined(some) if len(some) > 1 else some[0] for some in alike.values()]


def _joined(groups: Sequence[Group]) -> Group:
    members = torch.cat([group.members for group in groups])
    order = members.argsort()
    keys, values = (torch.cat(part)[order] for part in zip(*(group.in_order for group in groups), strict=True))
    return Group(members[order], keys, values, groups[0].window)


class RaggedLayer(CacheLayerMixin):
    """One layer's groups. `update` only hands on what is new: attention over the groups is in `attending.py`."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, windows: Sequence[Window | None]) -> None:
        super().__init__()
        self.windows = list(windows)
        self.groups: list[Group] = []
        self.seen = 0  # columns of the batch, padding among them
        self.tokens = torch.zeros(1, dtype=torch.long)  # of each row, without padding
        self.queries: Tensor | None = None  # the newest, for methods that score by them
        self.open = False  # whether the attention that can read this layer is at work

    @property
    def n_kv_heads(self) -> int:
        return len(self.windows)

    @property
    def nbytes(self) -> int:
        return sum(group.nbytes for group in self.groups)

    def lengths(self) -> Int[Tensor, "B G"]:
        """Tokens that each row's KV heads hold."""
        total = sum(len(group.members) for group in self.groups)
        found = torch.zeros(total, dtype=torch.long)
        for group in self.groups:
            found[group.members.cpu()] = group.length
        return found.view(-1, self.n_kv_heads)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """One empty group for each kind of window."""
        rows, n_kv_heads = key_states.shape[:2]
        self.tokens = torch.zeros(rows, dtype=torch.long)
        number = torch.arange(rows * n_kv_heads, device=key_states.device)
        for window in dict.fromkeys(self.windows):
            heads = torch.tensor([one == window for one in self.windows], device=key_states.device).repeat(rows)
            members = number[heads]
            keys, values = (t.new_empty(len(members), 0, t.shape[-1]) for t in (key_states, value_states))
            self.groups.append(Group(members, keys, values, window))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.open:
            raise UnsupportedError(
                "this cache can only be read inside the `with` block of the method that made it; go on there, or begin anew."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.groups, self.seen, self.is_initialized = [], 0, False
        self.tokens, self.queries = torch.zeros(1, dtype=torch.long), None

    def reorder_cache(self, beam_idx: Int[Tensor, "B"]) -> None:
        """Row b becomes what row `beam_idx[b]` was: beams, and rows that are repeated or left out."""
        count = self.n_kv_heads
        heads = torch.arange(count, device=beam_idx.device)
        source = (beam_idx[:, None] * count + heads).flatten()  # which member each new member was
        groups = []
        for group in self.groups:
            new, which = (source.to(group.members.device)[:, None] == group.members[None]).nonzero(as_tuple=True)
            groups.append(group.part(which, new))
        self.groups = groups
        self.tokens = self.tokens[beam_idx.cpu()]
        self.queries = None if self.queries is None else self.queries[beam_idx]

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(len(self.lengths())).repeat_interleave(repeats)
        self.reorder_cache(rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise UnsupportedError(
            "a ragged cache cannot take back tokens: what was dropped for them is gone. Generate without an assistant."
        )

    def offload(self) -> None:
        raise UnsupportedError("a ragged cache is not moved off its device; leave cache_implementation unset.")


class RaggedCache(Cache):
    """A cache whose full-attention layers are ragged; layers with a sliding window stay as Transformers has them."""

    def __init__(self, layers: list[Any], owner: object) -> None:
        super().__init__(layers=layers)
        self.owner = owner

    @property
    def ragged(self) -> list[RaggedLayer]:
        return [layer for layer in self.layers if isinstance(layer, RaggedLayer)]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values in memory, those of sliding layers among them."""
        others = [layer for layer in self.layers if not isinstance(layer, RaggedLayer)]
        tensors = [getattr(layer, name, None) for layer in others for name in ("keys", "values")]
        held = sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor))
        return held + sum(layer.nbytes for layer in self.ragged)

    def lengths(self) -> Int[Tensor, "L B G"]:
        """Tokens that each KV head of each ragged layer holds."""
        return torch.stack([layer.lengths() for layer in self.ragged])
