"""What edits learn from: prompts with right answers, and wrong ones to prefer them to."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol, get_args, get_type_hints, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from manyheads.errors import InputError
from manyheads.evaluation.metrics import log_probability
from manyheads.inputs import check_choice, parse_json, read_lines
from manyheads.model.headmodel import HeadModel
from manyheads.tasks import Example, Split, Task, TaskBatch, encode, get_task


@runtime_checkable
class Examples(Protocol):
    """What an edit can learn from: rows, and a loss of each, given a function that says the log-probability of answers."""

    @property
    def input_ids(self) -> Int[Tensor, "N T"]:
        """The token ids, prompts and answers together."""

    def __len__(self) -> int: ...

    def rows(self, index: Int[Tensor, "n"] | slice) -> Examples:
        """Some of the rows."""

    def loss(self, log_p: Callable[[Answered], Float[Tensor, "n"]]) -> Float[Tensor, "N"]:
        """The loss of each row, in nats."""


@dataclass(frozen=True)
class Answered:
    """Prompts followed by answers. `is_answer` marks the tokens of the answers.

    Prompts are left-padded, so that all end in one column; answers shorter than the longest have padding after them.
    """

    input_ids: Int[Tensor, "N T"]
    attention_mask: Int[Tensor, "N T"]
    is_answer: Bool[Tensor, "N T"]

    @classmethod
    def of_tokens(cls, prompts: Int[Tensor, "N T"], answers: Int[Tensor, "N"]) -> Answered:
        """From prompts of one length and their one-token answers."""
        ids = torch.cat([prompts, answers[:, None]], 1)
        is_answer = torch.zeros_like(ids, dtype=torch.bool)
        is_answer[:, -1] = True
        return cls(ids, torch.ones_like(ids), is_answer)

    @classmethod
    def of_batch(cls, batch: TaskBatch, *, foils: bool = False) -> Answered:
        """From an encoded task: every prompt with its answer, or with its foil."""
        ids = batch.foil_ids if foils else batch.answer_ids
        if (ids < 0).any():
            raise InputError("not every example has a foil; give examples that have, or leave foils out.")
        plain = cls.of_tokens(batch.input_ids, ids)
        mask = torch.cat([batch.attention_mask, torch.ones_like(ids)[:, None]], 1)
        return cls(plain.input_ids, mask, plain.is_answer)

    @classmethod
    def of_task(
        cls, model: HeadModel, task: Task | Sequence[Example], n: int, *, seed: int = 0, split: Split = "train"
    ) -> Answered:
        """`n` examples of a task with their answers. `InputError` without a tokenizer."""
        if model.tokenizer is None:
            raise InputError("examples of a task need a tokenizer; open the model with tokenizer=.")
        return cls.of_batch(encode(task, model.tokenizer, n, seed, split))

    @classmethod
    def of_texts(cls, model: HeadModel, prompts: Sequence[str], answers: Sequence[str]) -> Answered:
        """From texts; an answer may have several tokens. `InputError` if one runs into its prompt's last token."""
        if model.tokenizer is None:
            raise InputError("texts need a tokenizer; open the model with tokenizer=.")
        if not prompts or len(prompts) != len(answers):
            raise InputError(f"got {len(prompts)} prompts and {len(answers)} answers; give one answer for each prompt.")
        pairs = [_tokens(model, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        pad = model.tokenizer.pad_token_id
        pad = (model.tokenizer.eos_token_id or 0) if pad is None else pad
        before, after = (max(len(pair[i]) for pair in pairs) for i in (0, 1))
        columns: list[list[list[int]]] = [[], [], []]
        for prompt, answer in pairs:
            left, right = before - len(prompt), after - len(answer)
            columns[0].append([pad] * left + prompt + answer + [pad] * right)
            columns[1].append([0] * left + [1] * (len(prompt) + len(answer)) + [0] * right)
            columns[2].append([0] * before + [1] * len(answer) + [0] * right)
        ids, mask, is_answer = (torch.tensor(column) for column in columns)
        return cls(ids, mask, is_answer.bool())

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: Int[Tensor, "n"] | slice) -> Answered:
        """Some of the rows."""
        return Answered(self.input_ids[index], self.attention_mask[index], self.is_answer[index])

    def inputs(self, model: HeadModel) -> dict[str, Tensor]:
        """What the model takes: without the last token, which nothing follows."""
        return model.inputs({"input_ids": self.input_ids[:, :-1], "attention_mask": self.attention_mask[:, :-1]})

    def log_p(self, logits: Float[Tensor, "N {self.input_ids.shape[1]}-1 V"]) -> Float[Tensor, "N"]:
        """Each answer's log-probability, in nats, given the logits of `inputs`."""
        each = log_probability(logits, self.input_ids[:, 1:])
        return (each * self.is_answer[:, 1:].to(each)).sum(-1)

    def loss(self, log_p: Callable[[Answered], Float[Tensor, "N"]]) -> Float[Tensor, "N"]:
        """Each answer's negative log-likelihood, in nats."""
        return -log_p(self)

    def right(self, logits: Float[Tensor, "N {self.input_ids.shape[1]}-1 V"]) -> Bool[Tensor, "N"]:
        """Whether greedy decoding would give each answer."""
        best = logits.argmax(-1).cpu() == self.input_ids[:, 1:]
        return (best | ~self.is_answer[:, 1:]).all(-1)


@dataclass(frozen=True)
class Portions:
    """Examples to learn from, to stop early by, and to judge by. No prompt is in two of them."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]

    @property
    def swapped(self) -> Portions:
        """Answers and foils in each other's place. `InputError` where there is no foil."""
        return Portions(swapped(self.train), swapped(self.dev), swapped(self.test))

    @property
    def checksum(self) -> str:
        """SHA-256 of all prompts, answers and foils, in hex: whether a run goes on with the same ones."""
        text = json.dumps([[(e.prompt, e.answer, e.foil) for e in part] for part in vars(self).values()])
        return hashlib.sha256(text.encode()).hexdigest()


def task_of(given: str) -> Task:
    """The task of a name, with settings if any: `by_example:relation=french,shots=0`. `InputError` names what there is."""
    name, _, rest = given.partition(":")
    task = get_task(name)
    known: dict[str, Any] = {field.name: getattr(task, field.name) for field in fields(task)}  # type: ignore[arg-type]
    settings: dict[str, Any] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        if key not in known:
            raise InputError(f"task {name} has no setting {key!r}; it has {', '.join(known) or 'none'}.")
        settings[key] = _setting(task, key, value, known[key])
    return replace(task, **settings)  # type: ignore[type-var]


def of_task(task: Task, n: int, seed: int = 0) -> Portions:
    """About `n` examples of a task's training content, a fifth of them to stop early by, and half as many held-out ones."""
    train = _distinct(task.examples(n, seed, "train"))
    test = _distinct(task.examples(max(2, n // 2), seed, "test"))
    seen = {example.prompt for example in train}
    dev = max(1, len(train) // 5)
    return Portions(train[dev:], train[:dev], [example for example in test if example.prompt not in seen])


def of_file(path: str | Path, seed: int = 0) -> Portions:
    """The lines of a JSONL file, `{"prompt": ..., "answer": ..., "foil": ...}` (the foil may be missing), dealt out 3 : 1 : 1.

    `InputError` for a line of another kind, and for fewer than five prompts.
    """
    lines = [(row, line) for row, line in read_lines(path) if line.strip()]
    examples = _distinct([_example(line, f"{path}, line {row + 1}") for row, line in lines])
    if len(examples) < 5:
        raise InputError(f"{path} has {len(examples)} different prompts; give at least 5.")
    random.Random(seed).shuffle(examples)
    fifth = len(examples) // 5
    return Portions(examples[2 * fifth :], examples[:fifth], examples[fifth : 2 * fifth])


def demonstrations(task: Task | None, portions: Portions, shots: int, *, n: int = 50, seed: int = 0) -> list[str]:
    """`n` prompts after `shots` demonstrations: as the task writes them if it can, else an example a line."""
    if task is None or not hasattr(task, "shots"):
        return demonstrated(portions.train, shots, n, seed)
    return [example.prompt for example in replace(task, shots=shots).examples(n, seed, "train")]  # type: ignore[type-var]


def demonstrated(examples: Sequence[Example], shots: int, n: int = 50, seed: int = 0) -> list[str]:
    """`n` prompts, each after `shots` other examples with their answers, a line each: what soft injection averages over."""
    if not 0 < shots < len(examples):
        raise InputError(f"asked for {shots} demonstrations of {len(examples)} examples; there must be more examples.")
    rng = random.Random(seed)
    prompts = []
    for _ in range(n):
        *shown, asked = rng.sample(list(examples), shots + 1)
        prompts.append("".join(f"{e.prompt}{e.answer}{e.continuation}\n" for e in shown) + asked.prompt)
    return prompts


def swapped(examples: Sequence[Example]) -> list[Example]:
    """Answers and foils in each other's place. `InputError` where there is no foil."""
    if any(example.foil is None for example in examples):
        raise InputError("not every example has a foil; give examples that have.")
    return [Example(e.prompt, e.foil or "", e.answer) for e in examples]


def _distinct(examples: Sequence[Example]) -> list[Example]:
    return list({example.prompt: example for example in examples}.values())


def _example(line: str, where: str) -> Example:
    row = parse_json(line, where)
    wanted = isinstance(row, dict) and all(isinstance(row.get(k), str) and row[k] for k in ("prompt", "answer"))
    if not wanted or not isinstance(row.get("foil", ""), str):
        raise InputError(
            f'{where} is no {{"prompt": ..., "answer": ..., "foil": ...}} of texts (the foil may be missing).'
        )
    return Example(row["prompt"], row["answer"], row.get("foil") or None)


def _setting(task: Task, key: str, value: str, default: Any) -> Any:
    """What `value` says as the type of the setting; whether it may be that, the task says itself."""
    kinds = get_args(get_type_hints(type(task))[key]) or (type(default),)
    if bool in kinds:
        return check_choice(value.lower(), key, ("true", "false")) == "true"
    kind = next((kind for kind in (int, float) if kind in kinds), None)
    try:
        return value if kind is None else kind(value)
    except ValueError:
        raise InputError(f"{key} is {value!r}; give a number.") from None


def _tokens(model: HeadModel, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """What the model reads of a prompt, and what comes on top with its answer."""
    assert model.tokenizer is not None
    ids, both = (list(model.tokenizer(text)["input_ids"]) for text in (prompt, prompt + answer))
    end = model.tokenizer.eos_token_id
    if end is not None and ids[-1:] == both[-1:] == [end]:
        ids, both = ids[:-1], both[:-1]
    if not ids or both[: len(ids)] != ids or len(both) == len(ids):
        raise InputError(
            f"{answer!r} is no token of its own after {prompt!r}; begin answers with a space, end prompts without."
        )
    return ids, both[len(ids) :]
