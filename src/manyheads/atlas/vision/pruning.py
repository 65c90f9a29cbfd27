"""Pruning importance of vision heads (#40): what an image classifier loses without a head.

Li et al., "How Does Attention Work in Vision Transformers?", arXiv:2303.13731 (details are our reading). A head, or a set
of heads, is pruned by z = 0. With p and p' the class probabilities and s and s' the CLS state after the final norm, with and
without them,

    probability_drop = p[true] - p'[true]                                 in [-1, 1], positive: the head helped
    divergence       = JS(p, p') = H((p + p') / 2) - (H(p) + H(p')) / 2   in nats, [0, ln 2]
    changed          = [argmax p != argmax p']                            share of images, in [0, 1]
    cls_change       = 1 - cos(s, s')                                     in [0, 2]

each a mean over images, and over those of each class. Divergence and CLS change are unsigned: a head acts, but need
not help. A head pruned alone looks idle while another does the same: what matters is judged on sets, against random sets
(`pruning_check`), and heads that stand in for each other are those that cost more together than one by one
(`interactions`). Models without CLS are judged by the mean of their patches' states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from manyheads.atlas.core.behaviour import About
from manyheads.atlas.vision.strength import PAPER, PatchGrid, check_images, image_chunks, patch_grid
from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.controls import Control, matched_sets
from manyheads.heads import Head, HeadLike, HeadScores, HeadSet, mean_stderr
from manyheads.model.editing.edits import Ablate
from manyheads.model.headmodel import HeadModel
from manyheads.model.reading.readers import Activation, Reader
from manyheads.model.replay.recording import Recording
from manyheads.progress import Bar

ABOUTS = {
    about.name: about
    for about in (
        About(
            name="probability_drop",
            title="Drop of the true class",
            what="The true class becomes less likely without the head.",
            formula="p[true] - p'[true]",
            unit="probability",
            paper=PAPER,
            threshold=0.01,
            low=-1.0,
            kind="importance",
        ),
        About(
            name="divergence",
            title="Divergence of predictions",
            what="The class probabilities become others without the head.",
            formula="JS(p, p')",
            unit="nats",
            paper=PAPER,
            threshold=0.01,
            high=float(np.log(2)),
            kind="importance",
        ),
        About(
            name="changed",
            title="Changed predictions",
            what="Images are named differently without the head.",
            formula="[argmax p != argmax p']",
            unit="share of images",
            paper=PAPER,
            threshold=0.01,
            kind="importance",
        ),
        About(
            name="cls_change",
            title="Change of CLS",
            what="The state that is classified turns without the head.",
            formula="1 - cos(CLS, CLS')",
            unit="cosine",
            paper=PAPER,
            threshold=0.01,
            high=2.0,
            kind="importance",
        ),
    )
}
METRICS = tuple(ABOUTS)


@dataclass(frozen=True)
class PruningImportance:
    """What pruning each head alone costs, by metric: over all images, and `by_class[metric]` `[C, L, H]` (NaN: no image)."""

    scores: dict[str, HeadScores]
    by_class: dict[str, Float[np.ndarray, "C L H"]]
    images_of_class: Int[np.ndarray, "C"]
    accuracy: float

    def __getitem__(self, metric: str) -> HeadScores:
        return self.scores[metric]

    def to_frame(self) -> pd.DataFrame:
        """A row a head: layer, index, head, the four importances and their standard errors, n."""
        first = self.scores[METRICS[0]].to_frame()
        frame = first[["layer", "index", "head"]].copy()
        for name, scores in self.scores.items():
            frame[name], frame[f"{name}_stderr"] = scores.values.ravel(), scores.stderr.ravel()
        return frame.assign(n=first["n"])

    def classes(self) -> pd.DataFrame:
        """A row a class and head: class, layer, index, head, the four importances, n (images of the class)."""
        c, layer, index = (axis.ravel() for axis in np.indices(self.by_class[METRICS[0]].shape))
        frame = pd.DataFrame({"class": c, "layer": layer, "index": index})
        frame["head"] = [str(Head(int(a), int(b))) for a, b in zip(layer, index, strict=True)]
        for name in METRICS:
            frame[name] = self.by_class[name].ravel()
        return frame.assign(n=self.images_of_class[c])


@dataclass(frozen=True)
class PruningCheck:
    """What pruning `heads` together costs (`effect`, mean over `n` images, with its standard error), what each costs `alone`,
    and what different random sets with as many heads in each layer cost.

    `p_value` is the share of sets, this one counted in, that cost at least as much.
    """

    heads: HeadSet
    metric: str
    n: int
    effect: float
    stderr: float
    alone: tuple[float, ...]
    random_effects: tuple[float, ...]
    p_value: float

    @property
    def redundancy(self) -> float:
        """How much more the set costs than its heads one by one, summed. Positive: they stand in for each other."""
        return self.effect - sum(self.alone)


class _States(Reader):
    """Keeps the classified states of the latest pass, a batch for each variant in it."""

    site = "resid"

    def __init__(self, model: HeadModel, grid: PatchGrid, batch: int) -> None:
        self.layers = [model.n_layers]
        self.norm, self.grid, self.batch = model.layout.final_norm, grid, batch
        self.waiting: list[Tensor] = []

    def read(self, call: Activation) -> None:
        self.waiting += self.state(call.value).split(self.batch)

    def state(self, resid: Float[Tensor, "B T D"]) -> Float[Tensor, "B D"]:
        """CLS after the final norm, or the mean over patches where there is no CLS."""
        states = resid if self.norm is None else self.norm(resid)
        return (states[:, 0] if self.grid.special else states.mean(1)).double()


def pruned_answers(
    model: HeadModel, recording: Recording, labels: Int[Tensor, "B"], sets: Sequence[HeadSet], grid: PatchGrid
) -> Float[np.ndarray, "V 4 B"]:
    """The four importances (in the order of `METRICS`) of pruning each of `sets`, for every image of a recorded clean pass."""
    clean = _probabilities(model, recording.logits)
    if labels.min() < 0 or labels.max() >= clean.shape[1]:
        raise InputError(
            f"labels lie between 0 and {clean.shape[1] - 1}, the classes of this model; got {labels.tolist()}."
        )
    labels = labels.to(clean.device)[:, None]
    states = _States(model, grid, recording.batch)
    last = recording.outputs[-1]
    before = states.state(last if isinstance(last, Tensor) else last[0])

    def costs(logits: Tensor) -> Tensor:
        p = _probabilities(model, logits)
        drop = (clean - p).gather(1, labels)[:, 0]
        changed = (clean.argmax(1) != p.argmax(1)).to(drop)
        turned = 1 - torch.cosine_similarity(before, states.waiting.pop(0), dim=-1)
        return torch.cat([drop, divergence(clean, p), changed, turned])

    order = sorted(
        range(len(sets)), key=lambda i: min(h.layer for h in sets[i])
    )  # the order in which a sweep runs them
    with model.reading(states):
        costs_of = model.sweep(recording, [Ablate(sets[i]) for i in order], costs)
    values = np.empty_like(costs_of)
    values[order] = costs_of
    return values.reshape(len(sets), len(METRICS), recording.batch)


def divergence(p: Float[Tensor, "B C"], q: Float[Tensor, "B C"]) -> Float[Tensor, "B"]:
    """Jensen-Shannon divergence in nats: 0 where p = q, ln 2 where they have nothing in common."""
    middle = (p + q) / 2
    return (torch.xlogy(p, p / middle) + torch.xlogy(q, q / middle)).nan_to_num().sum(1).clamp(min=0) / 2


def importance_of(
    model: HeadModel, per_image: Float[np.ndarray, "LH 4 N"], labels: Int[Tensor, "N"], clean: Float[np.ndarray, "N"]
) -> PruningImportance:
    """The importances of single heads from their values for every image; `clean` marks the images that are named rightly."""
    values = per_image.reshape(*model.shape, len(METRICS), -1).transpose(2, 3, 0, 1)  # [4, N, L, H]
    wanted = labels.cpu().numpy()
    n_classes = max(int(getattr(model.config, "num_labels", 0)), int(wanted.max()) + 1)
    counts = np.bincount(wanted, minlength=n_classes)
    by_class = {}
    for name, one in zip(METRICS, values, strict=True):
        totals = np.zeros((n_classes, *model.shape))
        np.add.at(totals, wanted, one)
        by_class[name] = np.where(counts[:, None, None] > 0, totals / np.maximum(counts, 1)[:, None, None], np.nan)
    scores = {
        name: HeadScores.from_examples(name, one, ABOUTS[name].provenance(model, 0, n=len(wanted)))
        for name, one in zip(METRICS, values, strict=True)
    }
    return PruningImportance(scores, by_class, counts, float(clean.mean()))


def pruning_importance(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    labels: Int[Tensor, "N"],
    *,
    bar: Bar = Bar(),
) -> PruningImportance:
    """Prune every head by itself and measure the four importances (formulas above); `bar` counts images.

    `InputError` if `labels` do not fit `images` or the model's classes, `UnsupportedError` if the model is no image classifier.
    """
    return importance_of(model, *_over_images(model, images, labels, singles(model.heads), bar))


def pruning_check(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    labels: Int[Tensor, "N"],
    heads: HeadSet | Sequence[HeadLike],
    *,
    metric: str = "probability_drop",
    n_random: int = 20,
    seed: int = 0,
    bar: Bar = Bar(),
) -> PruningCheck:
    """Prune `heads` together, each alone, and `n_random` >= 20 different random sets with as many heads in each layer.

    Where the layers hold fewer different sets, `random_effects` has fewer. `InputError` for no heads, for fewer sets asked, or
    for an unknown metric.
    """
    if metric not in METRICS:
        raise InputError(f"unknown importance {metric!r}; choose one of {', '.join(METRICS)}.")
    sets = check_sets(model, heads, n_random, seed)
    values, *_ = _over_images(model, images, labels, sets, bar)
    return check_from(sets[0], values[:, METRICS.index(metric)], metric)


def check_sets(
    model: HeadModel, heads: HeadSet | Sequence[HeadLike], n_random: int = 20, seed: int = 0
) -> list[HeadSet]:
    """What a pruning check prunes: the heads together, each alone, then different random sets matched by layer."""
    chosen = model.head_set(heads)
    if not chosen:
        raise InputError("a pruning check needs at least one head; give some, such as scores.top(3).")
    if n_random < 20:
        raise InputError(f"a pruning check needs at least 20 random sets, not {n_random}.")
    return [chosen, *singles(chosen), *matched_sets(chosen, n_random, seed, shape=model.shape)]


def check_from(heads: HeadSet, values: Float[np.ndarray, "S N"], metric: str) -> PruningCheck:
    """The check of `heads` from one importance of all its sets, for every image."""
    together, alone, random = np.split(values, [1, 1 + len(heads)])
    control = Control.of(np.concatenate([together, random]))
    return PruningCheck(
        heads=heads,
        metric=metric,
        n=values.shape[1],
        effect=control.effect,
        stderr=control.stderr,
        alone=tuple(map(float, alone.mean(1))),
        random_effects=control.random,
        p_value=control.p_value,
    )


def interactions(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    labels: Int[Tensor, "N"],
    *,
    heads: HeadSet | Sequence[HeadLike] | None = None,
    metric: str = "probability_drop",
    bar: Bar = Bar(),
) -> pd.DataFrame:
    """Which heads stand in for each other: `interaction = together - (a alone + b alone)`, a row a pair of `heads` (None: all).

    Columns a, b, together, alone, interaction, stderr (of the interaction, over images), largest interaction first. Positive:
    redundant. The pairs of n heads are n (n - 1) / 2 prunings of every image.
    """
    chosen = model.heads if heads is None else model.head_set(heads)
    if len(chosen) < 2 or metric not in METRICS:
        raise InputError(
            f"interactions need two heads or more and one of {', '.join(METRICS)}; got {chosen} and {metric!r}."
        )
    pairs = list(combinations(range(len(chosen)), 2))
    names = list(chosen)
    sets = singles(chosen) + [model.head_set([names[a], names[b]]) for a, b in pairs]
    values = _over_images(model, images, labels, sets, bar)[0][:, METRICS.index(metric)]
    alone = values[: len(names)]
    rows = []
    for (a, b), together in zip(pairs, values[len(names) :], strict=True):
        excess = together - alone[a] - alone[b]
        sizes = together.mean(), (alone[a] + alone[b]).mean(), *mean_stderr(excess)
        rows.append((str(names[a]), str(names[b]), *map(float, sizes)))
    frame = pd.DataFrame(rows, columns=["a", "b", "together", "alone", "interaction", "stderr"])
    return frame.sort_values("interaction", ascending=False, kind="stable", ignore_index=True)


def singles(heads: HeadSet) -> list[HeadSet]:
    """Each head as a set of its own."""
    return [HeadSet([head], heads.shape) for head in heads]


def _over_images(
    model: HeadModel,
    images: Float[Tensor, "N C Y X"],
    labels: Int[Tensor, "N"],
    sets: Sequence[HeadSet],
    bar: Bar,
) -> tuple[Float[np.ndarray, "V 4 N"], Int[Tensor, "N"], Float[np.ndarray, "N"]]:
    check_images(images, labels)
    grid = patch_grid(model, images)
    values, right = [], []
    for rows in image_chunks(grid, len(images)):
        recording = model.record({"pixel_values": images[rows]})
        values.append(pruned_answers(model, recording, labels[rows], sets, grid))
        right.append(named_rightly(recording, labels[rows]))
        bar(rows.stop - rows.start)
    return np.concatenate(values, -1), labels, np.concatenate(right)


def named_rightly(recording: Recording, labels: Int[Tensor, "B"]) -> Float[np.ndarray, "B"]:
    """1 where the clean pass names the true class, else 0."""
    return (recording.logits.argmax(-1).cpu() == labels.cpu()).double().numpy()


def _probabilities(model: HeadModel, logits: Tensor) -> Float[Tensor, "B C"]:
    if logits.ndim != 2:
        raise UnsupportedError(
            f"{type(model.plain).__name__} returns {list(logits.shape)}, not one row of class logits an image; open an image "
            "classifier."
        )
    return logits.double().softmax(-1)
