"""Ways to put a task to a model: as it stands, after solved examples, or as a turn of a chat.

    plain    the family's own prompt
    solved   a few other examples with their answers stand before it, from the training split
    chat     the prompt is what the user says, in the tokenizer's chat template; the answer begins the assistant's turn, after
             `lead` ("Answer:", for models that would first repeat the question)

A phrasing is a task itself, of the same name: spans, twins and foils go with it. `suited` picks the one that a model answers,
on the training split, so that what is then said of the test split is not chosen by it; a family that is answered as it stands
stays as it is.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from numpy import nan_to_num
from transformers import PreTrainedTokenizerBase

from manyheads.errors import InputError
from manyheads.model.headmodel import HeadModel
from manyheads.tasks.base import Example, Split, Task
from manyheads.tasks.verdicts import TaskVerdict, task_verdict

LEAD = "Answer:"


@dataclass(frozen=True)
class Solved(Task):
    """`task` after `shots` solved examples of its training split, one a paragraph."""

    task: Task
    shots: int = 4
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {"shots": (1, 1000)}

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", self.task.name)

    def draw(self, rng: random.Random, split: Split) -> Example:
        example = self.task.draw(rng, split)
        shown: list[Example] = []
        while len(shown) < self.shots:
            one = self.task.draw(rng, "train")
            if one.prompt != example.prompt:
                shown.append(one)
        before = "".join(one.prompt + one.answer + one.continuation + "\n\n" for one in shown)
        return surrounded(example, before)


@dataclass(frozen=True)
class Chat(Task):
    """`task` as a turn of a chat: `before`, the prompt, `after`. `stripped`: the answer begins a line, without its space."""

    task: Task
    before: str
    after: str
    stripped: bool

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "name", self.task.name)

    def draw(self, rng: random.Random, split: Split) -> Example:
        example = surrounded(self.task.draw(rng, split), self.before, self.after)
        return _stripped(example) if self.stripped else example


def as_chat(task: Task, tokenizer: PreTrainedTokenizerBase, lead: str = "") -> Chat:
    """`task` in the tokenizer's chat template; the assistant's turn begins with `lead`. `InputError` without a template."""
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"this tokenizer has no chat template; put {task.name} to the model without one.")
    mark = "PROMPT"
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, found, after = str(text).rpartition(mark)
    if not found:
        raise InputError("the chat template does not repeat what the user says; put the task without it.")
    after += lead
    return Chat(task, before, after, stripped=not lead and after[-1:].isspace())


@dataclass(frozen=True)
class Suited:
    """The way of putting `task` that a model answers best, and the verdict on each way tried (all of the training split)."""

    task: Task
    how: str
    tried: dict[str, TaskVerdict]

    @property
    def verdict(self) -> TaskVerdict:
        """That of the way picked."""
        return self.tried[self.how]

    def __str__(self) -> str:
        return "; ".join(f"{how}: {verdict.summary}" for how, verdict in self.tried.items())


def suited(model: HeadModel, task: Task, *, chat: bool | None = None, n: int = 16, seed: int = 0) -> Suited:
    """Try the ways to put `task` (above, and the family's own variants) on `n` rows each until one is answered.

    The first that is answered is taken; else, of those above chance (of all, where none is), the one with the largest sum of
    shares answered and preferred. On so few rows that is a guess, which the test split has to bear out. `chat` True puts it as a
    chat turn only, False never, None also where the tokenizer has a template. `InputError` without a tokenizer, and for a chat
    without a template.
    """
    if model.tokenizer is None:
        raise InputError(f"the task {task.name} needs a tokenizer; open the model with tokenizer=.")
    options, tried = ways_to_put(task, model.tokenizer, chat), {}
    for how, way in options.items():
        tried[how] = task_verdict(model, way, n=n, seed=seed, split="train")
        if tried[how].verdict == "answered":
            return Suited(way, how, tried)
    best = max(tried, key=lambda how: (not tried[how].blind, tried[how].answered + nan_to_num(tried[how].preferred)))
    return Suited(options[best], best, tried)


def ways_to_put(task: Task, tokenizer: PreTrainedTokenizerBase, chat: bool | None = None) -> dict[str, Task]:
    """The ways to put `task` (see above) by name, from the cheapest to the longest prompts."""
    turns = {"chat": "", f'chat with "{LEAD}"': LEAD}
    if chat:
        return {how: as_chat(task, tokenizer, lead) for how, lead in turns.items()}
    plain = {"plain": task} | task.variants()
    can_chat = chat is None and getattr(tokenizer, "chat_template", None)
    turn = {how: as_chat(task, tokenizer, lead) for how, lead in turns.items()} if can_chat else {}
    return plain | turn | {f"{how}, solved": Solved(one) for how, one in plain.items()}


def surrounded(example: Example, before: str = "", after: str = "") -> Example:
    """The example with text around its prompt and its twin, spans and all; a span `end` moves to the end of `after`."""
    shift = len(before)
    spans = {name: (start + shift, end + shift) for name, (start, end) in example.spans.items()}
    prompt = before + example.prompt + after
    if after and "end" in spans:
        spans["end"] = (len(prompt) - 1, len(prompt))
    return replace(
        example,
        prompt=prompt,
        corrupted=None if example.corrupted is None else before + example.corrupted + after,
        spans=spans,
    )


def _stripped(example: Example) -> Example:
    def strip(text: str | None) -> str | None:
        return None if text is None else text.lstrip()

    return replace(
        example,
        answer=example.answer.lstrip(),
        foil=strip(example.foil),
        corrupted_answer=strip(example.corrupted_answer),
        accepted=tuple(text.lstrip() for text in example.accepted),
    )
