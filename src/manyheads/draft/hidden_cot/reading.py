"""Forward passes and generation from embeddings (#96), for any causal Transformers model, without patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from manyheads.errors import UnsupportedError
from manyheads.model.headmodel import HeadModel
from manyheads.model.hooks import caught
from manyheads.model.replay.recording import no_cache


@torch.no_grad()
def continued(model: Any, texts: list[Float[Tensor, "T E"]], new: int, stop: int | None = None) -> list[list[int]]:
    """Greedy continuation of embedded texts, up to `stop` or the model's end token, which is left out."""
    embeds = pad_sequence(texts, batch_first=True, padding_side="left")
    lengths = torch.tensor([len(text) for text in texts], device=embeds.device)
    longest = embeds.shape[1]
    end = model.generation_config.eos_token_id if stop is None else stop
    out = model.generate(
        inputs_embeds=embeds,
        attention_mask=(torch.arange(longest, device=embeds.device) >= longest - lengths[:, None]).long(),
        max_new_tokens=new,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=0,
    )
    ends = set(end if isinstance(end, list | tuple) else [end])
    return [row[: next((i for i, token in enumerate(row) if token in ends), len(row))] for row in out.tolist()]


def readout_width(model: HeadModel) -> int:
    """D, the width of the output matrix. `UnsupportedError` for a model that is not causal or takes no embeddings."""
    readout = getattr(model.layout.unembedding, "weight", None)
    takes = "inputs_embeds" in inspect.signature(model.plain.forward).parameters
    if not isinstance(readout, Tensor) or not takes or not model.is_causal:
        raise UnsupportedError(
            f"{type(model.plain).__name__} cannot read embeddings: give a causal language model that takes inputs_embeds."
        )
    return int(readout.shape[1])


def states_and_logits(model: Any, **inputs: Tensor) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B T V"]]:
    """The states that the output matrix reads, and the logits."""
    with caught(model.get_decoder()) as states:
        logits = model(**inputs, **no_cache(model)).logits
    return states[0], logits
