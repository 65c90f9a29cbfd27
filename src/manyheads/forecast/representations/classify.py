"""Classes of whole series: what every classifier does with series of equal or unequal lengths, and the plain ones to beat.

    NearestSeries(band=0.1).fit(x, y).predict(x)          # the class of the nearest training series, by DTW
    ConvolutionRidge().fit(x, y)                          # a ridge regression on random convolutions

Series are [N, T, C] or [N, T], with NaN where nothing was observed, or a list of [T, C] of different lengths. Each is stretched
by linear interpolation to the median length of the training series, over its own gaps too, so that its length says nothing.
Channels are scaled to mean 0 and standard deviation 1 over the training series.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.progress import Bar

EPSILON = 1e-6
PENALTIES = tuple(10.0**e for e in range(-3, 5))


def series_rows(x: Any) -> list[Float[np.ndarray, "T C"]]:
    """Each series from its first to its last observed step. `InputError` for what is no series, or holds nothing."""
    try:
        rows = [np.asarray(row, dtype=np.float32) for row in x]
    except (TypeError, ValueError):
        raise InputError("series are no numbers; give [N, T, C], [N, T], or a list of [T, C].") from None
    rows = [row[:, None] if row.ndim == 1 else row for row in rows]
    if not rows or any(row.ndim != 2 for row in rows) or len({row.shape[1] for row in rows}) != 1:
        raise InputError("there are no series, or they differ in their channels; give [N, T, C], or a list of [T, C].")
    out = []
    for number, row in enumerate(rows):
        seen = np.flatnonzero(np.isfinite(row).any(1))
        if np.isinf(row).any() or not np.isfinite(row).any(0).all():
            raise InputError(f"series {number} holds infinity, or a channel without a value; leave it out.")
        out.append(row[seen[0] : seen[-1] + 1])
    return out


def stretched(rows: Sequence[Float[np.ndarray, "_ C"]], steps: int) -> Float[np.ndarray, "N {steps} C"]:
    """Series at `steps` places from their first step to their last, linear between what was observed."""
    out = np.empty((len(rows), steps, rows[0].shape[1]), np.float32)
    for into, row in zip(out, rows, strict=True):
        places = np.linspace(0, len(row) - 1, steps)
        for c, channel in enumerate(row.T):
            seen = np.flatnonzero(np.isfinite(channel))
            into[:, c] = np.interp(places, seen, channel[seen])
    return out


class ScaledSeries:
    """What a method knows of its training series: their length, and the mean and deviation of each channel."""

    mean_: Float[np.ndarray, "C"]
    std_: Float[np.ndarray, "C"]
    steps_: int

    def measure(self, x: Any) -> Float[Tensor, "N T C"]:
        """The training series, as the method sees them."""
        rows = series_rows(x)
        self.steps_ = int(np.median([len(row) for row in rows]))
        found = stretched(rows, self.steps_)
        self.mean_ = found.mean((0, 1), dtype=np.float64)
        self.std_ = np.maximum(found.std((0, 1), dtype=np.float64), EPSILON)
        return self._scaled(found)

    def scaled(self, x: Any) -> Float[Tensor, "N T C"]:
        """Other series, by the length and the scale of the training series. `InputError` for other channels."""
        if not hasattr(self, "steps_"):
            raise InputError(f"this {type(self).__name__} was not fitted; call fit first.")
        rows = series_rows(x)
        if rows[0].shape[1] != len(self.mean_):
            raise InputError(f"it was fitted on {len(self.mean_)} channels, and these have {rows[0].shape[1]}.")
        return self._scaled(stretched(rows, self.steps_))

    def _scaled(self, x: Float[np.ndarray, "N T C"]) -> Float[Tensor, "N T C"]:
        return torch.from_numpy(((x - self.mean_) / self.std_).astype(np.float32))

    def _scales(self) -> dict[str, Any]:
        return {"mean": self.mean_.tolist(), "std": self.std_.tolist(), "steps": self.steps_}

    def _take_scales(self, about: Mapping[str, Any]) -> None:
        self.mean_, self.std_, self.steps_ = np.array(about["mean"]), np.array(about["std"]), int(about["steps"])


class SeriesClassifier(ScaledSeries, ABC):
    """`fit`, `predict`, `predict_proba`, `score`. A method fills in `learn` and `logits`, which are given scaled [N, T, C]."""

    classes_: np.ndarray

    def fit(self, x: Any, y: Any, *, bar: Bar = Bar()) -> Self:
        """Learn from series and their classes. `InputError` for fewer than two classes, or other numbers of both."""
        series, y = self.measure(x), np.asarray(y)
        if y.ndim != 1 or len(y) != len(series) or y.dtype.kind not in "iubUS":
            raise InputError(f"{len(series)} series do not go with classes {y.shape}; give a number or text for each.")
        self.classes_, numbers = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise InputError(f"all series are of class {self.classes_[0]!r}; give series of two classes at least.")
        self.learn(series, torch.from_numpy(numbers), bar)
        return self

    @torch.no_grad()
    def predict_proba(self, x: Any) -> Float[np.ndarray, "N K"]:
        """The probability of each class, in the order of `classes_`."""
        return self.logits(self.scaled(x)).double().softmax(-1).numpy()

    def predict(self, x: Any) -> Shaped[np.ndarray, "N"]:
        """The likeliest class of each series."""
        best = self.predict_proba(x).argmax(1)
        return self.classes_[best]

    def score(self, x: Any, y: Any) -> float:
        """The share of series whose class is right."""
        return float((self.predict(x) == np.asarray(y)).mean())

    @abstractmethod
    def learn(self, x: Float[Tensor, "N T C"], y: Int[Tensor, "N"], bar: Bar) -> None:
        """Methods fill this in; classes are numbers from 0 on."""

    @abstractmethod
    def logits(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N K"]:
        """Methods fill this in."""


class RidgeProbe:
    """Linear regression of targets [N, K] on features [N, D] with a penalty a |w|^2, chosen by leave-one-out errors.

    Features are scaled by the training rows; in closed form, over the kernel of rows, so that D may be large.
    """

    def fit(self, features: Float[Tensor, "N D"], targets: Float[Tensor, "N K"]) -> RidgeProbe:
        """Learn. Of the residuals r_i / (1 - h_ii) the mean square decides."""
        f, t = features.double(), targets.double()
        self.mean, self.shift = f.mean(0), t.mean(0)
        self.std = torch.where(f.std(0, correction=0) > EPSILON, f.std(0, correction=0), 1.0)
        z, off = (f - self.mean) / self.std / f.shape[1] ** 0.5, t - self.shift
        wide = z.shape[1] > z.shape[0]
        values, vectors = torch.linalg.eigh(z @ z.T if wide else z.T @ z)
        u = vectors if wide else z @ vectors / values.clamp_min(1e-12).sqrt()
        values, best = values.clamp_min(0), float("inf")
        for penalty in PENALTIES:
            shrunk = values / (values + penalty)
            left = off - u @ (shrunk[:, None] * (u.T @ off))
            kept = 1 - (u.square() @ shrunk) - 1 / len(z)
            error = float((left / kept.clamp_min(1e-6)[:, None]).square().mean())
            if error < best:
                best, self.penalty = error, penalty
        system = (
            z.T @ z + self.penalty * torch.eye(z.shape[1]) if not wide else z @ z.T + self.penalty * torch.eye(len(z))
        )
        solved = torch.linalg.solve(system.double(), off if wide else z.T @ off)
        self.weight = (z.T @ solved if wide else solved) / f.shape[1] ** 0.5
        return self

    def predict(self, features: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """The targets."""
        return (features.double() - self.mean) / self.std @ self.weight + self.shift


class RawRidge(SeriesClassifier):
    """A ridge regression on the values as they are."""

    def learn(self, x: Float[Tensor, "N T C"], y: Int[Tensor, "N"], bar: Bar) -> None:
        """Fit the regression to +1 for the class of a series and -1 for the others."""
        self.probe = RidgeProbe().fit(self.features(x), 2.0 * F.one_hot(y) - 1)

    def logits(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N K"]:
        """What the regression says: an order of classes, no probability."""
        return self.probe.predict(self.features(x))

    def features(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N D"]:
        """[N, T C]."""
        return x.flatten(1)


class ConvolutionRidge(RawRidge):
    """A ridge regression on random convolutions (after ROCKET, arXiv:1910.13051): each one's share above 0, and its maximum."""

    def __init__(self, kernels: int = 1000, seed: int = 0) -> None:
        self.kernels, self.seed = check_integer(kernels, "kernels", 8), check_seed(seed)

    def features(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N D"]:
        """Kernels of 9 steps at dilations of powers of 2 over all channels, with weights of mean 0, drawn by the seed."""
        draw, out = torch.Generator().manual_seed(self.seed), []
        most = max(1, int(np.log2(max(2, (x.shape[1] - 1) / 8))) + 1)
        for level in range(most):
            n = len(range(level, self.kernels, most))
            weight = torch.randn(n, x.shape[2], 9, generator=draw)
            weight = (weight - weight.mean(-1, keepdim=True)) / x.shape[2] ** 0.5
            bias = 2 * torch.rand(n, generator=draw) - 1
            y = F.conv1d(x.transpose(1, 2), weight, bias, padding="same", dilation=2**level)
            out += [(y > 0).float().mean(-1), y.amax(-1)]
        return torch.cat(out, 1)


class NearestSeries(SeriesClassifier):
    """The class of the nearest training series: by Euclidean distance, or by DTW within a `band`, a share of the length."""

    def __init__(self, band: float = 0.0) -> None:
        self.band = check_number(band, "band", 0.0, 1.0)

    def learn(self, x: Float[Tensor, "N T C"], y: Int[Tensor, "N"], bar: Bar) -> None:
        """Keep the series."""
        self.kept, self.of = x, y

    def logits(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N K"]:
        """Minus the distance to the nearest series of each class: an order of classes, no probability."""
        far = warped_distance(x, self.kept, round(self.band * x.shape[1]))
        return torch.stack([-far[:, self.of == k].amin(1) for k in range(int(self.of.max()) + 1)], 1)


def warped_distance(a: Float[Tensor, "N T C"], b: Float[Tensor, "M T C"], band: int) -> Float[Tensor, "N M"]:
    """Dynamic time warping: the least sum of squared differences along a path at most `band` off the diagonal.

    d[i, j] = |a_i - b_j|^2 + min(d[i-1, j], d[i, j-1], d[i-1, j-1]); with band 0 it is the squared Euclidean distance.
    """
    steps, none = a.shape[1], torch.full((len(a), len(b)), torch.inf)
    before = [torch.zeros_like(none)] + [none] * steps
    for i in range(steps):
        row = [none] * (steps + 1)
        for j in range(max(0, i - band), min(steps, i + band + 1)):
            step = (a[:, None, i] - b[None, :, j]).square().sum(-1)
            row[j + 1] = step + torch.minimum(torch.minimum(before[j], before[j + 1]), row[j])
        before = row
    return before[-1]
