"""Long contexts with sentences to remember in them, and questions that come after the context was read.

The question comes last on purpose: a cache that is cut knows the context only, as in use. Where the question stands in the prompt
that is scored and cut, a method can keep what it asks for, and the first word of the answer needs no cache at all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.inputs import check_integer
from manyheads.model.headmodel import HeadModel
from manyheads.model.inputs import takes
from manyheads.shrink.cache.attending import Compression
from manyheads.shrink.cache.press import Press
from manyheads.tasks.families.needle import KINDS, filler
from manyheads.tasks.lexicon import NAMES, OBJECTS
from manyheads.tasks.texts import opening_token

_WORD = ("The special magic word for {key} is {needle}. Remember it.", "The special magic word for {query} is")


@dataclass(frozen=True)
class Haystack:
    """A context `[T]`, and for each needle in it a question with its answer, as token ids."""

    context: Int[Tensor, "T"]
    questions: list[list[int]]
    answers: list[list[int]]

    @property
    def row(self) -> tuple[Int[Tensor, "S"], int]:
        """The context with all questions and answers after it, and where these begin."""
        tail = [i for q, a in zip(self.questions, self.answers, strict=True) for i in (*q, *a)]
        return torch.cat([self.context, torch.tensor(tail)]), len(self.context)


def haystacks(
    model: HeadModel, n: int, length: int, *, needles: int = 5, asks: bool | None = None, seed: int = 0
) -> list[Haystack]:
    """`n` contexts of `length` tokens with `needles` sentences to remember in them, at depths spread over the context.

    "The special magic word for Mary is lamp. Remember it." is asked for by its own words up to the last. With `asks`, sentences
    and questions are those of the task "needle": "The secret word of Mary is lamp.", "Q: What is the secret word of Mary? A:".
    None is both in turns, since a model may know one of them only.
    `InputError` without a tokenizer, or where so many needles do not fit.
    """
    if model.tokenizer is None:
        raise InputError("sentences to remember need a tokenizer; open the model with tokenizer=.")
    check_integer(n, "n", 1)
    check_integer(needles, "needles", 1, min(len(NAMES), len(OBJECTS)) // 2)
    rng = random.Random(seed)
    return [_one(model, rng, length, needles, bool(i % 2) if asks is None else asks) for i in range(n)]


def _one(model: HeadModel, rng: random.Random, length: int, needles: int, asks: bool) -> Haystack:
    names, things = rng.sample(NAMES, needles), rng.sample(OBJECTS, needles)
    kinds = [rng.choice(list(KINDS.values())) if asks else _WORD for _ in names]
    sentences = [
        _ids(model, kind[0].format(key=key, needle=thing))
        for kind, key, thing in zip(kinds, names, things, strict=True)
    ]
    begin = opening_token(model)
    ids = [] if begin is None else [begin]
    room = length - len(ids) - sum(map(len, sentences))
    others = [name for name in NAMES if name not in names]
    objects = [thing for thing in OBJECTS if thing not in things]
    hay: list[list[int]] = []
    while room > 0:
        hay.append(_ids(model, filler(rng, others, objects))[:room])
        room -= len(hay[-1])
    if len(hay) < needles:
        raise InputError(
            f"a context of {length} tokens has no room for {needles} sentences among others; make it longer."
        )
    for i, sentence in enumerate(sentences):  # the last piece of hay may be cut off: nothing goes behind it
        place = rng.randrange(i * (len(hay) - 1) // needles, max((i + 1) * (len(hay) - 1) // needles, 1))
        hay[place] = sentence + hay[place]
    context = torch.tensor(ids + [token for part in hay for token in part])
    questions = [_ids(model, question.format(query=key)) for (_, question), key in zip(kinds, names, strict=True)]
    return Haystack(context, questions, [_ids(model, thing) for thing in things])


def _ids(model: HeadModel, text: str) -> list[int]:
    found: list[int] = model.tokenizer(" " + text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


@torch.inference_mode()
def needle_recall(model: HeadModel, press: Press, hay: Sequence[Haystack]) -> Float[Tensor, "N"]:
    """The share of each context's needles that the model says word for word, its cache cut by `press` after the context."""
    with press(model) as block:
        return torch.tensor([sum(_said(model, block, one)) / len(one.answers) for one in hay])


def _said(model: HeadModel, block: Compression, one: Haystack) -> Iterator[bool]:
    cache, device = block.new_cache(), model.device
    plain: Any = model.plain
    few: dict[str, Any] = {"logits_to_keep": 1} if takes(plain, "logits_to_keep") else {}
    plain(one.context[None].to(device), past_key_values=cache, **few)
    cache.batch_repeat_interleave(len(one.questions))
    rows = [[*q, *a] for q, a in zip(one.questions, one.answers, strict=True)]
    widest = max(map(len, rows))
    ids = torch.tensor([[0] * (widest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (widest - len(row)) + [1] * len(row) for row in rows], device=device)
    whole = torch.cat([mask.new_ones(len(rows), len(one.context)), mask], 1)
    given: dict[str, Any] = {"attention_mask": whole}
    if takes(plain, "position_ids"):
        given["position_ids"] = (whole.cumsum(1) - 1)[:, -widest:].clamp(min=0)
    best = plain(ids, past_key_values=cache, **given).logits.argmax(-1)
    for row, answer in zip(best.tolist(), one.answers, strict=True):
        yield row[-len(answer) - 1 : -1] == answer
