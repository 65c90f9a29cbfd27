"""The texts that a search of the output matrix (#24) is fitted to and measured on, and the probes that it needs.

`read_texts` gives the states of two kinds of text: prose that comes with Python, and texts that the model writes itself. Clusters
are fitted on the first half of each, probes chosen on the third quarter, and agreement is reported on the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.draft.training.corpus import Corpus, from_texts, own_texts, trunk_states
from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks.texts import opening_token

ROWS, LENGTH = 96, 96  # of each kind of text


@dataclass(frozen=True, eq=False)
class ReadText:
    """A kind of text: what the output matrix reads at its positions, and the token that follows each."""

    name: str
    states: Float[Tensor, "N D"]
    following: Int[Tensor, "N"]


def read_texts(model: HeadModel, *, rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> list[ReadText]:
    """`rows` passages of prose that comes with Python and, if the model has an opening token, as many texts of its own."""
    length = min(length, getattr(model.config, "max_position_embeddings", length))
    found = [_read(model, "prose", from_texts(model, None, rows, length, seed=seed))]
    if opening_token(model) is not None:
        found.append(_read(model, "its own text", own_texts(model, rows, length, seed=seed)))
    return found


def _read(model: HeadModel, name: str, corpus: Corpus) -> ReadText:
    states, counted = [], corpus.counts[:, 1:]
    for ids in corpus.ids.split(8):
        states.append(trunk_states(model, ids.to(model.device))[0][:, :-1])
    return ReadText(name, torch.cat(states)[counted.to(model.device)], corpus.ids[:, 1:][counted].to(model.device))


def in_parts(texts: Sequence[ReadText], width: int) -> tuple[list[ReadText], list[ReadText], list[ReadText]]:
    """The first half, third and last quarter of every text. `InputError` for states of another width, or too few."""
    parts: tuple[list[ReadText], list[ReadText], list[ReadText]] = ([], [], [])
    for text in texts:
        n = len(text.states)
        if text.states.ndim != 2 or text.states.shape[1] != width or n < 4 or text.following.shape != (n,):
            raise InputError(
                f"the text {text.name!r} has states {list(text.states.shape)} and {list(text.following.shape)} tokens after "
                f"them; give four or more states of width {width}, and a token for each."
            )
        for part, start, end in zip(parts, (0, n // 2, 3 * n // 4), (n // 2, 3 * n // 4, n), strict=True):
            part.append(ReadText(text.name, text.states[start:end], text.following[start:end]))
    return parts


def spread(rows: Float[Tensor, "V E"], states: Float[Tensor, "N D"]) -> Float[Tensor, "V D+1"]:
    """Rows as they act on states: (C^1/2 w, <w, mu> + b less its mean); products of the first part are covariances of logits.

    Rows have a last column b if they are one wider than the states.
    """
    rows, states = rows.float(), states.float()
    weight = rows[:, : states.shape[1]]
    mean = states.mean(0)
    covariance = (states - mean).T @ (states - mean) / len(states)
    ridge = 1e-3 * covariance.diagonal().mean() * torch.eye(len(mean), device=mean.device)
    level = weight @ mean + rows[:, states.shape[1] :].sum(1)
    return torch.cat([weight @ torch.linalg.cholesky(covariance + ridge), (level - level.mean())[:, None]], 1)


def fewest_probes(needed: Int[Tensor, "N"], agreement: float) -> int:
    """The smallest P that is enough for a share `agreement` of the states."""
    within = needed.sort().values
    return int(within[max(0, min(len(within), -int(-agreement * len(within) // 1)) - 1)])
