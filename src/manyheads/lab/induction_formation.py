"""What an induction head needs to form (#45): train a small transformer with parts of its circuit given.

Singh et al., arXiv:2404.07129. Sequences A x B y A ?: two exemplars of different classes with random labels, then one of
them again, whose label is the answer. Labels are redrawn for each sequence: the answer is only in the prompt. Parts are clamped
*throughout training* (`clamping.py`), and only heads h of the upper layer are kept (the others' values are 0):

    none                no part
    previous token      one head of the lower layer attends to the token before, the first token to itself
    layer 1             patterns of the upper layer from embeddings moved one token later, its values from raw embeddings
    match               h's query row attends to the right label
    copy                logits of the two labels shown are h's scores there, others -1e9: copying is given
    layer 1 + copy      both

    strength[h] = a_h(query, right label) - a_h(query, wrong label)        in [-1, 1], attention
    crossing    = the first measured update with a loss below 0.4 ln 2 nats        (ln 2: guessing between the two labels)

The paper numbers the layers 1 and 2, and so do the experiments' names; heads and intermediates are numbered from 0.

Departures: classes are Gaussian vectors with one exemplar each, not features of Omniglot characters; Adam's rate is 1e-3,
not 1e-5, so that a run takes hundreds of updates and not tens of thousands; loss and strength are means over fixed sequences of
training classes. A run is too short to be resumed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.heads import Head
from manyheads.lab.clamping import NEVER, Clamp, ClampedTransformer, Clamps, Trace
from manyheads.progress import Bar
from manyheads.training import ADAM, Progress, fit

KNOWN_LABELS = math.log(2)  # the loss of guessing between the two labels shown
CROSSED = 0.4 * KNOWN_LABELS
PLATEAU = (0.95 * KNOWN_LABELS, 0.95)
PREVIOUS = Head(0, 0)
TOKENS = 5
SHOWN = (1, 3)  # positions of the labels


@dataclass(frozen=True)
class Sequences:
    """Exemplars A, B and the query, their labels (the last is the answer), and which of the two pairs the query repeats."""

    exemplars: Float[Tensor, "B 3 F"]
    labels: Int[Tensor, "B 3"]
    asked: Int[Tensor, " B"]

    @property
    def answers(self) -> Int[Tensor, " B"]:
        """The right labels."""
        return self.labels[:, -1]


Experiment = Callable[[ClampedTransformer, Sequences, Sequence[int]], Clamps]
"""The clamps for these sequences and kept heads of the upper layer; passes it runs for them keep their gradients."""


@dataclass(frozen=True)
class FewShot:
    """Class vectors and pairs of labels, each for training and held out."""

    classes: dict[str, Float[Tensor, "C F"]]
    pairs: dict[str, Int[Tensor, "P 2"]]
    n_labels: int

    @classmethod
    def random(
        cls, *, classes: int = 50, held: int = 100, features: int = 64, labels: int = 5, seed: int = 0
    ) -> FewShot:
        """Unit Gaussian vectors; a fifth of the pairs of labels is held out, never one that leaves a label unseen."""
        if classes < 2 or held < 2 or features < 1 or labels < 4:
            raise InputError(
                f"got {classes} classes, {held} held out, {features} features and {labels} labels; give at least 2, 2, 1 "
                "and 4."
            )
        draw = torch.Generator().manual_seed(seed)
        vectors = torch.randn(classes + held, features, generator=draw)
        pairs = torch.tensor(list(combinations(range(labels), 2)))
        cut = len(pairs) // 5
        order = torch.randperm(len(pairs), generator=draw)
        while len(pairs[order[cut:]].unique()) < labels:
            order = torch.randperm(len(pairs), generator=draw)
        return cls(
            {"train": vectors[:classes], "held": vectors[classes:]},
            {"train": pairs[order[cut:]], "held": pairs[order[:cut]]},
            labels,
        )

    def draw(self, n: int, seed: torch.Generator, *, classes: str = "train", pairs: str = "train") -> Sequences:
        """`n` sequences; `classes` and `pairs` name a split, "train" or "held"."""
        if n < 1 or classes not in self.classes or pairs not in self.pairs:
            raise InputError(
                f'got n={n}, classes {classes!r}, pairs {pairs!r}; give n from 1 on and "train" or "held" for each.'
            )

        def below(bound: int) -> Int[Tensor, " B"]:
            return torch.randint(bound, (n,), generator=seed)

        vectors, choices = self.classes[classes], self.pairs[pairs]
        first = below(len(vectors))
        second = (first + 1 + below(len(vectors) - 1)) % len(vectors)
        shown = choices[below(len(choices))]
        shown = torch.where(below(2)[:, None] == 1, shown.flip(1), shown)
        asked = below(2)
        items = _and_query(torch.stack([first, second], 1), asked)
        return Sequences(vectors[items], _and_query(shown, asked), asked)


@dataclass(frozen=True)
class Formation:
    """One training run, measured every few updates: `strength` has a column for each of `heads` (of the upper layer).

    `loss` in nats and `accuracy` are under the clamps of the experiment; `model` is the trained model.
    """

    experiment: str
    heads: tuple[int, ...]
    updates: Int[np.ndarray, " N"]
    loss: Float[np.ndarray, " N"]
    accuracy: Float[np.ndarray, " N"]
    strength: Float[np.ndarray, "N H"]
    model: ClampedTransformer
    task: FewShot
    batch: int
    seed: int

    @property
    def crossing(self) -> int | None:
        """The first measured update with a loss below 0.4 ln 2; None if there is none."""
        below = self.loss < CROSSED
        return int(self.updates[below.argmax()]) if below.any() else None

    @property
    def plateau(self) -> int:
        """Length, in updates, of the longest stretch before the crossing with a loss from 0.95 ln 2 to 0.95."""
        end = len(self.loss) if self.crossing is None else int(np.argmax(self.loss < CROSSED))
        longest, first = 0, None
        for at, loss in zip(self.updates[:end], self.loss[:end], strict=True):
            if not PLATEAU[0] <= loss <= PLATEAU[1]:
                first = None
                continue
            first = at if first is None else first
            longest = max(longest, int(at - first))
        return longest

    def to_frame(self) -> pd.DataFrame:
        """One row a measurement: experiment, update, sequences seen, loss, accuracy, and the strength of each kept head."""
        frame = pd.DataFrame(
            {
                "experiment": self.experiment,
                "update": self.updates,
                "sequences": self.updates * self.batch,
                "loss": self.loss,
                "accuracy": self.accuracy,
            }
        )
        return frame.assign(**{str(Head(1, h)): self.strength[:, i] for i, h in enumerate(self.heads)})


def previous_token_pattern(length: int = TOKENS) -> Float[Tensor, "T T"]:
    """The pattern that attends to the token before; the first token attends to itself."""
    return F.one_hot((torch.arange(length) - 1).clamp_min(0), length).float()


def only(model: ClampedTransformer, heads: Collection[int], *, layer: int = 1) -> dict[str, Clamp]:
    """The clamp under which the other heads of `layer` have values 0."""
    return {f"{layer}.v": Clamp(~_these(model, heads), torch.tensor(0.0))}


def none(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """No part given: only the upper layer's `heads` are kept."""
    return only(model, heads)


def previous(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """One head of the lower layer has the pattern of a previous-token head."""
    return only(model, heads) | {"0.pattern": Clamp(_these(model, [PREVIOUS.index]), previous_token_pattern())}


def layer_one(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """The upper layer's patterns come from embeddings moved one token later (first and query stay), its values from raw ones."""
    raw = model.embed(given.exemplars, given.labels)
    later = torch.cat([raw[:, :1], raw[:, :-2], raw[:, -1:]], 1)
    shifted = model(given.exemplars, given.labels, {"0.resid": Clamp.whole(later)})
    held = {name: Clamp.whole(shifted[name]) for name in ("1.scores", "1.pattern")}
    return only(model, heads) | {"0.resid": Clamp.whole(raw)} | held


def match(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """The query attends to the right label."""
    row = F.one_hot(torch.tensor(SHOWN)[given.asked], TOKENS).float()[:, None, None]
    return only(model, heads) | {"1.pattern": Clamp(_these(model, heads) & _query_row(), row)}


def copy(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """The query's logits are a head's scores at the labels shown."""
    return _copied(model(given.exemplars, given.labels), given, heads)


def layer_one_and_copy(model: ClampedTransformer, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    """Both: only the matching of the upper layer is left to learn."""
    held = layer_one(model, given, heads)
    return held | _copied(model(given.exemplars, given.labels, held), given, heads)


EXPERIMENTS: dict[str, Experiment] = {
    "none": none,
    "previous token": previous,
    "layer 1": layer_one,
    "match": match,
    "copy": copy,
    "layer 1 + copy": layer_one_and_copy,
}


def induction_strength(trace: Trace, given: Sequences, *, layer: int = 1) -> Float[Tensor, "B H"]:
    """The strength of every head of `layer` on each sequence (formula above)."""
    right, wrong = torch.tensor(SHOWN)[given.asked], torch.tensor(SHOWN)[1 - given.asked]
    row, each = trace[f"{layer}.pattern"][:, :, -1], torch.arange(len(given.asked))
    return row[each, :, right] - row[each, :, wrong]


@torch.no_grad()
def formation_accuracy(model: ClampedTransformer, given: Sequences, clamped: Clamps | None = None) -> float:
    """The share of right answers, under the clamps if given."""
    logits = model(given.exemplars, given.labels, clamped)["logits"][:, -1]
    return float((logits.argmax(-1) == given.answers).float().mean())


def alone(model: ClampedTransformer, given: Sequences) -> pd.DataFrame:
    """One row for each head of the upper layer: its strength, the accuracy with it alone, and the accuracy without it."""
    with torch.no_grad():
        strength = induction_strength(model(given.exemplars, given.labels), given).mean(0)
    every = range(model.n_heads)
    return pd.DataFrame(
        {
            "head": [str(Head(1, h)) for h in every],
            "strength": np.asarray(strength),
            "alone": [formation_accuracy(model, given, only(model, [h])) for h in every],
            "without": [formation_accuracy(model, given, only(model, set(every) - {h})) for h in every],
        }
    )


@torch.no_grad()
def without_below(
    model: ClampedTransformer,
    given: Sequences,
    heads: Collection[int],
    *,
    preserve: Collection[Literal["pattern", "v"]] = (),
    kept: Collection[int] | None = None,
) -> float:
    """Accuracy with the lower layer's `heads` ablated (values 0), the upper layer's patterns or values preserved.

    If preserving patterns suffices, the lower heads' output is used to match; if values, to copy. `kept`: heads of the upper
    layer that the model was trained with (default: all).
    """
    if set(preserve) - {"pattern", "v"}:
        raise InputError(f'preserve is {tuple(preserve)}; give some of "pattern" and "v".')
    every = range(model.n_heads)
    upper = only(model, every if kept is None else kept)
    trace = model(given.exemplars, given.labels, upper)
    held = {f"1.{part}": Clamp.whole(trace[f"1.{part}"]) for part in preserve}
    return formation_accuracy(model, given, upper | only(model, set(every) - set(heads), layer=0) | held)


def formation(
    experiment: str | Experiment = "none",
    *,
    task: FewShot | None = None,
    heads: Sequence[int] = (0,),
    steps: int = 1000,
    batch: int = 32,
    rate: float = 1e-3,
    every: int = 10,
    looked_at: int = 512,
    seed: int = 0,
    bar: Bar = Bar(),
) -> Formation:
    """Train by Adam for `steps` updates with `experiment` clamped; measure on `looked_at` fixed sequences every `every` updates.

    `experiment` is a name of `EXPERIMENTS` or a function like them. `seed` draws the task (50 classes, 5 labels, unless one is
    given), the weights and the sequences, the same for every experiment. `heads` of the upper layer are kept: one, as in the
    paper's experiments, or all, to see their joint effect.

    Raises:
        InputError: if the experiment is unknown, a head does not exist, an experiment that copies gets more than one head, or a
            number is not positive.
    """
    name, hold = _named(experiment)
    if seed < 0 or rate <= 0 or min(steps, batch, every, looked_at) < 1:
        raise InputError(
            f"got steps={steps}, batch={batch}, every={every}, looked_at={looked_at}, rate={rate}, seed={seed}; give numbers "
            "above 0 and a seed of at least 0."
        )
    task = task or FewShot.random(seed=seed)
    weights, batches, shown_seed = (int(s) for s in np.random.SeedSequence(seed).generate_state(3))
    model = ClampedTransformer(task.classes["train"].shape[1], task.n_labels, seed=weights)
    if not heads or len(set(heads)) < len(heads) or not set(heads) <= set(range(model.n_heads)):
        raise InputError(f"heads are {tuple(heads)}; give different ones from 0 to {model.n_heads - 1}.")
    draw = torch.Generator().manual_seed(batches)
    shown = task.draw(looked_at, torch.Generator().manual_seed(shown_seed))
    records = [(0, *_measure(model, shown, hold, heads))]

    def after_step(progress: Progress, _: torch.optim.Optimizer) -> None:
        if progress.step % every == 0:
            records.append((progress.step, *_measure(model, shown, hold, heads)))

    fit(
        model,
        lambda _: task.draw(batch, draw),
        replace(ADAM, steps=steps, rate=rate),
        loss=lambda _, given: _loss(model(given.exemplars, given.labels, hold(model, given, heads)), given),
        after_step=after_step,
        device=task.classes["train"].device,
        bar=bar,
    )
    updates, losses, right, strength = (np.asarray(column) for column in zip(*records, strict=True))
    return Formation(name, tuple(heads), updates, losses, right, strength, model, task, batch, seed)


@torch.no_grad()
def _measure(
    model: ClampedTransformer, given: Sequences, hold: Experiment, heads: Sequence[int]
) -> tuple[float, float, Float[np.ndarray, " H"]]:
    trace = model(given.exemplars, given.labels, hold(model, given, heads))
    right = (trace["logits"][:, -1].argmax(-1) == given.answers).float().mean()
    strength = induction_strength(trace, given).mean(0)[list(heads)]
    return float(_loss(trace, given)), float(right), np.asarray(strength)


def _loss(trace: Trace, given: Sequences) -> Float[Tensor, ""]:
    return F.cross_entropy(trace["logits"][:, -1], given.answers)


def _copied(trace: Trace, given: Sequences, heads: Sequence[int]) -> dict[str, Clamp]:
    if len(heads) > 1:
        raise InputError(f"the answer is read off one head, and {len(heads)} are kept; give one.")
    scores = trace["1.scores"][:, heads[0], -1, list(SHOWN)]
    logits = torch.full_like(trace["logits"][:, -1], NEVER).scatter(1, given.labels[:, :-1], scores)
    return {"logits": Clamp(_query_row(), logits[:, None])}


def _these(model: ClampedTransformer, heads: Collection[int]) -> Bool[Tensor, "H 1 1"]:
    return torch.tensor([h in heads for h in range(model.n_heads)])[:, None, None]


def _query_row() -> Bool[Tensor, "T 1"]:
    return (torch.arange(TOKENS) == TOKENS - 1)[:, None]


def _and_query(shown: Int[Tensor, "B 2"], asked: Int[Tensor, " B"]) -> Int[Tensor, "B 3"]:
    return torch.cat([shown, shown.gather(1, asked[:, None])], 1)


def _named(experiment: str | Experiment) -> tuple[str, Experiment]:
    if callable(experiment):
        return getattr(experiment, "__name__", type(experiment).__name__), experiment
    if experiment not in EXPERIMENTS:
        raise InputError(f"experiment is {experiment!r}; give one of {', '.join(EXPERIMENTS)}, or a function.")
    return experiment, EXPERIMENTS[experiment]
