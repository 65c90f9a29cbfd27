"""A forward pass over a tree of tokens that continue one prefix, with a key/value cache that forgets what was not kept.

Speculative decoding verifies many guesses at once: each node of a tree attends to the prefix and to its ancestors, at position
(length of the prefix) + (depth). The mask is handed to the model's own forward as `[B, 1, Q, S]`, so kernels, rotary angles and
everything else stay the architecture's. Architectures that derive positions from the mask (ALiBi) cannot take it: whether one
can is *tried* on a tiny tree when a `TreePass` is made, and where it cannot, chains of one row still work.

The cache is an ordinary Transformers cache whose layers write into buffers that grow by doubling. All rows of a batch append
at the same column; after a pass each row keeps its own choice of the new columns, moved up to where the row ended. What lies
between a row's end and the next append is masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from manyheads.errors import InputError, UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.inputs import positions_of, takes

_ROOM = 128
_PROVED: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class _BufferLayer(CacheLayerMixin):
    """Keys and values of one layer, `[B, Hkv, S, Dh]`, of which the first `length` columns are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(0)
        self.values = value_states.new_empty(0)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self.is_initialized = True
        start, self.length = self.length, self.length + key_states.shape[-2]
        keys = self.keys = _with_room(self.keys, key_states, start, self.length)
        values = self.values = _with_room(self.values, value_states, start, self.length)
        keys[:, :, start : self.length] = key_states
        values[:, :, start : self.length] = value_states
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def move(self, rows: Int[Tensor, "M"], source: Int[Tensor, "M"], target: Int[Tensor, "M"]) -> None:
        """Copy columns `source` to columns `target`, each in the row named beside it."""
        for buffer in (self.keys, self.values):
            if buffer is not None:
                at = [index.to(buffer.device) for index in (rows, source, target)]
                buffer[at[0], :, at[2]] = buffer[at[0], :, at[1]]


def _with_room(buffer: Tensor | None, new: Tensor, used: int, wanted: int) -> Tensor:
    if buffer is not None and buffer.ndim == 4 and buffer.shape[2] >= wanted:
        return buffer
    size = max(wanted + _ROOM, 2 * used)  # doubling: a generation copies each column a few times, not once a token
    larger = new.new_zeros(*new.shape[:2], size, new.shape[3])
    if used and buffer is not None:
        larger[:, :, :used] = buffer[:, :, :used]
    return larger


class TreeCache(Cache):
    """Keys and values of a batch whose rows may hold different numbers of columns.

    Row b holds columns `starts[b]` to `ends[b]`; columns from `max(ends)` on are what the last pass appended.
    """

    def __init__(self, n_layers: int, starts: list[int]) -> None:
        self.buffers = [_BufferLayer() for _ in range(n_layers)]
        super().__init__(layers=list(self.buffers))
        self.starts = list(starts)
        self.ends = list(starts)

    @property
    def columns(self) -> int:
        """The column at which the next pass appends, for all rows."""
        return max(self.ends)

    @property
    def lengths(self) -> list[int]:
        """Tokens held by each row."""
        return [end - start for start, end in zip(self.starts, self.ends, strict=True)]

    def hold(self, ends: list[int]) -> None:
        """Set the columns up to which rows reach, and forget what lies beyond."""
        self.ends = list(ends)
        self.forget()

    def forget(self) -> None:
        """Drop what was appended and not kept."""
        for layer in self.buffers:
            layer.length = min(layer.length, self.columns)

    def keep(self, kept: list[list[int]]) -> None:
        """Of the columns that the last pass appended, row b keeps those numbered `kept[b]`, in that order."""
        base = self.columns
        moves = [
            (row, base + old, end + new)
            for row, (end, olds) in enumerate(zip(self.ends, kept, strict=True))
            for new, old in enumerate(olds)
            if base + old != end + new
        ]
        if moves:
            rows, source, target = (torch.tensor(column) for column in zip(*moves, strict=True))
            for layer in self.buffers:
                layer.move(rows, source, target)
        self.hold([end + len(olds) for end, olds in zip(self.ends, kept, strict=True)])

    def seen(self, within: Bool[Tensor, "#B Q N"]) -> Bool[Tensor, "B 1 Q S"]:
        """What each of Q new columns attends to: all that its row holds, and, of the N columns appended since (its own are the
        last), those in `within`."""
        rows, columns, queries = len(self.ends), self.columns, within.shape[-2]
        if all(end == columns and start == 0 for start, end in zip(self.starts, self.ends, strict=True)):
            held = within.new_ones(rows, queries, columns)
        else:
            column = torch.arange(columns, device=within.device)
            starts, ends = (torch.tensor(x, device=within.device)[:, None] for x in (self.starts, self.ends))
            held = ((column >= starts) & (column < ends))[:, None].expand(rows, queries, columns)
        return torch.cat([held, within.expand(rows, -1, -1)], -1)[:, None]


@dataclass(frozen=True)
class Seen:
    """What a pass gives: logits `[B, Q, V]` and the states they were read from, `[B, Q, D]`."""

    logits: Float[Tensor, "B #Q V"]
    hidden: Float[Tensor, "B Q D"]


class TreePass:
    """A causal language model that reads a prompt once and then trees of tokens after it. Make one a generation.

    `UnsupportedError` for models without a plain key/value cache, whose attention takes no mask, or that predict no tokens.
    """

    def __init__(self, model: HeadModel) -> None:
        self.model = model
        module = model.plain
        if model.layout.unembedding is None or not hasattr(module, "prepare_inputs_for_generation"):
            raise UnsupportedError(f"{type(module).__name__} generates no text; give a causal language model.")
        if module.training:
            raise InputError(
                "the model is in training mode, where dropout makes its tokens random; call module.eval() first."
            )
        self._text = getattr(model.config, "get_text_config", lambda **_: model.config)(decoder=True)
        kinds = set(getattr(self._text, "layer_types", None) or ["full_attention"])
        if unknown := kinds - {"full_attention", "sliding_attention"}:
            raise UnsupportedError(
                f"{type(module).__name__} has layers of kind {sorted(unknown)[0]}, whose cache cannot take back what was read."
            )
        self._by_kind = "sliding_attention" in kinds
        everywhere = not hasattr(self._text, "layer_types")
        self._window = getattr(self._text, "sliding_window", None) if self._by_kind or everywhere else None
        self._takes = {name: takes(model.plain, name) for name in ("position_ids", "logits_to_keep")}
        self._last_position = int(getattr(self._text, "max_position_embeddings", 0) or 1 << 30) - 1
        self._attention = getattr(self._text, "_attn_implementation", None) or "eager"
        self._beyond = torch.zeros(1, 0, dtype=torch.long)
        self.cache = TreeCache(model.n_layers, [0])

    @property
    def takes_trees(self) -> bool:
        """Whether a tree's nodes see exactly their own paths: tried once a model on a tiny tree, against plain passes."""
        module = self.model.plain
        if module not in _PROVED:
            _PROVED[module] = True  # the trial is itself a tree pass, and must not ask again
            _PROVED[module] = self._tried()
        return _PROVED[module]

    @torch.inference_mode()
    def _tried(self) -> bool:
        if self._attention not in ("sdpa", "eager"):
            return False
        device = self.model.device
        ids = torch.randint(self.model.vocab_size, (1, 9), generator=torch.Generator().manual_seed(0)).to(device)
        prefix, nodes = ids[:, :5], ids[:, 5:]
        paths = ([0], [0, 1], [0, 2], [0, 2, 3])
        within = torch.zeros(1, 4, 4, dtype=torch.bool, device=device)
        for node, path in enumerate(paths):
            within[0, node, path] = True
        trial = TreePass(self.model)
        try:
            trial.prompt(prefix)
            tree = trial.tree(nodes, within, torch.tensor([[0, 1, 1, 2]], device=device)).logits[0]
        except (ValueError, RuntimeError, TypeError, IndexError):
            return False
        plain = [self.model.module(input_ids=torch.cat([prefix, nodes[:, p]], 1)).logits[0, -1] for p in paths]
        scale = torch.stack(plain).abs().max()
        tolerance = 1e-4 if tree.dtype in (torch.float32, torch.float64) else 3e-2
        return bool((tree - torch.stack(plain)).abs().max() <= tolerance * scale)

    def check_length(self, tokens: int) -> None:
        """`InputError` if the model has no positions for so many tokens."""
        if tokens > self._last_position + 1:
            raise InputError(
                f"{tokens} tokens are more than the model's {self._last_position + 1} positions; ask for fewer."
            )

    def begin(self, rows: int) -> None:
        """Empty the cache, for rows without padding. `UnsupportedError` for several rows where trees are not taken."""
        if rows > 1 and not self.takes_trees:
            raise UnsupportedError(f"{type(self.model.plain).__name__} reads one prompt at a time here; give one row.")
        self.cache = TreeCache(self.model.n_layers, [0] * rows)

    @torch.inference_mode()
    def prompt(self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"] | None = None) -> Seen:
        """Read a left-padded prompt into an empty cache. Logits come for the last token only, states for all."""
        rows, length = ids.shape
        padding = [0] * rows if mask is None else (length - mask.sum(-1)).tolist()
        if any(padding) and not self.takes_trees:
            raise UnsupportedError(
                f"{type(self.model.plain).__name__} reads one prompt at a time here: it cannot be padded; give one row."
            )
        self.cache = TreeCache(self.model.n_layers, padding)
        kwargs: dict[str, Any] = {"logits_to_keep": 1} if self._takes["logits_to_keep"] else {}
        if any(padding) and mask is not None:
            kwargs["attention_mask"] = mask
            if self._takes["position_ids"]:
                kwargs["position_ids"] = positions_of(mask, 0)
        seen = self._run(ids, kwargs)
        self.cache.hold([length] * rows)
        return Seen(seen.logits[:, -1:], seen.hidden)

    @torch.inference_mode()
    def tree(self, tokens: Int[Tensor, "B Q"], within: Bool[Tensor, "#B Q N"], depths: Int[Tensor, "#B Q"]) -> Seen:
        """Read tokens after what the cache holds, at positions (tokens held by the row) + `depths`.

        N - Q tokens may have been read since the cache last kept or forgot: `within[b, i, j]` is whether the i-th new one
        sees the j-th of them all. What was read stays beyond the rows' ends until `cache.keep` or `cache.forget`.
        """
        return self._run(tokens, self._placed(within, depths))

    def _placed(self, within: Tensor, depths: Tensor) -> dict[str, Any]:
        queries, read = within.shape[-2:]
        if not self.takes_trees:
            if len(self.cache.ends) > 1 or not bool((within == torch.ones_like(within).tril(read - queries)).all()):
                raise UnsupportedError(
                    f"{type(self.model.plain).__name__} takes no tree mask here; draft chains, one prompt at a time."
                )
            return {}
        lengths = torch.tensor(self.cache.lengths, device=depths.device)[:, None]
        positions = (lengths + depths).clamp(max=self._last_position)
        kwargs: dict[str, Any] = {"position_ids": positions} if self._takes["position_ids"] else {}
        seen = self.cache.seen(within)
        if not self._window:
            return kwargs | {"attention_mask": self._shaped(seen)}
        self._beyond = positions if read == queries else torch.cat([self._beyond, positions], 1)
        starts = torch.tensor(self.cache.starts, device=depths.device)[:, None]
        keys = torch.cat([torch.arange(self.cache.columns, device=depths.device) - starts, self._beyond], 1)
        near = seen & (positions[:, None, :, None] - keys[:, None, None, :] < self._window)
        if not self._by_kind:
            return kwargs | {"attention_mask": self._shaped(near)}
        return kwargs | {
            "attention_mask": {"full_attention": self._shaped(seen), "sliding_attention": self._shaped(near)}
        }

    def _shaped(self, seen: Bool[Tensor, "B 1 Q S"]) -> Tensor:
        if self._attention == "sdpa":
            return seen
        dtype = self.model.plain.dtype
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)

    def _run(self, ids: Tensor, kwargs: dict[str, Any]) -> Seen:
        with caught(self.model.plain.get_decoder()) as states:
            out = self.model.module(input_ids=ids, past_key_values=self.cache, use_cache=True, **kwargs)
        return Seen(out.logits, states[0])
