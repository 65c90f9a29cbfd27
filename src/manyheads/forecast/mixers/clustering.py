"""Channel clustering (#39): an output layer for each cluster of channels, on the trunk of any network forecaster here.

Chen et al., "From Similarity to Superiority: Channel Clustering for Time Series Forecasting", arXiv:2404.01340, on average 2.4 %
better than the forecasters it was put on for long horizons and 7.2 % for short ones.

    g_i          mean_m GELU(W x_im) of M windows of the history of channel i, scaled by mean and std over channels
    p_ik         softmax over k of cos(V g_i, c_k) / eps                            c_k: K learned prototypes; eps = 0.05
    y_i          sum_k p_ik f_k(z_i)                                                f_k: the forecaster's output layer, K times
    L_c          -2 mean_ij (S_ij - mean S) <p_i, p_j>,    S_ij = exp(-5 |x_i - x_j|^2 / max |x - x|^2)
    loss         the forecaster's + beta L_c

No channel is known by its number: channels may change places, and series that were never seen are assigned by their history.
f_k are linear, so that mixing their outputs is mixing their weights: y = sum_k W_k (p_ik z_i) is one linear layer on p x [z, 1].

Departures. L_c without the mean of S is least where all channels are in one cluster, so beta is 0 unless it is given, S is
centred, and sums are means. A linear embedding, as released, cancels: x and -x have opposite cosines, and windows have mean 0.
The mean is over windows of a channel's own history, not over the batch, so that a forecast does not depend on what else is in it.
W is drawn and not learned. Prototypes begin on channels that lie far apart; they and V learn by gradients, for the first steps
alone: errors do not keep clusters apart, since a mixture of two layers may do as well as a third.
The refresh of prototypes by attention over the channels of a batch, and the sampling of memberships for it, are left out.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation.experiment import Claim, Experiment, register_experiment
from manyheads.forecast.core.forecaster import FORECASTERS, forecasts
from manyheads.forecast.core.network import NetworkForecaster
from manyheads.forecast.core.panel import Panel
from manyheads.forecast.core.windows import Shape, Windows
from manyheads.forecast.mixers.planted import items_panel, squared_errors, three_groups
from manyheads.inputs import check_integer, check_number
from manyheads.learning import Attached, Head

MOST_BEGUN = 256  # series whose embeddings the prototypes begin with
_OWN = ("_batch", "_outputs", "_once", "ahead")  # what a base may not have its own way of
_SHARED = tuple(one.name for one in fields(NetworkForecaster) if one.init)


class Assigner(nn.Module):
    """f and the prototypes: M windows of a channel, [..., M, T] -> cosines [..., K]."""

    def __init__(self, context: int, width: int, clusters: int) -> None:
        super().__init__()
        features = 4 * width
        self.embed = nn.Sequential(nn.Linear(context, features), nn.GELU())
        self.embed.requires_grad_(False)
        self.project = nn.Linear(features, width)
        self.prototypes = nn.Parameter(torch.randn(clusters, width))
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("std", torch.ones(features))

    def forward(self, x: Float[Tensor, "*B M T"]) -> Float[Tensor, "*B K"]:
        """The cosine of what M windows have in common with each prototype."""
        found: Tensor = F.normalize(self.embedded(x), dim=-1) @ F.normalize(self.prototypes, dim=-1).T
        return found

    def embedded(self, x: Float[Tensor, "*B M T"]) -> Float[Tensor, "*B d"]:
        """What M windows have in common."""
        h: Tensor = self.project((self.embed(x).mean(-2) - self.mean) / self.std)
        return h

    @torch.no_grad()
    def begin(self, x: Float[Tensor, "N M T"]) -> None:
        """Scale what is embedded by the channels to learn from, and put the prototypes on channels that lie far apart.

        What GELUs give is else nearly the same vector for all channels, and clusters that no channel is in learn nothing.
        """
        features = self.embed(x).mean(-2)
        self.mean.copy_(features.mean(0))
        self.std.copy_(features.std(0, correction=0).clamp_min(1e-3))
        h = F.normalize(self.embedded(x), dim=-1)
        nearest = h @ F.normalize(h.mean(0), dim=0)
        for k in range(min(len(self.prototypes), len(h))):
            chosen = h[nearest.argmin()]
            self.prototypes[k] = chosen
            nearest = h @ chosen if k == 0 else torch.maximum(nearest, h @ chosen)


class ClusteredTrunk(nn.Module):
    """A trunk whose states [B, C, D] become p x [z, 1], [B, C, K, D + 1], for a linear head to read."""

    def __init__(
        self, base: nn.Module, shape: Shape, clusters: int, width: int, temperature: float, learns: int
    ) -> None:
        super().__init__()
        self.base, self.temperature, self.learns = base, temperature, learns
        taken = inspect.signature(base.forward).parameters
        self.taken = tuple(name for name in taken if name in inspect.signature(self.forward).parameters)
        needed = [n for n, one in taken.items() if one.default is one.empty and one.kind is not one.VAR_KEYWORD]
        if unknown := [n for n in needed if n not in self.taken]:
            raise UnsupportedError(f"the trunk reads {unknown[0]!r}, which channel clustering does not pass on.")
        self.passes: Tensor
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.assigner = Assigner(shape.context, width, clusters)
        self.width = clusters * (base.width + 1)  # type: ignore[operator]

    def memberships(self, views: Float[Tensor, "B M T C"]) -> Float[Tensor, "B C K"]:
        """How much each channel is of each cluster, by windows of its history."""
        cosines: Tensor = self.assigner(views.permute(0, 3, 1, 2))
        return (cosines / self.temperature).softmax(-1)

    def forward(
        self,
        views: Float[Tensor, "B M T C"],
        past_values: Float[Tensor, "B T C"],
        past_observed_mask: Float[Tensor, "B T C"] | None = None,
        past_time_features: Float[Tensor, "B T 5"] | None = None,
        future_time_features: Float[Tensor, "B H 5"] | None = None,
        future_covariates: Float[Tensor, "B H L"] | None = None,
        future_covariates_mask: Float[Tensor, "B H L"] | None = None,
    ) -> Float[Tensor, "B C K E"]:
        """The base's states, weighted by the memberships of their channels."""
        given = {
            "past_values": past_values,
            "past_observed_mask": past_observed_mask,
            "past_time_features": past_time_features,
            "future_time_features": future_time_features,
            "future_covariates": future_covariates,
            "future_covariates_mask": future_covariates_mask,
        }
        out = self.base(**{name: given[name] for name in self.taken})
        states = out if isinstance(out, Tensor) else out[0]  # Transformers' models give several things, states first
        p = self.memberships(views)[:, : states.shape[1]]
        if self.training:
            self.passes += 1
            p = p if int(self.passes) <= self.learns else p.detach()
        return weighted(states.flatten(2), p)


def weighted(states: Float[Tensor, "B C D"], p: Float[Tensor, "B C K"]) -> Float[Tensor, "B C K E"]:
    """What a linear layer reads, p x [z, 1], to give the mean of K layers, each with its bias, weighted by p."""
    return p[..., None] * F.pad(states, (0, 1), value=1.0)[:, :, None]


def similarity(x: Float[Tensor, "B T C"]) -> Float[Tensor, "B C C"]:
    """S of the formula above."""
    d = torch.cdist(x.transpose(1, 2), x.transpose(1, 2)).square()
    return torch.exp(-5 * d / d.amax((1, 2), keepdim=True).clamp_min(1e-12))


def cluster_loss(s: Float[Tensor, "B C C"], p: Float[Tensor, "B C K"], centred: bool = True) -> Float[Tensor, ""]:
    """L_c, up to what does not depend on p; not `centred` it is the paper's, a mean instead of a sum."""
    s = s - s.mean((1, 2), keepdim=True) if centred else s
    return -2 * (s * (p @ p.transpose(1, 2))).mean()


@dataclass(frozen=True)
class ClusterSettings:
    """K."""

    clusters: int


class ClusterHead(Head):
    """Nothing but L_c: it reads p, which stands where the states' 1 was."""

    Settings = ClusterSettings

    def forward(self, states: Float[Tensor, "B C K E"]) -> Float[Tensor, "B C K"]:
        """The memberships p."""
        return states[..., -1]

    def loss(self, output: Float[Tensor, "B C K"], target: tuple[Float[Tensor, "B T D"]]) -> Float[Tensor, ""]:
        """L_c of the windows of the batch."""
        return cluster_loss(similarity(target[0][..., : output.shape[1]]), output)


@forecasts("channel_clustering")
@dataclass(kw_only=True, eq=False)
class ClusteredForecaster(NetworkForecaster):
    """`base` names a network forecaster and `settings` its own settings; what all networks share is set here.

    K is `clusters` (the paper: ceil(0.3 C), or 4), d the `assigner_width`; `views` windows of its history assign a channel.
    Prototypes and assignments learn for the first `learns` steps. Not `normalised`, windows keep their level.
    """

    PAPER: ClassVar[str] = "2404.01340"
    COVARIATES: ClassVar[bool] = True  # the base leaves them aside if it reads none
    KEEPS: ClassVar[int | None] = None  # channels are assigned by their history

    base: str = "softs"
    settings: dict[str, Any] = field(default_factory=dict)
    clusters: int = 4
    assigner_width: int = 32
    temperature: float = 0.05
    views: int = 32
    learns: int = 50
    beta: float = 0.0
    normalised: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clusters", "assigner_width", "views"):
            check_integer(getattr(self, name), name, 1)
        check_number(self.beta, "beta", 0.0)
        self._based()

    def _based(self) -> NetworkForecaster:
        """The forecaster whose trunk it is. `InputError` for one without, `UnsupportedError` for one with batches of its own."""
        cls = FORECASTERS[self.base]
        if not issubclass(cls, NetworkForecaster) or issubclass(cls, ClusteredForecaster):
            raise InputError(f"base is {self.base!r}, which has no trunk of its own; give a network such as 'softs'.")
        if any(getattr(cls, name) is not getattr(NetworkForecaster, name) for name in _OWN):
            raise UnsupportedError(
                f"{self.base} makes windows or forecasts in its own way; cluster the channels of another."
            )
        shared = {name: getattr(self, name) for name in _SHARED}
        try:
            return cls(**shared | self.settings)
        except TypeError as error:
            raise InputError(f"settings do not fit {self.base} ({error}).") from None

    def trunk(self, shape: Shape) -> nn.Module:
        """The base's trunk with an assigner."""
        own = self._based().trunk(shape)
        return ClusteredTrunk(own, shape, self.clusters, self.assigner_width, self.temperature, self.learns)

    def prepare(self, trunk: nn.Module, windows: Windows, places: Int[np.ndarray, "N 2"]) -> None:
        """What the base's trunk takes, and where the prototypes begin."""
        self._based().prepare(trunk.base, windows, places)  # type: ignore[arg-type]
        last = places[np.append(np.diff(places[:, 0]) != 0, True)]  # of each series, the latest window to learn from
        views = history_views(windows, last[:: -(-len(last) // MOST_BEGUN)], 4 * self.views)
        trunk.assigner.begin(views.permute(0, 3, 1, 2).flatten(0, 1))  # type: ignore[union-attr, operator]

    def attached(self, trunk: nn.Module, shape: Shape) -> dict[str, Attached]:
        """The base's heads, on weighted states; L_c where beta is above 0."""
        heads = self._based().attached(trunk, shape)
        for one in heads.values():  # what random layers forecast would draw channels out of their clusters
            nn.init.zeros_(one.head.linear.weight)  # type: ignore[union-attr, arg-type]
        if self.beta:
            about = ClusterHead(ClusterSettings(self.clusters))
            heads["clusters"] = Attached(about, ("past_values",), pool="tokens", weight=self.beta, stays=False)
        return heads

    def _windows(self, panel: Panel, held: int | None = None) -> Windows:
        base = self._based()
        base.scales_ = self.scales_
        if self.normalised:
            return base._windows(panel, held)
        scales = self.scales_ if held is None else None
        reads = base.COVARIATES
        return Windows(
            panel, self.context, self.ahead, covariates=reads, scaling="series", held=held or 0, scales=scales
        )

    def _batch(self, windows: Windows, places: Int[np.ndarray, "B 2"]) -> dict[str, Tensor]:
        return windows.batch(places) | {"views": history_views(windows, places, self.views)}

    @torch.no_grad()
    def memberships(self, panel: Panel | None = None) -> pd.DataFrame:
        """A row a series and target of a panel (default: of what it was fitted on): item, target_name, cluster, p0, p1, ..."""
        heads, _ = self._learned
        given = self._fitted if panel is None else panel
        laid = self._laid_out(given)
        windows = self._windows(laid)
        places = np.array([(s, n) for s, n in enumerate(windows.lengths)])
        p = heads.trunk.module.memberships(history_views(windows, places, self.views))
        p = p[:, : laid.n_targets].reshape(-1, self.clusters).numpy()
        names = [(one.name, target) for one in given.series for target in given.columns.targets]
        table = pd.DataFrame(names, columns=["item", "target_name"]).assign(cluster=p.argmax(1))
        return table.join(pd.DataFrame(p, columns=[f"p{k}" for k in range(self.clusters)]))


def clustered(forecaster: NetworkForecaster, **settings: Any) -> ClusteredForecaster:
    """Channel clustering on a forecaster with its settings: `clustered(Softs(horizon=24), clusters=3)`."""
    given = forecaster.get_params()
    shared = {name: given.pop(name) for name in _SHARED}
    return ClusteredForecaster(**shared | {"base": forecaster.METHOD, "settings": given} | settings)


def history_views(windows: Windows, places: Int[np.ndarray, "B 2"], views: int) -> Float[Tensor, "B M T C"]:
    """Windows of each series at cuts spread evenly over what came before its cut, the last at the cut itself."""
    shape = windows.shape
    first = np.minimum(places[:, 1], shape.context)
    cuts = np.linspace(first, places[:, 1], views, axis=1).round().astype(int)
    at = torch.from_numpy(windows.starts[places[:, 0]][:, None] + cuts)
    index = at.flatten()[:, None] + torch.arange(-shape.context, 0)
    past, seen = windows.values[index], windows.observed[index]
    mean, std = windows._window_scale(past, seen)
    return ((past - mean[:, None]) / std[:, None]).unflatten(0, (len(places), views))


def rand_index(a: Int[np.ndarray, "N"], b: Int[np.ndarray, "N"]) -> float:
    """The adjusted Rand index of two partitions: 1 where they are the same, about 0 by chance (Hubert and Arabie, 1985)."""
    table = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(table, (a, b), 1)
    pairs, rows, columns = (float((n * (n - 1) / 2).sum()) for n in (table, table.sum(1), table.sum(0)))
    chance = rows * columns / (len(a) * (len(a) - 1) / 2)
    most = (rows + columns) / 2
    return (pairs - chance) / (most - chance) if most != chance else 1.0  # all alone, or all together, in both


GROUP = 4  # channels of a group


@dataclass(frozen=True)
class _Groups:
    """Three groups of four series; `unseen`: the last of each is kept from training, and the only one tested."""

    unseen: bool
    steps: int = 900
    length: int = 4000
    first: int = 3200

    def panels(self, seed: int) -> tuple[Panel, Panel]:
        """What is learned from, and what is tested after `first`."""
        rows = three_groups(seed, GROUP, self.length)
        held = np.arange(len(rows)) % GROUP == GROUP - 1
        learned, tested = (rows[~held], rows[held]) if self.unseen else (rows, rows)
        return items_panel(learned[:, : self.first]), items_panel(tested)


def _settings(data: _Groups, seed: int) -> dict[str, Any]:
    some = {"base": "linear", "context": 48, "horizon": 24, "objective": "point", "levels": (), "patience": None}
    some |= {"normalised": False}  # they are scaled already
    return some | {"rows": 12 * 32, "rate": 2e-3, "steps": data.steps, "seed": seed}


def _clustered(data: _Groups, seed: int) -> dict[str, float]:
    learned, tested = data.panels(seed)
    made = ClusteredForecaster(clusters=3, **_settings(data, seed))
    made.fit_panel(learned, validation=0)
    found = {"mse": float(squared_errors(made, tested, data.first).mean())}
    if not data.unseen:
        cluster = made.memberships(tested)["cluster"].to_numpy()
        found["rand index"] = rand_index(cluster, np.arange(len(tested)) // GROUP)
    trunk = made._learned[0].trunk.module
    trunk.temperature = 1e9  # all memberships alike
    return found | {"mse of the uniform mean": float(squared_errors(made, tested, data.first).mean())}


def _shared(data: _Groups, seed: int) -> dict[str, float]:
    learned, tested = data.panels(seed)
    made = ClusteredForecaster(clusters=1, **_settings(data, seed))
    made.fit_panel(learned, validation=0)
    return {"mse": float(squared_errors(made, tested, data.first).mean())}


def _own(data: _Groups, seed: int) -> dict[str, float]:
    """A layer for each series, which series that were never seen have not."""
    learned, tested = data.panels(seed)
    if data.unseen:
        return {"mse": float("nan")}
    errors = []
    for one, other in zip(learned.series, tested.series, strict=True):
        made = ClusteredForecaster(clusters=1, **_settings(data, seed) | {"rows": 32, "views": 1})
        made.fit_panel(replace(learned, series=(one,)), validation=0)
        errors.append(squared_errors(made, replace(tested, series=(other,)), data.first).mean())
    return {"mse": float(np.mean(errors))}


register_experiment(
    Experiment(
        "channel_clustering",
        (39,),
        "2404.01340",
        "Does an output layer for each of three clusters find the groups of channels, and help series that were never seen?",
        datasets=lambda quick: {
            name: _Groups(unseen, 60 if quick else 900) for name, unseen in (("seen", False), ("unseen", True))
        },
        methods={"one layer": _shared, "clustered": _clustered, "a layer a series": _own},
        baseline="one layer",
        claims=(
            Claim(
                "the adjusted Rand index of clusters and groups is at least .9",
                lambda v: v["clustered", "rand index"],
                at_least=0.9,
                on="seen",
            ),
            Claim(
                "its MSE is at most .93 of that of the uniform mean of the same layers, on series that were seen and others",
                lambda v: v["clustered", "mse"] / v["clustered", "mse of the uniform mean"],
                at_most=0.93,
            ),
            Claim(
                "its MSE is below that of one layer for all",
                lambda v: v["clustered", "mse"] / v["one layer", "mse"],
                at_most=1.0,
            ),
            Claim(
                "its MSE is below that of a layer for each series",
                lambda v: v["clustered", "mse"] / v["a layer a series", "mse"],
                at_most=1.0,
                on="seen",
            ),
        ),
        minutes=4,
        lower=frozenset({"mse", "mse of the uniform mean"}),
        room="forecast",
    )
)
