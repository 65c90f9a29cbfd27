"""Networks as graphs (#104, #106): graphs by hand, clusters by their formula, and predictors that tell an order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from manyheads.errors import InputError, UnsupportedError
from manyheads.evaluation import rank_correlation
from manyheads.judge.networks.aio_p import ADAPTER, Standard, for_task, learned_adapter
from manyheads.judge.networks.aio_p_claims import cost_task
from manyheads.judge.networks.design_benchmark import costs, design, designs
from manyheads.judge.networks.gennape import (
    GRAPHS,
    ClusteredHeads,
    GraphEncoder,
    GraphRegressor,
    contrastive_encoder,
    fuzzy_means,
    laplacian_spectrum,
    memberships,
    pack_graphs,
)
from manyheads.judge.networks.graphs import OPS, GraphMaker, graph_of
from manyheads.judge.networks.small_networks import KINDS, digits_networks, drawn_design, proxies

QUICK = replace(GRAPHS, steps=200, rows=32)


@pytest.fixture(scope="module")
def base():
    """What learned 300 designs of family A."""
    return GraphRegressor(QUICK).fit(*designs("A", 300, 0))


class Skipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.deep = (
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.a(x)))
        x = torch.nn.functional.max_pool2d(x + self.deep(x), 2)
        return self.head(x.mean((2, 3)))


def test_a_module_becomes_the_graph_that_one_would_draw():
    graph = graph_of(Skipped(), torch.zeros(1, 3, 16, 16), "mine")
    names = [OPS[i] for i in graph.ops.tolist()]
    assert names == ["input", "conv", "batchnorm", "relu", "depthwise", "add", "max pool", "mean", "linear", "output"]
    assert sorted(map(tuple, graph.edges.tolist())) == [
        (0, 1), (1, 2), (2, 3), (3, 4), (3, 5), (4, 5), (5, 6), (6, 7), (7, 8), (8, 9)
    ]  # fmt: skip
    assert graph.sizes[1].tolist() == [16, 3, 8] and graph.sizes[6].tolist() == [8, 8, 8] and graph.kernels[1] == 3
    assert graph.cost == pytest.approx((9 * 3 * 8 * 256 + 9 * 8 * 256 + 8 * 5) / 1e9)


def test_what_cannot_be_followed_is_refused_and_the_module_stays_in_its_mode():
    class Branching(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(UnsupportedError, match="Branching cannot be traced"):
        graph_of(Branching(), torch.zeros(1, 3))
    module = Skipped().train()
    with pytest.raises(UnsupportedError, match="Skipped"):
        graph_of(module, torch.zeros(1, 4, 8, 8))
    assert module.training and module.norm.num_batches_tracked == 0
    with pytest.raises(InputError, match="no operation 'convolve'"):
        GraphMaker().add("convolve", (1, 1, 1))


def test_designs_are_those_of_their_formula():
    graph, label = design("A", np.random.default_rng(3))
    assert 0.80 < label < 0.95 and len(graph) < 50 and OPS[int(graph.ops[0])] == "input"
    deep = [design("B", np.random.default_rng(i))[0] for i in range(20)]
    assert all(int((one.ops == OPS.index("depthwise")).sum()) >= 1 for one in deep)
    one, again = designs("C", 5, 0), designs("C", 5, 0)
    assert (one[1] == again[1]).all() and not (one[1] == designs("C", 5, 1)[1]).all()
    # one conv of the stem: 3 x 3 x 3 x c x 32 x 32 at the least
    assert costs(one[0]).min() > 9 * 3 * 16 * 1024 / 1e9


def test_graphs_packed_together_are_read_as_alone():
    graphs, _ = designs("A", 6, 0)
    encoder = GraphEncoder(0)
    with torch.no_grad():
        together = encoder(pack_graphs(graphs))
        alone = torch.cat([encoder(pack_graphs([one])) for one in graphs])
    assert torch.allclose(together, alone, atol=1e-6)
    turned = replace(graphs[0], edges=graphs[0].edges.flip(1))
    with torch.no_grad():
        assert not torch.allclose(encoder(pack_graphs([turned])), alone[:1], atol=1e-4), "an edge has a direction"


def test_memberships_sum_to_one_and_one_cluster_is_a_single_head():
    draw = np.random.default_rng(0)
    h = np.concatenate([draw.normal(0, 0.1, (40, 3)), draw.normal(3, 0.1, (60, 3))])
    centres = fuzzy_means(h, 2)
    u = memberships(h, centres)
    assert u.sum(1) == pytest.approx(1) and sorted(np.round(centres.mean(1)).tolist()) == [0, 3]
    assert u[:40].argmax(1).std() == 0 and u[0].argmax() != u[99].argmax() and u.max(1).min() > 0.95
    moved = ((u**2).T @ h) / (u**2).sum(0)[:, None]
    assert np.abs(moved - centres).max() < 1e-4, "a fixed point"
    graphs, y = designs("A", 60, 0)
    one = ClusteredHeads(GraphEncoder(0), 1, replace(QUICK, steps=20)).fit(graphs, y)
    scaled = torch.from_numpy((one._states(graphs) - one.centre) / one.scale).float()
    with torch.no_grad():
        assert one.predict(graphs) == pytest.approx(
            one.mean + one.spread * one.heads[0](scaled)[:, 0].numpy(), abs=1e-6
        )


def test_a_spectrum_tells_of_shape_alone():
    graph = graph_of(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 4))
    n = len(graph)  # a chain: 1 - cos(pi k / (n - 1))
    assert laplacian_spectrum(graph)[:n] == pytest.approx([1 - np.cos(np.pi * k / (n - 1)) for k in range(n)])
    other = graph_of(nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2)), torch.zeros(1, 4))
    assert (laplacian_spectrum(graph) == laplacian_spectrum(other)).all()


def test_what_designs_reach_is_told_from_their_graphs_better_than_from_counts(base):
    graphs, y = designs("A", 400, 0)
    fitted = base
    told = rank_correlation(fitted.predict(graphs[300:]), y[300:])
    assert told > 0.75 and told > rank_correlation(costs(graphs[300:]), y[300:]) + 0.2
    b, b_y = designs("B", 60, 0)
    assert rank_correlation(fitted.predict(b), b_y) > 0.5
    shuffled = GraphRegressor(replace(QUICK, steps=60)).fit(graphs[:300], np.random.default_rng(0).permutation(y[:300]))
    assert rank_correlation(shuffled.predict(graphs[300:]), y[300:]) < 0.35
    before = [one.clone() for one in fitted.encoder.parameters()]
    fitted.tuned(b, b_y)
    assert all(torch.equal(a, c) for a, c in zip(before, fitted.encoder.parameters(), strict=True)), "a copy goes on"
    encoder = contrastive_encoder(graphs[:60], replace(QUICK, steps=5))
    assert not torch.equal(encoder.own[0].weight, GraphEncoder(0).own[0].weight)
    for wrong in (y[:5], np.full(300, np.nan)):
        with pytest.raises(InputError, match="ten graphs"):
            GraphRegressor().fit(graphs[: len(wrong)], wrong)


def test_an_adapter_serves_another_task_and_leaves_its_base_to_the_bit(base):
    (cheap, cheap_y), (known, known_y), (judged, y) = cost_task(0)
    before = {name: value.clone() for name, value in base.encoder.state_dict().items()}
    adapter = learned_adapter(base, cheap, cheap_y, settings=replace(ADAPTER, steps=150))
    assert all(torch.equal(value, before[name]) for name, value in base.encoder.state_dict().items())
    assert all(one.requires_grad for one in base.encoder.parameters())
    told = for_task([adapter], known, known_y).predict(judged)
    unit = Standard.of(known, known_y)
    without = unit.back(judged, base.standardised(judged))
    assert 100 * np.abs(told - y).mean() < 2.0 and rank_correlation(told, y) > rank_correlation(without, y)
    assert 100 * np.abs(base.predict(judged) - y).mean() > 30, "in the unit of the first task"
    head = [one.clone() for one in adapter.head.parameters()]
    tuned = for_task([adapter], known, known_y, tune=True)
    assert all(torch.equal(a, b) for a, b in zip(head, adapter.head.parameters(), strict=True))
    assert all(torch.equal(value, before[name]) for name, value in base.encoder.state_dict().items())
    assert not np.allclose(tuned.predict(judged), told)
    with pytest.raises(InputError, match="no adapter"):
        for_task([], known, known_y)


@pytest.mark.parametrize("flops", [False, True])
def test_a_unit_and_back_is_the_label_again(flops):
    graphs, y = designs("B", 30, 0)
    unit = Standard.of(graphs[:20], y[:20], flops=flops)
    scaled = unit.scaled(graphs, y)
    assert unit.back(graphs, scaled) == pytest.approx(y, abs=1e-9)
    assert scaled[:20].mean() == pytest.approx(0) and scaled[:20].std() == pytest.approx(1)


def test_trained_networks_are_kept_with_what_tells_before():
    found = digits_networks()
    assert len(found.graphs) == 150 and {*found.families} == {*KINDS}
    assert found.accuracy.min() > 0.1 and found.accuracy.max() < 1 and found.accuracy.std() > 0.02
    assert set(found.proxies) == {"parameters", "gradient norm", "synflow", "GFLOPs"}
    network = drawn_design("plain", np.random.default_rng(0)).build(0)
    weights = [one.clone() for one in network.parameters()]
    told = proxies(network, torch.rand(8, 1, 8, 8), torch.arange(8))
    assert told["parameters"] == sum(one.numel() for one in weights) and told["synflow"] > 0
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
