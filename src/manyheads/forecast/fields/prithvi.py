"""Prithvi WxC (#77): one transformer that fills in and forecasts global fields, inside windows and across them in turn.

Schmude et al., "Prithvi WxC: Foundation Model for Weather and Climate", arXiv:2409.13598. With two fields y at times t - gap and
t, and the climatology and sigma of `grid.py`,

    forecast(t + lead)     clim(t + lead) + sigma_c net(anomaly(t - gap), anomaly(t); static, clim(t + lead), lead, gap)
    loss                   sum w (anomaly(t + lead) - net)^2 / sum w             w: cosine of latitude, over what is not missing
    masking                a share of the tokens is hidden: whole windows in one batch, tokens inside windows in the next
    roll-out               the forecast is read as the newest field, `rollout` times; the loss is the mean over these steps

First come `steps` of masked training over all leads and gaps, then `rollout_steps` of roll-outs without a mask (the paper's
second phase). A lead beyond the longest one learned is reached by roll-out. The network is in `prithvi_model.py`.

Departures. A grid that is no whole number of windows is padded at the south (last row again) and the east (around the globe, or
the last column again), and cut again. The climatology is the mean of each phase, without a window of days. Sizes are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError
from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.fields.grid import Climatology, GridFields, fields_of, latitude_weights, weighted_mse
from manyheads.forecast.fields.planted_fields import moved_fields, ridge_error
from manyheads.forecast.fields.prithvi_model import PrithviConfig, PrithviModel
from manyheads.inputs import check_integer, check_number, check_seed, clause
from manyheads.learning.saved import Card, fill, load, save
from manyheads.progress import Bar
from manyheads.training import ADAM, Progress, TrainSettings, fit, generator_of

KIND = "field forecaster"
PAPER = "2409.13598"
PLACES = (
    3  # static channels beside the climatology and what is seen: sin and cos of latitude and longitude, less cos lon
)
ROWS = 64  # forecasts a batch that learns nothing


@dataclass(kw_only=True, eq=False)
class PrithviWxC:
    """A forecaster of fields. `leads` and `gaps` are in steps of the data, `period` is a year (or a day) of them.

    `window` counts patches, `mask` is the share of hidden tokens, `mixes=False` makes global layers local ones. Roll-outs go by
    the first of `gaps`, which must be a lead.
    """

    leads: tuple[int, ...] = (1,)
    gaps: tuple[int, ...] = (1,)
    period: int | None = None
    patch: int = 2
    window: tuple[int, int] = (4, 4)
    width: int = 64
    n_heads: int = 4
    encoder_blocks: int = 1
    decoder_blocks: int = 0
    mixes: bool = True
    mask: float = 0.5
    steps: int = 1000
    rollout: int = 4
    rollout_steps: int = 0
    rows: int = 8
    rate: float = 1e-3
    seed: int = 0

    model_: PrithviModel | None = field(default=None, init=False, repr=False)
    climatology_: Climatology | None = field(default=None, init=False, repr=False)
    grid_: GridFields | None = field(default=None, init=False, repr=False)
    start_: int = field(default=0, init=False, repr=False)
    run_: Progress | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("patch", "width", "n_heads", "steps", "rollout", "rows"):
            check_integer(getattr(self, name), name, 1)
        for name in ("encoder_blocks", "decoder_blocks", "rollout_steps"):
            check_integer(getattr(self, name), name)
        for name in ("leads", "gaps", "window"):
            for value in getattr(self, name):
                check_integer(value, name, 1)
        if not self.leads or not self.gaps or len(self.window) != 2:
            raise InputError("give at least one lead and one gap, and two sides of a window.")
        if self.rollout_steps and self.gaps[0] not in self.leads:
            raise InputError(f"roll-outs go by {self.gaps[0]} steps, the first gap; give that among the leads too.")
        if self.period is not None:
            check_integer(self.period, "period", 2)
        check_number(self.mask, "mask", 0.0, 0.95)
        check_number(self.rate, "rate", 0.0, above=True)
        check_seed(self.seed)

    def fit(
        self,
        data: Any,
        *,
        latitude: Any = None,
        longitude: Any = None,
        held: int = 0,
        folder: str | Path | None = None,
        bar: Bar = Bar(),
    ) -> PrithviWxC:
        """Learn from fields (`fields_of`). The last `held` fields only judge when to stop: the best state on them counts.

        With a `folder` an interrupted training goes on there. `InputError` for too few fields.
        """
        fields = fields_of(data, latitude, longitude)
        check_integer(held, "held", 0, len(fields.values) - 1)
        learned = len(fields.values) - held
        span = max(self.gaps) + max(*self.leads, self.rollout * self.gaps[0] if self.rollout_steps else 0)
        if learned <= span:
            raise InputError(
                f"{learned} fields are left to learn from; give at least {span + 1} for these leads and gaps."
            )
        self.climatology_ = Climatology.of(replace(fields, values=fields.values[:learned]), self.period)
        self.model_ = self._built(fields)
        anomalies = self._anomalies(fields, 0)
        weights = latitude_weights(fields.latitude)
        judge = (lambda: self._judged(anomalies, learned, weights)) if held > max(self.leads) else None

        def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return self._loss(batch, weights)

        for phase, steps in (("masked", self.steps), ("rollout", self.rollout_steps)):
            if steps:
                self.run_ = fit(
                    self.model_,
                    self._batches(anomalies[:learned], phase),
                    self._training(steps),
                    None if folder is None else Path(folder) / phase,
                    loss=loss,
                    judge=judge,
                    bar=bar.step(f"prithvi, {phase}", steps),
                    device="cpu",
                )
        self.model_.eval()
        self._remember(fields)
        return self

    def predict(self, lead: int = 1, *, history: Any = None, start: int | None = None) -> Float[np.ndarray, "C I J"]:
        """The field `lead` steps after the last one, in the channels' own units; NaN where no value was ever seen.

        `history` are the last fields before it (default: those of `fit`), `start` the step of the first of them, counted from
        the first of `fit`: it says the phase of the year, so with a `period` it has to be given.
        """
        check_integer(lead, "lead", 1)
        return self._predicted(self._history(history, start), lead)[-1]

    def skill(self, data: Any, *, start: int | None = None, leads: Sequence[int] | None = None) -> pd.DataFrame:
        """A row a lead and channel, over all fields of `data` that can be forecast: rmse, beside climatology and persistence.

        Errors are weighted by the cosine of latitude and in the channel's unit; `start` is as in `predict`.
        """
        fields, first = self._history(data, start)
        rows, weights = [], latitude_weights(fields.latitude)
        values = torch.from_numpy(fields.values)
        for lead in self.leads if leads is None else leads:
            found = torch.from_numpy(self._predicted((fields, first), check_integer(lead, "lead", 1)))[:-lead]
            at = torch.arange(self.gaps[0], len(values) - lead)
            if not len(at):
                raise InputError(f"{len(values)} fields are too few to judge a lead of {lead}.")
            said = {
                "rmse": found,
                "climatology": self._climatology.at(first + at + lead),
                "persistence": self._climatology.field(
                    self._climatology.anomaly(values[at], first + at), first + at + lead
                ),
            }
            for c in range(values.shape[1]):
                mse = {n: weighted_mse(x[:, c].nan_to_num(), values[at + lead, c], weights) for n, x in said.items()}
                rows.append({"lead": lead, "channel": c, **{n: float(x) ** 0.5 for n, x in mse.items()}})
        return pd.DataFrame(rows)

    def save(self, folder: str | Path, *, force: bool = False) -> Path:
        """Write settings, weights, climatology and the last fields into a new folder."""
        grid, clim = self._grid, self._climatology
        values = torch.from_numpy(grid.values)
        tensors = {f"model.{name}": value for name, value in self._model.state_dict().items()} | {
            "clim.mean": clim.mean,
            "clim.sigma": clim.sigma,
            "clim.seen": clim.seen,
            "history": values.nan_to_num(),
            "history.there": ~values.isnan(),
        }
        about = {"start": self.start_, "latitude": grid.latitude.tolist(), "longitude": grid.longitude.tolist()}
        return save(
            folder, Card("prithvi", PAPER, self._settings(), self.seed, kind=KIND, about=about), tensors, force=force
        )

    @classmethod
    def load(cls, folder: str | Path) -> PrithviWxC:
        """As it was saved; its forecasts are the same bits. `InputError` for another folder."""
        card, tensors = load(folder, KIND, "forecaster of fields")
        try:
            lists: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in card.settings.items()}
            made = cls(**lists)
            values = tensors["history"].masked_fill(~tensors["history.there"], torch.nan).numpy()
            made.grid_ = fields_of(values, card.about["latitude"], card.about["longitude"])
            made.start_ = int(card.about["start"])
            made.climatology_ = Climatology(*(tensors[f"clim.{name}"] for name in ("mean", "sigma", "seen")))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{folder} holds no forecaster of fields that can be read ({clause(error)}).") from None
        made.model_ = made._built(made.grid_)
        weights = {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")}
        fill(made.model_, weights, folder)
        made.model_.eval()
        return made

    @property
    def backbone(self) -> PrithviModel:
        """The trained network, which `mh.open_model` opens."""
        return self._model

    def _built(self, fields: GridFields) -> PrithviModel:
        """A new network for the grid, padded to whole windows. Its head is zero: it begins as the climatology."""
        unit = [self.patch * side for side in self.window]
        size = [-(-cells // one) * one for cells, one in zip(fields.values.shape[2:], unit, strict=True)]
        channels = fields.values.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            config = PrithviConfig(
                image_size=(size[0], size[1]),
                patch_size=self.patch,
                window=self.window,
                num_channels=2 * channels,
                outputs=channels,
                statics=2 * channels + PLACES,
                hidden_size=self.width,
                num_attention_heads=self.n_heads,
                encoder_blocks=self.encoder_blocks,
                decoder_blocks=self.decoder_blocks,
                wraps=fields.wraps,
                mixes=self.mixes,
            )
            model = PrithviModel(config)
        nn.init.zeros_(model.head.weight)
        nn.init.zeros_(model.head.bias)
        self.static_ = self._static(fields)
        return model

    def _static(self, fields: GridFields) -> Float[Tensor, "P S I J"]:
        """What the network knows of every cell in each phase: its place, which channels are seen there, the climatology."""
        clim = self._climatology
        phi, lam = (torch.from_numpy(np.deg2rad(x)).float() for x in (fields.latitude, fields.longitude))
        size = (len(phi), len(lam))
        places = torch.stack([phi.sin()[:, None].expand(size), lam.sin().expand(size), lam.cos().expand(size)])
        centred = clim.mean - clim.mean.mean((0, 2, 3), keepdim=True)
        scaled = centred / centred.square().mean((0, 2, 3), keepdim=True).sqrt().clamp_min(1e-6)
        fixed = torch.cat([places, clim.seen.float()])
        return torch.cat([fixed.expand(len(scaled), *fixed.shape), scaled], 1)

    def _anomalies(self, fields: GridFields, start: int) -> Float[Tensor, "T C I J"]:
        values = torch.from_numpy(fields.values)
        return self._climatology.anomaly(values, start + torch.arange(len(values)))

    def _training(self, steps: int) -> TrainSettings:
        return replace(
            ADAM, steps=steps, rate=self.rate, warmup=20, decay=0.5, clip=1.0, every=max(1, steps // 10), seed=self.seed
        )

    def _batches(self, anomalies: Float[Tensor, "T C I J"], phase: str) -> Callable[[int], dict[str, Tensor]]:
        """A lead and a gap for each row, and the time that is forecast from. In a roll-out both are the first gap."""

        def batch(i: int) -> dict[str, Tensor]:
            draw = generator_of(self.seed + (0 if phase == "masked" else 500), i)

            def chosen(values: Sequence[int]) -> Int[Tensor, "B"]:
                return torch.tensor(values)[torch.randint(len(values), (self.rows,), generator=draw)]

            lead, gap, ahead = chosen(self.leads), chosen(self.gaps), 1
            if phase == "rollout":
                lead, gap, ahead = (
                    torch.full_like(lead, self.gaps[0]),
                    torch.full_like(gap, self.gaps[0]),
                    self.rollout,
                )
            room = len(anomalies) - gap - ahead * lead
            t = gap + (torch.rand(self.rows, generator=draw) * room).long()
            found = {"past": torch.stack([anomalies[t - gap], anomalies[t]], 1), "time": t, "lead": lead, "gap": gap}
            found["target"] = torch.stack([anomalies[t + r * lead] for r in range(1, ahead + 1)], 1)
            return found if phase == "rollout" or not self.mask else found | {"visible": self._visible(i, draw)}

        return batch

    def _visible(self, i: int, draw: torch.Generator) -> Tensor:
        """Which tokens are seen: all but whole windows, or, every second time, but some tokens of each."""
        config = self._model.config
        m = config.window[0] * config.window[1]
        n = config.tokens[0] * config.tokens[1] // m
        shape = (self.rows, n, 1) if i % 2 == 0 else (self.rows, n, m)
        noise = torch.rand(shape, generator=draw)
        dim = 1 if i % 2 == 0 else 2
        hidden = noise.argsort(dim).argsort(dim) < round(self.mask * shape[dim])
        return (~hidden).expand(-1, -1, m).flatten(1)

    def _loss(self, batch: dict[str, Tensor], weights: Tensor) -> Tensor:
        past, lead, gap, time, losses = batch["past"], batch["lead"], batch["gap"], batch["time"], []
        for r in range(batch["target"].shape[1]):
            found = self._net(past, time + (r + 1) * lead, lead, gap, batch.get("visible"))
            losses.append(weighted_mse(found, batch["target"][:, r], weights))
            past = torch.stack([past[:, 1], found], 1)
        return torch.stack(losses).mean()

    def _net(
        self,
        past: Float[Tensor, "B 2 C I J"],
        then: Int[Tensor, "B"],
        lead: Int[Tensor, "B"],
        gap: Int[Tensor, "B"],
        visible: Tensor | None = None,
    ) -> Float[Tensor, "B C I J"]:
        """The anomaly at the times `then`, on the user's grid."""
        size = past.shape[-2:]
        static = self._padded(self.static_[then % len(self.static_)])
        found = self._model(
            self._padded(past.nan_to_num().flatten(1, 2)), static, visible, lead.float(), gap.float()
        ).anomaly
        return found[..., : size[0], : size[1]]

    def _padded(self, x: Float[Tensor, "B K I J"]) -> Float[Tensor, "B K I2 J2"]:
        rows, columns = (cells - own for cells, own in zip(self._model.config.image_size, x.shape[2:], strict=True))
        if columns:
            at = torch.arange(x.shape[3] + columns)
            at = at % x.shape[3] if self._model.config.wraps else at.clamp_max(x.shape[3] - 1)
            x = x[..., at]
        return F.pad(x, (0, 0, 0, rows), mode="replicate") if rows else x

    @torch.no_grad()
    def _judged(self, anomalies: Tensor, first: int, weights: Tensor) -> float:
        """The loss of the first lead over the fields from `first` on."""
        lead, gap = self.leads[0], self.gaps[0]
        at = torch.arange(max(first - lead, gap), len(anomalies) - lead)
        found = [self._forward(anomalies, part, lead, gap) for part in at.split(ROWS)]
        return float(weighted_mse(torch.cat(found), anomalies[at + lead], weights))

    def _forward(self, anomalies: Tensor, at: Tensor, lead: int, gap: int, first: int = 0) -> Tensor:
        past = torch.stack([anomalies[at - gap], anomalies[at]], 1)
        return self._net(past, first + at + lead, torch.full_like(at, lead), torch.full_like(at, gap))

    @torch.no_grad()
    def _predicted(self, history: tuple[GridFields, int], lead: int) -> Float[np.ndarray, "N C I J"]:
        """The fields `lead` steps after each but the first of a history; by roll-out, where it is no lead that was learned."""
        fields, first = history
        anomalies, gap = self._anomalies(fields, first), self.gaps[0]
        if len(anomalies) <= gap:
            raise InputError(f"{len(anomalies)} fields are too few to forecast from; give at least {gap + 1}.")
        hops = self._hops(lead)
        parts = []
        for at in torch.arange(gap, len(anomalies)).split(ROWS):
            past, then = torch.stack([anomalies[at - gap], anomalies[at]], 1), first + at
            for hop in hops:
                then = then + hop
                found = self._net(past, then, torch.full_like(at, hop), torch.full_like(at, gap))
                past = torch.stack([past[:, 1], found], 1)
            parts.append(self._climatology.field(found, then))
        return torch.cat(parts).numpy()

    def _hops(self, lead: int) -> list[int]:
        """The leads that are gone through: as many of the first gap as it takes, then one that was learned."""
        hop, hops = self.gaps[0], list[int]()
        while lead not in self.leads:
            if hop not in self.leads or lead <= hop:
                raise InputError(
                    f"a lead of {lead} cannot be reached from leads {list(self.leads)} by hops of {hop}; learn it."
                )
            hops, lead = [*hops, hop], lead - hop
        return [*hops, lead]

    def _history(self, data: Any, start: int | None) -> tuple[GridFields, int]:
        grid = self._grid
        if data is None:
            return grid, self.start_
        if self.period is not None and start is None:
            raise InputError("with a period the phase of the history counts; give start, the step of its first field.")
        fields = fields_of(data)
        if fields.values.shape[1:] != grid.values.shape[1:]:
            raise InputError(
                f"the history has fields of {list(fields.values.shape[1:])}, and it was fitted on {list(grid.values.shape[1:])}."
            )
        return replace(grid, values=fields.values), check_integer(start or 0, "start")

    def _remember(self, fields: GridFields) -> None:
        kept = max(self.gaps) + 1
        self.start_ = len(fields.values) - kept
        self.grid_ = replace(fields, values=fields.values[-kept:])

    def _settings(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(replace(self)).items() if not name.endswith("_")}

    @property
    def _model(self) -> PrithviModel:
        return _fitted(self.model_)

    @property
    def _climatology(self) -> Climatology:
        return _fitted(self.climatology_)

    @property
    def _grid(self) -> GridFields:
        return _fitted(self.grid_)


def _fitted(found: Any) -> Any:
    if found is None:
        raise InputError("this PrithviWxC was not fitted; call fit(fields) first.")
    return found


TRAINED, SHIFT = 500, 16  # fields to learn from; cells that everything moves by, a third of the way around


def _moved(**settings: Any) -> Callable[[int, int], dict[str, float]]:
    """The error of the next field after the fields learned from; the last 60 of these choose the best state."""

    def run(steps: int, seed: int) -> dict[str, float]:
        values = moved_fields(seed, TRAINED + 100, shift=SHIFT)
        made = PrithviWxC(window=(3, 4), mask=0.0, width=48, steps=steps, rows=8, rate=2e-3, seed=seed, **settings)
        made.fit(values[:TRAINED], held=60)
        found = made.skill(values[TRAINED:], start=TRAINED)
        return {"mse": float(found["rmse"].iloc[0]) ** 2, "climatology": float(found["climatology"].iloc[0]) ** 2}

    return run


def _linear(steps: int, seed: int) -> dict[str, float]:
    return {"mse": ridge_error(moved_fields(seed, TRAINED + 100, shift=SHIFT), TRAINED)}


register_experiment(
    Experiment(
        "teleconnection",
        (77,),
        PAPER,
        "The next field is this one, moved by a third of the globe: do layers across windows see it?",
        datasets=lambda quick: {"moved fields": 20 if quick else 300},
        methods={
            "local": _moved(mixes=False),
            "global and local": _moved(),
            "ridge regression": _linear,
        },
        baseline="local",
        claims=(
            Claim(
                "its MSE is at most .8 of that of local layers alone",
                lambda v: v["global and local", "mse"] / v["local", "mse"],
                at_most=0.8,
            ),
        ),
        minutes=8,
        lower=frozenset({"mse"}),
        room="forecast",
    )
)
