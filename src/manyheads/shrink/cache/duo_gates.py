"""DuoAttention's gates (#47): learn how much of full attention each KV head needs.

Xiao et al., arXiv:2410.10819, section 2. A gate a in [0, 1] a KV head, 1 at first, everything else frozen. A pass without
gradients keeps every head's output F; a second one runs with

    z[l, h] = a[l, g(h)] F[l, h] + (1 - a[l, g(h)]) S[l, h]

where S is attention to sinks and recent tokens only, of the second pass's own q, k and v. With h the states after the last norm:

    loss = mean over the questions' and answers' tokens of mean_D (h_full - h)^2  +  0.05 mean|a|

Gates end below 1 for true retrieval heads too, because of the second term: rank them, do not compare them with one half.
Departure: contexts are our haystacks, of one length, where the paper has passkeys in books of 1k to 32k tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from manyheads.heads import HeadScores
from manyheads.inputs import check_integer, check_number
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught, frozen
from manyheads.model.inputs import takes
from manyheads.model.reading.attention import AttentionCall, Part, attending
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.shrink.cache.attending import check_model
from manyheads.shrink.cache.duo_scores import check_beyond
from manyheads.shrink.cache.haystacks import Haystack, haystacks
from manyheads.shrink.cache.ragged import Window
from manyheads.training import TrainSettings, fit

SETTINGS = TrainSettings(
    steps=400,
    rate=0.02,
    warmup=80,
    decay=0.2,
    floor=0.1,
    betas=(0.9, 0.999),
    weight_decay=0.0,
    clip=None,
    precision="fp32",
)


def duo_gates(
    model: HeadModel,
    *,
    length: int = 1024,
    sinks: int = 64,
    recent: int = 256,
    needles: int = 8,
    steps: int = 400,
    sparse: float = 0.05,
    seed: int = 0,
    contexts: Callable[[int], Haystack] | None = None,
    folder: str | Path | None = None,
    bar: Bar = Bar(),
) -> HeadScores:
    """Trained gates as scores `[L, Hkv]`, in [0, 1]; the model is unchanged. With a `folder` an interrupted run goes on.

    `sparse` is the weight of mean|a|; the paper's is for states of length about sqrt(D). One context of `length` tokens a step,
    or `contexts(step)`, a pure function, for contexts of one's own. `InputError` and `UnsupportedError` as for `duo_scores`.
    """
    check_model(model)
    model.require_alike("a gate for every KV head")
    check_integer(steps, "steps", 1)
    check_number(sparse, "sparse", 0.0)
    window = Window(sinks, recent)
    check_beyond(window, length)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if contexts is None:
            one = haystacks(model, 1, length, needles=needles, asks=bool(step % 2), seed=seed * 1_000_003 + step)[0]
        else:
            one = contexts(step)
        row, start = one.row
        return row[None], torch.arange(start - 1, len(row))

    gates = Gates(model, window, sparse)
    settings = replace(SETTINGS, steps=steps, warmup=max(1, steps // 5), seed=seed)
    with frozen(model.plain, but=gates.parameters()):
        fit(gates, batch, settings, folder, after_step=gates.clamp, device=model.device, bar=bar)
    values = gates.values.detach().float().cpu().numpy()
    values = np.where(np.isin(np.arange(model.n_layers), model.layout.attention_layers)[:, None], values, np.nan)
    given = {"length": length, "sinks": sinks, "recent": recent, "needles": needles, "steps": steps, "sparse": sparse}
    meta = Provenance.of(model, "duo_gates", "arXiv:2410.10819", seed, **given).to_json()
    return HeadScores("duo_gates", values, np.full_like(values, np.nan), steps, meta)


class Gates(nn.Module):
    """The gates `[L, Hkv]` of a model, and the loss of a batch: ids `[1, T]` and the positions that count."""

    def __init__(self, model: HeadModel, window: Window, sparse: float = 0.05) -> None:
        super().__init__()
        self._model, self.window, self.sparse = (
            (model,),
            window,
            sparse,
        )  # in a tuple: the model's parameters are not ours
        self.values = nn.Parameter(torch.ones(model.n_layers, model.n_kv_heads, device=model.device))

    def clamp(self, *_: Any) -> None:
        self.values.data.clamp_(0.0, 1.0)

    def forward(self, batch: tuple[Int[Tensor, "1 T"], Int[Tensor, "Q"]]) -> Float[Tensor, ""]:
        ids, rows = batch
        whole: dict[int, Tensor] = {}
        with torch.no_grad():
            wanted = self._states(ids, whole.__setitem__, lambda layer, call: call.z)
        seen = _seen(self.window, ids.shape[1], ids.device)

        def mixed(layer: int, call: AttentionCall) -> Tensor:
            group = self._model[0].n_heads // self._model[0].n_kv_heads
            gate = self.values[layer].repeat_interleave(group)[:, None].to(call.query.dtype)
            return gate * whole[layer] + (1 - gate) * self._streamed(layer, call, seen)

        found = self._states(ids, lambda *_: None, mixed)
        return (wanted - found)[0, rows].float().square().mean() + self.sparse * self.values.abs().mean()

    def _states(
        self, ids: Tensor, keep: Callable[[int, Tensor], None], make: Callable[[int, AttentionCall], Tensor]
    ) -> Tensor:
        """The states after the last norm where each layer's z is what `make` says."""
        model = self._model[0]
        plain: Any = model.plain
        few: dict[str, Any] = {"logits_to_keep": 1} if takes(plain, "logits_to_keep") else {}
        with _making(model, keep, make), caught(plain.get_decoder()) as states:
            plain(input_ids=ids, use_cache=False, **few)
        state: Tensor = states[0]
        return state

    def _streamed(self, layer: int, call: AttentionCall, seen: Bool[Tensor, "T T"]) -> Float[Tensor, "1 T H D"]:
        model = self._model[0]
        group = model.n_heads // call.key.shape[1]
        keys, values = (t.repeat_interleave(group, 1) for t in (call.key, call.value))
        scale = getattr(model.layout.blocks[layer].core, "scaling", None)
        return scaled_dot_product_attention(call.query, keys, values, attn_mask=seen, scale=scale).transpose(1, 2)


def _seen(window: Window, length: int, device: torch.device) -> Bool[Tensor, "T T"]:
    """What a streaming head's tokens see."""
    column = torch.arange(length, device=device)
    behind = column[:, None] - column
    return (behind >= 0) & ((behind < window.recent) | (column < window.sinks))


@contextlib.contextmanager
def _making(
    model: HeadModel, keep: Callable[[int, Tensor], None], make: Callable[[int, AttentionCall], Tensor]
) -> Iterator[None]:
    layers = model.layout.attention_layers
    cores = {layer: model.layout.blocks[layer].core for layer in layers}
    with attending(cores, {layer: _Maker(model.n_heads, keep, make) for layer in layers}, True):
        yield


class _Maker:
    """Puts what `make` says in place of a layer's z; q, k, v and the mask stay."""

    by_query_head = False
    offset = 0

    def __init__(
        self, n_heads: int, keep: Callable[[int, Tensor], None], make: Callable[[int, AttentionCall], Tensor]
    ) -> None:
        self.n_heads, self.keep, self.make = n_heads, keep, make

    def change(self, part: Part, tensor: Tensor) -> Tensor:
        return tensor

    def touches(self, part: Part) -> bool:
        return False

    def block(self, shape: tuple[int, int, int, int], device: torch.device) -> Tensor | None:
        return None

    def attend(self, call: AttentionCall) -> Tensor:
        z = self.make(call.layer, call)
        self.keep(call.layer, z)
        return z
