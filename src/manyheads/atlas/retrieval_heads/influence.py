"""AttentionInfluence (#17): which documents become much harder to predict once a small model loses its retrieval heads.

Hua et al., arXiv:2505.07293. The heads that score highest as retrieval heads (5% of all) attend uniformly, 1/i in row i. With
L_base and L_ref the mean cross-entropy of a document's tokens, in nats, without and with that mask,

    score = (L_ref - L_base) / max(L_base, floor)        a share of the loss, dimensionless; 0 for no heads, unbounded above

A high score marks text that needs in-context reasoning; documents are ranked within their domain, the top 20% selected.

Departures: the denominator has a floor (0.1 nats), so that a text known by heart cannot outrank all; the paper's figure divides
by L_ref, we by L_base as its equation does; a model whose best retrieval score is under 0.1 is refused, since a ranking by heads
that retrieve nothing would only look like one. Beside the selection stand two random ones, as many documents and as many
tokens: the selection is a subset of the corpus, so what it is used for also up-weights it, and long documents score higher.
Separating repeats from *other* text proves nothing; `token_matched` makes twins with the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.retrieval_heads.scores import ABOUT as RETRIEVAL
from manyheads.atlas.retrieval_heads.scores import Tests, most_answered, probe_verdicts, retrieval
from manyheads.errors import InputError, UnsupportedError
from manyheads.heads import HeadLike, HeadScores, HeadSet
from manyheads.inputs import check_integer, check_number
from manyheads.model.editing.edits import Ablate
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar

FLOOR = 0.1  # nats a token
LONGEST = 4096  # tokens of a document, where the model's positions reach as far
LOGITS = 2**26  # of one pass: of a large vocabulary, more take gigabytes and gain no speed
ABOUT = About(
    name="attention_influence",
    title="AttentionInfluence",
    what="How much harder a document becomes to predict without the model's retrieval heads.",
    formula="(loss with the heads attending uniformly - loss) / loss, of a document",
    unit="share of the loss",
    paper="arXiv:2505.07293",
    threshold=0.0,
    low=-1.0,
    high=float("inf"),
)
Texts = Sequence[str] | Sequence[Sequence[int]] | Int[Tensor, "N T"]


@dataclass(frozen=True)
class Influence:
    """Each document's tokens read and mean losses in nats a token; NaN for documents of fewer than two tokens."""

    n_tokens: Int[np.ndarray, "N"]
    loss: Float[np.ndarray, "N"]
    loss_masked: Float[np.ndarray, "N"]
    heads: HeadSet
    floor: float = FLOOR
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> Float[np.ndarray, "N"]:
        """Relative loss difference (formula above)."""
        return (self.loss_masked - self.loss) / np.maximum(self.loss, self.floor)

    def to_frame(self, domain: Sequence[str] | None = None, *, keep: float = 0.2, seed: int = 0) -> pd.DataFrame:
        """A row a document, with its rank in its domain, and whether it is selected (see `selection`)."""
        domains = np.asarray(domain if domain is not None else [""] * len(self.loss))
        frame = pd.DataFrame(
            {
                "domain": domains,
                "n_tokens": self.n_tokens,
                "loss": self.loss,
                "loss_masked": self.loss_masked,
                "score": self.score,
            }
        )
        return frame.assign(**selection(self.score, self.n_tokens, domains, keep=keep, seed=seed))


def influence(
    model: HeadModel,
    documents: Texts,
    *,
    heads: HeadSet | Iterable[HeadLike] | None = None,
    max_tokens: int | None = None,
    batch_tokens: int = 4096,
    floor: float = FLOOR,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Influence:
    """Score documents (texts, or token ids) by what masking `heads` costs on them; by default the model's `retrieval_heads`.

    The first `max_tokens` tokens of a document count (default: as many as the model has positions, at most 4,096). Documents of
    about one length share a forward pass of at most `batch_tokens` tokens, fewer where the vocabulary is large; padding and
    other documents change no score. The masked pass begins at the lowest masked layer. `bar` counts documents.
    `UnsupportedError` without retrieval heads.
    """
    check_number(floor, "floor", 0, above=True)
    check_integer(batch_tokens, "batch_tokens", 1)
    rows = token_rows(model, documents, max_tokens)
    chosen = retrieval_heads(model, seed=seed) if heads is None else model.head_set(heads)
    losses = np.full((2, len(rows)), np.nan)
    for batch in _batches(rows, min(batch_tokens, LOGITS // model.vocab_size)):
        losses[:, batch] = _losses(model, [rows[i] for i in batch], chosen)
        bar(len(batch))
    settings = {"heads": [str(h) for h in chosen], "floor": floor, "max_tokens": _longest(model, max_tokens)}
    n_tokens = np.array([len(row) for row in rows], dtype=np.int64)
    return Influence(n_tokens, losses[0], losses[1], chosen, floor, ABOUT.provenance(model, seed, **settings))


def retrieval_heads(
    model: HeadModel,
    *,
    scores: HeadScores | None = None,
    task: Tests | None = None,
    share: float = 0.05,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadSet:
    """The `share` of all heads (at least one) that score highest as retrieval heads.

    `scores` are retrieval scores already made; else they are taken on `task` (`JsonRecall()` is the paper's), or on the kind of
    needles that the model answers. `UnsupportedError` if it answers none (the message says what it makes of each kind), or if the
    best score is under 0.1: such a model has no retrieval heads, and a ranking would mean nothing.
    """
    if not 0 < share <= 1:
        raise InputError(f"share is {share}; give the share of heads to mask, in (0, 1].")
    if scores is None and task is None:
        tried = probe_verdicts(model, seed)
        if not any(verdict.answered for _, verdict in tried.values()):
            every = "; ".join(f"{kind}: {verdict.summary}" for kind, (_, verdict) in tried.items())
            raise UnsupportedError(
                f"this model answers no needle test ({every}), so it has no retrieval heads to rank documents by; name heads= "
                "if you know better."
            )
        scores = retrieval(model, seed=seed, probe=most_answered(tried), bar=bar)
    elif scores is None:
        scores = retrieval(model, task=task, seed=seed, bar=bar)
    best = float(scores.values.max())
    if best < RETRIEVAL.threshold:
        raise UnsupportedError(
            f"this model has no retrieval heads (best score {best:.3f}, at least {RETRIEVAL.threshold} expected; "
            f"{scores.n} tests answered), so documents cannot be ranked by them; name heads= if you know better."
        )
    return scores.top(max(1, round(share * scores.values.size)))


def selection(
    score: Float[np.ndarray, "N"],
    n_tokens: Int[np.ndarray, "N"],
    domain: np.ndarray | Sequence[Any],
    *,
    keep: float = 0.2,
    seed: int = 0,
) -> dict[str, Any]:
    """Columns `rank` (1 is highest, in its domain), `selected` (the top `keep`), and two random baselines, domain by domain.

    `random` are as many documents as selected, `random_tokens` as few random documents as reach the selection's tokens. Documents
    without a score have no rank and take no part. Ties go by order.
    """
    if not 0 <= keep <= 1:
        raise InputError(f"keep is {keep}; give the share of documents to select, in [0, 1].")
    rng = np.random.default_rng(seed)
    rank = np.zeros(len(score), dtype=np.int64)
    chosen = {name: np.zeros(len(score), dtype=bool) for name in ("selected", "random", "random_tokens")}
    codes, scored = pd.factorize(np.asarray(domain))[0], ~np.isnan(score)
    order = np.flatnonzero(scored)[np.lexsort((-score[scored], codes[scored]))]  # by domain, then by score
    for members in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        k = round(keep * len(members))
        shuffled = rng.permutation(members)
        tokens = n_tokens[shuffled]
        rank[members] = np.arange(1, len(members) + 1)
        chosen["selected"][members[:k]] = True
        chosen["random"][shuffled[:k]] = True
        chosen["random_tokens"][shuffled[tokens.cumsum() - tokens < n_tokens[members[:k]].sum()]] = True
    return {"rank": pd.arrays.IntegerArray(rank, ~scored), **chosen}


def token_matched(rows: Sequence[Sequence[int]] | Int[Tensor, "N T"], seed: int = 0) -> list[list[int]]:
    """A twin of each document: the same tokens in random order, the first (often a special one, never predicted) in its place.

    What still separates documents from their twins is the order of tokens, not which tokens they have or how many.
    """
    rng = np.random.default_rng(seed)
    plain = rows.tolist() if isinstance(rows, Tensor) else rows
    return [[*row[:1], *(int(token) for token in rng.permutation(list(row[1:])))] for row in plain]


def token_rows(model: HeadModel, documents: Texts, max_tokens: int | None = None) -> list[list[int]]:
    """The first `max_tokens` token ids of each document. `InputError` for text without a tokenizer."""
    most = _longest(model, max_tokens)
    if isinstance(documents, Tensor):
        return [row[:most] for row in torch.atleast_2d(documents).tolist()]
    if isinstance(documents, str):
        raise InputError("documents is one text; give a list of texts.")
    if not len(documents):
        return []
    if not isinstance(documents[0], str):
        return [[int(token) for token in row[:most]] for row in documents]
    if model.tokenizer is None:
        raise InputError("texts need a tokenizer; open the model with tokenizer=, or give token ids.")
    return [list(row[:most]) for row in model.tokenizer(list(documents))["input_ids"]]


def _longest(model: HeadModel, max_tokens: int | None) -> int:
    if max_tokens is not None and max_tokens < 2:
        raise InputError(f"max_tokens is {max_tokens}; a document needs at least 2 tokens to have a loss.")
    room = getattr(model.config, "max_position_embeddings", None) or LONGEST
    return min(room, LONGEST if max_tokens is None else max_tokens)


def _batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of the rows that have a loss, shortest first, in batches of at most `batch_tokens` padded tokens (or one row)."""
    batch: list[int] = []
    for i in sorted((i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _losses(model: HeadModel, rows: Sequence[Sequence[int]], heads: HeadSet) -> Float[np.ndarray, "2 B"]:
    """Mean cross-entropy of each row's tokens, without and with the heads masked; padded on the right, where nobody looks."""
    lengths = torch.tensor([len(row) for row in rows])
    width = int(lengths.max())
    ids = torch.tensor([[*row, *[row[-1]] * (width - len(row))] for row in rows])
    real = torch.arange(width) < lengths[:, None]

    def loss(logits: Tensor) -> Tensor:
        targets = ids[:, 1:].to(logits.device)
        each = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="none")
        weight = real[:, 1:].to(logits.device)
        return (each.view_as(targets).double() * weight).sum(1) / weight.sum(1)

    inputs = {"input_ids": ids, "attention_mask": real.long()}
    if not heads:
        clean = loss(model.logits(inputs)).cpu().numpy()
        return np.stack([clean, clean])
    recording = model.record(inputs)
    clean = loss(recording.logits).cpu().numpy()
    return np.stack([clean, model.sweep(recording, [Ablate(heads, "uniform")], loss)[0]])
