"""CogDPM (#58): samples of the next fields by diffusion, guided more strongly where the forecast is uncertain.

Chen et al., "CogDPM: Diffusion Probabilistic Models via Cognitive Predictive Coding", arXiv:2405.02384 (ICML 2024). With the
anomalies a of `grid.py`, the past fields c = a(t - K + 1) .. a(t), and x_0 = (a(t + 1) - a(t)) / s, s the spread of changes,

    z_l       sqrt(A_l) x_0 + sqrt(1 - A_l) e                              A_l falls from 1 to 0 over the levels (cosine)
    loss      |e - net(z_l, l, c)|^2 over what is not missing; c is hidden from one row in ten
    x_gen     (z_l - sqrt(1 - A_l) eps) / sqrt(A_l)                        what the running sample says
    x_per     the same for the last estimate, noised to level l again      what it says of itself
    U         variance of x_gen and x_per over the last `window` levels, for each cell; divided by its mean, clipped
    eps       eps_u + w U (eps_c - eps_u)                                  eps_c with c, eps_u without

U is high where precision is low. A lead of n steps is n forecasts, each sample going on from its own.

Departures. The paper gives no formula of U that we could verify: this is a reading. U is normalised for each sample by itself.
Changes are diffused, not fields. Estimates are held within +-5 spreads. The network is a small one of dilated convolutions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.forecast.fields.grid import Climatology, GridFields, fields_of, latitude_weights
from manyheads.inputs import check_integer, check_number, check_seed, clause
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import ADAM, fit, generator_of

KIND, PAPER = "cogdpm", "2405.02384"
HIDDEN = 0.1  # the share of training rows without condition
FARTHEST = 5.0  # spreads


class Denoiser(nn.Module):
    """Noise of z [B, C, I, J] at a level, given the past [B, K C, I, J]; dilated convolutions that wrap where the grid does."""

    def __init__(self, channels: int, past: int, width: int, blocks: int, levels: int, wraps: bool) -> None:
        super().__init__()
        self.wraps, self.dilations = wraps, [2 ** (i % 3) for i in range(blocks)]
        self.first = nn.Conv2d(channels + past + 1, width, 3)
        self.level = nn.Embedding(levels, 2 * width * blocks)
        self.convs = nn.ModuleList([nn.Conv2d(width, width, 3, dilation=d) for d in self.dilations])
        self.mixes = nn.ModuleList([nn.Conv2d(width, width, 1) for _ in self.dilations])
        self.norms = nn.ModuleList([nn.GroupNorm(1, width) for _ in self.dilations])
        self.last = nn.Conv2d(width, channels, 1)
        nn.init.zeros_(self.level.weight)

    def forward(
        self,
        z: Float[Tensor, "B C I J"],
        level: Int[Tensor, "B"],
        past: Float[Tensor, "B K I J"],
        told: Float[Tensor, "B"],
    ) -> Float[Tensor, "B C I J"]:
        """`told` is 1 where a row may read its past, else 0."""
        told = told[:, None, None, None]
        x = self.first(self._padded(torch.cat([z, past * told, told.expand(-1, 1, *z.shape[2:])], 1), 1))
        changes = self.level(level)[..., None, None].chunk(2 * len(self.convs), 1)
        for i, (conv, mix, norm) in enumerate(zip(self.convs, self.mixes, self.norms, strict=True)):
            h = norm(x) * (1 + changes[2 * i]) + changes[2 * i + 1]
            x = x + mix(F.silu(conv(self._padded(h, self.dilations[i]))))
        out: Tensor = self.last(F.silu(x))
        return out

    def _padded(self, x: Tensor, by: int) -> Tensor:
        around = F.pad(x, (by, by, 0, 0), mode="circular" if self.wraps else "replicate")
        return F.pad(around, (0, 0, by, by), mode="replicate")


def guided(
    without: Float[Tensor, "*B"],
    given: Float[Tensor, "*B"],
    weight: float,
    inverse_precision: Float[Tensor, "*B"] | float,
) -> Float[Tensor, "*B"]:
    """Guidance: eps_u + w U (eps_c - eps_u)."""
    return without + weight * inverse_precision * (given - without)


def normalised_variance(variance: Float[Tensor, "B C I J"], low: float, high: float) -> Float[Tensor, "B C I J"]:
    """U: the variance over its mean for each sample, clipped; 1 where there is none."""
    mean = variance.mean((1, 2, 3), keepdim=True)
    return torch.where(mean > 0, variance / mean.clamp_min(1e-30), 1.0).clamp(low, high)


def crps(samples: Float[Tensor, "S *B"], truth: Float[Tensor, "*B"]) -> Float[Tensor, "*B"]:
    """Of an ensemble, fair to its size: mean |x_i - y| - 1/2 mean over i != j of |x_i - x_j|, in the unit of y."""
    n = len(samples)
    apart = (samples[:, None] - samples[None]).abs().sum((0, 1)) / max(1, n * (n - 1))
    return (samples - truth).abs().mean(0) - apart / 2


@dataclass(kw_only=True, eq=False)
class CogDPM:
    """`past` fields are the condition, `period` steps are a year. `weight` is w of the guidance, U lies in [low, high].

    `uniform` makes U 1 everywhere: ordinary guidance.
    """

    past: int = 2
    period: int | None = None
    levels: int = 20
    window: int = 4
    weight: float = 1.0
    low: float = 0.5
    high: float = 2.0
    uniform: bool = False
    width: int = 32
    blocks: int = 6
    steps: int = 500
    rows: int = 16
    rate: float = 2e-3
    seed: int = 0

    net_: Denoiser | None = field(default=None, init=False, repr=False)
    climatology_: Climatology | None = field(default=None, init=False, repr=False)
    grid_: GridFields | None = field(default=None, init=False, repr=False)
    start_: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("past", "window", "width", "blocks", "steps", "rows"):
            check_integer(getattr(self, name), name, 1)
        check_integer(self.levels, "levels", 2)
        if self.period is not None:
            check_integer(self.period, "period", 2)
        check_number(self.rate, "rate", 0.0, above=True)
        check_number(self.weight, "weight", 0.0)
        check_number(self.low, "low", 0.0, 1.0)
        check_number(self.high, "high", 1.0)
        check_seed(self.seed)

    def fit(self, data: Any, *, latitude: Any = None, longitude: Any = None, bar: Bar = Bar()) -> CogDPM:
        """Learn from fields (`fields_of`). `InputError` for too few of them."""
        given = fields_of(data, latitude, longitude)
        if len(given.values) <= self.past + 1:
            raise InputError(f"{len(given.values)} fields are too few; give at least {self.past + 2}.")
        self.climatology_ = Climatology.of(given, self.period)
        a = self.climatology_.anomaly(torch.from_numpy(given.values), torch.arange(len(given.values)))
        changes = a[self.past :] - a[self.past - 1 : -1]
        self.spread_ = changes.square().nanmean((0, 2, 3)).sqrt().clamp_min(1e-6)
        self.net_ = self._built(given)

        def batch(i: int) -> dict[str, Tensor]:
            draw = generator_of(self.seed, i)
            t = torch.randint(len(changes), (self.rows,), generator=draw)
            return {
                "x": changes[t] / self.spread_[:, None, None],
                "past": torch.stack([a[t + k] for k in range(self.past)], 1).nan_to_num().flatten(1, 2),
                "level": torch.randint(self.levels, (self.rows,), generator=draw),
                "told": (torch.rand(self.rows, generator=draw) >= HIDDEN).float(),
                "noise": torch.randn(changes[t].shape, generator=draw),
            }

        settings = replace(ADAM, steps=self.steps, rate=self.rate, warmup=20, decay=0.5, clip=1.0, seed=self.seed)
        fit(self.net_, batch, settings, loss=self._loss, bar=bar.step("cogdpm", self.steps), device="cpu")
        self.net_.eval()
        self.start_ = len(given.values) - self.past
        self.grid_ = replace(given, values=given.values[-self.past :])
        return self

    def predict(
        self, lead: int = 1, *, samples: int = 8, history: Any = None, start: int | None = None, seed: int = 0
    ) -> Float[np.ndarray, "S C I J"]:
        """Samples of the field `lead` steps after the last one, in the channels' own units; NaN where no value was ever seen.

        `history` are the last fields before it (default: those of `fit`), `start` the step of the first of them, counted from
        the first of `fit`. The same seed gives the same samples.
        """
        return self.predict_with_uncertainty(lead, samples=samples, history=history, start=start, seed=seed)[0]

    def predict_with_uncertainty(
        self, lead: int = 1, *, samples: int = 8, history: Any = None, start: int | None = None, seed: int = 0
    ) -> tuple[Float[np.ndarray, "S C I J"], Float[np.ndarray, "C I J"]]:
        """`predict`, and U before it is clipped: the mean over levels and samples at the last step."""
        check_integer(lead, "lead", 1)
        check_integer(samples, "samples", 1)
        values, first = self._history(history, start)
        now = torch.tensor([first + len(values) - 1])
        found, u = self._rolled(torch.from_numpy(values[None, -self.past :]), now, lead, samples, check_seed(seed))
        return found[:, 0].numpy(), u[0].numpy()

    def skill(
        self,
        data: Any,
        *,
        start: int | None = None,
        leads: Sequence[int] = (1,),
        samples: int = 8,
        seed: int = 0,
        changes: Float[np.ndarray, "N C I J"] | None = None,
    ) -> pd.DataFrame:
        """A row a lead and channel over the fields of `data`: crps and rmse of the mean, weighted by the cosine of latitude.

        Also `rank`, Spearman's correlation of U with the squared error of the mean over cells and times. With the `changes`
        of training also `persistence`, the CRPS of the last anomaly and drawn changes.
        """
        values, first = self._history(data, start)
        given, weights, rows = torch.from_numpy(values), latitude_weights(self._grid.latitude), []
        for lead in leads:
            at = torch.arange(self.past - 1, len(values) - check_integer(lead, "lead", 1))
            if not len(at):
                raise InputError(f"{len(values)} fields are too few to judge a lead of {lead}.")
            past = torch.stack([given[at - self.past + 1 + k] for k in range(self.past)], 1)
            found, u = self._rolled(past, first + at, lead, samples, seed)
            truth = given[at + lead]
            kept = {"crps": crps(found, truth), "square": (found.mean(0) - truth).square()}
            if changes is not None:
                kept["persistence"] = crps(self._persisting(given[at], first + at, lead, changes, samples), truth)
            for c in range(truth.shape[1]):
                mean = {name: _mean(x[:, c], weights) for name, x in kept.items()}
                there = kept["square"][:, c].isfinite()
                pair = pd.DataFrame({"u": u[:, c][there].numpy(), "off": kept["square"][:, c][there].numpy()})
                rank = float(pair["u"].rank().corr(pair["off"].rank()))
                rows.append({"lead": lead, "channel": c, **mean, "rmse": mean.pop("square") ** 0.5, "rank": rank})
        return pd.DataFrame(rows).drop(columns="square")

    def training_changes(self, data: Any, lead: int = 1) -> Float[np.ndarray, "N C I J"]:
        """The changes of the anomalies of training fields in `lead` steps: the spread of persistence. The first is of phase 0."""
        values = torch.from_numpy(fields_of(data).values)
        a = self._climatology.anomaly(values, torch.arange(len(values)))
        return (a[lead:] - a[:-lead]).numpy()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings, weights, climatology and the last fields into a new folder."""
        clim, grid = self._climatology, self._grid
        values = torch.from_numpy(grid.values)
        tensors = {f"net.{name}": value for name, value in self._net.state_dict().items()} | {
            "clim.mean": clim.mean,
            "clim.sigma": clim.sigma,
            "clim.seen": clim.seen,
            "spread": self.spread_,
            "history": values.nan_to_num(),
            "history.there": ~values.isnan(),
        }
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        about = {"start": self.start_, "latitude": grid.latitude.tolist(), "longitude": grid.longitude.tolist()}
        return save(folder, Card(KIND, PAPER, settings, self.seed, kind=KIND, about=about), tensors, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> CogDPM:
        """As it was saved; its samples are the same bits. `InputError` for another folder."""
        card, tensors = load(folder, KIND, "CogDPM")
        try:
            made = cls(**card.settings)
            values = tensors["history"].masked_fill(~tensors["history.there"], torch.nan).numpy()
            made.grid_ = GridFields(values, np.array(card.about["latitude"]), np.array(card.about["longitude"]))
            made.start_, made.spread_ = int(card.about["start"]), tensors["spread"]
            made.climatology_ = Climatology(*(tensors[f"clim.{name}"] for name in ("mean", "sigma", "seen")))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} holds no CogDPM that can be read ({clause(error)}).") from None
        made.net_ = made._built(made.grid_)
        fill(made.net_, {n.removeprefix("net."): v for n, v in tensors.items() if n.startswith("net.")}, folder)
        made.net_.eval()
        return made

    def _built(self, given: GridFields) -> Denoiser:
        channels = given.values.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return Denoiser(channels, self.past * channels, self.width, self.blocks, self.levels, given.wraps)

    @property
    def signal(self) -> Float[Tensor, "L"]:
        """A_l of the formula above."""
        angle = (torch.arange(1, self.levels + 1).double() / (self.levels + 1)) * torch.pi / 2
        return angle.cos().square().float()

    def _loss(self, net: nn.Module, batch: dict[str, Tensor]) -> Float[Tensor, ""]:
        there = ~batch["x"].isnan()
        a = self.signal[batch["level"]][:, None, None, None]
        z = a.sqrt() * batch["x"].nan_to_num() + (1 - a).sqrt() * batch["noise"]
        off = net(z, batch["level"], batch["past"], batch["told"]) - batch["noise"]
        return (off.square() * there).sum() / there.sum().clamp_min(1)

    @torch.no_grad()
    def _rolled(
        self, past: Float[Tensor, "B K C I J"], now: Int[Tensor, "B"], lead: int, samples: int, seed: int
    ) -> tuple[Float[Tensor, "S B C I J"], Float[Tensor, "B C I J"]]:
        """Samples of the fields `lead` steps after the times `now`, and U of the last step."""
        times = now[:, None] + torch.arange(1 - self.past, 1)
        a = self._climatology.anomaly(past, times).nan_to_num().repeat(samples, 1, 1, 1, 1)
        for step in range(lead):
            change, u = self.sampled(a, generator_of(seed, 2 * step), generator_of(seed, 2 * step + 1))
            a = torch.cat([a[:, 1:], (a[:, -1] + self.spread_[:, None, None] * change)[:, None]], 1)
        found = self._climatology.field(a[:, -1].unflatten(0, (samples, -1)), (now + lead).expand(samples, -1))
        return found, u.unflatten(0, (samples, -1)).mean(0)

    def sampled(
        self, past: Float[Tensor, "B K C I J"], draw: torch.Generator, again: torch.Generator
    ) -> tuple[Float[Tensor, "B C I J"], Float[Tensor, "B C I J"]]:
        """A sample of x_0 for each past of anomalies, and the mean of U. The noise of x_per comes from a generator of its own."""
        net, signal, condition = self._net, self.signal, past.flatten(1, 2)
        z = torch.randn(past[:, 0].shape, generator=draw)
        x, estimates, total = torch.zeros_like(z), [], torch.zeros_like(z)

        def noise_of(z: Tensor, level: int, told: float) -> Tensor:
            n = len(z)
            out: Tensor = net(z, torch.full((n,), level), condition, torch.full((n,), told))
            return out

        def clean(z: Tensor, eps: Tensor, level: int) -> Tensor:
            return ((z - (1 - signal[level]).sqrt() * eps) / signal[level].sqrt()).clamp(-FARTHEST, FARTHEST)

        for level in range(self.levels - 1, -1, -1):
            given, without = noise_of(z, level, 1.0), noise_of(z, level, 0.0)
            gen = clean(z, given, level)
            # Before the first estimate there is nothing to noise again.
            estimates.append(gen)
            if level < self.levels - 1:
                noised = signal[level].sqrt() * x + (1 - signal[level]).sqrt() * torch.randn(z.shape, generator=again)
                estimates.append(clean(noised, noise_of(noised, level, 1.0), level))
            estimates = estimates[-2 * self.window :]
            variance = torch.stack(estimates).var(0, unbiased=False)
            total += normalised_variance(variance, 0.0, torch.inf) / self.levels
            u = 1.0 if self.uniform else normalised_variance(variance, self.low, self.high)
            x = clean(z, guided(without, given, self.weight, u), level)
            if level:
                z = self._step_down(z, x, level, torch.randn(z.shape, generator=draw))
        return x, total

    def _step_down(self, z: Tensor, x: Tensor, level: int, noise: Tensor) -> Tensor:
        """Z of the level below, drawn given z and the estimate x (ancestral sampling)."""
        a, below = self.signal[level], self.signal[level - 1]
        ratio = a / below
        mean = (below.sqrt() * (1 - ratio) * x + ratio.sqrt() * (1 - below) * z) / (1 - a)
        return mean + ((1 - ratio) * (1 - below) / (1 - a)).sqrt() * noise

    def _persisting(
        self, last: Float[Tensor, "B C I J"], now: Int[Tensor, "B"], lead: int, changes: Any, samples: int
    ) -> Float[Tensor, "S B C I J"]:
        """The last anomaly with whole fields of training changes added."""
        draw = torch.randint(len(changes), (samples, len(last)), generator=generator_of(self.seed, 58))
        a = self._climatology.anomaly(last, now) + torch.from_numpy(changes)[draw]
        return self._climatology.field(a, (now + lead).expand(samples, -1))

    def _history(self, history: Any, start: int | None) -> tuple[Float[np.ndarray, "T C I J"], int]:
        own = self._grid
        if history is None:
            return own.values, self.start_
        given = fields_of(history, own.latitude, own.longitude)
        if given.values.shape[1:] != own.values.shape[1:] or len(given.values) < self.past:
            raise InputError(
                f"the history is {list(given.values.shape)}; give {self.past} or more fields of {list(own.values.shape[1:])}."
            )
        if start is None and self.period is not None:
            raise InputError(
                "the forecaster has a period; give start, the step of the first field, counted from fit's."
            )
        return given.values, 0 if start is None else check_integer(start, "start")

    @property
    def _net(self) -> Denoiser:
        if self.net_ is None:
            raise InputError("this CogDPM was not fitted; call fit(fields) first.")
        return self.net_

    @property
    def _climatology(self) -> Climatology:
        assert self.climatology_ is not None
        return self.climatology_

    @property
    def _grid(self) -> GridFields:
        if self.grid_ is None:
            raise InputError("this CogDPM was not fitted; call fit(fields) first.")
        return self.grid_


def _mean(values: Float[Tensor, "N I J"], weights: Float[Tensor, "I 1"]) -> float:
    """The mean weighted by latitude over what is there."""
    there = values.isfinite() * weights
    return float((values.nan_to_num() * there).sum() / there.sum().clamp_min(1e-6))
