"""Does a hidden chain of thought (#96) replace its written chain? Accuracies as shares of problems, in [0, 1].

    hidden     the answerer with u               shuffled   with another problem's u        mean   with the mean u
    full       a model that writes its steps     without    one that never saw steps

If `shuffled` equals `hidden`, the answerer ignores u. Give as `without` a freshly trained model: one that was taught steps
first can stay at chance where a fresh one learns, and the comparison would look too good. Tokens are counted for each
problem: chain + answer for `full`, 1 + answer for `hidden`, where the 1 is the pass that makes u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.draft.hidden_cot.data import Rows, Worked, right_padded
from manyheads.draft.hidden_cot.loss import retrieved, same_chain
from manyheads.draft.hidden_cot.model import HiddenCot
from manyheads.draft.hidden_cot.reading import continued
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel


@dataclass(frozen=True)
class HiddenCotReport:
    """Result of `judge`. `retrieval` is within batches of `rows`; `full` and `without` are None if no model was given."""

    n: int
    rows: int
    hidden: float
    shuffled: float
    mean: float
    retrieval: float
    tokens: float
    tokens_full: float
    full: float | None = None
    without: float | None = None

    @property
    def tokens_kept(self) -> float:
        """Tokens with the hidden chain over tokens with the written one."""
        return self.tokens / self.tokens_full


def judge(
    hidden: HiddenCot,
    data: Worked,
    *,
    full: HeadModel | None = None,
    without: HeadModel | None = None,
    stop: int | None = None,
    rows: int = 128,
    seed: int = 0,
) -> HiddenCotReport:
    """Compare on held-out problems. Without a `stop` token texts are cut to the true ones' length.

    `InputError` for fewer problems than two, or than one batch of `rows`.
    """
    if not 2 <= rows <= len(data):
        raise InputError(f"{len(data)} problems make no batch of {rows}; give rows from 2 to {len(data)}.")
    u = hidden.hidden(data.prefixes)
    other = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed))
    donors = torch.empty_like(other)
    donors[other] = other.roll(1)
    longest = max(map(len, data.answers))

    def answered(states: Float[Tensor, "B D"]) -> float:
        out = hidden.generate(data.prefixes, hidden=states, max_new_tokens=longest, stop=stop)
        return _share_right(out, data.answers, [len(a) for a in data.answers], stop)

    def with_model(model: HeadModel | None, chains: bool) -> float | None:
        if model is None:
            return None
        lengths = [len(a) + chains * len(c) for c, a in zip(data.chains, data.answers, strict=True)]
        return _share_right(_texts(model, data.prefixes, max(lengths), stop), data.answers, lengths, stop)

    answer_tokens, chain_tokens = (sum(map(len, part)) / len(data) for part in (data.answers, data.chains))
    return HiddenCotReport(
        n=len(data),
        rows=rows,
        hidden=answered(u),
        shuffled=answered(u[donors]),
        mean=answered(u.mean(0).expand_as(u)),
        retrieval=key_retrieval(hidden, data, rows=rows),
        tokens=1 + answer_tokens,
        tokens_full=chain_tokens + answer_tokens,
        full=with_model(full, chains=True),
        without=with_model(without, chains=False),
    )


def key_retrieval(hidden: HiddenCot, data: Worked, *, rows: int = 128) -> float:
    """How often the nearest chain state in the batch is that of u's own chain, over whole batches of `rows`."""
    found = []
    for start in range(0, len(data) - rows + 1, rows):
        batch = data.at(range(start, start + rows))
        same = same_chain(*right_padded(batch.chains, hidden.device))
        found.append(float(retrieved(hidden.hidden(batch.prefixes), hidden.chain_states(batch.chains), same)))
    return sum(found) / len(found)


def _texts(model: HeadModel, prefixes: Rows, new: int, stop: int | None) -> list[list[int]]:
    embeds = [model.plain.get_input_embeddings()(torch.tensor(list(p), device=model.device)) for p in prefixes]
    return continued(model.plain, embeds, new, stop)


def _share_right(texts: list[list[int]], answers: Rows, lengths: list[int], stop: int | None) -> float:
    """The share of texts that end with the answer."""
    right = 0
    for text, answer, length in zip(texts, answers, lengths, strict=True):
        wanted = [token for token in answer if token != stop]
        tokens = text if stop is not None else text[:length]
        right += tokens[-len(wanted) :] == wanted
    return right / len(texts)
