"""LongHeads (#46): read texts longer than the trained window. Every head picks, for each token, the chunks that it attends to.

Lu et al., arXiv:2402.10685 (EMNLP 2024); nothing is trained. The text is cut into chunks of w tokens. A token at position
t < W attends to all before it, as ever. A later one, in chunk m = t // w, attends in each head to n = W/w chunks:

    chunk 0, chunks m-1 and m (up to the token itself), and the n-3 chunks c in 1..m-2 with the largest q_t . R_c

q and k are stored as they are before RoPE. The picked chunks stand one after the other at positions 0 .. W-1, the query at the
place of its own key, (n-1) w + t mod w: no position and no distance is beyond the trained ones. R_c, `[Dh]` a query head, is

    released    keys and queries at their places in the chunk:  O = softmax(Q K^T / sqrt(Dh)) V, without a causal mask;
                c = mean of O over the chunk;  R = softmax(c K^T / sqrt(Dh)) K.  A mean of *values* asks for keys
    keys        the same with O = softmax(Q K^T / sqrt(Dh)) K: keys ask for keys
    mean        the mean of the chunk's keys, before RoPE
    tokens      no summary: a chunk counts by its best key before RoPE (an oracle; scoring costs as much as attention, and where
                chunks tie, as those with the same token do in the first layer, rounding chooses)

Departures. A token sees its own key while the prompt is read and while text is generated; the released code leaves it out in the
first. Only complete chunks are summarised, so no padding takes a share. Grouped-query attention works: keys are a KV head's, a
choice of chunks is a query head's own. Nothing is moved off the device.

Cost. A generated token reads W keys a head, and T/w summaries ("tokens": T keys twice, which are also kept twice). A prompt is
read in blocks of a chunk's queries or fewer, whose scores are bounded (`chunk_attention.LARGEST`): every chunk is scored, and
masked, where that is less work than gathering those picked, W keys a query. So it costs what plain attention costs, or T times W
where that is less, and some copying.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import causal_mask_function

from manyheads.errors import InputError, UnsupportedError
from manyheads.inputs import check_choice, check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import hooked, uncompiled
from manyheads.model.layout import tiny_inputs
from manyheads.model.weights.copies import agree
from manyheads.shrink.positions.chunk_attention import FEWEST, REPRESENTATIONS, ChunkAttention
from manyheads.shrink.positions.following import FollowingLayer, some_rows
from manyheads.shrink.positions.rotation import Rope, rope_of, still

NAME = "manyheads_long_heads"


@dataclass(frozen=True)
class LongHeads:
    """`with LongHeads()(model): ...` - inside, `logits` and `generate` read texts of any length.

    `window` is W, at most the model's trained length (default: that length); `chunk` is w, a divisor of it (default: an eighth).
    The config's length is not always what a model was trained on: a window that the model never saw filled is too long.
    """

    window: int | None = None
    chunk: int | None = None
    representation: str = "released"

    @contextmanager
    def __call__(self, model: HeadModel) -> Iterator[HeadModel]:
        """Every pass inside the block attends this way. `UnsupportedError` before it begins if the model cannot."""
        window, chunk = self.sizes(model)
        run = _Run(_checked(model), window, chunk, self.representation)
        cores: list[Any] = [block.core for block in model.layout.blocks]
        tiny = _tiny(model, window)
        wanted = model.logits(tiny)
        with ExitStack() as stack:
            stack.enter_context(uncompiled(model.plain))
            stack.enter_context(hooked(run.rope.module, run.note_positions, still))
            for core in cores:
                stack.enter_context(hooked(core, before=run.before_attention))
                stack.callback(_RUNS.pop, id(core), None)
                _RUNS[id(core)] = run
            for config in {id(core.config): core.config for core in cores}.values():
                stack.callback(setattr, config, "_attn_implementation_internal", config._attn_implementation)
                config._attn_implementation_internal = NAME
            stack.callback(run.close)
            if not agree(wanted, model.logits(tiny)):
                raise UnsupportedError(
                    f"{type(model.plain).__name__} attends in a way that LongHeads does not know: within the window its logits "
                    "would change."
                )
            yield model

    def sizes(self, model: HeadModel) -> tuple[int, int]:
        """W and w for this model. `InputError` for a window beyond the trained length or one that is not 4 chunks or more."""
        check_choice(self.representation, "representation", REPRESENTATIONS)
        config = getattr(model.layout.blocks[0].core, "config", model.config)
        trained = int(getattr(config, "max_position_embeddings", None) or 2**31 - 1)
        if self.window is not None and check_integer(self.window, "window", FEWEST) > trained:
            raise InputError(
                f"window is {self.window}, and this model was trained on {trained} positions; give {trained} at most."
            )
        window = trained if self.window is None else self.window
        chunk = max(1, window // 8) if self.chunk is None else check_integer(self.chunk, "chunk", 1)
        if window % chunk or window // chunk < FEWEST:
            raise InputError(
                f"a window of {window} is not a whole number of chunks of {chunk}, at least {FEWEST}; give another chunk."
            )
        return window, chunk


def _checked(model: HeadModel) -> Rope:
    name = type(model.plain).__name__
    cores: list[Any] = [block.core for block in model.layout.blocks]
    if {core.config._attn_implementation for core in cores if hasattr(core, "config")} & {NAME, "manyheads"}:
        raise UnsupportedError(
            "LongHeads, or what reads or edits attention, is active already; leave that block first."
        )
    if not model.is_causal:
        raise UnsupportedError(
            f"{name} reads the whole text at once, and LongHeads needs a model whose tokens look back."
        )
    if model.module is not model.plain:
        raise UnsupportedError(f"this {name} is compiled, and compiled code keeps its attention; open it uncompiled.")
    return rope_of(model, "LongHeads")


def _tiny(model: HeadModel, window: int) -> dict[str, Tensor]:
    """A row of tokens within the window."""
    return {name: value[:, :window] for name, value in tiny_inputs(model.plain).items()}


# In a pass

_RUNS: dict[int, _Run] = {}  # id(attention module) -> what attends there, only while active


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function that Transformers calls: q and k come before RoPE, the mask says which columns are tokens."""
    for setting in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(setting) is not None:
            raise UnsupportedError(f"{type(module).__name__} has {setting} in its attention, and LongHeads has not.")
    z = _RUNS[id(module)].attend(module, query, key, value, attention_mask, kwargs.get("scaling"))
    return z.transpose(1, 2).contiguous(), None


def _columns(
    kv_length: int, mask_function: Any = causal_mask_function, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """The mask that our attention is given: `[B, S]`, true where a column is a token."""
    if mask_function is not causal_mask_function:
        raise UnsupportedError(
            "LongHeads needs layers in which every token sees all before it, and these have another mask (a sliding window?)."
        )
    return None if attention_mask is None else attention_mask[:, :kv_length].bool()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _columns)


class ChunkLayer(FollowingLayer):
    """One layer's cache: keys before RoPE, values, `summaries` of complete chunks `[B, H, C, N, Dh]`, and the last `queries`.

    Queries are kept for two chunks, so that a cache that loses its last tokens can still summarise the chunk that they end in.
    """

    owner: _Run | None = None

    def own(self, run: _Run) -> None:
        """Belong to this block. `InputError` if another one filled this cache, in another way."""
        before = self.owner
        if before is not None and (before.rope.module is not run.rope.module or before.sizes != run.sizes):
            raise InputError(
                f"this cache was filled by LongHeads with other settings ({before.sizes}); begin with an empty one."
            )
        self.owner = run

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append, while the block lasts: afterwards nobody would rotate these keys."""
        if self.owner is None or self.owner.closed:
            raise InputError("this cache was filled by LongHeads, whose block has ended; begin with an empty one.")
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        """Shorter by so many tokens; a chunk that is complete no more is summarised anew when it is."""
        super().crop(tokens_to_remove)
        if tokens_to_remove and "queries" in self.beside:
            self.beside["queries"] = self.beside["queries"][:, :, : -abs(tokens_to_remove)]

    def put(self, rows: list[int], batch: int, first: int, new: Float[Tensor, "b H C N Dh"]) -> None:
        """Summaries of the chunks of some rows of `batch`, from chunk `first` on."""
        kept = self.beside.get("summaries", new.new_zeros(batch, new.shape[1], 0, *new.shape[3:]))
        missing = max(0, first + new.shape[2] - kept.shape[2])
        kept = F.pad(kept, (0, 0, 0, 0, 0, missing))
        kept[rows, :, first : first + new.shape[2]] = new
        self.beside["summaries"] = kept


@dataclass
class _Run:
    """LongHeads at work in one model."""

    rope: Rope
    window: int
    chunk: int
    representation: str
    closed: bool = False
    positions: Tensor | None = None  # as the model numbers the tokens of a pass, until they are checked
    caches: dict[int, ChunkLayer | None] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[int, int, str]:
        return self.window, self.chunk, self.representation

    def __deepcopy__(self, memo: Any) -> _Run:
        return self  # a cache may be copied, the model that fills it may not

    def close(self) -> None:
        self.closed = True

    def note_positions(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.positions = args[1] if len(args) > 1 else kwargs["position_ids"]

    def before_attention(self, core: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if core.config._attn_implementation != NAME:
            raise UnsupportedError(
                "what reads or edits attention cannot be active inside LongHeads; read or edit z, or the residual stream."
            )
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        layer: ChunkLayer | None = ChunkLayer.of(cache, core.layer_idx, "LongHeads")
        if layer is not None:
            layer.own(self)
        self.caches[id(core)] = layer

    def attend(
        self,
        core: nn.Module,
        query: Float[Tensor, "B H T Dh"],
        key: Float[Tensor, "B G S Dh"],
        value: Float[Tensor, "B G S Dv"],
        tokens: Bool[Tensor, "B S"] | None,
        scale: float | None,
    ) -> Float[Tensor, "B H T Dv"]:
        """The heads' outputs. Rows with as much padding before them go together, without it: each is as if alone."""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        how = ChunkAttention(self.rope.rotate, self.window, self.chunk, self.representation, scale)
        before, total = key.shape[2] - query.shape[2], key.shape[2]
        padding = _padding(tokens, len(query))
        if self.positions is not None:
            _check_positions(self.positions, tokens, total)
            self.positions = None
        store = self.caches.get(id(core)) or ChunkLayer()
        recent = torch.cat([store.beside["queries"], query], 2) if "queries" in store.beside else query
        z = value.new_zeros(*query.shape[:3], value.shape[-1])
        for pad in sorted(set(padding)):
            rows = [row for row, each in enumerate(padding) if each == pad]
            keys, values = some_rows(rows, key)[:, :, pad:], some_rows(rows, value)[:, :, pad:]
            summaries = _summaries(
                how, store, rows, some_rows(rows, recent), keys, values, max(0, before - pad), len(query)
            )
            start = max(0, pad - before)  # where the tokens of this pass begin
            z[rows, :, start:] = how.attend(some_rows(rows, query)[:, :, start:], keys, values, summaries)
        store.beside["queries"] = recent[:, :, -2 * self.chunk :]
        return z


def _summaries(
    how: ChunkAttention,
    store: ChunkLayer,
    rows: list[int],
    queries: Float[Tensor, "b H Q Dh"],
    keys: Float[Tensor, "b G S Dh"],
    values: Float[Tensor, "b G S Dv"],
    before: int,
    batch: int,
) -> Float[Tensor, "b H C N Dh"]:
    """Summaries of these rows' complete chunks; `store` gets those that were not complete when there were `before` tokens."""
    w, total = how.chunk, keys.shape[2]
    known, complete = before // w, total // w
    if complete > known:
        start, stop = (edge * w - total + queries.shape[2] for edge in (known, complete))
        if start < 0:
            raise UnsupportedError(f"this cache was cut back by more than a chunk of {w} tokens; read the text again.")
        new = how.summarise(
            queries[:, :, start:stop], keys[:, :, known * w : complete * w], values[:, :, known * w : complete * w]
        )
        store.put(rows, batch, known, new)
    return (
        some_rows(rows, store.beside["summaries"])
        if "summaries" in store.beside
        else queries.new_zeros(*queries.shape[:2], 0, 1, queries.shape[3])
    )


def _padding(tokens: Bool[Tensor, "B S"] | None, batch: int) -> list[int]:
    """How many columns of padding stand before each row's tokens."""
    if tokens is None:
        return [0] * batch
    runs = (tokens[:, 1:] & ~tokens[:, :-1]).sum(1) + tokens[:, 0]
    if bool((runs > 1).any()):
        raise InputError("a row has padding between its tokens, and LongHeads numbers tokens one after the other.")
    return [int(column) for column in tokens.int().argmax(1)]


def _check_positions(positions: Int[Tensor, "..."], tokens: Bool[Tensor, "B S"] | None, total: int) -> None:
    """`InputError` unless every row's tokens are numbered one after the other: LongHeads would number them so again."""
    length = positions.shape[-1]
    shift = positions - torch.arange(total - length, total, device=positions.device)
    padded = torch.zeros_like(shift, dtype=torch.bool) if tokens is None else ~tokens[:, -length:]
    high, low = shift.masked_fill(padded, -(2**31)).amax(-1), shift.masked_fill(padded, 2**31).amin(-1)
    if positions.ndim != 2 or bool((high > low).any()):
        raise InputError("LongHeads numbers the tokens of a row one after the other; give no position_ids of your own.")
