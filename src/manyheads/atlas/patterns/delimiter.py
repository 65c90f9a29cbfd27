"""Delimiter heads: which heads attend to punctuation, line breaks and separators more than their share of the text.

Clark et al., arXiv:1906.04341, found BERT heads that attend to [SEP], commas and full stops. Over real text, with d the set of
delimiter positions, the first token left out (that is `first_token`'s),

    score[l, h] = mean_t ( sum_{s in d, s <= t} pattern[l,h,t,s] - |d up to t| / |keys up to t| )        in (-1, 1)

The second term is what uniform attention gives, so that a text full of commas makes no delimiter heads. In encoders every query
sees every key. The paper gives the first term alone.
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.core.judges import TEXT
from manyheads.atlas.core.registry import register
from manyheads.heads import HeadScores
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.attention import AttentionCall
from manyheads.model.reading.readers import Reader
from manyheads.progress import Bar
from manyheads.tasks.texts import passages

ROWS = 8  # of one forward pass
ABOUT = About(
    name="delimiter",
    title="Delimiter",
    what="Attends to punctuation, line breaks and separators.",
    formula="attention on delimiters less the share that uniform attention gives them, on real text",
    unit="attention",
    paper="arXiv:1906.04341",
    threshold=0.3,
    kind="rest",
    low=-1.0,
)


class DelimiterMass(Reader):
    """Keeps each row's mean excess attention on the marked keys: `kept[l]` `[B, H]`."""

    site = "attention"

    def __init__(self, marked: Bool[Tensor, "B T"]) -> None:
        self.marked = marked
        self.kept: list[Tensor] = []

    def read(self, call: AttentionCall) -> None:
        allowed = call.allowed.float()
        marked = self.marked.to(allowed.device)[:, None, :, None].float()
        uniform = (allowed @ marked / allowed.sum(-1, keepdim=True))[..., 0]
        mass = (call.pattern.float() @ marked)[..., 0]
        self.kept.append((mass - uniform)[:, :, 2:].mean(-1).cpu())


def delimiter(
    model: HeadModel,
    *,
    texts: Sequence[str] | None = None,
    n: int = 32,
    length: int = 64,
    seed: int = 0,
    bar: Bar = Bar(),
) -> HeadScores:
    """Score every head by its attention to delimiters (formula above), over `n` passages of `length` tokens.

    `texts` are cut into passages; without them, prose that ships with Python. `InputError` without a tokenizer.
    """
    rows = passages(model, texts, n=n, length=length, seed=seed)
    marked = delimiters(model, rows)
    per_row = []
    for ids, some in zip(rows.split(ROWS), marked.split(ROWS), strict=True):
        reader = DelimiterMass(some)
        model.look(ids, reader)
        per_row.append(torch.stack(reader.kept, 1))
        bar(len(ids))
    meta = ABOUT.provenance(model, seed, n=len(rows), length=rows.shape[1])
    return HeadScores.from_examples(
        ABOUT.name, np.asarray(torch.cat(per_row)), meta | {"delimiters": float(marked.float().mean())}
    )


def delimiters(model: HeadModel, rows: Int[Tensor, "N T"]) -> Bool[Tensor, "N T"]:
    """Which tokens are punctuation, line breaks or separators; never the first of a row."""
    tokenizer = model.tokenizer
    separators = {tokenizer.sep_token_id, tokenizer.eos_token_id} - {None}
    known = {}
    for token in rows.unique().tolist():
        text = tokenizer.decode([token])
        bare = text.strip()
        known[token] = token in separators or "\n" in text or (bare != "" and set(bare) <= set(string.punctuation))
    marked = torch.tensor([[known[token] for token in row] for row in rows.tolist()])
    marked[:, 0] = False
    return marked


register(ABOUT, score=delimiter, judge=TEXT)
