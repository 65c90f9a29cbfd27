"""What a model of a chain learns from: the next token, and not to prefer what its predecessor wrongly said.

With y the next token, e the predecessor's likeliest, and logits [V] of the model that learns,

    loss = -log p(y) + [e != y] * beta * -log sigmoid(logit_y - logit_e)                nats a token, mean over the weights

The second part punishes a synonym as it does a mistake: give weights that count only tokens which have one right answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import check_ids
from manyheads.training import TrainSettings

BOOSTING = TrainSettings(steps=400, rows=16, rate=1e-3, warmup=20, decay=0.5, weight_decay=0.0, precision="fp32")


def boosting_loss(
    logits: Float[Tensor, "B T V"],
    before: Float[Tensor, "B T V"],
    targets: Int[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    beta: float,
) -> Float[Tensor, ""]:
    """The loss above, `before` being the predecessor's logits."""
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(weights)
    said = before.argmax(-1)
    right, wrong = (logits.gather(-1, at[..., None])[..., 0].float() for at in (targets, said))
    losses = losses + beta * torch.where(said != targets, -F.logsigmoid(right - wrong), 0.0)
    return (losses * weights).sum() / weights.sum().clamp_min(1e-6)


def boosting_rows(
    model: HeadModel, data: Sequence[str] | Int[Tensor, "N T"] | Mapping[str, Tensor], length: int
) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `weights`, `[N, T]` each, from texts, token ids, or a mapping that has `input_ids`.

    Texts are cut into pieces of `length` tokens and padded on the right, where a causal model does not see it.
    """
    if isinstance(data, Tensor):
        data = {"input_ids": data}
    given = dict(data) if isinstance(data, Mapping) else _from_texts(model, data, length)
    if unknown := set(given) - {"input_ids", "attention_mask", "weights"}:
        raise InputError(f"a chain learns from input_ids, attention_mask and weights, not from {sorted(unknown)[0]}.")
    ids = given.get("input_ids")
    check_ids(ids, model.vocab_size)
    assert ids is not None
    given.setdefault("attention_mask", torch.ones_like(ids))
    given.setdefault("weights", given["attention_mask"].float())
    for name, tensor in given.items():
        if tensor.shape != ids.shape:
            raise InputError(f"{name} has shape {list(tensor.shape)}, and input_ids {list(ids.shape)}; give the same.")
    if ids.shape[1] < 2:
        raise InputError("the rows have one token, and nothing follows it; give rows of two tokens or more.")
    return given


def _from_texts(model: HeadModel, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    if model.tokenizer is None:
        raise InputError("learning from texts needs a tokenizer; open the model with tokenizer=, or give token ids.")
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InputError("the texts are no list of texts; give some.")
    whole = [model.tokenizer(text, verbose=False)["input_ids"] for text in texts]
    rows: list[Any] = [ids[at : at + length] for ids in whole for at in range(0, len(ids), length)]
    rows = [row for row in rows if len(row) > 1]
    if not rows:
        raise InputError("the texts hold no two tokens that follow each other; give longer ones.")
    width = max(map(len, rows))
    ids = torch.tensor([row + [row[-1]] * (width - len(row)) for row in rows])
    real = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    return {"input_ids": ids, "attention_mask": real.long(), "weights": real.float()}
