"""Real text for behaviours that need it, and the one rule for the token that opens a text.

    a task's prompt      opens with what the tokenizer itself puts before a text (often nothing); a chat turn with what the chat
                         template writes, which then is not put twice
    a passage, random    open with the token that tokenizer or config names for it (BOS, else CLS), if there is one: a model
    tokens, a draft      trained on documents has seen it before each

`openings` says both for a model. Passages are of one length, from texts given or from prose that ships with Python.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel


def passages(
    model: HeadModel, texts: Sequence[str] | None, *, n: int, length: int, seed: int
) -> Int[Tensor, "N {length}"]:
    """At most `n` passages of `length` tokens, drawn from `texts` without overlap; each begins as the model's texts do.

    `InputError` without a tokenizer, or if the texts are too short for one passage.
    """
    if model.tokenizer is None:
        raise InputError("reading text needs a tokenizer; open the model with tokenizer=.")
    begin = opening_token(model)
    separator = model.tokenizer.sep_token_id if begin == model.tokenizer.cls_token_id else None
    lead = [] if begin is None else [begin]
    tail = [] if separator is None or begin is None else [separator]
    room = length - len(lead) - len(tail)
    rng = random.Random(seed)
    sources = list(bundled_prose() if texts is None else texts)
    rng.shuffle(sources)
    rows: list[list[int]] = []
    for source in sources:
        ids = model.tokenizer(source, add_special_tokens=False, verbose=False)["input_ids"]
        starts = range(0, len(ids) - room + 1, room)
        rows += [lead + ids[start : start + room] + tail for start in rng.sample(starts, min(len(starts), 4))]
        if len(rows) >= n:
            break
    if not rows:
        raise InputError(f"the texts hold no passage of {length} tokens; give longer ones, or a smaller length.")
    return torch.tensor(rows[:n])


@dataclass(frozen=True)
class Openings:
    """What a task's prompts and what passages of text open with: the tokens as they are written, "" for nothing."""

    prompt: str
    passage: str

    def __str__(self) -> str:
        return f"prompts open with {self.prompt or 'nothing'}, passages with {self.passage or 'nothing'}"


def openings(model: HeadModel) -> Openings:
    """The opening tokens of this model's texts (rule above)."""
    if model.tokenizer is None:
        return Openings("", "")
    passage = opening_token(model)
    prompt, first = (
        "".join(model.tokenizer.convert_ids_to_tokens(ids))
        for ids in (prompt_opening(model.tokenizer), [] if passage is None else [passage])
    )
    return Openings(prompt, first)


def prompt_opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that `tokenizer` puts before a text."""
    # Measured, not asked for: tokenizers have no one name for it.
    plain, special = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    starts = [i for i in range(len(special)) if plain and special[i : i + len(plain)] == plain]
    return list(special[: starts[0]]) if starts else []


def opening_token(model: HeadModel) -> int | None:
    """The token that texts begin with, if the model has one."""
    for source, name in (
        (model.tokenizer, "bos_token_id"),
        (model.tokenizer, "cls_token_id"),
        (model.config, "bos_token_id"),
    ):
        value = getattr(source, name, None)
        if isinstance(value, int) and value < model.vocab_size:
            return value
    return None


def bundled_prose() -> list[str]:
    """The topics of Python's own language reference: English with some code."""
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics) if len(topics[name]) > 1500]
