"""Why in-context classification is learned all at once (#51): two layers of attention on pairs of item and label.

Reddy, arXiv:2312.03002. K classes have means mu_k ~ N(0, I / D) and class k has label k mod L, a vector of the same law. A
sequence is N pairs of item and label, then a target item whose label is the answer:

    item   = (mu_k + eps eta) / sqrt(1 + eps^2), eta ~ N(0, I / D)     token = one-hot position (random window), then content
    model  : x <- x + softmax(x Q (x K)^T / sqrt(W), causal) x V, twice, one head each; the last token into an MLP of L logits

Claim: the loss first falls to ln N (one of the labels shown, nobody knows which), stays, and falls to 0 at once when both heads
of an induction circuit have formed. Theory: the parameters grow as a product, so nothing moves until all have begun; where L = N
all labels are always shown, ln N is chance, and the circuit has no slope to begin on. Refuted by: a fall without a plateau at
ln N, a fall without the two heads, or a run with L = N that learns. Measured on fixed sequences, all shares in [0, 1]:

    ILA1    layer 1: attention of a label to its item            TILA2    layer 2: attention of the target to the right labels
    TLA2    layer 2: attention of the target to all labels       CLA      share of answers that are labels of the context

Departures: Adam at 1e-3 in place of plain descent at .01, so that a run takes thousands of updates and not hundreds of thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal, cast

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, fit_seeds, generator_of

Kind = Literal["train", "in context", "swapped", "in weights"]
KINDS = ("train", "in context", "swapped", "in weights")
MEASURES = ("loss", "accuracy", "ILA1", "TILA2", "TLA2", "CLA")
LEARNING = replace(ADAM, steps=4000, rows=128, rate=1e-3)
HELD_OUT = 10**6 - 1  # the number of the batch that is measured


@dataclass(frozen=True)
class ItemLabels:
    """A batch: contents of the 2 N + 1 tokens, labels of the pairs and of the target (last), and where the window begins."""

    content: Float[Tensor, "B T D"]
    labels: Int[Tensor, "B N1"]
    start: Int[Tensor, " B"]

    @property
    def answers(self) -> Int[Tensor, " B"]:
        """The right labels."""
        return self.labels[:, -1]


@dataclass(frozen=True)
class ItemLabelTask:
    """K `classes`, L `labels`, N `pairs` a sequence, D `features`; each class of the context stands there `burst` times.

    With probability 1 - `bursty` context and target are drawn independently. With probability `fresh` all means are new: only the
    context helps. Classes have probabilities k^-`zipf`. With `distinct` no two classes of a context share a label.
    """

    classes: int = 32
    labels: int = 32
    pairs: int = 8
    features: int = 63
    noise: float = 0.1
    burst: int = 1
    bursty: float = 1.0
    fresh: float = 1.0
    zipf: float = 0.0
    positions: int = 65
    distinct: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("classes", "labels", "pairs", "features", "burst"):
            check_integer(getattr(self, name), name, 1)
        check_integer(self.positions, "positions", 2 * self.pairs + 1)
        check_seed(self.seed)
        for name in ("noise", "zipf"):
            check_number(getattr(self, name), name, 0.0)
        for name in ("bursty", "fresh"):
            check_number(getattr(self, name), name, 0.0, 1.0)
        if self.pairs % self.burst or self.classes % self.labels:
            raise InputError(
                f"got {self.pairs} pairs in bursts of {self.burst}, and {self.classes} classes of {self.labels} labels; give "
                "whole bursts, and as many classes for each label."
            )
        if self.shown > (self.labels if self.distinct else self.classes):
            raise InputError(f"a context shows {self.shown} classes; give at least as many labels (or classes).")

    @property
    def shown(self) -> int:
        """Classes in a context."""
        return self.pairs // self.burst

    @property
    def guess(self) -> float:
        """The loss of a guess between the labels shown, in nats: ln N where they are distinct."""
        return math.log(self.shown)

    def vectors(self) -> tuple[Float[Tensor, "K D"], Float[Tensor, "L D"]]:
        """Means of the classes and vectors of the labels, from the seed."""
        generator = generator_of(self.seed, 0)
        drawn = torch.randn(self.classes + self.labels, self.features, generator=generator) / self.features**0.5
        return drawn[: self.classes], drawn[self.classes :]

    def draw(self, n: int, number: int, seed: int = 0, kind: Kind = "train") -> ItemLabels:
        """`n` sequences; `number` and `seed` decide which.

        Kinds other than "train" are tests: "in context" has fresh classes, "swapped" known ones whose labels in the context (and
        the answer) are the next ones, "in weights" a known target that the context does not show.
        """
        check_choice(kind, "kind", KINDS)
        generator = generator_of(seed, number)
        means, vectors = self.vectors()
        order = self._order(n, generator)
        if kind == "in weights" and order.shape[1] == self.shown:
            raise InputError("every class is in every context; give more labels or classes than the context shows.")
        if kind == "in weights":  # the target is drawn first: it is as frequent as `zipf` says
            target, order = order[:, 0], order[:, 1:]
        else:
            target = order[torch.arange(n), torch.randint(self.shown, (n,), generator=generator)]
        shown = order[:, : self.shown].repeat_interleave(self.burst, 1)
        if kind == "train" and self.bursty < 1:
            alone = (torch.rand(n, generator=generator) >= self.bursty)[:, None]
            free = self._free(n, generator)
            shown, target = torch.where(alone, free[:, :-1], shown), torch.where(alone[:, 0], free[:, -1], target)
        shown = shown.gather(1, torch.rand(shown.shape, generator=generator).argsort(1))
        classes = torch.cat([shown, target[:, None]], 1)
        labels = (classes + (kind == "swapped")) % self.labels
        items = means[classes]
        share = {"train": self.fresh, "in context": 1.0}.get(kind, 0.0)
        if share:
            first = (classes[:, :, None] == classes[:, None]).byte().argmax(-1)  # copies of a class stay copies
            new = torch.randn(items.shape, generator=generator) / self.features**0.5
            new = new.gather(1, first[..., None].expand_as(new))
            items = torch.where((torch.rand(n, generator=generator) < share)[:, None, None], new, items)
        eta = torch.randn(items.shape, generator=generator) / self.features**0.5
        items = (items + self.noise * eta) / (1 + self.noise**2) ** 0.5
        content = torch.stack([items, vectors[labels]], 2).flatten(1, 2)[:, :-1]
        start = torch.randint(self.positions - content.shape[1] + 1, (n,), generator=generator)
        return ItemLabels(content, labels, start)

    def _log_weights(self) -> Float[Tensor, " K"]:
        return -self.zipf * torch.arange(1, self.classes + 1).log()

    def _order(self, n: int, generator: torch.Generator) -> Int[Tensor, "B C"]:
        """Classes in the order in which they are drawn without replacement; with `distinct` the first one of each label.

        Weights plus Gumbel noise, sorted, are such an order.
        """
        keys = self._log_weights() - (-torch.rand(n, self.classes, generator=generator).log()).log()
        if not self.distinct:
            return keys.argsort(1, descending=True)
        best, which = keys.view(n, -1, self.labels).max(1)  # class k has label k mod L
        order = best.argsort(1, descending=True)
        return which.gather(1, order) * self.labels + order

    def _free(self, n: int, generator: torch.Generator) -> Int[Tensor, "B N1"]:
        weights = self._log_weights().exp().expand(n, -1)
        return torch.multinomial(weights, self.pairs + 1, replacement=True, generator=generator)


class TwoLayers(nn.Module):
    """The network of the formula above. `patterns` are of the newest pass: layer 1 [B, T, T], layer 2 of the target [B, T].

    With `held` layer 1's tokens attend to themselves alone, throughout training: what if its head never formed?
    """

    def __init__(self, task: ItemLabelTask, *, hidden: int = 128, held: bool = False, seed: int = 0) -> None:
        super().__init__()
        self.held = held
        self.positions, width = task.positions, task.positions + task.features
        generator = generator_of(check_seed(seed), 1)
        self.qkv = nn.Parameter(torch.randn(2, 3, width, width, generator=generator) / width**0.5)
        self.mlp = three_layers(width, hidden, task.labels, seed)

    def forward(self, given: ItemLabels) -> Float[Tensor, "B L"]:
        """Logits of the target's label."""
        length = given.content.shape[1]
        window = F.one_hot(given.start[:, None] + torch.arange(length), self.positions).to(given.content.dtype)
        x = torch.cat([window, given.content], -1)
        (q1, k1, v1), (q2, k2, v2) = self.qkv
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        scores = (x @ q1) @ (x @ k1).transpose(1, 2) / x.shape[-1] ** 0.5
        hidden = ~torch.eye(length, dtype=torch.bool) if self.held else later
        lower = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        x = x + lower @ (x @ v1)
        last = x[:, -1:]
        upper = ((last @ q2) @ (x @ k2).transpose(1, 2) / x.shape[-1] ** 0.5).softmax(-1)
        self.patterns = lower.detach(), upper[:, 0].detach()
        logits: Tensor = self.mlp((last + upper @ x @ v2)[:, 0])
        return logits


def three_layers(inputs: int, hidden: int, outputs: int, seed: int) -> nn.Sequential:
    """Three hidden layers with ReLU, as Torch begins them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for a, b in pairwise((inputs, hidden, hidden, hidden)):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(hidden, outputs))


@torch.no_grad()
def progress_measures(model: nn.Module, given: ItemLabels) -> dict[str, float]:
    """Loss in nats, accuracy, and the four measures of the formula above."""
    logits = model(given)
    lower, upper = cast(tuple[Tensor, Tensor], model.patterns)
    item = torch.arange(0, lower.shape[1] - 1, 2)
    at_labels, context = upper[:, 1::2], given.labels[:, :-1]
    said = logits.argmax(-1, keepdim=True)
    right = (context == given.answers[:, None]).to(upper.dtype)
    return {
        "loss": float(F.cross_entropy(logits, given.answers)),
        "accuracy": float((said[:, 0] == given.answers).float().mean()),
        "ILA1": float(lower[:, item + 1, item].mean()),
        "TILA2": float((at_labels * right).sum(-1).mean()),
        "TLA2": float(at_labels.sum(-1).mean()),
        "CLA": float((said == context).any(-1).float().mean()),
    }


@dataclass(frozen=True)
class AbruptRun:
    """A training run, measured every few updates: an array a measure (`MEASURES`), each [N]; layer 1's head has ILA1, layer 2's
    TILA2 and TLA2. `model` is the trained one."""

    task: ItemLabelTask
    updates: Int[np.ndarray, " N"]
    measures: dict[str, Float[np.ndarray, " N"]]
    model: nn.Module
    seed: int

    def __getitem__(self, name: str) -> Float[np.ndarray, " N"]:
        """A measure by name, such as "loss" or "ILA1"."""
        return self.measures[name]

    @property
    def drop(self) -> int | None:
        """The first measured update with a loss below half that of a guess between the labels shown; None if there is none."""
        below = self["loss"] < self.task.guess / 2
        return int(self.updates[below.argmax()]) if below.any() else None

    @property
    def plateau(self) -> tuple[int, float]:
        """Updates of the longest stretch before the drop within .15 nats of the guess and CLA >= .98; the best accuracy there."""
        flat = (abs(self["loss"] - self.task.guess) <= 0.15) & (self["CLA"] >= 0.98)
        flat &= self.updates < (np.inf if self.drop is None else self.drop)
        longest, best, first = 0, math.nan, None
        for i, holds in enumerate(flat):
            first = None if not holds else i if first is None else first
            if first is not None and self.updates[i] - self.updates[first] >= longest:
                longest = int(self.updates[i] - self.updates[first])
                best = float(self["accuracy"][first : i + 1].max())
        return longest, best

    def around_drop(self, name: str, updates: int = 600) -> tuple[float, float]:
        """A measure at the beginning and at the end of so many updates around the drop; NaN without a drop."""
        if self.drop is None:
            return math.nan, math.nan
        ends = (self.drop - updates / 2, self.drop + updates / 2)
        before, after = np.interp(ends, self.updates, self[name])
        return float(before), float(after)

    @property
    def fall(self) -> float:
        """How abrupt: updates from 90 % to 10 % of the first loss, as a share of the drop's; NaN if it does not fall so far."""
        part = self["loss"] / self["loss"][0]
        if self.drop is None or part.min() > 0.1:
            return math.nan
        return float(self.updates[(part < 0.1).argmax()] - self.updates[(part < 0.9).argmax()]) / self.drop

    def to_frame(self) -> pd.DataFrame:
        """One row a measurement: update, loss, accuracy, ILA1, TILA2, TLA2, CLA."""
        return pd.DataFrame({"update": self.updates, **self.measures})


def abrupt_run(
    task: ItemLabelTask = ItemLabelTask(),
    model: nn.Module | None = None,
    *,
    settings: TrainSettings = LEARNING,
    every: int = 20,
    looked_at: int = 1000,
    seed: int = 0,
    bar: Bar = Bar(),
) -> AbruptRun:
    """Train `TwoLayers` (or a `model` with `patterns` like it); measure on `looked_at` fixed new sequences of fresh classes.

    4,000 updates take 45 seconds on one core with N = 4, L = 16. `seed` draws weights and sequences.
    """
    models = [TwoLayers(task, seed=seed) if model is None else model]
    return abrupt_runs([task], models, settings=settings, every=every, looked_at=looked_at, seeds=(seed,), bar=bar)[0]


def abrupt_runs(
    tasks: Sequence[ItemLabelTask],
    models: Sequence[nn.Module],
    *,
    settings: TrainSettings = LEARNING,
    every: int = 20,
    looked_at: int = 1000,
    seeds: Sequence[int] = (0,),
    bar: Bar = Bar(),
) -> list[AbruptRun]:
    """The same with several seeds at once, each with a task and a model of its own."""
    for name, value in (("every", every), ("looked_at", looked_at)):
        check_integer(value, name, 1)
    given = list(zip(tasks, models, seeds, strict=True))
    shown = [task.draw(looked_at, HELD_OUT, seed, "in context") for task, _, seed in given]
    records: dict[int, list[dict[str, float]]] = {}

    def look(step: int) -> None:
        records[step] = [progress_measures(model, seen) for model, seen in zip(models, shown, strict=True)]

    look(0)
    fit_seeds(
        models,
        [partial(task.draw, settings.rows, seed=seed) for task, _, seed in given],
        settings,
        loss=lambda m, batch: F.cross_entropy(m(batch), batch.answers),
        look=look,
        every=every,
        bar=bar,
    )
    updates = np.array(list(records))
    found = []
    for s, (task, model, seed) in enumerate(given):
        measures = {name: np.array([record[s][name] for record in records.values()]) for name in MEASURES}
        found.append(AbruptRun(task, updates, measures, model, seed))
    return found
