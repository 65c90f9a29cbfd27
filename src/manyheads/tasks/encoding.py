"""From examples to tensors, for any fast tokenizer: left-padded prompts, answers, twins and token spans.

An answer may be several tokens. What answer and foil share at their beginning (the piece that stands for the space before
digits, the first piece of a split word) goes to the end of the prompt's row, so that the logits of the last column are those
where the two part. Where no foil is given nothing moves. The whole answers are kept beside (`WholeAnswer`); `whole_answers`
scores them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice, takewhile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from manyheads.errors import InputError
from manyheads.tasks.base import Example, Span, Split, Task
from manyheads.tasks.texts import prompt_opening

MAX_TOKENS = 1024  # of one forward pass


@dataclass(frozen=True)
class WholeAnswer:
    """All tokens of an example's answer, of its foil (none: empty) and of every accepted answer, as they follow the prompt.

    The first `shared` tokens of answer and foil are the same and already stand at the end of the row.
    """

    answer: list[int]
    foil: list[int]
    accepted: list[list[int]]
    shared: int = 0

    @property
    def is_one_token(self) -> bool:
        """Whether the first token says all: answer, foil and accepted answers are one token each."""
        return all(len(ids) <= 1 for ids in (self.answer, self.foil, *self.accepted))


@dataclass(frozen=True)
class TaskBatch:
    """Encoded examples. All prompts end at the last column (left padding), so `logits[:, -1]` answers every row.

    `answer_ids`, `foil_ids` and `accepted_ids` are the tokens that may stand next: of an answer of several tokens the first that
    the foil does not share. `whole` holds the whole answers (None: all of them are one token).

    `foil_ids` and `corrupted_answer_ids` are -1 where an example has none; `corrupted_ids` is None where no example has
    a twin (one row's twin is as long as its prompt, so `corrupted_mask` equals `attention_mask`); `spans[name]` holds
    token ranges [start, end) in padded coordinates, -1 where the example has no such span. `accepted_ids[i]` begin all
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
    whole: list[WholeAnswer] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def wholes(self) -> list[WholeAnswer]:
        """Every row's whole answers, also where they are single tokens."""
        if self.whole is not None:
            return self.whole
        pairs = zip(self.answer_ids.tolist(), self.foil_ids.tolist(), self.accepted_ids, strict=True)
        return [WholeAnswer([a], [f] if f >= 0 else [], [[one] for one in right]) for a, f, right in pairs]

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
            whole=None if self.whole is None else [self.whole[i] for i in keep],
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
    whole: WholeAnswer


def encode(
    task: Task | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    split: Split = "test",
) -> TaskBatch:
    """`n` examples of a task (or the first `n` usable of a list) as tensors.

    An example is dropped, and counted, when its answer (or its foil) does not follow the prompt as tokens of its own, when one
    of the two is the beginning of the other, or when its twin does not have as many tokens as the prompt. Of a task, up to
    `8 n` examples are tried; fewer than `n` rows may come back, none at all is an error.
    """
    batch, dropped = try_encode(task, tokenizer, n, seed, split)
    if batch is None:
        name = task.name if isinstance(task, Task) else "given"
        reasons = ", ".join(f"{count} x {reason}" for reason, count in Counter(dropped).most_common())
        raise InputError(
            f"this tokenizer can use none of {sum(dropped.values())} {name} examples ({reasons or 'no examples'})."
        )
    return batch


def try_encode(
    task: Task | Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    seed: int = 0,
    split: Split = "test",
) -> tuple[TaskBatch | None, dict[str, int]]:
    """As `encode`, but with None where no example is usable, beside the number of examples dropped for each reason."""
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
    return _stack(rows, kept, dict(dropped), encoder.pad) if rows else None, dict(dropped)


def accuracy(logits: Float[Tensor, "N V"], batch: TaskBatch) -> float:
    """Share of rows whose largest logit (at the last position) is a right answer."""
    return float(right_answers(logits, batch).double().mean())


def right_answers(logits: Float[Tensor, "N V"], batch: TaskBatch) -> Bool[Tensor, "N"]:
    """Which rows' largest logit (at the last position) is a right answer, or begins one: `whole_answers` reads all of it."""
    best = logits.argmax(-1).tolist()
    return torch.tensor([token in right for token, right in zip(best, batch.accepted_ids, strict=True)])


class _Encoder:
    """Turns one example into ids and token spans, or into the reason why it cannot."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.prefix = prompt_opening(tokenizer)
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self.pad: int = next(i for i in ids if i is not None)

    def row(self, example: Example) -> _Row | str:
        encoding = self.tokenizer(example.prompt, add_special_tokens=False, return_offsets_mapping=True)
        ids = list(encoding.input_ids)
        answer = self._after(example.prompt, ids, example.answer)
        if answer is None:
            return "answer is no tokens of its own"
        foil = [] if example.foil is None else self._after(example.prompt, ids, example.foil)
        if foil is None:
            return "foil is no tokens of its own"
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(answer, foil, strict=False))))
        if foil and shared == min(len(answer), len(foil)):
            return "foil and answer begin one another"
        twin, twin_answer = None, -1
        if example.corrupted is not None:
            twin = list(self.tokenizer(example.corrupted, add_special_tokens=False).input_ids)
            if len(twin) != len(ids):
                return "twin has another length"
            lead = answer[:shared]
            if example.corrupted_answer is not None:
                known = self._after(example.corrupted, twin, example.corrupted_answer)
                if known is None:
                    return "twin's answer is no tokens of its own"
                if len(known) <= shared:
                    return "twin's answer ends where answer and foil part"
                lead, twin_answer = known[:shared], known[shared]
            twin += lead  # its own beginning: its answer too is read at the last column
        spans = {name: _token_span(span, encoding.offset_mapping) for name, span in example.spans.items()}
        if any(span is None for span in spans.values()):
            return "a span holds no token"
        others = [self._after(example.prompt, ids, text) for text in example.accepted]
        ids += answer[:shared]
        if shared and "end" in spans:
            spans["end"] = (len(ids) - 1, len(ids))  # where the answer is read, which has moved
        # What a chat template writes may open with the same token; it stands once.
        prefix = [] if ids[: len(self.prefix)] == self.prefix else self.prefix
        shift = len(prefix)
        return _Row(
            ids=prefix + ids,
            answer=answer[shared],
            foil=foil[shared] if foil else -1,
            twin=None if twin is None else prefix + twin,
            twin_answer=twin_answer,
            spans={name: (span[0] + shift, span[1] + shift) for name, span in spans.items() if span},
            whole=WholeAnswer(answer, foil, [answer, *(one for one in others if one and one != answer)], shared),
        )

    def _after(self, prompt: str, ids: list[int], answer: str) -> list[int] | None:
        """The tokens that `answer` adds to the prompt's `ids`, if it leaves those as they are."""
        # Encoded together: tokenizers merge over the border, and then no token after the prompt is the answer's own.
        both = list(self.tokenizer(prompt + answer, add_special_tokens=False).input_ids)
        new = both[len(ids) :]
        return new if new and both[: len(ids)] == ids and self.tokenizer.unk_token_id not in new else None


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
        accepted_ids=[_next(row.whole) for row in rows],
        examples=examples,
        dropped=dropped,
        whole=None if all(row.whole.is_one_token for row in rows) else [row.whole for row in rows],
    )


def _next(whole: WholeAnswer) -> list[int]:
    """The tokens that may stand next in an accepted answer, after what answer and foil share."""
    lead = whole.answer[: whole.shared]
    return sorted({ids[len(lead)] for ids in whole.accepted if ids[: len(lead)] == lead and len(ids) > len(lead)})
