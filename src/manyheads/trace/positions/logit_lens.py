"""The logit lens: the prediction of each layer's residual stream (nostalgebraist, 2020; arXiv:2303.08112, section 2).

A state is the residual stream at some depth: `embedding`, then for each layer `L0.attention` (after its attention's write)
and `L0` (after its MLP's write too). Each is read by everything that the model has above its last layer,

    logits[s] = head(x_s),    head = final norm, unembedding, scalings and caps, or whatever else is there (BERT's masked-LM head)
    top[s]      the most likely tokens and their log-probabilities                                       nats, <= 0
    rank[s]     number of tokens likelier than the answer                                             0 .. V - 1
    kl[s]       KL(p_final || p_s) = sum_v p_final(v) (log p_final(v) - log p_s(v))                      nats, 0 at the last

The head runs in the model's own forward with stubs for its layers, so the last state gives exactly the model's logits. States are
read one at a time: memory holds `[B, T, V]` of one state and of the final one, whatever the depth.

It is not a probe: in early layers the stream may use other directions for a token than the unembedding reads (arXiv:2303.08112).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Keep
from manyheads.model.replay.streaming import Stream
from manyheads.progress import Bar
from manyheads.provenance import Provenance
from manyheads.report import Reported
from manyheads.trace.positions.patching_map import token_text, token_texts


@dataclass(frozen=True)
class LogitLens(Reported):
    """Predictions of each state at each position (formulas above). `answers` `[B, T]` are the tokens followed, -1 for none;
    `names` the text of every token that occurs; `logits` only with `keep_logits`."""

    states: tuple[str, ...]
    tokens: tuple[tuple[str, ...], ...]
    positions: Int[np.ndarray, "T"]
    top_ids: Int[np.ndarray, "S B T K"]
    top_log_probs: Float[np.ndarray, "S B T K"]
    kl: Float[np.ndarray, "S B T"]
    answers: Int[np.ndarray, "B T"]
    rank: Int[np.ndarray, "S B T"]
    log_prob: Float[np.ndarray, "S B T"]
    names: dict[int, str] = field(repr=False)
    logits: Float[Tensor, "S B T V"] | None = field(default=None, repr=False)
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def settled(self) -> Int[np.ndarray, "B T"]:
        """The first state from which the most likely token stays the final one."""
        same = self.top_ids[..., 0] == self.top_ids[-1, ..., 0]
        stays = np.cumprod(same[::-1], 0)[::-1]
        return np.asarray(len(self.states) - stays.sum(0))

    def to_frame(self) -> pd.DataFrame:
        """One row for each state, prompt and position: the top token, and rank and log-probability of the answer."""
        s, b, t = np.indices(self.kl.shape).reshape(3, -1)
        answers = self.answers[b, t]
        return pd.DataFrame(
            {
                "state": np.array(self.states, dtype=object)[s],
                "row": b,
                "position": self.positions[t],
                "token": [self.tokens[row][i] for row, i in zip(b, t, strict=True)],
                "top": [self.names[int(i)] for i in self.top_ids[..., 0].ravel()],
                "top_log_prob": self.top_log_probs[..., 0].ravel(),
                "kl": self.kl.ravel(),
                "answer": [self.names.get(int(i)) for i in answers],
                "rank": self.rank.ravel(),
                "log_prob": self.log_prob.ravel(),
            }
        )


def read_states(
    model: HeadModel,
    inputs: Any,
    *,
    answers: Int[Tensor, "B"] | Int[Tensor, "B T"] | None = None,
    top: int = 5,
    keep: int | None = None,
    keep_logits: bool = False,
    bar: Bar = Bar(),
) -> LogitLens:
    """Read every state of `inputs` by the model's own head (formulas above), at the last `keep` positions if given.

    `answers` are tokens to follow through the layers: one a row for all positions, or one a position (-1: none); by default the
    model's most likely token. `bar` gets the number of states done. A classifier's logits have one position.
    `InputError` if `answers` has another shape or `top` is less than 1.
    """
    if top < 1:
        raise InputError(f"top is {top}; give at least 1 token.")
    batch, writes = model.inputs(inputs), Keep("attention_write")
    with model.reading(writes):
        stream = Stream.of(model, batch)
    with torch.no_grad():
        final = _at_positions(stream.head(stream.resid(model.n_layers), keep)).log_softmax(-1)
        asked = _asked(answers, final)
        names, found, kept = [], [], []
        for name, state in _states(stream, writes):
            logits = _at_positions(stream.head(state, keep))
            names.append(name)
            found.append(_read(logits.log_softmax(-1), final, asked, min(top, final.shape[-1])))
            kept += [logits] if keep_logits else []
            bar(len(names))
    ids, log_probs, kl, rank, log_prob = (np.stack(part) for part in zip(*found, strict=True))
    length = stream.first.shape[1]
    positions = np.arange(length)[-final.shape[1] :]
    texts = tuple(row[-final.shape[1] :] for row in token_texts(model, batch, len(final), length))
    mentioned = np.unique(np.concatenate([ids.ravel(), np.asarray(asked.cpu()).ravel()]))
    return LogitLens(
        states=tuple(names),
        tokens=texts,
        positions=positions,
        top_ids=ids,
        top_log_probs=log_probs,
        kl=kl,
        answers=np.asarray(asked.cpu()),
        rank=rank,
        log_prob=log_prob,
        names={int(i): token_text(model, int(i)) for i in mentioned if i >= 0},
        logits=torch.stack(kept) if keep_logits else None,
        meta=Provenance.of(model, "logit lens").to_json(),
    )


def _states(stream: Stream, writes: Keep) -> Iterator[tuple[str, Float[Tensor, "B T D"]]]:
    """Each state's name and residual stream, from the embedding up."""
    yield "embedding", stream.resid(0)
    for layer, block in enumerate(stream.model.layout.blocks):
        middle = stream.resid(layer) + writes.values[layer].to(stream.resid(layer))
        yield f"L{layer}.attention", middle if block.post_norms is None else block.post_norms[0](middle)
        yield f"L{layer}", stream.resid(layer + 1)


def _read(
    log_p: Float[Tensor, "B T V"], final: Float[Tensor, "B T V"], asked: Int[Tensor, "B T"], top: int
) -> tuple[np.ndarray, ...]:
    best = log_p.topk(top, -1)
    terms = final.exp() * (final - log_p)
    kl = terms.nan_to_num_(0.0).sum(-1)  # a token at -inf in both gives 0 * nan
    answer = log_p.gather(-1, asked.clamp(min=0)[..., None])
    rank = (log_p > answer).sum(-1).where(asked >= 0, -1)
    log_prob = answer[..., 0].where(asked >= 0, float("nan"))
    return tuple(np.asarray(part.cpu()) for part in (best.indices, best.values, kl, rank, log_prob))


def _asked(answers: Tensor | None, final: Float[Tensor, "B T V"]) -> Int[Tensor, "B T"]:
    if answers is None:
        return final.argmax(-1)
    given = torch.as_tensor(answers, device=final.device)
    given = given[:, None].expand(-1, final.shape[1]) if given.ndim == 1 else given
    if given.shape != final.shape[:2]:
        rows, positions = final.shape[:2]
        raise InputError(
            f"answers have shape {list(torch.as_tensor(answers).shape)}; give [{rows}], one a row, or [{rows}, {positions}]."
        )
    return given


def _at_positions(logits: Tensor) -> Float[Tensor, "B T V"]:
    return (logits if logits.ndim > 2 else logits[:, None]).float()
