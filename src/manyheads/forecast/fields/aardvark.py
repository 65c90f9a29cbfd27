"""Aardvark Weather (#95): from raw observations to a gridded state, the next days' states, and forecasts at stations.

Vaughan et al., "Aardvark weather: end-to-end data-driven weather forecasting", arXiv:2404.00411 (Nature 2025).

    features    for each instrument field and den of its own SetConv (`set_conv.py`), and static fields     [B, K, I, J]
    encoder     ViT(features)                                                                     state     [B, S, I, J]
    processor   state + ViT_d(state, static), one copy for each day d ahead
    decoder     MLP of the state that a SetConv reads at a station, added to a linear map of it             [B, N, V]
    loss        sum w (state - truth)^2 / sum w        w: cosine of latitude, states in units of their standard deviation

First each part learns alone: the encoder from observations and states, the first processor from true states of a day and the
next, each later copy from the one before and what that one says, the decoder from true states. Then `tune` trains all of them
through the observations of one day, on the states of all days ahead, and on stations where they are given.

Departures. The ViT is the network of Prithvi (#77) with one window over the whole grid. den goes in as log(1 + den).
A lead is a step of the data. Every instrument has a SetConv of its own (the released code mixes them up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.fields.grid import GridFields, fields_of, latitude_weights, weighted_mse
from manyheads.forecast.fields.planted_fields import moved_fields
from manyheads.forecast.fields.prithvi_model import PrithviConfig, PrithviModel
from manyheads.forecast.fields.set_conv import Observations, SetConv
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.learning.saved import Card, fill, load, save
from manyheads.training import ADAM, drawn_rows, fit

KIND, PAPER = "aardvark", "2404.00411"


@dataclass(kw_only=True, eq=False)
class Aardvark:
    """`leads` steps ahead; each part learns for `steps`, then all together for `tune` steps at a tenth of the rate.

    `length` is where the SetConvs begin, in degrees / 360 (None: half a cell). `depth` layers (an even number) of `width`.
    """

    leads: int = 1
    patch: int = 2
    width: int = 32
    n_heads: int = 4
    depth: int = 2
    length: float | None = None
    steps: int = 300
    tune: int = 100
    rows: int = 16
    rate: float = 2e-3
    seed: int = 0

    net_: AardvarkNet | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("leads", "patch", "width", "n_heads", "steps", "rows"):
            check_integer(getattr(self, name), name, 1)
        check_integer(self.tune, "tune")
        check_number(self.rate, "rate", 0.0, above=True)
        check_seed(self.seed)
        if check_integer(self.depth, "depth", 2) % 2:
            raise InputError(f"depth is {self.depth}; give an even number of layers.")

    def fit(
        self,
        states: Any,
        seen: Mapping[str, Observations],
        *,
        stations: Observations | None = None,
        latitude: Any = None,
        longitude: Any = None,
    ) -> Aardvark:
        """Learn from states [T, S, lat, lon] and what each instrument saw at the same times; `stations` are to be forecast.

        `InputError` where they are of different times, or too few.
        """
        grid = fields_of(states, latitude, longitude)
        _check_times(len(grid.values), {**seen, **({} if stations is None else {"stations": stations})})
        if len(grid.values) <= self.leads or np.isnan(grid.values).any():
            raise InputError(f"give more than {self.leads} states, without NaN; these are {len(grid.values)}.")
        size = [side % self.patch for side in grid.values.shape[2:]]
        if any(size):
            raise InputError(
                f"the grid {list(grid.values.shape[2:])} is no whole number of patches of {self.patch}; cut it."
            )
        self.net_ = net = self._built(grid, {name: one.values.shape[2] for name, one in seen.items()}, stations)
        truth, weights = net.scaled(torch.from_numpy(grid.values)), latitude_weights(grid.latitude)

        def error(found: Tensor, times: Tensor) -> Tensor:
            return weighted_mse(found, truth[times], weights)

        def observed(times: Tensor) -> dict[str, Observations]:
            return {name: one.at(times) for name, one in seen.items()}

        def after(days: int) -> Callable[[Tensor], Tensor]:
            return lambda t: error(net.ahead(truth[t], days), t + days)

        self._train(net.encoder, len(truth), lambda t: error(net.encode(observed(t)), t), 0)
        for d, processor in enumerate(net.processors):
            if d:
                processor.load_state_dict(net.processors[d - 1].state_dict())
            self._train(processor, len(truth) - d - 1, after(d + 1), d + 1)
        if stations is not None:
            self._train(net.decoder, len(truth), lambda t: net.missed(truth[t], stations.at(t)), self.leads + 1)

        def together(t: Tensor) -> Tensor:
            state, losses = net.encode(observed(t)), []
            for d in range(self.leads):
                state = net.step(state, d)
                losses.append(error(state, t + d + 1))
                if stations is not None:
                    losses.append(net.missed(state, stations.at(t + d + 1)))
            return torch.stack(losses).mean()

        if self.tune:
            self._train(net, len(truth) - self.leads, together, self.leads + 2, steps=self.tune, rate=self.rate / 10)
        net.eval()
        return self

    @torch.no_grad()
    def predict(self, seen: Mapping[str, Observations], lead: int = 1) -> Float[np.ndarray, "B S I J"]:
        """The states `lead` steps after observations; 0 is the analysis of the same time."""
        net = self._net
        found = net.ahead(net.encode(seen), check_integer(lead, "lead", 0, self.leads))
        return net.unscaled(found).numpy()

    @torch.no_grad()
    def predict_stations(
        self,
        seen: Mapping[str, Observations],
        latitude: Float[Tensor, "B N"],
        longitude: Float[Tensor, "B N"],
        lead: int = 1,
    ) -> Float[np.ndarray, "B N V"]:
        """What stations will measure, `lead` steps after observations."""
        net = self._net
        if net.decoder is None:
            raise InputError("it was fitted without stations; give some to fit.")
        return net.at_stations(
            net.ahead(net.encode(seen), check_integer(lead, "lead", 0, self.leads)), latitude, longitude
        ).numpy()

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings and weights into a new folder."""
        net = self._net
        settings = {one.name: getattr(self, one.name) for one in fields(self) if one.init}
        about = {
            "latitude": net.latitude,
            "longitude": net.longitude,
            "instruments": net.instruments,
            "states": net.states,
            "targets": net.targets,
        }
        return save(folder, Card(KIND, PAPER, settings, self.seed, kind=KIND, about=about), net, force=force)

    @classmethod
    def load(cls, folder: str | Path) -> Aardvark:
        """As it was saved; its forecasts are the same bits. `InputError` for another folder."""
        card, tensors = load(folder, KIND, "Aardvark")
        try:
            made = cls(**card.settings)
            made.net_ = AardvarkNet(made, **card.about)
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder} holds no Aardvark that can be read ({error}).") from None
        fill(made.net_, tensors, folder)
        made.net_.eval()
        return made

    def _built(self, grid: GridFields, instruments: dict[str, int], stations: Observations | None) -> AardvarkNet:
        targets = 0 if stations is None else stations.values.shape[2]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = AardvarkNet(
                self,
                latitude=grid.latitude.tolist(),
                longitude=grid.longitude.tolist(),
                instruments=instruments,
                states=grid.values.shape[1],
                targets=targets,
            )
        values = torch.from_numpy(grid.values)
        net.mean.copy_(values.mean((0, 2, 3)))
        net.std.copy_(values.std((0, 2, 3)).clamp_min(1e-6))
        return net

    def _train(
        self,
        part: nn.Module | None,
        n: int,
        loss: Callable[[Tensor], Tensor],
        stage: int,
        *,
        steps: int | None = None,
        rate: float | None = None,
    ) -> None:
        """Train one part by a loss of drawn times, of which there are n."""
        settings = replace(
            ADAM, steps=steps or self.steps, rate=rate or self.rate, warmup=20, decay=0.5, clip=1.0, seed=self.seed
        )
        assert part is not None
        fit(
            part,
            lambda i: drawn_rows(n, self.rows, i, self.seed + 100 * stage),
            settings,
            loss=lambda _, times: loss(times),
            device="cpu",
        )

    @property
    def _net(self) -> AardvarkNet:
        if self.net_ is None:
            raise InputError("this Aardvark was not fitted; call fit(states, observations) first.")
        return self.net_


class AardvarkNet(nn.Module):
    """The three parts. States inside are scaled by their mean and standard deviation."""

    mean: Tensor
    std: Tensor
    static: Tensor

    def __init__(
        self,
        settings: Aardvark,
        *,
        latitude: list[float],
        longitude: list[float],
        instruments: dict[str, int],
        states: int,
        targets: int,
    ) -> None:
        super().__init__()
        self.latitude, self.longitude, self.instruments = latitude, longitude, dict(instruments)
        self.states, self.targets = states, targets
        phi, lam = torch.tensor(latitude), torch.tensor(longitude)
        cell = abs(latitude[0] - latitude[1]) / 720 if len(latitude) > 1 else 0.01
        length = settings.length or cell
        self.register_buffer("mean", torch.zeros(states))
        self.register_buffer("std", torch.ones(states))
        angles = [phi.deg2rad().sin()[:, None], lam.deg2rad().sin()[None], lam.deg2rad().cos()[None]]
        size = (len(phi), len(lam))
        self.register_buffer("static", torch.stack([a.expand(size) for a in angles]).float(), persistent=False)

        def vit(channels: int) -> PrithviModel:
            config = PrithviConfig(
                image_size=size,
                patch_size=settings.patch,
                window=(size[0] // settings.patch, size[1] // settings.patch),
                num_channels=channels + len(self.static),
                outputs=states,
                hidden_size=settings.width,
                num_attention_heads=settings.n_heads,
                encoder_blocks=settings.depth // 2 - 1,
                mixes=False,
            )
            return PrithviModel(config)

        convs = {name: SetConv(phi, lam, length) for name in instruments}
        self.encoder = nn.ModuleDict({"convs": nn.ModuleDict(convs), "vit": vit(2 * sum(instruments.values()))})
        self.processors = nn.ModuleList([vit(states) for _ in range(settings.leads)])
        self.decoder = None
        if targets:
            mlp = nn.Sequential(nn.Linear(states, settings.width), nn.GELU(), nn.Linear(settings.width, targets))
            parts = {"conv": SetConv(phi, lam, length), "mlp": mlp, "linear": nn.Linear(states, targets)}
            self.decoder = nn.ModuleDict(parts)

    def scaled(self, states: Float[Tensor, "B S I J"]) -> Float[Tensor, "B S I J"]:
        """States in units of their standard deviation."""
        return (states - self.mean[:, None, None]) / self.std[:, None, None]

    def unscaled(self, states: Float[Tensor, "B S I J"]) -> Float[Tensor, "B S I J"]:
        """`scaled`, undone."""
        return states * self.std[:, None, None] + self.mean[:, None, None]

    def encode(self, seen: Mapping[str, Observations]) -> Float[Tensor, "B S I J"]:
        """The state that observations of one time say. `InputError` for other instruments than it was built for."""
        given = {name: one.values.shape[2] for name, one in seen.items()}
        if given != self.instruments:
            raise InputError(
                f"the instruments and their channels are {given}, and it was fitted on {self.instruments}."
            )
        parts = []
        for name, conv in self.encoder["convs"].items():  # type: ignore[operator, union-attr]
            found, den = conv(seen[name])
            parts += [found, den.log1p()]
        return self._vit(self.encoder["vit"], torch.cat(parts, 1))

    def step(self, state: Float[Tensor, "B S I J"], day: int) -> Float[Tensor, "B S I J"]:
        """A day on: the state and the change that this day's copy says."""
        return state + self._vit(self.processors[day], state)

    def ahead(self, state: Float[Tensor, "B S I J"], lead: int) -> Float[Tensor, "B S I J"]:
        """So many days on."""
        for day in range(lead):
            state = self.step(state, day)
        return state

    def at_stations(
        self, state: Float[Tensor, "B S I J"], latitude: Float[Tensor, "B N"], longitude: Float[Tensor, "B N"]
    ) -> Float[Tensor, "B N V"]:
        """What stations measure in a state."""
        assert self.decoder is not None
        read = self.decoder["conv"].read(state, latitude, longitude)  # type: ignore[operator]
        out: Tensor = self.decoder["linear"](read) + self.decoder["mlp"](read)
        return out

    def missed(self, state: Float[Tensor, "B S I J"], stations: Observations) -> Float[Tensor, ""]:
        """The mean squared error at stations, in their unit squared, over what was measured."""
        found = self.at_stations(state, stations.latitude, stations.longitude)
        there = ~stations.values.isnan()
        return ((found - stations.values.nan_to_num()).square() * there).sum() / there.sum().clamp_min(1)

    def _vit(self, vit: nn.Module, maps: Float[Tensor, "B K I J"]) -> Float[Tensor, "B S I J"]:
        out: Tensor = vit(torch.cat([maps, self.static.expand(len(maps), -1, -1, -1)], 1)).anomaly
        return out


def _check_times(times: int, seen: Mapping[str, Observations]) -> None:
    if wrong := {name: len(one.values) for name, one in seen.items() if len(one.values) != times}:
        name, n = next(iter(wrong.items()))
        raise InputError(f"there are {times} states, and {name!r} has observations of {n} times; give as many.")


def nearest_gridding(
    seen: Observations, latitude: Float[Tensor, "I"], longitude: Float[Tensor, "J"]
) -> Float[Tensor, "B C I J"]:
    """The value of the nearest observation for every cell, by degrees, around the globe: what a forecast has to beat."""
    north = latitude[:, None, None] - seen.latitude[:, None, None]
    east = (longitude[:, None] - seen.longitude[:, None, None] + 180) % 360 - 180
    near = (north**2 + east**2).argmin(-1)
    found = seen.values.gather(1, near.flatten(1)[..., None].expand(-1, -1, seen.values.shape[2]))
    return found.mT.unflatten(2, near.shape[1:])


SIZE, SHIFT, CELLS, TRAINED, SHARE = (8, 32), 5, 3.0, 800, 0.05


def sparse_observations(values: Float[np.ndarray, "T 1 I J"], share: float, seed: int) -> Observations:
    """A share of the cells of each field, drawn anew each time, at their places on a global grid."""
    rng, (rows, columns) = np.random.default_rng(seed), values.shape[2:]
    n = round(share * rows * columns)
    at = torch.from_numpy(rng.random((len(values), rows * columns)).argsort(1)[:, :n])
    seen = torch.from_numpy(values).flatten(1).gather(1, at)[..., None]
    latitude = 90 - 180 / rows * (at // columns + 0.5)
    return Observations(seen, latitude, 360 / columns * (at % columns).float())


def _advection(*, joint: bool | None) -> Callable[[int, int], dict[str, float]]:
    """The RMSE of the next field from the observations of this one. None: without a network."""

    def run(steps: int, seed: int) -> dict[str, float]:
        values = moved_fields(seed, TRAINED + 100, size=SIZE, shift=SHIFT, keep=0.98, cells=CELLS)
        seen = sparse_observations(values, SHARE, seed)
        grid, test = fields_of(values), torch.arange(TRAINED, len(values) - 1)
        weights = latitude_weights(grid.latitude)

        def rmse(found: Tensor) -> float:
            return float(weighted_mse(found, torch.from_numpy(values)[test + 1], weights)) ** 0.5

        if joint is None:
            phi, lam = torch.from_numpy(grid.latitude).float(), torch.from_numpy(grid.longitude).float()
            found = nearest_gridding(seen.at(test), phi, lam)
            return {"rmse": rmse(found), "rmse if moved": rmse(found.roll(SHIFT, -1))}
        # As many steps in all: what is tuned together learns less alone.
        alone, tune = (steps, steps) if joint else (steps * 3 // 2, 0)
        made = Aardvark(steps=alone, tune=tune, seed=seed)
        made.fit(values[:TRAINED], {"points": seen.at(torch.arange(TRAINED))})
        return {"rmse": rmse(torch.from_numpy(made.predict({"points": seen.at(test)})))}

    return run


register_experiment(
    Experiment(
        "sparse_advection",
        (95,),
        PAPER,
        "From 5 % of the cells of a moving field: what is the next field?",
        datasets=lambda quick: {"advection": 20 if quick else 250},
        methods={
            "nearest, persisting": _advection(joint=None),
            "stage by stage": _advection(joint=False),
            "tuned together": _advection(joint=True),
        },
        baseline="nearest, persisting",
        claims=(
            Claim(
                "encoder and processor have at most .6 of the RMSE of persistence of the nearest observation",
                lambda v: v["stage by stage", "rmse"] / v["nearest, persisting", "rmse"],
                at_most=0.6,
            ),
            Claim(
                "tuned together they are no worse than stage by stage, in as many steps",
                lambda v: v["tuned together", "rmse"] / v["stage by stage", "rmse"],
                at_most=1.0,
            ),
        ),
        minutes=3,
        lower=frozenset({"rmse", "rmse if moved"}),
        room="forecast",
    )
)
