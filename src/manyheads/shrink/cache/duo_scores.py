"""What streaming would cost each head, without training: one pass over contexts with needles in them.

At the tokens of the answers, what a head writes is compared with what it would write if it saw only the sinks and the recent
tokens. A softmax over fewer keys is the same softmax renormalised, so one pass gives both:

    score[l, g] = mean over answer tokens of  sum over g's query heads h of  ||(z_h - z_h under the window) W_O[h]|| / ||resid_l||

without a unit. Ours; DuoAttention itself trains gates (`duo_gates`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Keep, ReadAttention
from manyheads.provenance import Provenance
from manyheads.shrink.cache.attending import check_model
from manyheads.shrink.cache.haystacks import Haystack, haystacks
from manyheads.shrink.cache.ragged import Window


def duo_scores(
    model: HeadModel,
    *,
    n: int = 4,
    length: int = 1024,
    sinks: int = 64,
    recent: int = 256,
    needles: int = 8,
    seed: int = 0,
    contexts: Sequence[Haystack] | None = None,
) -> HeadScores:
    """How much every KV head reads beyond its sinks and recent tokens, as scores `[L, Hkv]` (formula above).

    `n` contexts of `length` tokens with `needles` needles, or `contexts` of one's own. `InputError` where a context is not twice
    as long as the window, or without a tokenizer; `UnsupportedError` for a model whose cache cannot be cut.
    """
    check_model(model)
    model.require_alike("a score for every KV head")
    window = Window(sinks, recent)
    if contexts is None:
        check_beyond(window, length)
        contexts = haystacks(model, n, length, needles=needles, seed=seed)
    for one in contexts:
        check_beyond(window, len(one.context))
    per_example = np.stack([_scores_on(model, window, one) for one in contexts])
    settings = {
        "n": len(contexts),
        "length": len(contexts[0].context),
        "sinks": sinks,
        "recent": recent,
        "needles": needles,
    }
    meta = Provenance.of(model, "duo_scores", "arXiv:2410.10819", seed, **settings).to_json()
    return HeadScores.from_examples("duo_scores", per_example, meta)


def check_beyond(window: Window, length: int) -> None:
    """`InputError` where hardly a token lies beyond the window: every head would look like a streaming head."""
    if length < 2 * window.size:
        raise InputError(
            f"a context of {length} tokens shows little beyond {window.sinks} sinks and {window.recent} recent tokens; make it "
            f"at least {2 * window.size} tokens long, or the window smaller."
        )


def _scores_on(model: HeadModel, window: Window, one: Haystack) -> Float[np.ndarray, "L G"]:
    row, start = one.row
    asking = torch.tensor(asking_in(one, start))
    lost = np.full((model.n_layers, model.n_kv_heads), np.nan)
    writes: dict[int, Tensor] = {}

    def read(call: AttentionCall) -> None:
        writes[call.layer] = _lost(model, call, asking, window)

    stream = Keep("resid")
    model.read(row[None], ReadAttention(read), stream, keep=1)
    for layer, of_heads in writes.items():
        size = stream.values[layer][0, asking].float().norm(dim=-1)  # [Q]
        lost[layer] = (of_heads / size).mean(-1).unflatten(0, (model.n_kv_heads, -1)).sum(1).cpu().numpy()
    return lost


def asking_in(one: Haystack, start: int) -> list[int]:
    """Where in the row (`Haystack.row`) the next token is a token of an answer."""
    found: list[int] = []
    at = start
    for question, answer in zip(one.questions, one.answers, strict=True):
        at += len(question)
        found += range(at - 1, at - 1 + len(answer))
        at += len(answer)
    return found


def _lost(model: HeadModel, call: AttentionCall, rows: Tensor, window: Window) -> Float[Tensor, "H Q"]:
    """What each query head writes less, or otherwise, under the window: its length."""
    pattern = call.pattern_rows(rows)[0].float()  # [H, Q, S]
    column = torch.arange(pattern.shape[-1], device=pattern.device)
    seen: Bool[Tensor, "Q S"] = (column < window.sinks) | (rows.to(column.device)[:, None] - column < window.recent)
    streamed = pattern * seen
    change = pattern - streamed / streamed.sum(-1, keepdim=True).clamp_min(1e-9)
    z = change @ call.values_of(list(range(pattern.shape[0])))[0].float()
    return torch.einsum("hqd,hdo->hqo", z, model.W_O(call.layer).float()).norm(dim=-1)
