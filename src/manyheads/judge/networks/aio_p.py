"""AIO-P (#106): one predictor of networks for many tasks, by adapters beside a frozen encoder and labels in a common unit.

Mills et al., arXiv:2211.17228 (AAAI 2023). A `GraphRegressor` knows what networks reach in one task. For another

    stand          (y - mean) / deviation                                            `Standard(flops=False)`
    stand_flops    q = y / (log10(F + 1) + 1), F in GFLOPs, then (q - mean) / deviation
                   back: (p deviation + mean) (log10(F + 1) + 1)                     `Standard(flops=True)`
    adapter        z_0 = the nodes' embeddings, z_i+1 = tanh(GraphConv_i([x_i+1 ; z_i])), x_i+1 what layer i of the frozen base
                   makes; head on [mean x_L ; mean z_L]; learned on cheap labels of another task               `Adapter`
    prediction     the mean over the adapters, in standardised units, brought back by the mean and deviation of a few true labels

Mean and deviation of a new task come from the few designs that have true labels; those of cheap (pseudo) labels are their own,
for their scale may be wrong. The published code scales training labels only and selects by MAPE of standardised labels; neither
is done here. Its rescaling of heads by random factors, and how pseudo-labels are made from a supernet, are not built: labels are
given.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.judge.networks.gennape import (
    LAYERS,
    WIDTH,
    GraphRegressor,
    PackedGraphs,
    checked_labels,
    gathered,
    graph_means,
    learn_rows,
    pack_graphs,
)
from manyheads.judge.networks.graphs import NetworkGraph
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings

ADAPTER = replace(ADAM, steps=400, rows=32, rate=1e-3)
TWENTY = replace(ADAM, steps=100, rows=20, rate=1e-4)


@dataclass(frozen=True)
class Standard:
    """Labels of a task in standard deviations, and back (formulas above)."""

    mean: float
    spread: float
    flops: bool

    @classmethod
    def of(cls, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"], *, flops: bool = True) -> Standard:
        """From designs whose labels are known, two at least."""
        if len(graphs) != len(y) or len(y) < 2:
            raise InputError("a task's unit needs two designs with labels at least.")
        q = np.asarray(y, dtype=np.float64) / (_log_cost(graphs) if flops else 1.0)
        return cls(float(q.mean()), max(float(q.std()), 1e-12), flops)

    def scaled(self, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
        """Labels in standard deviations."""
        return (y / (_log_cost(graphs) if self.flops else 1.0) - self.mean) / self.spread

    def back(self, graphs: Sequence[NetworkGraph], p: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
        """Predictions in the unit of the labels."""
        return (p * self.spread + self.mean) * (_log_cost(graphs) if self.flops else 1.0)


def _log_cost(graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
    return np.log10(np.array([one.cost for one in graphs]) + 1) + 1


class Adapter(nn.Module):
    """Layers beside a base that stays as it is, learned on labels of another task."""

    def __init__(self, base: GraphRegressor, seed: int = 0) -> None:
        super().__init__()
        # Not a part of this module: its weights are neither trained nor saved with the adapter.
        self.base = [base.encoder]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.own = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH) for _ in range(LAYERS))
            self.others = nn.ModuleList(nn.Linear(2 * WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
            self.head = nn.Sequential(
                nn.Linear(2 * WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1)
            )

    def forward(self, graphs: PackedGraphs) -> Float[Tensor, "G"]:
        with torch.set_grad_enabled(any(one.requires_grad for one in self.base[0].parameters())):
            layers = self.base[0].layers(graphs)
        z = layers[0]
        for own, others, x in zip(self.own, self.others, layers[1:], strict=True):
            both = torch.cat([x, z], 1)
            z = torch.tanh(own(both) + others(gathered(both, graphs)))
        found = torch.cat([graph_means(layers[-1], graphs), graph_means(z, graphs)], 1)
        return self.head(found)[:, 0]

    def predict(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
        """In standardised units."""
        with torch.no_grad():
            return self(pack_graphs(graphs)).double().numpy()


def learned_adapter(
    base: GraphRegressor,
    graphs: Sequence[NetworkGraph],
    y: Float[np.ndarray, "G"],
    *,
    flops: bool = True,
    settings: TrainSettings = ADAPTER,
    bar: Bar = Bar(),
) -> Adapter:
    """An adapter that learned labels of another task, however cheap; `base` is left as it is, to the bit."""
    y = checked_labels(graphs, y)
    adapter = Adapter(base, settings.seed)
    target = torch.from_numpy(Standard.of(graphs, y, flops=flops).scaled(graphs, y)).float()
    frozen = [one for one in base.encoder.parameters() if one.requires_grad]
    for one in frozen:
        one.requires_grad_(False)
    try:
        learn_rows(adapter, adapter, graphs, target, settings, bar)
    finally:
        for one in frozen:
            one.requires_grad_(True)
    return adapter


@dataclass(frozen=True)
class TaskPredictor:
    """What networks would reach in a task: the mean of some adapters, in the unit that a few true labels give."""

    adapters: tuple[Adapter, ...]
    unit: Standard

    def predict(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
        """In the unit of the task's labels."""
        return self.unit.back(graphs, np.mean([one.predict(graphs) for one in self.adapters], axis=0))


def for_task(
    adapters: Sequence[Adapter],
    graphs: Sequence[NetworkGraph],
    y: Float[np.ndarray, "G"],
    *,
    flops: bool = True,
    tune: bool = False,
    settings: TrainSettings = TWENTY,
) -> TaskPredictor:
    """A predictor for a task of which a few designs are known. With `tune` heads and base learn from them too, in copies.

    `InputError` without an adapter, or for fewer than ten labels.
    """
    if not adapters:
        raise InputError("there is no adapter; learn one first.")
    y = checked_labels(graphs, y)
    unit = Standard.of(graphs, y, flops=flops)
    if not tune:
        return TaskPredictor(tuple(adapters), unit)
    target = torch.from_numpy(unit.scaled(graphs, y)).float()
    tuned = []
    for one in adapters:
        other = Adapter.__new__(Adapter)
        nn.Module.__init__(other)
        other.own, other.others, other.head = one.own, one.others, copy.deepcopy(one.head)
        other.base = [copy.deepcopy(one.base[0])]
        learn_rows(nn.ModuleList([other.head, other.base[0]]), other, graphs, target, settings)
        tuned.append(other)
    return TaskPredictor(tuple(tuned), unit)
