"""A reward head on a language model, from files of feedback: trained, measured beside what could embarrass it, and used.

The head is that of #110 (`preference`), at the last token of prompt and answer in the model's chat template. With ratings and
preferences it follows the paper: ratings first, then pairs. A frozen trunk is read once, each answer by itself; a feature is
scaled to a standard deviation of 1 for training, and the scale goes into the weights, so the head reads plain states.

Pair accuracy is the share of test pairs whose preferred answer has the higher score. Beside it stand the longer (or shorter)
answer, whichever is right more often in training, the same head on counts of words, and a random head on the same states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.heads import mean_stderr
from manyheads.inputs import check_choice, check_integer
from manyheads.learning import Attached, MultiHead, Trunk, sequence_classifier
from manyheads.learning.trunk import Layer
from manyheads.model.headmodel import HeadModel
from manyheads.predict.reward.answers import (
    Answer,
    answer_states,
    conversations,
    padded_ids,
    tokens_of_texts,
    word_counts,
)
from manyheads.predict.reward.feedback import AnswerPair, Feedback, split_feedback, unseen_feedback
from manyheads.predict.reward.pairs import pair_target
from manyheads.predict.reward.preference import (
    LOSSES,
    RewardHead,
    RewardLoss,
    RewardSettings,
    preference_loss,
    rate_then_prefer,
)
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, epoch_rows

NAME = "reward"
LEAST = 10  # lines of feedback to train on
FROZEN = replace(ADAM, epochs=40, rows=32, rate=1e-3, patience=8)
"""For a head on a frozen trunk; it stops early, by a part of the feedback that is left out."""
TUNED = TrainSettings(epochs=2, rows=8, rate=1e-5, warmup=10, decay=0.5, weight_decay=0.0, precision="fp32", patience=3)
"""For a trunk that is tuned with its head, which was trained on the frozen trunk before."""
SELDOM = 10**9  # steps between looks at conflicts of gradients, which one head has with nobody


@dataclass(frozen=True)
class RewardRun:
    """A trained reward head on its trunk (`heads`), and how it does on pairs that it did not learn from.

    `table` has a row a scorer: pair accuracy, its standard error over pairs, and their number. `notes` say how to read it.
    """

    heads: MultiHead
    table: pd.DataFrame
    notes: tuple[str, ...]


def train_reward(
    model: HeadModel,
    feedback: Feedback,
    test: Feedback | None = None,
    *,
    layer: Layer | Literal["best"] = -1,
    objective: RewardLoss = "scaled",
    tune: bool = False,
    settings: TrainSettings | None = None,
    exportable: bool = False,
    most_tokens: int = 1024,
    seed: int = 0,
    bar: Bar = Bar(),
) -> RewardRun:
    """Train a reward head on `feedback` and measure it on `test`, or on a fifth of the prompts, which are then left out.

    `objective` is the loss of pairs; ratings alone are learned by regression. Of a text longer than `most_tokens` its end is
    read. The layer "best" is one of five from a third of the depth on, by the part of `feedback` that stops training early. With
    `tune` the trunk learns too: the model's weights change. `exportable`: no bias, and it is tried beforehand whether
    `sequence_classifier` can write it. `InputError` for too little feedback, a layer that is not there, no tokenizer.
    """
    check_choice(objective, "objective", LOSSES[1:])
    check_integer(most_tokens, "most_tokens", 1)
    layers = _candidates(model) if layer == "best" else [layer]
    if layer == "best" and (tune or exportable):
        raise InputError(
            "the best layer is looked for on a frozen trunk, and only the last is exported; give its number."
        )
    feedback, test = split_feedback(feedback, 0.2, seed) if test is None else (feedback, test)
    test = unseen_feedback(test, feedback)
    answers = list(dict.fromkeys([*feedback.answers, *test.answers]))
    lesson = _Lesson.of(feedback, test, answers, objective, seed, bar)
    ids, cut = tokens_of_texts(model, conversations(model, answers), most_tokens)
    bias = not feedback.pairs and not exportable
    head = RewardHead(RewardSettings(Trunk(model).width, bias=bias, objective=objective, seed=seed))
    head.to(next(p for p in model.plain.parameters() if p.is_floating_point()))  # its device and number format
    heads = MultiHead(Trunk(model, frozen=not tune), {NAME: Attached(head, layer=layers[0], pool="last")})
    if exportable:
        sequence_classifier(heads, NAME)
    answer_states(model, ids[:1], layers)  # a layer that is not there is known before all are read
    read = answer_states(model, ids, layers, bar=bar.step("reading states", len(ids)))
    # A trunk is tuned from a head that was trained on it as it was, so that the head's first noise does not spoil it.
    best = lesson.best_of(head, read, FROZEN if tune or settings is None else settings)
    heads.attached[NAME] = replace(heads.attached[NAME], layer=layers[best])
    states = read[best]
    drawn = RewardHead(RewardSettings(states.shape[1], seed=seed + 500))(states)[:, 0].detach()
    if tune:
        used = replace(settings or TUNED, seed=seed)
        lesson.teach(heads, lambda rows: padded_ids(model, [ids[i] for i in rows.tolist()]), used)
        (states,) = answer_states(model, ids, layers, bar=bar.step("scoring", len(ids)))
    words = word_counts(answers, feedback.answers)
    scorers = {
        "reward head": score_states(heads, states),
        "words counted": lesson.of_states(words, FROZEN).scores(words),
        **_by_length(feedback, answers),
        "random head": drawn,
    }
    notes = _notes(feedback, test, cut, most_tokens)
    if layer == "best":
        tried = ", ".join(map(str, layers))
        notes.insert(0, f"Reads layer {layers[best]}, the best of {tried} on what was left out.")
    return RewardRun(heads, _measured(scorers, test.compared, lesson.number), tuple(notes))


def reward_scores(
    heads: MultiHead, answers: Sequence[Answer], *, most_tokens: int = 1024, rows: int = 16, bar: Bar = Bar()
) -> Float[Tensor, "N"]:
    """The reward of each answer to its prompt, by a head that `train_reward` made (or that was loaded). Higher is better."""
    model = heads.trunk.model
    if not isinstance(model, HeadModel) or NAME not in heads.attached:
        raise InputError(f"these heads have no {NAME!r} on a language model; give those that `predict reward` saved.")
    different = list(dict.fromkeys(answers))
    ids, _ = tokens_of_texts(model, conversations(model, different), most_tokens)
    layers = [heads.attached[NAME].layer]
    (states,) = answer_states(model, ids, layers, rows=rows, bar=bar.step("scoring", len(ids)))
    number = {answer: i for i, answer in enumerate(different)}
    return score_states(heads, states)[[number[answer] for answer in answers]]


@torch.no_grad()
def score_states(heads: MultiHead, states: Float[Tensor, "N D"]) -> Float[Tensor, "N"]:
    """The rewards of states that were read at the head's layer."""
    head: Any = heads.attached[NAME].head
    scores: Tensor = head(states.to(head.linear.weight))[:, head.settings.overall].float().cpu()
    return scores


@dataclass(frozen=True)
class _Numbered:
    """Feedback by the numbers of its answers: pairs [P, 2], preferred first, with strengths, and rated ones with ratings."""

    pairs: Tensor
    strength: Tensor
    rated: Tensor
    rating: Tensor

    @classmethod
    def of(cls, feedback: Feedback, number: Mapping[Answer, int]) -> _Numbered:
        pairs = [[number[one.prompt, one.chosen], number[one.prompt, one.rejected]] for one in feedback.pairs]
        rated = [number[one.prompt, one.response] for one in feedback.rated]
        return cls(
            torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            torch.tensor([one.margin for one in feedback.pairs]),
            torch.tensor(rated, dtype=torch.long),
            torch.tensor([one.rating for one in feedback.rated]),
        )


@dataclass(frozen=True)
class _Fitted:
    """A head for (states - mean) / scale, and its loss on what it did not learn from."""

    head: RewardHead
    mean: Tensor
    scale: Tensor
    loss: float

    @torch.no_grad()
    def scores(self, states: Tensor) -> Tensor:
        out: Tensor = self.head((states - self.mean) / self.scale)
        return out[:, 0]


@dataclass(frozen=True)
class _Lesson:
    """What to learn from, and by what to stop early."""

    learned: _Numbered
    valid: _Numbered
    objective: RewardLoss
    number: Mapping[Answer, int]
    seed: int
    bar: Bar

    @classmethod
    def of(
        cls, feedback: Feedback, test: Feedback, answers: Sequence[Answer], objective: RewardLoss, seed: int, bar: Bar
    ) -> _Lesson:
        learned, valid = split_feedback(feedback, 0.15, seed + 1)
        _check_enough(feedback, learned, valid, test)
        number = {answer: i for i, answer in enumerate(answers)}
        return cls(_Numbered.of(learned, number), _Numbered.of(valid, number), objective, number, seed, bar)

    def best_of(self, head: RewardHead, read: Sequence[Tensor], settings: TrainSettings) -> int:
        """Train on the states of each layer, put the best weights into `head`, and say which layer they are for."""
        found = [self.of_states(states, settings) for states in read]
        best = min(range(len(found)), key=lambda i: found[i].loss)
        _fold(head, found[best])
        return best

    def of_states(self, states: Tensor, settings: TrainSettings) -> _Fitted:
        """A head on states that were read."""
        rows = torch.cat([self.learned.pairs.flatten(), self.learned.rated])
        mean, scale = states[rows].mean(0), states[rows].std(0).clamp_min(1e-6)
        x = (states - mean) / scale
        head = RewardHead(RewardSettings(x.shape[1], bias=not len(self.learned.pairs), objective=self.objective))
        nn.init.zeros_(head.linear.weight)  # what the data say nothing of stays at 0
        if head.settings.bias:
            nn.init.constant_(head.linear.bias, float(self.learned.rating.mean()))
        heads = MultiHead(Trunk(nn.Identity()), {NAME: head})
        used = replace(settings, seed=self.seed)
        return _Fitted(head, mean, scale, self.teach(heads, lambda numbers: {"input": x[numbers]}, used))

    def teach(self, heads: MultiHead, inputs: Callable[[Tensor], dict[str, Tensor]], settings: TrainSettings) -> float:
        """Ratings, then pairs, as far as there are any. Returns the loss on what was left out."""
        head: Any = heads.attached[NAME].head
        learned, valid, ends_with_pairs = self.learned, self.valid, len(self.learned.pairs) > 0
        # Without a bias the head cannot know where ratings lie, so they count from their mean.
        centre = learned.rating.mean() if len(learned.rated) and head.linear.bias is None else torch.tensor(0.0)

        def by_rows(number: int) -> dict[str, Tensor]:
            rows = epoch_rows(len(learned.rated), settings.rows, number, settings.seed)
            return {**inputs(learned.rated[rows]), NAME: learned.rating[rows] - centre}

        def by_pairs(number: int) -> dict[str, Tensor]:
            rows = epoch_rows(len(learned.pairs), settings.rows, number, settings.seed)
            return {**inputs(learned.pairs[rows].flatten()), NAME: pair_target(learned.strength[rows])}

        def judge() -> float:
            numbers = valid.pairs.flatten() if ends_with_pairs else valid.rated
            out = torch.cat([heads(inputs(part))[NAME] for part in numbers.split(2 * settings.rows)]).cpu()
            if not ends_with_pairs:
                return float((out[:, 0] - valid.rating + centre).square().mean())
            gap = out[:, 0].view(-1, 2)
            return float(preference_loss(gap[:, 0] - gap[:, 1], valid.strength, self.objective))

        first, second = (settings.for_examples(len(part)) for part in (learned.rated, learned.pairs))
        if not ends_with_pairs:
            head.learns("rating")
            heads.fit(by_rows, first, judge=judge, log_every=SELDOM, bar=self.bar.step("training", first.steps))
        elif len(learned.rated):
            rate_then_prefer(heads, by_rows, by_pairs, first, second, objective=self.objective, judge=judge)
        else:
            heads.fit(by_pairs, second, judge=judge, log_every=SELDOM, bar=self.bar.step("training", second.steps))
        with torch.no_grad():
            return judge()


@torch.no_grad()
def _fold(head: RewardHead, fitted: _Fitted) -> None:
    """Put weights for scaled states into the head for states as they are. What is constant goes where there is no bias."""
    head.learns(fitted.head.settings.objective)
    weight = fitted.head.linear.weight / fitted.scale
    head.linear.weight.copy_(weight)
    if head.settings.bias:
        head.linear.bias.copy_(fitted.head.linear.bias - weight @ fitted.mean)


def _candidates(model: HeadModel) -> list[Layer]:
    """The last layer, and four from a third of the depth on."""
    depths = {max(1, round(model.n_layers * share)) for share in (1 / 3, 1 / 2, 2 / 3, 5 / 6)}
    return [-1, *sorted(depths - {model.n_layers})]


def _check_enough(feedback: Feedback, learned: Feedback, valid: Feedback, test: Feedback) -> None:
    found = sum(one.margin > 0 for one in feedback.pairs) + len(feedback.rated)
    if found < LEAST:
        raise InputError(
            f"there are {found} preferences (ties aside) and ratings to learn from; give at least {LEAST}."
        )
    if not test.compared:
        raise InputError("there is no pair to test on that was not learned from; give other pairs as the test.")
    for part in (learned, valid):
        if feedback.pairs and not any(one.margin for one in part.pairs):
            raise InputError("too few pairs are left to learn from and to stop early by; give more of them.")
        if not feedback.pairs and not part.rated:
            raise InputError("too few ratings are left to learn from and to stop early by; give more of them.")


def _by_length(feedback: Feedback, answers: Sequence[Answer]) -> dict[str, Tensor]:
    """The length in characters, or its negative, whichever is right more often in training."""
    shorter = sum(np.sign(len(one.chosen) - len(one.rejected)) for one in feedback.compared) < 0
    lengths = torch.tensor([float(len(answer)) for _, answer in answers])
    return {"shorter answer": -lengths} if shorter else {"longer answer": lengths}


def _measured(scorers: Mapping[str, Tensor], pairs: Sequence[AnswerPair], number: Mapping[Answer, int]) -> pd.DataFrame:
    chosen = [number[one.prompt, one.chosen] for one in pairs]
    rejected = [number[one.prompt, one.rejected] for one in pairs]
    rows = []
    for name, scores in scorers.items():
        gap = (scores[chosen] - scores[rejected]).double().numpy()
        mean, stderr = mean_stderr((gap > 0) + (gap == 0) / 2)
        rows.append((name, float(mean), float(stderr), len(pairs)))
    return pd.DataFrame(rows, columns=["scorer", "pair accuracy", "stderr", "pairs"])


def _notes(feedback: Feedback, test: Feedback, cut: int, most: int) -> list[str]:
    known, pairs = set(feedback.answers), test.compared
    seen = sum((one.prompt, answer) in known for one in pairs for answer in (one.chosen, one.rejected))
    notes = [
        f"Learned from {len(feedback.pairs)} pairs and {len(feedback.rated)} ratings, tested on {len(pairs)} pairs."
    ]
    if seen:
        share = seen / (2 * len(pairs))
        notes.append(
            f"{share:.0%} of the answers in the test stood in other pairs in training, which flatters the heads."
        )
    if not test.pairs:
        notes.append("Test pairs are made of ratings, so they share answers, and the standard errors are too small.")
    if cut:
        notes.append(
            f"{cut} texts were longer than {most} tokens, or than the model's positions; their ends were read."
        )
    return [*notes, "Scores compare answers to one prompt; their zero means nothing."] if feedback.pairs else notes
