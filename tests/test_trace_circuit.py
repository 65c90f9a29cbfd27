from functools import lru_cache

import numpy as np
import pytest
import torch
from architectures import opened

import manyheads as mh
from manyheads.errors import InputError, MismatchError
from manyheads.lab.constructed import constructed
from manyheads.model.replay.edges import edge_attribution, edges, name_of, node_named, receivers, senders
from manyheads.tasks.pairs import twinned
from manyheads.trace.circuits.circuit import Circuit
from manyheads.trace.circuits.faithfulness import Trial, completeness, faithfulness, minimality, size_curve, whole


@lru_cache
def planted(seed=0):
    """The induction circuit, its model, and a trial on it: `... a b ... c d ... a`, and twins in which a and c change places."""
    given = constructed(seed=seed, plant=["previous_token", "induction", "copying", "retrieval"])
    model = mh.open_model(given.module, tokenizer=given.tokenizer)
    known = given.known["previous_token"] | given.known["induction"]
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(np.stack([rng.permutation(np.arange(5, 60))[:12] for _ in range(16)]))
    other = ids.clone()
    other[:, [3, 7]] = ids[:, [7, 3]]
    clean, corrupted = (torch.cat([some, ids[:, 3:4]], 1) for some in (ids, other))
    rows = torch.arange(16)

    def metric(logits):
        return (logits[:, -1][rows, ids[:, 4]] - logits[:, -1][rows, ids[:, 8]]).double()

    return model, known, Trial(model, clean, corrupted, metric)


@lru_cache
def on_ladon(n=8):
    model = mh.open_model()
    batch = twinned(model, mh.tasks.IOI(corruption="abc"), n, 0)
    return model, Trial(model, batch.inputs, batch.twins, batch.logit_difference)


def heads(circuit_heads, model):
    return Circuit("heads", model.shape, {str(head): 1.0 for head in circuit_heads})


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("outside", "alone"), [("corrupted", 0.05), ("mean", 0.8)])
def test_the_planted_circuit_is_faithful_and_neither_head_alone_is(seed, outside, alone):
    model, known, trial = planted(seed)
    trial = Trial(model, trial.clean, trial.corrupted, trial.metric, outside=outside)
    found = faithfulness(trial, heads(known, model))
    assert found.value == pytest.approx(1, abs=0.02) and found.stderr < 0.02
    for head in known:
        assert abs(faithfulness(trial, heads([head], model)).value) < alone


def test_the_planted_circuit_is_complete_and_a_part_of_it_is_not():
    model, known, trial = planted()
    assert completeness(trial, heads(known, model))["incompleteness"].max() < 0.05
    assert completeness(trial, heads(list(known)[:1], model))["incompleteness"].max() > 0.9


def test_every_head_of_the_planted_circuit_is_needed_and_an_idle_one_is_not():
    model, known, trial = planted()
    idle = next(iter(model.heads - known))
    table = minimality(trial, heads([*known, idle], model), n_random=20).set_index("head")
    assert (table.loc[[str(h) for h in known], "effect"] > 0.9).all()
    assert table.loc[str(idle), "effect"] < 0.05 and table["random"].iloc[0] < 0.05
    assert (table.loc[[str(h) for h in known], "p"] == 1 / (len(model.heads) - 2)).all(), "no other head does as much"
    assert table.loc[str(idle), "p"] > 0.2


def test_the_size_curve_of_a_right_ranking_jumps_to_one_and_a_wrong_ones_does_not():
    model, known, trial = planted()
    total = len(model.heads)

    def ranked(first):
        rest = [h for h in model.heads if h not in first]
        return Circuit("heads", model.shape, {str(h): total - i for i, h in enumerate([*first, *rest])})

    shares = (0, 1 / total, 2 / total, 0.5, 1)
    right = size_curve(trial, ranked(list(known)), shares=shares)
    wrong = size_curve(trial, ranked([h for h in model.heads if h not in known]), shares=shares)
    values = right.table.set_index("size")["faithfulness"]
    assert values[0] == 0 and abs(values[1]) < 0.05 and abs(values[2] - 1) < 0.02 and values[total] == pytest.approx(1)
    assert right.cpr > 0.85 and right.cmd < 0.15
    assert wrong.cpr < 0.5 and right.random_cpr < right.cpr


def test_areas_are_those_of_the_trapezoid_rule():
    model, _, trial = planted()
    curve = size_curve(trial, Circuit("heads", model.shape, {str(h): 1.0 for h in model.heads}), shares=(0, 0.5, 1))
    y = curve.table["faithfulness"].tolist()
    assert curve.cpr == pytest.approx((y[0] + 2 * y[1] + y[2]) / 4)
    assert curve.cmd == pytest.approx((abs(1 - y[0]) + 2 * abs(1 - y[1]) + abs(1 - y[2])) / 4)


def test_heads_components_and_edges_agree_on_one_circuit():
    model, trial = on_ladon()
    kept = [h for i, h in enumerate(model.heads) if i % 3]
    names = {str(h): 1.0 for h in kept}
    components = Circuit("components", model.shape, names | {f"M{layer}": 1.0 for layer in range(model.n_layers)})
    out = {h for h in model.heads if h not in kept}
    left = {(name_of(s), name_of(r)): 1.0 for s, r in edges(model) if s not in out}
    by_heads = trial.values([Circuit("heads", model.shape, names)])
    assert np.abs(by_heads - trial.values([components])).max() < 1e-3
    assert np.abs(by_heads - trial.values([Circuit("edges", model.shape, edges=left)])).max() < 1e-3
    assert np.abs(by_heads - trial.without([out])).max() < 1e-6


def test_all_of_the_model_is_the_model_and_no_edge_is_the_corrupted_run():
    model, trial = on_ladon()
    clean = trial.metric(model.logits(trial.clean)).numpy()
    corrupted = trial.metric(model.logits(trial.corrupted)).numpy()
    for kind in ("heads", "components", "edges"):
        some = Circuit(kind, model.shape)
        full, empty = trial.bounds(some)
        assert np.abs(full - clean).max() < 1e-3
        if kind == "edges":
            assert np.abs(empty - corrupted).max() < 1e-3
    assert len(whole(Circuit("edges", model.shape), model)) == len(edges(model))


@pytest.mark.slow
def test_the_best_edges_by_attribution_make_a_more_faithful_circuit_than_random_ones():
    model, trial = on_ladon(3)
    scores = edge_attribution(model, trial.clean, trial.corrupted, trial.metric, keep=1)
    ranked = Circuit.of_edges(scores, model, len(edges(model)), method="EAP-IG")
    curve = size_curve(trial, ranked, shares=(0.05, 0.3), n_random=2)
    assert (curve.table["faithfulness"] > curve.table["random"] + 0.2).any()
    assert curve.cmd < curve.random_cmd


def test_an_encoders_heads_are_tried_too():
    model = opened("bert")
    ids = torch.arange(3, 23).reshape(2, 10)
    trial = Trial(model, ids, ids.flip(0), lambda logits: logits[:, -1, 5].double(), keep=None)
    values = trial.values([whole(Circuit("heads", model.shape), model), Circuit("heads", model.shape)])
    assert np.abs(values[0] - model.logits(ids)[:, -1, 5].numpy()).max() < 1e-5
    assert np.abs(values[0] - values[1]).max() > 1e-6


def test_connected_drops_what_leads_nowhere():
    given = {
        ("embedding", "L0H0.value"): 1.0,
        ("L0H0", "L1H1.key"): 1.0,
        ("L1H1", "logits"): 1.0,
        ("L0H1", "L1H1.query"): 1.0,  # nothing feeds L0H1
        ("embedding", "M1"): 1.0,  # nothing reads M1
    }
    circuit = Circuit("edges", (2, 2), edges=given)
    assert list(circuit.connected().edges) == list(given)[:3]
    assert circuit.connected().members == ["embedding", "L0H0", "L1H1", "logits"]
    assert circuit.connected().heads == mh.HeadSet(["L0H0", "L1H1"])


def test_a_circuit_is_the_same_after_saving_and_not_taken_for_another_models(tmp_path):
    model, _ = on_ladon()
    scores = mh.HeadScores(
        "m", np.arange(48.0).reshape(6, 8) - 20, np.zeros((6, 8)), 4, {"fingerprint": model.fingerprint}
    )
    circuit = Circuit.of_heads(scores, 5)
    assert circuit.heads == mh.HeadSet([(5, 7), (5, 6), (5, 5), (5, 4), (5, 3)])
    assert Circuit.load(circuit.save(tmp_path / "a.json"), fingerprint=model.fingerprint) == circuit
    with pytest.raises(MismatchError, match="not of this model"):
        Circuit.load(tmp_path / "a.json", fingerprint="0" * 16)
    with pytest.raises(InputError, match="already exists"):
        circuit.save(tmp_path / "a.json")
    (tmp_path / "b.json").write_text('{"kind": "heads"}')
    with pytest.raises(InputError, match="is not a circuit"):
        Circuit.load(tmp_path / "b.json")
    edged = Circuit("edges", (2, 2), edges={("embedding", "L1H0.query"): -0.5})
    assert Circuit.load(edged.save(tmp_path / "c.json")) == edged


def test_names_of_nodes_are_read_back():
    model, _ = on_ladon()
    for node in (*senders(model), *receivers(model)):
        assert node_named(name_of(node)) == node
    for wrong in ("L1H0.output", "Q3", "M", ""):
        with pytest.raises(InputError):
            node_named(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(kind="heads", nodes={"M0": 1.0}), "is no head"),
        (dict(kind="heads", nodes={"L7H0": 1.0}), "out of range"),
        (dict(kind="components", nodes={"logits": 1.0}), "neither head nor MLP"),
        (dict(kind="edges", nodes={"L0H0": 1.0}), "give edges only"),
        (dict(kind="nodes"), "of kind 'nodes'"),
    ],
)
def test_what_is_no_circuit_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        Circuit(shape=(2, 2), **arguments)


def test_a_partial_ranking_has_no_size_curve_and_equal_twins_no_faithfulness():
    model, known, trial = planted()
    with pytest.raises(InputError, match="ranks everything"):
        size_curve(trial, heads(known, model))
    same = Trial(model, trial.clean, trial.clean, trial.metric)
    with pytest.raises(InputError, match="give other twins"):
        faithfulness(same, heads(known, model))
