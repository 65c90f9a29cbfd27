"""n-gram heads (#44): which heads look up not the last token but the last n of them, and attend to what came after them.

Akyürek et al., arXiv:2401.12973. The head of order n attends to the token after an earlier occurrence of the last n tokens;
of order 1 it is an induction head. A row of random tokens holds, for each order n, a context x_n .. x_1, its match and its
broken twin, in random order among fillers, and last the context again, all tokens different:

    match: y x_n x_{n-1} .. x_1 f        twin: x_n y x_{n-1} .. x_1 g  (n = 1: u v g)        query: z x_n .. x_1

    score_n[l, h] = mean over rows of pattern[l, h, x_1 of the query, f] - pattern[l, h, x_1 of the query, g]    in [-1, 1]

The twin has the same tokens, and matches at every order below n but not at n; the match matches at n and no further. So
the exact head of order n scores 1 at n and 0 at every other order. What depends on position, on lower orders, or on which tokens
are near but not on their order, scores 0 in expectation. A head that prefers the longest match there is scores 1
at every order. This is attention alone; the causal check tests whether the model predicts accordingly.

The paper names such heads by looking at patterns and gives no score; this one is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import Judge, Judged
from manyheads.atlas.core.registry import register
from manyheads.atlas.core.repeats import MAX_TOKENS, usable_ids
from manyheads.errors import InputError
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.tasks.texts import opening_token

ORDERS = (1, 2, 3)
FILLERS = 4


def about(order: int) -> About:
    """The behaviour of order `order`."""
    return About(
        name=f"ngram_{order}",
        title=f"n-gram, order {order}",
        what=f"Attends to the token after an earlier occurrence of the last {order}, not of fewer.",
        formula="attention to what followed the match minus what followed its twin, which matches at lower orders only",
        unit="attention",
        paper="arXiv:2401.12973",
        threshold=0.3,
        low=-1.0,
        kind="copying",
    )


ABOUTS = {of.name: of for of in map(about, ORDERS)}


@dataclass(frozen=True)
class NgramRows:
    """Token ids, and for each order the columns of the query, of what followed the match, and of what followed its twin."""

    tokens: Int[Tensor, "N T"]
    query: Int[Tensor, "N O"]
    after_match: Int[Tensor, "N O"]
    after_twin: Int[Tensor, "N O"]

    def chunk(self, rows: slice) -> NgramRows:
        return NgramRows(self.tokens[rows], self.query[rows], self.after_match[rows], self.after_twin[rows])


def ngram_rows(model: HeadModel, orders: Sequence[int], n: int, seed: int) -> NgramRows:
    """`n` rows as described above; with a single order, the query is the last token."""
    if not orders or len(set(orders)) < len(orders) or min(orders) < 1 or n < 1:
        raise InputError(
            f"got orders={tuple(orders)} and n={n}; give different orders from 1 on, and at least one row."
        )
    ids, first = usable_ids(model), opening_token(model)
    rng = np.random.default_rng(seed)
    needed = sum(order + 6 for order in orders) + FILLERS
    if needed > len(ids):
        raise InputError(
            f"orders {tuple(orders)} need {needed} different tokens; this model has {len(ids)}. Give fewer."
        )
    rows = [_row(orders, iter(rng.permutation(ids)[:needed].tolist()), first, rng) for _ in range(n)]
    longest = getattr(model.config, "max_position_embeddings", None) or 1_000_000
    if len(rows[0][0]) > longest:
        raise InputError(
            f"orders {tuple(orders)} need {len(rows[0][0])} tokens; this model reads {longest}. Give fewer."
        )
    tokens, ends = (torch.tensor([row[part] for row in rows]) for part in (0, 1))
    return NgramRows(tokens, *ends.unbind(1))


def _row(
    orders: Sequence[int], fresh: Iterator[int], first: int | None, rng: np.random.Generator
) -> tuple[list[int], list[list[int]]]:
    """One row, and the last columns `[3, O]` of each order's query, match and twin."""
    blocks: dict[tuple[int, int], list[int]] = {}
    for o, order in enumerate(orders):
        y, f, g, z, *context = (next(fresh) for _ in range(order + 4))
        blocks[0, o] = [z, *context]
        blocks[1, o] = [y, *context, f]
        blocks[2, o] = [context[0], y, *context[1:], g] if order > 1 else [next(fresh), next(fresh), g]
    queries = [key for key in blocks if key[0] == 0]
    copies = [key for key in blocks if key[0] > 0]
    blocks |= {(-1, i): [next(fresh)] for i in range(FILLERS)}
    copies += [key for key in blocks if key[0] < 0]
    row = [] if first is None else [first]
    ends = [[0] * len(orders) for _ in range(3)]
    for place in [*map(tuple, rng.permutation(copies)), *map(tuple, rng.permutation(queries))]:
        row += blocks[place]
        if place[0] >= 0:
            ends[place[0]][place[1]] = len(row) - 1
    return row, ends


def preferences(pattern: Float[Tensor, "N H T T"], rows: NgramRows) -> Float[Tensor, "N O H"]:
    """How much more each head's query attends to what followed the match than to what followed its twin."""
    row = torch.arange(len(rows.query), device=pattern.device)[:, None]
    query, match, twin = (x.to(pattern.device) for x in (rows.query, rows.after_match, rows.after_twin))
    return pattern[row, :, query, match] - pattern[row, :, query, twin]


class MatchPreferences(Reader):
    """Keeps each layer's `preferences`: `kept[l]` `[N, O, H]`."""

    site = "attention"

    def __init__(self, rows: NgramRows) -> None:
        self.rows = rows
        self.kept: list[Tensor] = []

    def read(self, call: AttentionCall) -> None:
        self.kept.append(preferences(call.pattern, self.rows).float().cpu())


def ngram(
    model: HeadModel,
    *,
    orders: Sequence[int] = ORDERS,
    n: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> dict[str, HeadScores]:
    """Score every head at every order (formula above) over `n` rows that all orders share: `{"ngram_1": ...}`."""
    rows = ngram_rows(model, orders, n, seed)
    size = max(1, MAX_TOKENS // rows.tokens.shape[1])
    found = []
    for start in range(0, n, size):
        reader = MatchPreferences(rows.chunk(slice(start, start + size)))
        model.read(reader.rows.tokens, reader, keep=1)
        found.append(torch.stack(reader.kept, 2))  # [N, O, L, H]
        bar(len(reader.rows.tokens))
    per_row = np.asarray(torch.cat(found))
    return {
        of.name: HeadScores.from_examples(of.name, per_row[:, o], of.provenance(model, seed, n=n, orders=list(orders)))
        for o, of in enumerate(map(about, orders))
    }


def ngram_judge(model: HeadModel, *, order: int = 2, n: int = 32, seed: int = 1) -> Judge:
    """A text on which order `order` decides: log p(f) - log p(g) after the query, in nats; 0 on average for lower orders."""
    rows = ngram_rows(model, (order,), n, seed)
    right, wrong = (rows.tokens.gather(1, column) for column in (rows.after_match, rows.after_twin))

    def score(logits: Tensor) -> Tensor:
        last = logits[:, -1].float()
        return (last.gather(-1, right.to(last.device)) - last.gather(-1, wrong.to(last.device)))[:, 0]

    metric = f"log-probability of what followed the match of order {order} less that of what followed its twin (nats)"
    return Judge(metric, model, {"input_ids": rows.tokens}, score, 1)


def _judge_of(order: int, model: HeadModel, n: int, seed: int) -> Judge:
    return ngram_judge(model, order=order, n=n, seed=seed)


for _order in (2, 3):
    register(
        ABOUTS[f"ngram_{_order}"],
        score=ngram,
        judge=Judged(f"ngram{_order}", partial(_judge_of, _order)),
        example="repeats",
        causal=True,
    )
