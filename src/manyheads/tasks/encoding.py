"""From examples to tensors, for any fast tokenizer: left-padded prompts, answer ids, twins and token spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Span, Split, Task

MAX_TOKENS = 1024  # of one forward pass


@dataclass(frozen=True)
class TaskBatch:
    """Encoded examples. All prompts end at the last column (left padding), so `logits[:, -1]` answers every row.

    `foil_ids` and `corrupted_answer_ids` are -1 where an example has none; `corrupted_ids` is None where no example has
    a twin (one row's twin is as long as its prompt, so `corrupted_mask` equals `attention_mask`); `spans[name]` holds
    token ranges [start, end) in padded coordinates, -1 where the example has no such span. `accepted_ids[i]` are all
    right answers of row i. `dropped` counts, by reason, the examples that this tokenizer could not encode.
    """

    input_ids: Int[Tensor, "N T"]
    attention_mask: Int[Tensor, "N T"]
    answer_ids: Int[Tensor, " N"]
    foil_ids: Int[Tensor, " N"]
    corrupted_ids: Int[Tensor, "N T"] | None
    corrupted_mask: Int[Tensor, "N T"] | None
    corrupted_answer_ids: Int[Tensor, " N"]
    spans: dict[str, Int[Tensor, "N 2"]]
    accepted_ids: list[list[int]]
    examples: list[Example]
    dropped: dict[str, int]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model takes of the prompts."""
        return {"input_ids": self.input_ids, "attention_mask": self.attention_mask}

    @property
    def twins(self) -> dict[str, Tensor]:
        """What a model takes of the corrupted prompts. `InputError` where there are none."""
        if self.corrupted_ids is None or self.corrupted_mask is None:
            raise InputError("these examples have no twins (corrupted prompts); give examples with `corrupted`.")
        return {"input_ids": self.corrupted_ids, "attention_mask": self.corrupted_mask}

    def logit_difference(self, logits: Float[Tensor, "N ... V"]) -> Float[Tensor, "N"]:
        """`logit[answer] - logit[foil]` of each row at the last position: what patching is judged by."""
        rows = torch.arange(len(logits), device=logits.device)
        last = logits[:, -1].double()
        return last[rows, self.answer_ids.to(last.device)] - last[rows, self.foil_ids.to(last.device)]

    def rows(self, start: int, stop: int) -> TaskBatch:
        """The batch of examples `start:stop` alone."""
        return self.take(torch.arange(len(self))[start:stop])

    def take(self, rows: Bool[Tensor, "N"] | Int[Tensor, "M"]) -> TaskBatch:
        """Some examples, by mask or by number."""
        numbers = torch.as_tensor(rows)
        numbers = numbers.nonzero().flatten() if numbers.dtype == torch.bool else numbers
        keep = numbers.tolist()

        def cut(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[numbers]

        return replace(
            self,
            input_ids=self.input_ids[numbers],
            attention_mask=self.attention_mask[numbers],
            answer_ids=self.answer_ids[numbers],
            foil_ids=self.foil_ids[numbers],
            corrupted_ids=cut(self.corrupted_ids),
            corrupted_mask=cut(self.corrupted_mask),
            corrupted_answer_ids=self.corrupted_answer_ids[numbers],
            spans={name: spans[numbers] for name, spans in self.spans.items()},
            accepted_ids=[self.accepted_ids[i] for i in keep],
            examples=[self.examples[i] for i in keep],
        )

    def chunks(self, max_tokens: int = MAX_TOKENS) -> list[TaskBatch]:
        """The batch in pieces of at most `max_tokens` tokens, or of one row."""
        size = max(1, max_tokens // self.input_ids.shape[1])
        return [self.rows(start, start + size) for start in range(0, len(self), size)]


@dataclass(frozen=True)
class _Row:
    ids: list[int]
    answer: int
    foil: int
    twin: list[int] | None
    twin_answer: int
    spans: dict[str, Span]
    accepted: list[int]


def encode(
    task: Task | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    split: Split = "test",
) -> TaskBatch:
    """`n` examples of a task (or the first `n` usable of a list) as tensors.

    An example is dropped, and counted, when its answer (or its foil's) is not exactly one token after the prompt, or
    when its twin does not have as many tokens as the prompt. Of a task, up to `8 n` examples are tried; fewer than `n`
    rows may come back, none at all is an error.
    """
    if not tokenizer.is_fast:
        raise InputError(
            f"{type(tokenizer).__name__} has no offsets; tasks need a fast tokenizer (one with a tokenizer.json)."
        )
    if n < 1:
        raise InputError(f"n is {n}; ask for at least 1 example.")
    pool: Iterable[Example] = islice(task.stream(seed, split), 8 * n) if isinstance(task, Task) else task
    encoder, rows, kept, dropped = _Encoder(tokenizer), [], [], Counter[str]()
    for example in pool:
        row = encoder.row(example)
        if isinstance(row, str):
            dropped[row] += 1
            continue
        rows.append(row)
        kept.append(example)
        if len(rows) == n:
            break
    if not rows:
        name = task.name if isinstance(task, Task) else "given"
        reasons = ", ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
        raise InputError(
            f"this tokenizer can use none of {dropped.total()} {name} examples ({reasons or 'no examples'})."
        )
    return _stack(rows, kept, dict(dropped), encoder.pad)


def accuracy(logits: Float[Tensor, "N V"], batch: TaskBatch) -> float:
    """Share of rows whose largest logit (at the last position) is a right answer."""
    return float(right_answers(logits, batch).double().mean())


def right_answers(logits: Float[Tensor, "N V"], batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Which rows' largest logit (at the last position) is a right answer."""
    best = logits.argmax(-1).tolist()
    return torch.tensor([token in right for token, right in zip(best, batch.accepted_ids, strict=True)])


class _Encoder:
    """Turns one example into ids and token spans, or into the reason why it cannot."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # What stands before a text is measured, not asked for: tokenizers have no one name for it.
        plain, special = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
        starts = [i for i in range(len(special)) if plain and special[i : i + len(plain)] == plain]
        self.prefix: list[int] = list(special[: starts[0]]) if starts else []
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(i for i in ids if i is not None)

    def row(self, example: Example) -> _Row | str:
        encoding = self.tokenizer(example.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding.input_ids)
        answer = self._next(example.prompt, ids, example.answer)
        if answer is None:
            return "answer is not one token"
        foil = -1 if example.foil is None else self._next(example.prompt, ids, example.foil)
        if foil is None or foil == answer:
            return "foil is not one token" if foil is None else "foil and answer are one token"
        accepted = [self._next(example.prompt, ids, text) for text in example.accepted]
        twin, twin_answer = None, -1
        if example.corrupted is not None:
            twin = list(self.tokenizer(example.corrupted, add_special_tokens=False).input_ids)
            if len(twin) != len(ids):
                return "twin has another length"
            if example.corrupted_answer is not None:
                known = self._next(example.corrupted, twin, example.corrupted_answer)
                if known is None:
                    return "twin's answer is not one token"
                twin_answer = known
        spans = {name: _token_span(span, encoding.offset_mapping) for name, span in example.spans.items()}
        if any(span is None for span in spans.values()):
            return "a span holds no token"
        shift = len(self.prefix)
        return _Row(
            ids=self.prefix + ids,
            answer=answer,
            foil=foil,
            twin=None if twin is None else self.prefix + twin,
            twin_answer=twin_answer,
            spans={name: (span[0] + shift, span[1] + shift) for name, span in spans.items() if span},
            accepted=sorted({answer, *(one for one in accepted if one is not None)}),
        )

    def _next(self, prompt: str, ids: list[int], answer: str) -> int | None:
        """The one token that `answer` adds to the prompt's `ids`, if it is one and leaves them as they are."""
        # Encoded together: tokenizers merge over the border, and then no token after the prompt is the answer.
        both = self.tokenizer(prompt + answer, add_special_tokens=False).input_ids
        if len(both) != len(ids) + 1 or list(both[:-1]) != ids or both[-1] == self.tokenizer.unk_token_id:
            return None
        return int(both[-1])


def _token_span(span: Span, offsets: Sequence[Span]) -> Span | None:
    inside = [i for i, (start, end) in enumerate(offsets) if start < span[1] and end > span[0]]
    return (inside[0], inside[-1] + 1) if inside else None


def _stack(rows: list[_Row], examples: list[Example], dropped: dict[str, int], pad: int) -> TaskBatch:
    width = max(len(row.ids) for row in rows)
    gaps = [width - len(row.ids) for row in rows]
    ids = torch.tensor([[pad] * gap + row.ids for gap, row in zip(gaps, rows, strict=True)])
    mask = torch.tensor([[0] * gap + [1] * len(row.ids) for gap, row in zip(gaps, rows, strict=True)])
    twins = None
    if any(row.twin for row in rows):
        twins = torch.tensor([[pad] * gap + (row.twin or row.ids) for gap, row in zip(gaps, rows, strict=True)])
    names = {name for row in rows for name in row.spans}
    spans = {
        name: torch.tensor(
            [
                [edge + gap for edge in row.spans[name]] if name in row.spans else [-1, -1]
                for gap, row in zip(gaps, rows, strict=True)
            ]
        )
        for name in sorted(names)
    }
    return TaskBatch(
        input_ids=ids,
        attention_mask=mask,
        answer_ids=torch.tensor([row.answer for row in rows]),
        foil_ids=torch.tensor([row.foil for row in rows]),
        corrupted_ids=twins,
        corrupted_mask=None if twins is None else mask.clone(),
        corrupted_answer_ids=torch.tensor([row.twin_answer for row in rows]),
        spans=spans,
        accepted_ids=[row.accepted for row in rows],
        examples=examples,
        dropped=dropped,
    )
