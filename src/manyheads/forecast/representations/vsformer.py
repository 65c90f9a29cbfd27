"""VSFormer (#55): the class of a series from its typical shapes and from statistics of intervals, with priors from the classes.

"VSFormer: Value and Shape-Aware Transformer with Prior-Enhanced Self-Attention for Multivariate Time Series Classification",
arXiv:2412.16515.

    model = VSFormer().fit(x, y)          # x [N, T, C], or a list of [T, C]; y a number or text for each
    model.predict(x), model.predict_proba(x), model.score(x, y)
    model.priors_["shape"]                # a prior a token; model.motifs_ and model.intervals_ say which tokens these are

With s a window of m steps of one channel, less its mean and over its deviation, and d(s, x)^2 the least |s - w|^2 / m over such
windows w of x,

    shape token    the window of x nearest to motif s less s, and d(s, x); a motif is a window of a training series whose nearest
                   window in another series of its class is nearer than others'
    its prior      mean of d(s, x) over x of other classes / mean over the other x of its class
    value token    mean, deviation, least, most and slope of one channel on one of 2^g equal intervals, g = 0 ... levels - 1
    its prior      1 - H(class | statistic in quarters) / H(class), of the statistic with the highest
    attention      softmax(R * Q K^T / sqrt(Dh)) V,  R_ij = r_i r_j / mean(r)^2,  r the priors: R has mean 1, and R = 1 is plain
    class          W [mean of shape tokens, mean of value tokens] after an encoder for each

Motifs, priors and scales come from the training series alone. We depart: the paper's text gives an outline, and the details are
ours. Motifs are the best of each class over all channels and lengths; a token also has the distance; priors above or below 1
scale scores of both signs, as in the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.forecast.representations.classify import SeriesClassifier
from manyheads.inputs import check_choice, check_integer, check_number, check_seed
from manyheads.learning import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import TrainSettings, fit, row_batches

BRANCHES = ("shape", "value")
PRIORS = ("classes", "shuffled", "none")
STATISTICS = 5
FLAT = 0.05  # the least deviation that a window is divided by, in that of the channel: a flat one is no shape
MOST = 4000  # windows of a class in which motifs are looked for
CLASSIFYING = TrainSettings(
    epochs=60, rows=16, rate=2e-3, warmup=20, weight_decay=0.05, decay=0.5, floor=0.0, precision="fp32"
)


@dataclass(frozen=True)
class VSFormerSettings:
    """`motifs` of each class, of `lengths` (shares of a series); `levels` of intervals, at most `values` tokens; the encoder.

    `branches` are used. `priors` come from the "classes", or to compare from "shuffled" ones, or there are "none" (R = 1).
    It trains for the epochs of its `TrainSettings`, and for `steps` at least.
    """

    motifs: int = 8
    lengths: tuple[float, ...] = (0.12, 0.3)
    levels: int = 4
    values: int = 60
    width: int = 32
    layers: int = 2
    heads: int = 4
    dropout: float = 0.1
    branches: tuple[str, ...] = BRANCHES
    priors: str = "classes"
    steps: int = 600
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("motifs", "levels", "values", "width", "layers", "heads", "steps"):
            check_integer(getattr(self, name), name, 1)
        for length in self.lengths:
            check_number(length, "lengths", 0.0, 1.0, above=True)
        for branch in self.branches:
            check_choice(branch, "branches", BRANCHES)
        check_number(self.dropout, "dropout", 0.0, 0.9)
        check_choice(self.priors, "priors", PRIORS)
        check_seed(self.seed)
        if not self.lengths or not self.branches or self.width % self.heads:
            raise InputError(f"give a length, a branch, and a width that {self.heads} heads divide, not {self.width}.")


def prior_attention(
    q: Float[Tensor, "B H N Dh"], k: Float[Tensor, "B H N Dh"], v: Float[Tensor, "B H N Dh"], prior: Float[Tensor, "N"]
) -> Float[Tensor, "B H N Dh"]:
    """softmax(R * q k^T / sqrt(Dh)) v, with R the outer product of the priors over its mean."""
    r = prior / prior.mean()
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (r[:, None] * r * scores).softmax(-1) @ v


class PriorLayer(nn.Module):
    """An encoder layer, norms first, whose attention is multiplied by priors."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.norm, self.mlp_norm = heads, nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out, self.dropout = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.Dropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Float[Tensor, "B N D"], prior: Float[Tensor, "N"]) -> Float[Tensor, "B N D"]:
        """The stream after it."""
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.dropout(self.out(prior_attention(q, k, v, prior).transpose(1, 2).flatten(-2)))
        out: Tensor = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return out


class TokenEncoder(nn.Module):
    """Numbers of tokens with encodings of channel, class and place; layers; the mean. `tags` [N, 2] are channel and class."""

    tags: Tensor
    prior: Tensor

    def __init__(self, inputs: int, tokens: int, kinds: tuple[int, int], settings: VSFormerSettings) -> None:
        super().__init__()
        width = settings.width
        self.embed, self.place = nn.Linear(inputs, width), nn.Linear(2, width)
        self.kinds = nn.ModuleList([nn.Embedding(n, width) for n in kinds])
        # Tokens stand in the same order for every series, so each has an encoding of its own too.
        self.own = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.layers = nn.ModuleList(
            [PriorLayer(width, settings.heads, settings.dropout) for _ in range(settings.layers)]
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("tags", torch.zeros(tokens, 2, dtype=torch.long))
        self.register_buffer("prior", torch.ones(tokens))

    def forward(self, tokens: Float[Tensor, "B N I"]) -> Float[Tensor, "B D"]:
        """The mean of the tokens. The last two numbers of each are where it begins and how long it is."""
        x = self.embed(tokens[..., :-2]) + self.place(tokens[..., -2:]) + self.own
        x = x + sum(kind(tag) for kind, tag in zip(self.kinds, self.tags.T, strict=True))
        for layer in self.layers:
            x = layer(x, self.prior)
        out: Tensor = self.norm(x).mean(1)
        return out


class VSFormerNetwork(nn.Module):
    """An encoder a branch, and a linear layer. A batch has the tokens of each branch, and `y`."""

    def __init__(self, encoders: dict[str, TokenEncoder], classes: int, settings: VSFormerSettings) -> None:
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.dropout = nn.Dropout(settings.dropout)
        self.decide = nn.Linear(settings.width * len(encoders), classes)

    def logits(self, tokens: dict[str, Tensor]) -> Float[Tensor, "B K"]:
        """Of the classes."""
        read = [encoder(tokens[name]) for name, encoder in self.encoders.items()]
        out: Tensor = self.decide(self.dropout(torch.cat(read, 1)))
        return out

    def forward(self, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        """Cross-entropy in nats."""
        return F.cross_entropy(self.logits(batch), batch["y"])


def shapes_of(x: Float[Tensor, "N T"], m: int) -> Float[Tensor, "N W m"]:
    """Every window of m steps less its mean and over its deviation."""
    windows = x.unfold(1, m, 1)
    middle = windows - windows.mean(-1, keepdim=True)
    return middle / middle.square().mean(-1, keepdim=True).sqrt().clamp_min(FLAT)


def shape_distances(x: Float[Tensor, "N T"], shapes: Float[Tensor, "M m"]) -> Float[Tensor, "N W M"]:
    """d^2 of each window of each series to each shape."""
    windows, m = shapes_of(x, shapes.shape[1]), shapes.shape[1]
    squares = windows.square().sum(-1)[..., None] + shapes.square().sum(-1)
    return ((squares - 2 * windows @ shapes.T) / m).clamp_min(0)


def class_motifs(
    x: Float[Tensor, "N T"], m: int, count: int, generator: torch.Generator
) -> tuple[Float[Tensor, "M m"], Int[Tensor, "M"]]:
    """Windows whose nearest one in another series is nearest, and whose series each is of; matches of chosen ones are left out.

    A join of at most MOST windows with all.
    """
    shapes = shapes_of(x, m)
    n, w = shapes.shape[:2]
    chosen = torch.randperm(n * w, generator=generator)[:MOST]
    profile = torch.full((n, w), torch.inf)
    for part in chosen.split(500):
        near = shape_distances(x, shapes.flatten(0, 1)[part]).amin(1)  # [N, part]
        near[part // w, torch.arange(len(part))] = torch.inf  # its own series is no other
        profile.view(-1)[part] = near.amin(0)
    found, of = list[Tensor](), list[int]()
    while len(found) < count and bool(profile.isfinite().any()):
        i, j = divmod(int(profile.argmin()), w)
        found.append(shapes[i, j])
        of.append(i)
        best = shape_distances(x, shapes[i, j][None])[..., 0].argmin(1)
        profile[(torch.arange(w) - best[:, None]).abs() <= m // 2] = torch.inf
        profile[i, max(0, j - m // 2) : j + m // 2 + 1] = torch.inf
    return torch.stack(found) if found else shapes[:0, 0], torch.tensor(of, dtype=torch.long)


def shape_prior(far: Float[Tensor, "N M"], own: Int[Tensor, "M"], of: Int[Tensor, "M"], y: Int[Tensor, "N"]) -> Tensor:
    """Of motifs of class `own` from series `of`: the mean distance to other classes over that within, itself left out."""
    same = y[:, None] == own
    inside = same & (torch.arange(len(y))[:, None] != of)
    means = [(far * rows).sum(0) / rows.sum(0).clamp_min(1) for rows in (~same, inside)]
    # A class of one series has no distance within: its motifs weigh as much as the mean over everybody says.
    means[1] = torch.where(inside.any(0), means[1], far.mean(0))
    return means[0] / means[1].clamp_min(1e-3)


def value_prior(statistics: Float[Tensor, "N V S"], y: Int[Tensor, "N"]) -> Float[Tensor, "V"]:
    """1 - H(class | statistic) / H(class), with the statistic in quarters, and of the S statistics the largest."""
    cuts = torch.quantile(statistics, torch.tensor([0.25, 0.5, 0.75]), dim=0)
    quarter = (statistics[None] > cuts[:, None]).sum(0)
    shares = torch.stack(
        [
            (quarter == q)[:, None]
            .logical_and((y[:, None] == torch.arange(int(y.max()) + 1))[..., None, None])
            .float()
            .mean(0)
            for q in range(4)
        ]
    )  # [4, K, V, S]
    bins, classes = shares.sum(1), shares.sum((0, 2, 3)) / (shares.shape[2] * shares.shape[3])
    joint = -torch.special.entr(shares).sum((0, 1)) + torch.special.entr(bins).sum(0)  # -H(class | quarter)
    gain = 1 + joint / torch.special.entr(classes).sum()
    return gain.amax(-1).clamp_min(0)


def interval_statistics(x: Float[Tensor, "N T C"], begin: int, end: int) -> Float[Tensor, "N C 5"]:
    """Mean, deviation, least, most, and slope over the interval."""
    part = x[:, begin:end]
    t = torch.linspace(-1, 1, end - begin)[:, None] if end > begin + 1 else torch.zeros(1, 1)
    slope = (part * t).sum(1) / t.square().sum().clamp_min(1e-6)
    return torch.stack([part.mean(1), part.std(1, correction=0), part.amin(1), part.amax(1), slope], -1)


def intervals_of(steps: int, levels: int) -> list[tuple[int, int]]:
    """Equal parts of a series: 1, 2, 4, ... of them, none shorter than 2 steps."""
    parts = [2**g for g in range(levels) if g == 0 or steps // 2**g >= 2]
    return [(i * steps // n, (i + 1) * steps // n) for n in parts for i in range(n)]


class VSFormer(SeriesClassifier):
    """Fit, predict, save and load. `motifs_` are (channel, length, class) and `intervals_` (channel, begin, end) a token."""

    def __init__(self, settings: VSFormerSettings = VSFormerSettings(), training: TrainSettings = CLASSIFYING) -> None:
        self.settings, self.training = settings, training

    @property
    def priors_(self) -> dict[str, Float[Tensor, "N"]]:
        """The prior of each token, by branch; each branch's have mean 1."""
        return {name: encoder.get_buffer("prior") for name, encoder in self.network_.encoders.items()}

    def learn(self, x: Float[Tensor, "N T C"], y: Int[Tensor, "N"], bar: Bar) -> None:
        """Motifs, intervals and priors; then the network."""
        s = self.settings
        drawn = torch.Generator().manual_seed(s.seed)
        self._choose(x, y, y[torch.randperm(len(y), generator=drawn)] if s.priors == "shuffled" else y, drawn)
        self._build(x.shape[2])
        if s.priors != "none":
            for name, encoder in self.network_.encoders.items():
                encoder.get_buffer("prior").copy_(self._found[name] / self._found[name].mean().clamp_min(1e-6))
        tokens = self.tokens(x)
        batches = row_batches({**tokens, "y": y}, self.training.rows, s.seed)
        settings = replace(self.training, seed=s.seed).for_examples(len(x))
        steps = max(s.steps, settings.steps or 0)  # of few series an epoch is a handful of steps
        settings = replace(settings, steps=steps)
        fit(self.network_, batches, settings, device="cpu", bar=bar.step("vsformer", steps))
        self.network_.eval()

    def logits(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N K"]:
        """Of the network."""
        return torch.cat([self.network_.logits(self.tokens(part)) for part in x.split(64)])

    def tokens(self, x: Float[Tensor, "N T C"]) -> dict[str, Float[Tensor, "N V I"]]:
        """The tokens of each branch."""
        made = {"shape": self._shape_tokens, "value": self._value_tokens}
        return {name: made[name](x) for name in self.settings.branches}

    def _choose(self, x: Tensor, y: Tensor, for_priors: Tensor, drawn: torch.Generator) -> None:
        """The tokens: motifs by their true priors, intervals too; and the priors that attention gets."""
        s, self._found = self.settings, dict[str, Tensor]()
        self.motifs_: list[tuple[int, int, int]] = []
        self.intervals_: list[tuple[int, int, int]] = []
        self._shapes: list[Tensor] = []
        if "shape" in s.branches:
            found = [one for k in range(int(y.max()) + 1) for one in self._motifs_of(x, y, k, drawn)]
            self.motifs_, self._shapes = [one[0] for one in found], [one[1] for one in found]
            far = torch.stack([one[2] for one in found], 1)
            of = torch.tensor([one[3] for one in found])
            self._found["shape"] = shape_prior(far, for_priors[of], of, for_priors)
        if "value" in s.branches:
            spans = intervals_of(x.shape[1], s.levels)
            values = torch.cat([interval_statistics(x, *span) for span in spans], 1)
            order = value_prior(values, y).topk(min(s.values, values.shape[1])).indices.sort().values
            channels = x.shape[2]
            self.intervals_ = [(int(i) % channels, *spans[int(i) // channels]) for i in order]
            self._found["value"] = value_prior(values[:, order], for_priors)

    def _motifs_of(self, x: Tensor, y: Tensor, k: int, drawn: torch.Generator) -> list[tuple[Any, Tensor, Tensor, int]]:
        """The best motifs of a class by prior: (channel, length, class), shape, distances to every series, whose it is."""
        mine, found = torch.nonzero(y == k)[:, 0], list[Any]()
        for m in sorted({max(4, round(share * x.shape[1])) for share in self.settings.lengths}):
            if m > x.shape[1]:
                raise InputError(f"series have {x.shape[1]} steps, and the least motif has {m}; give longer series.")
            for c in range(x.shape[2]):
                channel = x[..., c]
                shapes, of = class_motifs(channel[mine], m, self.settings.motifs, drawn)
                if not len(shapes):  # one series of the class: its windows resemble nothing
                    shapes, of = shapes_of(channel[mine[:1]], m)[0, :: max(1, m)], torch.zeros(1, dtype=torch.long)
                    of = of.expand(len(shapes))
                far = torch.cat([shape_distances(part, shapes).amin(1) for part in channel.split(64)]).sqrt()
                prior = shape_prior(far, torch.full_like(of, k), mine[of], y)
                rows = zip(prior.tolist(), shapes, far.T, mine[of].tolist(), strict=True)
                found += [(score, (c, m, k), shape, row, i) for score, shape, row, i in rows]
        best = sorted(found, key=lambda one: -one[0])[: self.settings.motifs]
        return [one[1:] for one in best]

    def _build(self, channels: int) -> None:
        s, classes = self.settings, len(self.classes_)
        sizes = {
            "shape": (max((m for _, m, _ in self.motifs_), default=1) + 3, self.motifs_),
            "value": (STATISTICS + 2, self.intervals_),
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(s.seed)
            encoders = {
                name: TokenEncoder(sizes[name][0] - 2, len(sizes[name][1]), (channels, classes), s)
                for name in s.branches
            }
            self.network_ = VSFormerNetwork(encoders, classes, s)
        for name, encoder in encoders.items():
            tags = [(c, k) for c, _, k in self.motifs_] if name == "shape" else [(c, 0) for c, *_ in self.intervals_]
            encoder.tags.copy_(torch.tensor(tags))

    def _shape_tokens(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N V I"]:
        """Nearest window less motif (0 after its end), distance, begin, length."""
        longest, out = max(m for _, m, _ in self.motifs_), []
        for (c, m, _), shape in zip(self.motifs_, self._shapes, strict=True):
            far, at = shape_distances(x[..., c], shape[None])[..., 0].min(1)
            window = shapes_of(x[..., c], m)[torch.arange(len(x)), at]
            rest = torch.stack([far.sqrt(), at / x.shape[1], torch.full_like(far, m / x.shape[1])], 1)
            out.append(torch.cat([F.pad(window - shape, (0, longest - m)), rest], 1))
        return torch.stack(out, 1)

    def _value_tokens(self, x: Float[Tensor, "N T C"]) -> Float[Tensor, "N V I"]:
        """Statistics, begin, length."""
        spans = {(low, high): interval_statistics(x, low, high) for _, low, high in self.intervals_}
        out = [spans[low, high][:, c] for c, low, high in self.intervals_]
        places = torch.tensor([(low, high - low) for _, low, high in self.intervals_]) / x.shape[1]
        return torch.cat([torch.stack(out, 1), places.expand(len(x), -1, -1)], -1)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings, motifs, priors and weights into a new folder."""
        if not hasattr(self, "network_"):
            raise InputError("this VSFormer was not fitted; call fit(x, y) first.")
        about = {
            "classes": self.classes_.tolist(),
            **self._scales(),
            "motifs": self.motifs_,
            "intervals": self.intervals_,
        }
        shapes = {f"motifs.{i}": shape for i, shape in enumerate(self._shapes)}
        card = Card("vsformer", "2412.16515", vars(self.settings), self.settings.seed, kind="vsformer", about=about)
        return save(folder, card, {**self.network_.state_dict(), **shapes}, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> VSFormer:
        """One as it was saved: its probabilities are the same bits."""
        card, tensors = load(folder, "vsformer", "VSFormer")
        try:
            settings: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in card.settings.items()}
            made, about = cls(VSFormerSettings(**settings)), card.about
            made.classes_ = np.array(about["classes"])
            made._take_scales(about)
            made.motifs_ = [(int(c), int(m), int(k)) for c, m, k in about["motifs"]]
            made.intervals_ = [(int(c), int(low), int(high)) for c, low, high in about["intervals"]]
            made._shapes = [tensors.pop(f"motifs.{i}") for i in range(len(made.motifs_))]
            made._build(len(made.mean_))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"the card in {folder} is damaged ({error}).") from None
        fill(made.network_, tensors, folder)
        made.network_.eval()
        return made
