"""What the card of a head shows beside its scores: what it writes by its weights, features it carries, texts that need it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from manyheads.atlas.retrieval_heads.influence import influence
from manyheads.explorer.overview import numbers
from manyheads.heads import Head
from manyheads.model.headmodel import HeadModel
from manyheads.model.weights.ov import effective_embedding, embedding, ov, readout
from manyheads.progress import Bar
from manyheads.report.numbers import visible
from manyheads.tasks.texts import bundled_prose
from manyheads.trace.sae.autoencoder import AttentionSae
from manyheads.trace.sae.features import logit_effects

SHOWN = 8  # tokens, features, documents
TEXTS, TEXT = 48, 256  # documents that are read, and tokens of each


def shown_tokens(model: HeadModel, ids: Sequence[int]) -> list[str]:
    """Tokens as text, spaces and line ends made visible."""
    return [visible(model.tokenizer.decode([i])) for i in ids]


def promoted(model: HeadModel, head: Head, ids: Int[Tensor, "T"], bar: Bar = Bar()) -> list[dict[str, Any]]:
    """For each token, in the order of the prompt: the logits that the head raises and lowers most if it reads that token alone.

    What it reads is the token's embedding and the first MLP's write; logits are centred, without the final norm's denominator.
    `rank` is that of the token itself, from 1.
    """
    each = ids.new_tensor(list(dict.fromkeys(ids.tolist())))
    directions = readout(model, torch.arange(model.vocab_size, device=model.device))
    step = bar.step("tokens", len(each))
    rows = []
    with torch.no_grad():
        for some in each.split(64):
            resid = embedding(model, some) + effective_embedding(model, some)
            logits = ov(model, resid)[head.layer, :, head.index] @ directions.T.to(resid)
            logits = logits - logits.mean(-1, keepdim=True)
            best, worst = logits.topk(SHOWN).indices.tolist(), (-logits).topk(SHOWN).indices.tolist()
            for i, token in enumerate(some.tolist()):
                rows.append(
                    {
                        "reads": shown_tokens(model, [token])[0],
                        "rank": int((logits[i] > logits[i, token]).sum()) + 1,
                        "promotes": shown_tokens(model, best[i]),
                        "suppresses": shown_tokens(model, worst[i]),
                    }
                )
            step(len(some))
    return rows


def head_features(model: HeadModel, sae: AttentionSae, head: Head, ids: Int[Tensor, "1 T"]) -> list[dict[str, Any]]:
    """The autoencoder's features that are active on a prompt, by activation times the head's share of the decoder row.

    Each with that share, its activation at every token, and the tokens whose logits it raises most.
    """
    active = sae.read(model, ids)[0].detach().cpu()
    share = sae.head_shares()[:, head.index].cpu()
    size = active.amax(0) * share
    best = [i for i in size.topk(min(SHOWN, len(size))).indices.tolist() if size[i] > 0]
    if not best:
        return []
    raised = logit_effects(model, sae, best).topk(SHOWN).indices.tolist()
    return [
        {
            "feature": feature,
            "share": float(share[feature]),
            "activations": numbers(active[:, feature].numpy()),
            "raises": shown_tokens(model, tokens),
        }
        for feature, tokens in zip(best, raised, strict=True)
    ]


def moving_documents(
    model: HeadModel, texts: Sequence[str] | None, head: Head, bar: Bar = Bar()
) -> list[dict[str, Any]]:
    """The documents whose loss rises most when the head attends to all tokens alike (#17's score for one head).

    The first 48 documents, 256 tokens of each; without `texts`, prose that comes with Python.
    """
    read = list(texts if texts is not None else bundled_prose())[:TEXTS]
    found = influence(model, read, heads=[head], max_tokens=TEXT, bar=bar.step("documents", len(read)))
    order = np.argsort(-np.nan_to_num(found.score, nan=-np.inf), kind="stable")[:SHOWN]
    return [
        {"text": read[i][:300], "score": float(found.score[i]), "loss": float(found.loss[i])}
        for i in order
        if np.isfinite(found.score[i])
    ]
