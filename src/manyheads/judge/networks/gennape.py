"""GENNAPE (#104): what networks would reach, from their graphs: an encoder, soft clusters of designs, and a head a cluster.

Mills et al., arXiv:2211.17226 (AAAI 2023). With the nodes' embeddings x of a graph (operation, sizes, kernel),

    k-GNN        x_i <- tanh(W1 x_i + W2 sum over j -> i of x_j + b), six times; h = mean over nodes           [32]
    regressor    y = MLP(h), trained end to end: the paper's baseline                             `GraphRegressor`
    contrastive  L = - sum_i sum_{k != i} a_ik log softmax_k(z_i . z_k / tau), z = h / |h|        `contrastive_encoder`
                 a_i = softmax over k of - |l_i - l_k| / mean distance, l the 21 smallest eigenvalues of the graph's normalised
                 Laplacian: graphs of like shape lie together, whatever they reach
    clusters     u_ic = d_ic^(-2 / (m - 1)) / sum_c' d_ic'^(-2 / (m - 1)), m = 2                  `fuzzy_means`
    heads        y = sum_c u_ic MLP_c(h_i), the encoder and the centres frozen                    `ClusteredHeads`

The order in which networks stand matters to a search: judge by rank correlation, beside FLOPs (`NetworkGraph.cost`) and the
number of parameters, which cost nothing. The published ensemble adds classifiers of pairs, which are not built. Labels are scaled
to mean 0 and deviation 1 for training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from manyheads.errors import InputError
from manyheads.inputs import check_integer, check_number, check_seed
from manyheads.judge.networks.graphs import OPS, NetworkGraph
from manyheads.progress import Bar
from manyheads.training import ADAM, TrainSettings, drawn_rows, fit

WIDTH, LAYERS, KERNELS, EIGENVALUES = 32, 6, 9, 21
GRAPHS = replace(ADAM, steps=800, rows=64, rate=1e-3)
FEW = replace(ADAM, steps=300, rows=10, rate=5e-4)


@dataclass(frozen=True)
class PackedGraphs:
    """Many graphs as one: nodes one after another, edges between them, and whose each node is."""

    ops: Int[Tensor, "N"]
    sizes: Float[Tensor, "N 3"]
    kernels: Int[Tensor, "N"]
    edges: Int[Tensor, "E 2"]
    whose: Int[Tensor, "N"]
    graphs: int


def pack_graphs(graphs: Sequence[NetworkGraph]) -> PackedGraphs:
    """Graphs for one pass."""
    starts = np.cumsum([0, *(len(one) for one in graphs)])
    edges = torch.cat([one.edges + int(start) for one, start in zip(graphs, starts, strict=False)])
    whose = torch.repeat_interleave(torch.arange(len(graphs)), torch.tensor([len(one) for one in graphs]))
    parts = [torch.cat([getattr(one, name) for one in graphs]) for name in ("ops", "sizes", "kernels")]
    return PackedGraphs(parts[0], parts[1], parts[2], edges, whose, len(graphs))


class GraphEncoder(nn.Module):
    """The k-GNN: states of every node after each layer (`layers`), or their mean over the nodes of a graph (called)."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check_seed(seed))
            self.op, self.kernel = nn.Embedding(len(OPS), WIDTH - 12), nn.Embedding(KERNELS, 4)
            self.size = nn.Linear(3, 8)
            self.own = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS))
            self.others = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))

    def layers(self, graphs: PackedGraphs) -> list[Float[Tensor, "N D"]]:
        """Embeddings of the nodes, and what each layer makes of them."""
        scale = graphs.sizes.new_tensor([32.0, 512.0, 512.0])
        parts = (
            self.op(graphs.ops),
            self.size(graphs.sizes / scale),
            self.kernel(graphs.kernels.clamp_max(KERNELS - 1)),
        )
        found = [torch.cat(parts, 1)]
        for own, others in zip(self.own, self.others, strict=True):
            x = found[-1]
            found.append(torch.tanh(own(x) + others(gathered(x, graphs))))
        return found

    def forward(self, graphs: PackedGraphs) -> Float[Tensor, "G D"]:
        return graph_means(self.layers(graphs)[-1], graphs)


def gathered(x: Float[Tensor, "N D"], graphs: PackedGraphs) -> Float[Tensor, "N D"]:
    """The sum over what leads to each node."""
    return torch.zeros_like(x).index_add(0, graphs.edges[:, 1], x[graphs.edges[:, 0]])


def graph_means(x: Float[Tensor, "N D"], graphs: PackedGraphs) -> Float[Tensor, "G D"]:
    """The mean over the nodes of each graph."""
    counts = torch.bincount(graphs.whose, minlength=graphs.graphs).clamp_min(1)[:, None]
    return x.new_zeros(graphs.graphs, x.shape[1]).index_add(0, graphs.whose, x) / counts


def small_network(wide: int, seed: int) -> nn.Sequential:
    """Two layers to a number."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(wide, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 1))


class GraphRegressor:
    """Fitted to graphs with what they reached: `predict` gives it for others. `tune` goes on with a few of another family."""

    def __init__(self, settings: TrainSettings = GRAPHS) -> None:
        self.settings = settings
        self.encoder, self.head = GraphEncoder(settings.seed), small_network(WIDTH, settings.seed)
        self.mean, self.spread = 0.0, 1.0

    def fit(self, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"], bar: Bar = Bar()) -> GraphRegressor:
        """Learn everything. `InputError` for fewer than ten graphs or labels that are no finite numbers."""
        y = checked_labels(graphs, y)
        self.mean, self.spread = float(y.mean()), max(float(y.std()), 1e-12)
        self._learn(graphs, y, self.settings, bar)
        return self

    def tuned(
        self, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"], settings: TrainSettings = FEW
    ) -> GraphRegressor:
        """A copy that went on with these."""
        other = copy.deepcopy(self)
        y = checked_labels(graphs, y)
        other.mean, other.spread = float(y.mean()), max(float(y.std()), 1e-12)
        other._learn(graphs, y, settings, Bar())
        return other

    def predict(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
        """In the unit of the labels."""
        return self.mean + self.spread * self.standardised(graphs)

    def standardised(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
        """In standard deviations of what it learned from."""
        with torch.no_grad():
            return self.head(self.encoder(pack_graphs(graphs)))[:, 0].double().numpy()

    def _learn(
        self, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"], settings: TrainSettings, bar: Bar
    ) -> None:
        learn_rows(nn.ModuleList([self.encoder, self.head]), self._forward, graphs, self._scaled(y), settings, bar)

    def _forward(self, graphs: PackedGraphs) -> Float[Tensor, "G"]:
        return self.head(self.encoder(graphs))[:, 0]

    def _scaled(self, y: Float[np.ndarray, "G"]) -> Float[Tensor, "G"]:
        return torch.from_numpy((y - self.mean) / self.spread).float()


def learn_rows(
    module: nn.Module,
    forward: Callable[[PackedGraphs], Float[Tensor, "G"]],
    graphs: Sequence[NetworkGraph],
    y: Float[Tensor, "G"],
    settings: TrainSettings,
    bar: Bar = Bar(),
) -> None:
    """Least squares over drawn graphs."""

    def loss(_: nn.Module, chosen: Int[Tensor, "R"]) -> Float[Tensor, ""]:
        return (forward(pack_graphs([graphs[i] for i in chosen.tolist()])) - y[chosen]).square().mean()

    rows = min(settings.rows, len(graphs))
    fit(module, lambda i: drawn_rows(len(graphs), rows, i, settings.seed), settings, loss=loss, device="cpu", bar=bar)
    module.eval()


def checked_labels(graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"]) -> Float[np.ndarray, "G"]:
    """Labels as numbers. `InputError` for fewer than ten, or some that are none."""
    y = np.asarray(y, dtype=np.float64)
    if y.shape != (len(graphs),) or len(y) < 10 or not np.isfinite(y).all():
        raise InputError(f"give at least ten graphs, each with a finite number; there are {len(graphs)} and {y.shape}.")
    return y


def laplacian_spectrum(graph: NetworkGraph, n: int = EIGENVALUES) -> Float[np.ndarray, "{n}"]:
    """The n smallest eigenvalues of the normalised Laplacian, edges without direction; 2, the largest there can be, fills up."""
    a = np.zeros((len(graph), len(graph)))
    for i, j in graph.edges.tolist():
        a[i, j] = a[j, i] = 1.0
    scale = 1 / np.sqrt(np.maximum(a.sum(1), 1e-12))
    values = np.linalg.eigvalsh(np.diag((a.sum(1) > 0).astype(float)) - scale[:, None] * a * scale)[:n]
    return np.concatenate([values, np.full(n - len(values), 2.0)])


def contrastive_encoder(
    graphs: Sequence[NetworkGraph], settings: TrainSettings = GRAPHS, *, tau: float = 0.1, bar: Bar = Bar()
) -> GraphEncoder:
    """An encoder that learned from graphs alone which are of like shape (formula above)."""
    check_number(tau, "tau", 0.0, 10.0, above=True)
    encoder = GraphEncoder(settings.seed)
    shapes = torch.from_numpy(np.stack([laplacian_spectrum(one) for one in graphs])).float()

    def loss(module: nn.Module, chosen: Int[Tensor, "R"]) -> Float[Tensor, ""]:
        z = torch.nn.functional.normalize(module(pack_graphs([graphs[i] for i in chosen.tolist()])), dim=1)
        itself = torch.eye(len(chosen), dtype=torch.bool)
        apart = torch.cdist(shapes[chosen], shapes[chosen])
        near = (-apart / apart.mean().clamp_min(1e-6)).masked_fill(itself, -torch.inf).softmax(1)
        log_p = (z @ z.T / tau).masked_fill(itself, -torch.inf).log_softmax(1).masked_fill(itself, 0.0)
        return -(near * log_p).sum(1).mean()

    rows = min(settings.rows, len(graphs))
    fit(encoder, lambda i: drawn_rows(len(graphs), rows, i, settings.seed), settings, loss=loss, device="cpu", bar=bar)
    return encoder.eval()


def memberships(
    h: Float[np.ndarray, "G D"], centres: Float[np.ndarray, "C D"], m: float = 2.0
) -> Float[np.ndarray, "G C"]:
    """How much each belongs to each cluster; rows sum to 1."""
    d = np.maximum(np.linalg.norm(h[:, None] - centres[None], axis=2), 1e-12)
    u = (d / d.min(1, keepdims=True)) ** (-2 / (m - 1))
    return u / u.sum(1, keepdims=True)


def fuzzy_means(
    h: Float[np.ndarray, "G D"], clusters: int = 10, *, m: float = 2.0, seed: int = 0, most: int = 300
) -> Float[np.ndarray, "C D"]:
    """Centres sum u^m h / sum u^m, until none moves by 1e-5. `InputError` for more clusters than rows."""
    check_integer(clusters, "clusters", 1, len(h))
    check_number(m, "m", 1.0, 100.0, above=True)
    centres = h[np.random.default_rng(seed).permutation(len(h))[:clusters]]
    for _ in range(most):
        u = memberships(h, centres, m) ** m
        moved = (u.T @ h) / u.sum(0)[:, None]
        done = float(np.abs(moved - centres).max()) < 1e-5
        centres = moved
        if done:
            break
    return centres


class ClusteredHeads:
    """A head a soft cluster on a frozen encoder (formula above)."""

    def __init__(self, encoder: GraphEncoder, clusters: int = 10, settings: TrainSettings = GRAPHS) -> None:
        self.encoder, self.clusters, self.settings = encoder, clusters, settings

    def fit(self, graphs: Sequence[NetworkGraph], y: Float[np.ndarray, "G"], bar: Bar = Bar()) -> ClusteredHeads:
        """Find the clusters, then learn their heads."""
        y, h = checked_labels(graphs, y), self._states(graphs)
        self.centre, self.scale = h.mean(0), np.maximum(h.std(0), 1e-6)
        scaled = (h - self.centre) / self.scale
        self.mean, self.spread = float(y.mean()), max(float(y.std()), 1e-12)
        self.centres = fuzzy_means(scaled, self.clusters, seed=self.settings.seed)
        self.heads = nn.ModuleList(small_network(WIDTH, self.settings.seed + i) for i in range(self.clusters))
        x, u = torch.from_numpy(scaled).float(), torch.from_numpy(memberships(scaled, self.centres)).float()
        target = torch.from_numpy((y - self.mean) / self.spread).float()

        def loss(_: nn.Module, chosen: Int[Tensor, "R"]) -> Float[Tensor, ""]:
            return (self._mixed(x[chosen], u[chosen]) - target[chosen]).square().mean()

        rows = min(self.settings.rows, len(y))
        fit(
            self.heads,
            lambda i: drawn_rows(len(y), rows, i, self.settings.seed),
            self.settings,
            loss=loss,
            device="cpu",
            bar=bar,
        )
        return self

    def predict(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G"]:
        """In the unit of the labels."""
        scaled = (self._states(graphs) - self.centre) / self.scale
        u = torch.from_numpy(memberships(scaled, self.centres)).float()
        with torch.no_grad():
            found = self._mixed(torch.from_numpy(scaled).float(), u).double().numpy()
        return self.mean + self.spread * found

    def _mixed(self, x: Float[Tensor, "R D"], u: Float[Tensor, "R C"]) -> Float[Tensor, "R"]:
        return (u * torch.cat([head(x) for head in self.heads], 1)).sum(1)

    def _states(self, graphs: Sequence[NetworkGraph]) -> Float[np.ndarray, "G D"]:
        with torch.no_grad():
            return self.encoder(pack_graphs(graphs)).double().numpy()
