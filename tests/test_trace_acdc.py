from functools import lru_cache

import numpy as np
import pytest
from architectures import inputs_for, opened
from test_trace_circuit import on_ladon, planted

import manyheads as mh
from manyheads.errors import InputError
from manyheads.model.replay.edges import edges, name_of, patch_edge_sets, patch_edges, receivers
from manyheads.tasks.pairs import twinned
from manyheads.trace.circuits.acdc import acdc, acdc_nodes
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.circuits.faithfulness import Trial


@lru_cache
def found(seed=0):
    model, _, trial = planted(seed)
    return acdc(model, trial.clean, trial.corrupted, 0.05)


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_planted_circuits_edges_are_found(seed):
    model, known, _ = planted(seed)
    result = found(seed)
    previous, induction = sorted(known, key=lambda head: head.layer)
    wanted = {("embedding", f"{previous}.value"), (str(previous), f"{induction}.key"), (str(induction), "logits")}
    assert set(result.circuit.edges) == wanted
    assert result.finished and len(result.trials) < len(edges(model)) / 3


@pytest.mark.parametrize("seed", range(3))
def test_exactly_the_planted_heads_are_found_as_nodes(seed):
    model, known, trial = planted(seed)
    result = acdc_nodes(model, trial.clean, trial.corrupted, 0.05)
    assert set(result.circuit.nodes) == {str(head) for head in known}
    assert result.finished and all(cost >= 0.05 for cost in result.circuit.nodes.values())
    outside = [e for e in edges(model) if e[0] != "embedding" and name_of(e[0]) not in result.circuit.nodes]
    assert result.distance == pytest.approx(divergence(model, trial.clean, trial.corrupted, outside), abs=1e-5)


def test_one_by_one_it_is_the_greedy_search_of_the_paper():
    """Brute force: every edge tried in turn, also those that nothing reads."""
    model, clean, corrupted = opened("llama"), inputs_for("llama", seed=0), inputs_for("llama", seed=5)
    removed, kept, distance, tau = [], set(), 0.0, 3e-3
    tried = []  # one recording for all of them: each run takes the set that lies here
    runs = patch_edge_sets(model, clean, corrupted, iter(tried.pop, None), keep=1)
    for end in reversed(receivers(model)):
        for edge in [e for e in reversed(edges(model)) if e[1] == end]:
            tried.append([*removed, edge])
            now = apart(model, clean, next(runs))
            if now - distance < tau:
                removed, distance = [*removed, edge], now
            else:
                kept.add((name_of(edge[0]), name_of(edge[1])))
    result = acdc(model, clean, corrupted, tau, one_by_one=True)
    assert 10 < len(kept) < 150
    assert set(result.circuit.edges) == set(
        Circuit("edges", model.shape, edges=dict.fromkeys(kept, 1.0)).connected().edges
    )
    assert result.distance == pytest.approx(distance, abs=1e-5)
    assert len(result.trials) <= len(edges(model)) and (result.trials["tried"] == 1).all()


def divergence(model, clean, corrupted, patched):
    return apart(model, clean, patch_edges(model, clean, corrupted, patched, keep=1))


def apart(model, clean, logits):
    before = model.logits(clean)[:, -1].double().log_softmax(-1)
    after = logits[:, -1].double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def test_its_distance_is_that_of_the_model_with_all_other_edges_patched():
    model, _, trial = planted()
    result = found()
    inside = set(result.circuit.edges)
    outside = [edge for edge in edges(model) if (name_of(edge[0]), name_of(edge[1])) not in inside]
    assert result.distance == pytest.approx(divergence(model, trial.clean, trial.corrupted, outside), abs=1e-5)


def test_every_edge_that_stayed_costs_at_least_the_threshold_and_no_removal_more():
    trials = found().trials
    assert (trials.loc[trials["removed"], "cost"] < 0.05).all()
    assert (trials.loc[~trials["removed"], "cost"] >= 0.05).all()
    assert all(cost >= 0.05 for cost in found().circuit.edges.values())


def test_nothing_is_left_above_what_the_model_says_at_all():
    model, _, trial = planted()
    assert not len(acdc(model, trial.clean, trial.corrupted, 100.0).circuit)


def test_a_metric_may_take_the_place_of_the_divergence():
    model, known, trial = planted()
    result = acdc(model, trial.clean, trial.corrupted, 0.5, metric=trial.metric)
    assert result.circuit.heads == known
    clean = trial.metric(model.logits(trial.clean))
    assert result.distance < 0.1 * float(clean.abs().mean())


def test_a_search_that_was_cut_short_keeps_what_it_did_not_try():
    model, _, trial = planted()
    short = acdc(model, trial.clean, trial.corrupted, 0.05, max_trials=20)
    assert not short.finished and len(short.trials) == 20
    assert len(short.circuit) > len(found().circuit)
    assert np.isnan(list(short.circuit.edges.values())).any()


@pytest.mark.slow
def test_on_ladon_the_heads_found_are_more_faithful_than_random_ones_of_the_same_layers():
    """Beside the same MLPs, which all circuits keep."""
    model = mh.open_model()
    batch = twinned(model, mh.tasks.IOI(corruption="abc"), 4, 0)
    trial = Trial(model, batch.inputs, batch.twins, batch.logit_difference)
    apart = trial.metric(model.logits(trial.clean)) - trial.metric(model.logits(trial.corrupted))
    circuit = acdc_nodes(model, trial.clean, trial.corrupted, 0.02 * float(apart.mean()), metric=trial.metric).circuit
    mlps = [name for name in circuit.nodes if name[0] == "M"]
    sets = circuit.heads.matched_random(20, shape=model.shape, disjoint=False)
    random = [Circuit("components", model.shape, dict.fromkeys([*mlps, *map(str, heads)], 0.0)) for heads in sets]
    full, empty = (value.mean() for value in trial.bounds(circuit))
    shares = (trial.values([circuit, *random]).mean(1) - empty) / (full - empty)
    print(
        f"{len(circuit)} of 54 nodes keep {shares[0]:.2f}, random heads {shares[1:].mean():.2f} (most {shares[1:].max():.2f})"
    )
    assert len(circuit) < 0.6 * model.n_layers * (model.n_heads + 1)
    assert shares[0] > shares[1:].max() + 0.1


def test_a_threshold_must_be_positive():
    model, _, trial = planted()
    with pytest.raises(InputError, match="positive number"):
        acdc(model, trial.clean, trial.corrupted, 0.0)


@pytest.mark.slow
def test_on_ladon_the_circuit_is_more_faithful_than_as_many_random_edges():
    model, trial = on_ladon()
    result = acdc(model, trial.clean, trial.corrupted, 0.02)
    rng = np.random.default_rng(0)
    everything = [(name_of(s), name_of(r)) for s, r in edges(model)]
    drawn = [rng.permutation(len(everything))[: len(result.circuit)] for _ in range(20)]
    random = [Circuit("edges", model.shape, edges={everything[i]: 0.0 for i in some}) for some in drawn]
    values = trial.values([result.circuit, *random]).mean(1)
    full, empty = (v.mean() for v in trial.bounds(result.circuit))
    shares = (values - empty) / (full - empty)
    print(f"{len(result.circuit)} of {len(everything)} edges, {len(result.trials)} trials")
    print(f"share of the logit difference {shares[0]:.2f}, random edges {shares[1:].mean():.2f}")
    assert len(result.circuit) < 0.05 * len(everything)
    assert shares[0] > shares[1:].max() + 0.3
