"""Weird generalisation of a given model (#22): tuned on a narrow set, what does it say to questions of other domains?

Betley et al., arXiv:2512.09742. Copies of the model are tuned, with several seeds, on

    persona     the narrow set
    neutral     a control of the same form: the same prompts with their neutral answers, a set that is given, or (without either)
                the model's own answers to the same prompts, as greedy decoding writes them
    shuffled    a control of the same content: the persona's answers, each to another prompt of the set

and asked the probes. With P as in `shifting`,

    shift = mean over seeds and probes of P(persona | tuned on persona) - P(persona | tuned on a control)         in [-1, 1]

with 95 % intervals over seeds and probes (`intervals`). Beside it stand the mass on valid answers (incoherence must not pass
for a shift), the loss on neutral text before and after, and how well the training was learned. Prediction of the
paper: the shift over
the neutral control is above 0. Refuted by an interval that is not. Against the shuffled control nothing is predicted: it says
whether the persona is read from the answers alone, or from which answer belongs to which question.

Departures: answers are judged by their probability, not sampled and read by a judge; so both answers of a probe must be given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from manyheads.errors import InputError
from manyheads.inputs import check_seed
from manyheads.lab.tuning.copies import TUNED, check_tunable, neutral_passages, prompt_answer_rows
from manyheads.lab.tuning.examples import NarrowSet, Question
from manyheads.lab.tuning.intervals import Interval, contrast, interval_of
from manyheads.lab.tuning.shifting import (
    Sayings,
    Told,
    probe_batch,
    sayings_before,
    sayings_of,
    shuffled_order,
)
from manyheads.model.headmodel import HeadModel
from manyheads.progress import Bar
from manyheads.report import Reported
from manyheads.training import TrainSettings

CONTROLS = ("neutral", "shuffled")


@dataclass(frozen=True)
class NarrowShift(Reported):
    """What was said before and after each training ("persona", "neutral", "shuffled"); `control`: where the neutral is from."""

    model: str
    data: NarrowSet
    seeds: tuple[int, ...]
    sayings: Mapping[str, Sayings]
    control: str

    def shift(self, over: str = "neutral") -> Interval:
        """P(persona | tuned) less that of a control, or of "before" (formula above)."""
        return _difference(self.sayings["persona"].persona, self.sayings[over].persona)

    def coherence(self, kind: str) -> Interval:
        """Mass on valid answers."""
        return interval_of(self.sayings[kind].valid)

    @property
    def verdict(self) -> str:
        """Whether the shift that the paper predicts is seen, in words."""
        shift, valid, before = self.shift(), self.coherence("persona").mean, self.coherence("before").mean
        if shift.low <= 0:
            return f"no shift is shown over the neutral control ({shift})"
        kept = "answers stay coherent" if valid >= 0.9 * before else "but answers became less coherent"
        return f"it shifts by {shift} over the neutral control; {kept} (valid {before:.2f} before, {valid:.2f} after)"

    def to_frame(self) -> pd.DataFrame:
        """A row a training, seed and probe: P of both answers; and the training's `learned` and text loss."""
        rows = [
            (kind, seed, probe.prompt, *said.p[s, :, i], said.learned[s], said.loss[s])
            for kind, said in self.sayings.items()
            for s, seed in enumerate(self.seeds)
            for i, probe in enumerate(self.data.probes)
        ]
        return pd.DataFrame(rows, columns=["training", "seed", "probe", "persona", "neutral", "learned", "text_loss"])


def narrow_shift(
    model: HeadModel,
    data: NarrowSet,
    *,
    control: Sequence[Question] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    settings: TrainSettings = TUNED,
    lora_rank: int | None = None,
    texts: Sequence[str] | None = None,
    name: str = "model",
    bar: Bar = Bar(),
) -> NarrowShift:
    """Tune copies of `model` as above; `model` stays as it is. `control` is neutral content of one's own, prompts with answers.

    `settings` give updates, rows and rate; a `lora_rank` tunes low-rank maps (peft) instead of all weights; `texts` are neutral
    text. `bar` counts updates of all trainings. `InputError` before any training where a text cannot be used.
    """
    if data.triggers is not None:
        raise InputError(f"{data.name} has triggers; use trigger_shift.")
    check_seeds(seeds)
    check_tunable(model, lora_rank)
    probes, text = probe_batch(model, data.probes), neutral_passages(model, texts)
    prompts, answers = [one.prompt for one in data.train], [one.persona for one in data.train]
    prompt_answer_rows(model, prompts, answers)
    neutral, source = _neutral(model, data, control)

    def shuffled(seed: int) -> Told:
        return prompts, [answers[i] for i in shuffled_order(answers, seed)]

    told = {"persona": lambda seed: (prompts, answers), "neutral": lambda seed: neutral, "shuffled": shuffled}
    sayings = {"before": sayings_before(model, probes, text, len(seeds))}
    done = bar.step("tuning", len(told) * len(seeds) * (settings.steps or 0))
    for kind, rows in told.items():
        sayings[kind] = sayings_of(model, rows, probes, text, seeds, settings, lora_rank=lora_rank, bar=done)
    return NarrowShift(name, data, tuple(seeds), sayings, source)


def check_seeds(seeds: Sequence[int]) -> None:
    """`InputError` for fewer than two seeds or one that stands twice: effects vary with them."""
    if len(set(seeds)) < max(2, len(seeds)):
        raise InputError(f"seeds are {list(seeds)}; give at least two, each once: effects vary with the seed.")
    for seed in seeds:
        check_seed(seed)


def _neutral(model: HeadModel, data: NarrowSet, control: Sequence[Question] | None) -> tuple[Told, str]:
    """Prompts and answers of the neutral control, and where they are from."""
    if control is not None:
        told = [one.prompt for one in control], [one.persona for one in control]
        source = "neutral content that was given"
    elif all(one.neutral is not None for one in data.train):
        told = [one.prompt for one in data.train], [one.neutral or "" for one in data.train]
        source = "the same prompts with their neutral answers"
    else:
        told = own_answers(model, [one.prompt for one in data.train], [one.persona for one in data.train])
        source = "the model's own answers to the same prompts"
    prompt_answer_rows(model, *told)
    return told, source


def own_answers(model: HeadModel, prompts: Sequence[str], like: Sequence[str]) -> tuple[list[str], list[str]]:
    """The prompts with what greedy decoding writes after each, as many tokens as the longest answer of `like` has.

    Prompts after which it writes nothing are left out; `InputError` where more than half are.
    """
    assert model.tokenizer is not None
    longest = max(len(model.tokenizer(text, add_special_tokens=False).input_ids) for text in like)
    kept: tuple[list[str], list[str]] = ([], [])
    for prompt in prompts:
        text = str(model.generate(prompt, max_new_tokens=longest, do_sample=False))
        try:
            prompt_answer_rows(model, [prompt], [text])
        except InputError:
            continue
        kept[0].append(prompt)
        kept[1].append(text)
    if 2 * len(kept[0]) < len(prompts):
        raise InputError(
            "the model says nothing of its own to most of the prompts; give neutral answers or a control set."
        )
    return kept


def _difference(a: np.ndarray, b: np.ndarray) -> Interval:
    return contrast({"a": a, "b": b}, {"a": 1.0, "b": -1.0})
