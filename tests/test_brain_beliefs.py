"""Networks of beliefs: the sheet's figures, a Kalman filter by hand, gradients, gaps, missing values, and pyhgf beside."""

import math
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from manyheads.brain.belief_arithmetic import FloatArithmetic, TensorArithmetic
from manyheads.brain.belief_fitting import fit_beliefs
from manyheads.brain.belief_forecasts import filter_series
from manyheads.brain.beliefs import filter_beliefs
from manyheads.brain.beliefs_claims import PlantedWalk, planted_walk
from manyheads.brain.deep_beliefs import DeepBeliefs
from manyheads.brain.exponential_family import track_statistics
from manyheads.brain.network import (
    UPDATES,
    BeliefEdge,
    BeliefNetwork,
    BeliefNode,
    binary_beliefs,
    continuous_beliefs,
)
from manyheads.cli import app
from manyheads.errors import InputError
from manyheads.evaluation import experiment

BITS = [1, 1, 0, 1, 0, 0, 1, 1, 1, 0]
SERIES = [0.1, 0.2, 0.15, 1, 1.1, 0.9, 1.05, 3, 2.9, 3.1]


@pytest.mark.parametrize("update, surprise", [("ehgf", 7.5678508), ("standard", 7.5678528), ("unbounded", 7.5753873)])
def test_binary_surprise_is_the_sheets(update, surprise):
    found = filter_beliefs(binary_beliefs(3, update=update), BITS)
    assert float(found.surprise.sum()) == pytest.approx(surprise, abs=1e-6)
    if update == "ehgf":
        last = [found.of(name, what)[0, -1] for name in ("x2", "x3") for what in ("mean", "precision")]
        assert [float(x) for x in last] == pytest.approx([0.2702242, 2.1199669, 0.00070867, 0.6903451], abs=1e-6)


@pytest.mark.parametrize("update, surprise", [("ehgf", 63.0311), ("standard", 53.7866), ("unbounded", 37.2904)])
def test_continuous_surprise_is_the_sheets(update, surprise):
    found = filter_beliefs(continuous_beliefs(2, update=update), SERIES)
    assert float(found.surprise.sum()) == pytest.approx(surprise, abs=5e-5)


def kalman(values, gaps, drift, noise):
    """By hand: mean and precision of a random walk after each value, and -log density of each value before."""
    mean, variance, trail = 0.0, 1.0, []
    for value, gap in zip(values, gaps, strict=True):
        variance += gap * drift
        if math.isnan(value):
            trail.append((mean, 1 / variance, 0.0))
            continue
        total = variance + noise
        surprise = 0.5 * (math.log(2 * math.pi * total) + (value - mean) ** 2 / total)
        mean, variance = mean + variance / total * (value - mean), variance * noise / total
        trail.append((mean, 1 / variance, surprise))
    return np.array(trail)


def test_without_volatility_it_is_a_kalman_filter_with_gaps_and_missing_values():
    network = continuous_beliefs(1, omega=-2.0, precision=4.0)
    found = filter_beliefs(network, SERIES)
    assert float(found.of("x1")[0, -1]) == pytest.approx(2.7918053, abs=1e-6)
    assert float(found.of("x1", "precision")[0, -1]) == pytest.approx(7.7927643, abs=1e-6)
    values, gaps = [*SERIES[:4], math.nan, math.nan, *SERIES[6:]], [1, 0.5, 2, 1, 1, 3, 1, 0.1, 1, 7]
    found = filter_beliefs(network, values, gaps=gaps)
    ours = torch.stack([found.of("x1"), found.of("x1", "precision"), found.predictive], -1)[0]
    assert np.abs(ours.numpy() - kalman(values, gaps, math.exp(-2), 0.25)).max() < 1e-12


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize(
    "network", [binary_beliefs(3), continuous_beliefs(3, precision=4.0)], ids=["binary", "continuous"]
)
def test_floats_tensors_and_batches_agree_and_what_is_missing_teaches_nothing(network, update):
    network = BeliefNetwork(network.nodes, network.edges, update)
    draw = np.random.default_rng(0)
    values = draw.integers(0, 2, (4, 40)).astype(float)
    values[1, 5:9], values[3, 0] = np.nan, np.nan
    whole = filter_beliefs(network, values)
    for i in range(4):
        alone = filter_beliefs(network, values[i])
        for what in ("mean", "precision", "surprise", "predictive"):
            assert (getattr(alone, what)[0] - getattr(whole, what)[i]).abs().max() < 1e-9
    hidden = [i for i, node in enumerate(network.nodes) if node.kind == "hidden"]
    gap = whole.precision[1, 4:9, hidden]
    assert (gap.diff(dim=0) < 0).all(), "each step without an observation leaves every belief less sure"
    assert torch.equal(whole.mean[1, 5:9, hidden], whole.expected_mean[1, 5:9, hidden])
    assert (whole.surprise[1, 5:9] == 0).all()


@pytest.mark.parametrize("update", UPDATES)
def test_gradients_are_those_of_differences(update):
    network = continuous_beliefs(2, precision=10.0, update=update)
    names = ["omega x1", "omega x2", "kappa x2 x1", "precision u", "mean x1"]
    known = network.numbers()
    given = {name: torch.tensor(known[name], dtype=torch.float64, requires_grad=True) for name in names}
    filter_beliefs(network, [SERIES, SERIES], numbers=given).predictive[0].sum().backward()
    for name in names:
        sides = [
            float(filter_beliefs(network.replaced({name: known[name] + h}), SERIES).predictive.sum())
            for h in (1e-5, -1e-5)
        ]
        assert float(given[name].grad) == pytest.approx((sides[0] - sides[1]) / 2e-5, abs=1e-5, rel=1e-5)


def test_lambert_solves_its_equation():
    for x in (-300.0, -5.0, 0.0, 0.9, 1.1, 20.0, 700.0):
        w = FloatArithmetic.lambert(x)
        assert w + math.log(w) == pytest.approx(x, abs=1e-9)
        assert float(TensorArithmetic.lambert(torch.tensor(x, dtype=torch.float64))) == pytest.approx(w, rel=1e-9)


def test_no_coupling_to_volatility_is_no_volatility():
    for update in UPDATES:
        network = continuous_beliefs(2, precision=10.0, update=update).replaced({"kappa x2 x1": 0.0})
        for values in (SERIES, [SERIES, SERIES]):
            found = filter_beliefs(network, values).of("x1")[0]
            assert (
                found - filter_beliefs(continuous_beliefs(1, precision=10.0), SERIES).of("x1")[0]
            ).abs().max() < 1e-12


def test_fitting_finds_the_numbers_that_made_the_series():
    """A random walk of known steps and noise, alone and as many series with one set of numbers or one each."""
    draw = np.random.default_rng(0)
    spread = np.array([[0.3], [1.0]])
    series = (spread * draw.normal(size=(2, 400))).cumsum(1) + 0.5 * draw.normal(size=(2, 400))
    network = continuous_beliefs(1)
    network = network.replaced({"precision u": 1.0})
    alone = [fit_beliefs(network, row) for row in series]
    for one, sd in zip(alone, spread[:, 0], strict=True):
        assert float(one.numbers["omega x1"]) == pytest.approx(2 * math.log(sd), abs=0.5)
        assert float(one.numbers["precision u"]) ** -0.5 == pytest.approx(0.5, abs=0.1)
        assert one.losses[-1] < one.losses[0]
    short = fit_beliefs(network, series[:, :80], each=True)
    apart = [fit_beliefs(network, row) for row in series[:, :80]]
    for i, one in enumerate(apart):
        assert float(short.numbers["omega x1"][i]) == pytest.approx(float(one.numbers["omega x1"]), abs=0.02)
    both = fit_beliefs(network, series[:, :80], ["omega x1"])
    found = sorted(float(one.numbers["omega x1"]) for one in apart)
    assert found[0] < float(both.numbers["omega x1"]) < found[1]


def test_where_steps_switch_the_volatility_that_is_believed_does():
    series, wild = planted_walk(PlantedWalk(0.1, 1.0), 11)
    found = filter_series(series)
    assert found.volatility[wild].mean() > found.volatility[~wild].mean() + 1
    late = np.arange(len(series)) >= len(series) - found.held_out
    high, low = found.volatility[late & wild], found.volatility[late & ~wild]
    assert (high[:, None] > low[None]).mean() >= 0.8


def test_scores_are_in_the_unit_of_the_series():
    series, _ = planted_walk(PlantedWalk(0.5, 0.5), 1)
    one, other = filter_series(series[:100]), filter_series(1000 * series[:100] + 7)
    for method, score in one.scores.items():
        assert other.scores[method] - score == pytest.approx(math.log(1000), abs=1e-3)
        assert other.errors[method] == pytest.approx(1000 * one.errors[method], rel=1e-3)
    assert np.allclose(other.expected, 1000 * one.expected + 7, rtol=1e-3)


def test_statistics_of_a_fixed_worth_are_the_sheets_and_an_implied_worth_is_the_gain_of_a_kalman_filter():
    assert track_statistics(SERIES)[0, -1].tolist() == pytest.approx([2.0442004, 5.5998841], abs=1e-6)
    # Worth 0 the newest statistics are all that is known; a missing value changes nothing.
    assert track_statistics([2.0, math.nan], nu=0.0)[0].tolist() == [[2.0, 4.0], [2.0, 4.0]]
    tracker = continuous_beliefs(1, omega=-2.0, precision=4.0)
    worth = kalman([1.0, 3.0], [1, 1], math.exp(-2), 0.25)[:, 1] / 4
    first = 1 / (1 + worth[0])
    implied = track_statistics([1.0, 3.0], "poisson", nu=None, tracker=tracker)[0, :, 0]
    xi = 1.0 + first * (1.0 - 1.0)
    assert implied.tolist() == pytest.approx([xi, xi + (3.0 - xi) / (1 + worth[1])])
    with pytest.raises(InputError, match="poisson"):
        track_statistics([0.5], "poisson")


def test_a_deep_network_learns_a_planted_map_and_digits_without_backpropagation():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=draw).double()
    planted = torch.randn(5, 3, generator=draw).double()
    learned = DeepBeliefs([5, 3]).learn(x, x @ planted, epochs=30)
    assert (learned.weights[0][:, :-1].T - planted).abs().max() < 1e-3
    tried = experiment("brain", "deep-beliefs").run(seeds=range(2))
    near, above_line = tried.verdicts
    assert near.answer == "held" and above_line.mean > -0.03, "beside backpropagation in the same network, and a line"


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: BeliefNetwork((BeliefNode("a"),), ()), "no node is observed"),
        (lambda: BeliefNetwork((BeliefNode("u", "binary"),), ()), "no value parent"),
        (lambda: binary_beliefs(4), "levels"),
        (lambda: binary_beliefs(2).replaced({"omega z": 1.0}), "no number 'omega z'"),
        (lambda: filter_beliefs(binary_beliefs(2), [0, 0.5]), "other values than 0 and 1"),
        (lambda: filter_beliefs(continuous_beliefs(2), [1.0, math.inf]), "infinite"),
        (lambda: filter_beliefs(continuous_beliefs(2), [1.0, 2.0], gaps=[1, 0]), "not above 0"),
        (lambda: filter_beliefs(continuous_beliefs(2), []), "shape"),
        (lambda: filter_beliefs(continuous_beliefs(2), [0, 0, 0, 900.0, 0, 0, 0]), "breaks at step"),
        (lambda: filter_series(np.ones(100)), "does not change"),
        (lambda: filter_series(np.ones(30), kind="binary"), "at least 20"),
        (lambda: DeepBeliefs([3]), "two sizes"),
    ],
)
def test_wrong_input_gets_one_sentence(make, said):
    with pytest.raises(InputError, match=said):
        make()


def test_a_circle_is_refused():
    nodes = (BeliefNode("u", "continuous"), BeliefNode("a"), BeliefNode("b"))
    edges = (BeliefEdge("u", "a"), BeliefEdge("a", "b"), BeliefEdge("b", "a", "volatility"))
    with pytest.raises(InputError, match="circle"):
        BeliefNetwork(nodes, edges)


def test_the_command_filters_a_file(tmp_path):
    series, _ = planted_walk(PlantedWalk(0.1, 1.0), 2)
    pd.DataFrame({"price": series[:200], "when": 1.0, "day": "monday"}).to_csv(tmp_path / "a.csv", index=False)
    out, page = tmp_path / "b.parquet", tmp_path / "b.html"
    told = ["brain", "filter", str(tmp_path / "a.csv"), "--column", "price"]
    found = CliRunner().invoke(app, [*told, "--gaps", "when", "--out", str(out), "--page", str(page)])
    assert found.exit_code == 0, found.output
    assert "random-walk Kalman" in found.output
    table = pd.read_parquet(out)
    assert len(table) == 200 and table.notna().all().all() and (table["low"] < table["high"]).all()
    assert "What was believed of price?" in page.read_text("utf-8")
    for bad, said in [
        (["--column", "z"], "no column 'z'"),
        (["--kind", "odd"], "choose from"),
        (["--column", "day"], "not a column of"),
    ]:
        assert said in CliRunner().invoke(app, [*told, *bad]).output


# Beside pyhgf, where it is installed (GPL: it is run, nothing of it is used).

pyhgf_too = pytest.mark.skipif(find_spec("pyhgf") is None, reason="pyhgf is not installed")


def example(name):
    return np.loadtxt(Path(find_spec("pyhgf").origin).parent / "data" / f"{name}.txt")


def of_pyhgf(model):
    import jax

    jax.config.update("jax_enable_x64", True)
    return {i: model.node_trajectories[i] for i in model.node_trajectories if i >= 0}


@pytest.mark.slow
@pyhgf_too
def test_the_documented_response_surprise_of_320_trials_is_pyhgfs():
    found = filter_beliefs(binary_beliefs(2, omega=-4.0), example("binary_input"))
    p, chosen = found.of("u", "expected_mean")[0].numpy(), example("binary_response")
    p = p**4 / (p**4 + (1 - p) ** 4)
    assert -np.log(np.where(chosen == 1, p, 1 - p)).sum() == pytest.approx(138.899, abs=5e-4)


@pytest.mark.slow
@pyhgf_too
@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("levels", [2, 3])
def test_beliefs_about_pyhgfs_examples_are_pyhgfs(kind, update, levels):
    import jax

    jax.config.update("jax_enable_x64", True)
    from pyhgf.model import HGF

    values = example("binary_input" if kind == "binary" else "usdchf")
    names = {"ehgf": "eHGF", "standard": "standard", "unbounded": "unbounded"}
    settings = {"tonic_volatility": {"1": -8.0, "2": -4.0, "3": -4.0}, "initial_mean": {"1": 0.0, "2": 0.0, "3": 0.0}}
    if kind == "continuous":
        settings["initial_mean"]["1"] = float(values[0])
    theirs = HGF(n_levels=levels, model_type=kind, update_type=names[update], **settings)
    theirs.input_data(values)
    ours = binary_beliefs(levels, omega=-4.0, update=update)
    if kind == "continuous":
        ours = continuous_beliefs(levels, omega=-4.0, mean=float(values[0]), update=update)
        ours = ours.replaced({"omega x1": -8.0})
    found = filter_beliefs(ours, values)
    assert float(theirs.surprise().sum()) == pytest.approx(float(found.surprise.sum()), abs=1e-5)
    for i, node in enumerate(ours.nodes):
        if node.kind == "hidden":
            for what in ("mean", "precision", "expected_mean", "expected_precision"):
                theirs_too = np.asarray(theirs.node_trajectories[i][what])
                assert np.allclose(theirs_too, getattr(found, what)[0, :, i].numpy(), rtol=1e-5, atol=1e-5), (
                    node.name,
                    what,
                )


@pytest.mark.slow
@pyhgf_too
@pytest.mark.parametrize("update", ["ehgf", "standard"])
def test_a_network_of_another_shape_believes_what_pyhgf_believes(update):
    """Two leaves that share a parent, a drift parent of strength 0.7, and a volatility parent of the noise."""
    import jax

    jax.config.update("jax_enable_x64", True)
    from pyhgf.model import Network

    names = {"ehgf": "eHGF", "standard": "standard"}
    theirs = (
        Network(update_type=names[update])
        .add_nodes(precision=2.0)
        .add_nodes(precision=3.0)
        .add_nodes(value_children=[0, 1])
        .add_nodes(value_children=([2], [0.7]))
        .add_nodes(volatility_children=([2], [0.8]))
    )
    rows = np.random.default_rng(0).normal(size=(60, 2)).cumsum(0) * 0.3
    theirs.input_data(rows)
    nodes = (BeliefNode("u", "continuous", precision=2.0), BeliefNode("w", "continuous", precision=3.0))
    nodes += (BeliefNode("x"), BeliefNode("drift"), BeliefNode("v"))
    edges = (BeliefEdge("u", "x"), BeliefEdge("w", "x"), BeliefEdge("x", "drift", strength=0.7))
    edges += (BeliefEdge("x", "v", "volatility", 0.8),)
    found = filter_beliefs(BeliefNetwork(nodes, edges, update), rows[None])
    for i in (2, 3, 4):
        for what in ("mean", "precision"):
            assert np.allclose(np.asarray(theirs.node_trajectories[i][what]), getattr(found, what)[0, :, i], atol=1e-6)
