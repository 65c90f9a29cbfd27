"""Answers as a language model reads them: in its chat template, as token ids, as states. And as counts of words, without it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import clause
from manyheads.learning import Trunk
from manyheads.learning.trunk import Layer
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar

Answer = tuple[str, str]  # the prompt, and an answer to it
WORDS = 2000  # that are counted


def conversations(model: HeadModel, answers: Sequence[Answer]) -> list[str]:
    """Each prompt with its answer as a text: in the tokenizer's chat template if it has one, else one after the other."""
    tokenizer: Any = model.tokenizer
    if tokenizer is None:
        raise InputError("answers are texts, and this model was opened without a tokenizer; give one that has one.")
    if not getattr(tokenizer, "chat_template", None):
        return [prompt + answer for prompt, answer in answers]
    texts = []
    for prompt, answer in answers:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        try:
            texts.append(str(tokenizer.apply_chat_template(turns, tokenize=False)))
        except Exception as error:  # the template is a program of the model's makers
            raise InputError(f"the chat template takes no turn of user and assistant ({clause(error)}).") from None
    return texts


def tokens_of_texts(model: HeadModel, texts: Sequence[str], most: int) -> tuple[list[list[int]], int]:
    """The ids of each text, at most the last `most` or as many as the model has positions for; and how many texts were cut."""
    tokenizer: Any = model.tokenizer
    positions = getattr(model.plain.config, "max_position_embeddings", None)
    most = min(most, positions) if isinstance(positions, int) and positions > 0 else most
    special = not getattr(tokenizer, "chat_template", None)  # a template writes its own
    rows = tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
    if empty := [text for text, row in zip(texts, rows, strict=True) if not row]:
        raise InputError(f"{empty[0][:40]!r} has no tokens; leave it out.")
    return [list(row)[-most:] for row in rows], sum(len(row) > most for row in rows)


def padded_ids(model: HeadModel, ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """A batch of rows of ids, padded on the left."""
    tokenizer: Any = model.tokenizer
    pad = tokenizer.pad_token_id
    pad = (tokenizer.eos_token_id or 0) if pad is None else pad
    longest = max(map(len, ids))
    rows = [[pad] * (longest - len(row)) + list(row) for row in ids]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def answer_states(
    model: HeadModel, ids: Sequence[Sequence[int]], layers: Sequence[Layer], *, rows: int = 16, bar: Bar = Bar()
) -> list[Float[Tensor, "N D"]]:
    """The state of each row's last token at each layer, on the processor. Those of like length are read together."""
    trunk = Trunk(model)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    out: Any = None
    for start in range(0, len(order), rows):
        part = order[start : start + rows]
        batch = padded_ids(model, [ids[i] for i in part])
        found = torch.stack(trunk.states(batch, layers, "last")).float().cpu()
        out = torch.empty(len(layers), len(ids), found.shape[2]) if out is None else out
        out[:, part] = found
        bar(len(part))
    return list(out)


def word_counts(answers: Sequence[Answer], learned: Collection[Answer]) -> Float[Tensor, "N W"]:
    """How often each of the commonest words (of the answers to learn from) stands in an answer, as log(1 + n)."""
    words = [re.findall(r"\w+|[^\w\s]", answer.lower()) for _, answer in answers]
    common = Counter(w for answer, own in zip(answers, words, strict=True) if answer in learned for w in set(own))
    column = {word: i for i, (word, _) in enumerate(common.most_common(WORDS))}
    out = torch.zeros(len(answers), max(1, len(column)))
    for i, own in enumerate(words):
        for word in own:
            if word in column:
                out[i, column[word]] += 1
    return torch.log1p(out)
