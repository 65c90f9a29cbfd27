"""#45: clamps hold what they name and nothing else, and parts of an induction circuit that are given speed up the rest."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from bars import Counting

from manyheads import open_model
from manyheads.atlas.patterns.induction import induction
from manyheads.errors import InputError
from manyheads.heads import Head, HeadSet
from manyheads.lab.clamping import Clamp, ClampedTransformer, as_transformers
from manyheads.lab.induction_formation import (
    EXPERIMENTS,
    KNOWN_LABELS,
    FewShot,
    Formation,
    alone,
    formation,
    formation_accuracy,
    induction_strength,
    only,
    previous_token_pattern,
    without_below,
)
from manyheads.lab.triple_product import steps_to_learn, triple_gradient, triple_loss, triple_product
from manyheads.model.editing.edits import Ablate


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some(n=16, seed=0):
    task = FewShot.random(seed=seed)
    return task, task.draw(n, generator(seed)), ClampedTransformer(64, 5, seed=seed)


@cache
def run(experiment, seed=0, steps=1000, heads=(0,)):
    return formation(experiment, seed=seed, steps=steps, heads=heads)


def token_ids(task, given, classes="train"):
    items = (given.exemplars[:, :, None] == task.classes[classes]).all(-1).int().argmax(-1)
    return torch.stack([items, len(task.classes[classes]) + given.labels], 2).flatten(1)[:, :-1]


# the data


def test_a_query_repeats_one_of_two_classes_and_its_label_is_the_answer():
    task, given, _ = some(2000)
    a, b, query = given.exemplars.unbind(1)
    assert not (a == b).all(-1).any()
    for which, shown in ((0, a), (1, b)):
        rows = given.asked == which
        assert 0.45 < rows.float().mean() < 0.55
        assert torch.equal(query[rows], shown[rows])
        assert torch.equal(given.answers[rows], given.labels[rows, which])
    shown = given.labels[:, :2].tolist()
    assert {tuple(sorted(pair)) for pair in shown} == {tuple(pair) for pair in task.pairs["train"].tolist()}
    assert {tuple(pair) for pair in shown} > {tuple(pair) for pair in task.pairs["train"].tolist()}  # either order


def test_no_class_and_no_pair_of_labels_is_in_two_splits():
    for seed in range(20):
        task = FewShot.random(seed=seed)
        assert (len(task.pairs["train"]), len(task.pairs["held"])) == (8, 2)
        assert len({tuple(p) for part in task.pairs.values() for p in part.tolist()}) == 10
        assert len(task.pairs["train"].unique()) == 5
        assert len(torch.cat(list(task.classes.values())).unique(dim=0)) == 150
    held = task.draw(500, generator(), classes="held", pairs="held")
    assert {tuple(sorted(p)) for p in held.labels[:, :2].tolist()} == {tuple(p) for p in task.pairs["held"].tolist()}


# the model and its clamps


def test_the_model_is_the_gpt_j_that_transformers_makes_of_its_weights():
    task, given, model = some(50)
    twin = as_transformers(model, task.classes["train"])
    theirs = twin(input_ids=token_ids(task, given), output_attentions=True, output_hidden_states=True)
    ours = model(given.exemplars, given.labels)
    for layer in range(2):
        assert torch.allclose(theirs.attentions[layer], ours[f"{layer}.pattern"], atol=1e-6)
    assert torch.allclose(theirs.hidden_states[1], ours["0.resid"], atol=1e-5)
    assert torch.allclose(theirs.logits[:, :, 50:], ours["logits"], atol=1e-5)


def test_weights_start_as_described():
    model = ClampedTransformer(512, 5, seed=3)
    weight = model.layers[0].qkv.weight.detach()
    assert weight.std() == pytest.approx(1 / 8, rel=0.03) and weight.abs().max() < 2 / 8 / 0.879
    assert model.exemplar.weight.detach().std() == pytest.approx(512**-0.5, rel=0.03)
    assert model.label.detach().abs().max() <= 0.04 and not model.exemplar.bias.any()
    names = {name.split(".", 2)[-1] for name, _ in model.named_parameters() if name.startswith("layers")}
    assert names == {"norm.weight", "norm.bias", "qkv.weight", "out.weight"}


def test_the_last_label_is_not_looked_at():
    _, given, model = some()
    other = given.labels.clone()
    other[:, -1] = (other[:, -1] + 1) % 5
    assert torch.equal(model(given.exemplars, given.labels)["logits"], model(given.exemplars, other)["logits"])


@pytest.mark.parametrize("name", ClampedTransformer(8, 4).names())
def test_a_clamp_of_nothing_changes_no_bit_and_a_clamp_of_everything_gives_what_was_cached(name):
    _, given, model = some()
    plain = model(given.exemplars, given.labels)
    cached = torch.randn(plain[name].shape, generator=generator(7))
    nothing = Clamp(torch.zeros_like(cached, dtype=torch.bool), cached)
    same = model(given.exemplars, given.labels, {name: nothing})
    assert all(torch.equal(same[other], plain[other]) for other in model.names())
    held = model(given.exemplars, given.labels, {name: Clamp.whole(cached)})
    assert torch.equal(held[name], cached)
    assert not torch.equal(held["logits"], plain["logits"])
    order = model.names()
    assert all(torch.equal(held[earlier], plain[earlier]) for earlier in order[: order.index(name)])


@pytest.mark.parametrize("name", ClampedTransformer(8, 4).names())
def test_no_gradient_passes_a_clamped_entry_and_all_of_it_passes_the_others(name):
    _, given, model = some()
    mask = torch.rand(model(given.exemplars, given.labels)[name].shape, generator=generator(1)) < 0.5
    seen = {}
    original = torch.where

    def spy(condition, cached, value):
        if value.requires_grad:
            value.retain_grad()
        seen["value"] = value
        return original(condition, cached, value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "where", spy)
        trace = model(given.exemplars, given.labels, {name: Clamp(mask, torch.zeros(()))})
    trace[name].retain_grad()
    torch.nn.functional.cross_entropy(trace["logits"][:, -1], given.answers).backward()
    inside, outside = seen["value"].grad, trace[name].grad
    assert not inside[mask].any()
    assert torch.equal(inside[~mask], outside[~mask]) and outside[mask].any()


def test_a_cached_value_passes_its_own_gradient_on():
    _, given, model = some()
    plain = model(given.exemplars, given.labels)
    held = model(given.exemplars, given.labels, {"1.pattern": Clamp.whole(plain["1.pattern"].detach())})
    through = model(given.exemplars, given.labels, {"1.pattern": Clamp.whole(plain["1.pattern"])})
    grads = [
        torch.autograd.grad(trace["logits"].square().sum(), model.layers[1].qkv.weight, retain_graph=True)[0].chunk(3)
        for trace in (plain, through, held)
    ]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(grads[0], grads[1], strict=True))
    assert not grads[2][0].any() and not grads[2][1].any() and grads[2][2].any()


def test_blocked_scores_leave_a_pattern_that_sums_to_one_and_skips_them():
    _, given, model = some()
    mask = torch.zeros(5, 5, dtype=torch.bool)
    mask[4, 1] = True
    pattern = model(given.exemplars, given.labels, {"1.scores": Clamp(mask, torch.tensor(-torch.inf))})["1.pattern"]
    assert not pattern[..., 4, 1].any() and torch.allclose(pattern.sum(-1), torch.ones(16, 8, 5))


# what the experiments hold


def test_the_previous_token_clamp_leaves_token_zero_attending_to_itself():
    expected = torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0]])
    assert torch.equal(previous_token_pattern(), expected.float())
    _, given, model = some()
    pattern = model(given.exemplars, given.labels, EXPERIMENTS["previous token"](model, given, [2]))["0.pattern"]
    plain = model(given.exemplars, given.labels)["0.pattern"]
    assert (pattern[:, 0] == expected).all() and torch.equal(pattern[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("experiment", ["none", "previous token", "layer 1", "match"])
def test_only_the_kept_head_writes_in_the_upper_layer(experiment):
    _, given, model = some()
    trace = model(given.exemplars, given.labels, EXPERIMENTS[experiment](model, given, [3]))
    written = trace["1.z"].abs().amax((0, 2, 3))
    assert written[3] > 0 and not written[torch.arange(8) != 3].any()


def test_a_perfect_layer_one_matches_what_stood_before_and_copies_what_stands_there():
    _, given, model = some()
    trace = model(given.exemplars, given.labels, EXPERIMENTS["layer 1"](model, given, [0]))
    a, x, b, y, q = model.embed(given.exemplars, given.labels).unbind(1)
    expected = model(given.exemplars, given.labels, {"0.resid": Clamp.whole(torch.stack([a, a, x, b, q], 1))})
    assert torch.equal(trace["1.pattern"], expected["1.pattern"])
    raw = model(given.exemplars, given.labels, {"0.resid": Clamp.whole(torch.stack([a, x, b, y, q], 1))})
    assert torch.equal(trace["1.v"][:, 0], raw["1.v"][:, 0])
    trace["logits"][:, -1].sum().backward()
    assert not model.layers[0].qkv.weight.grad.any() and model.exemplar.weight.grad.any()


def test_match_attends_to_the_right_label_and_leaves_the_other_rows():
    _, given, model = some()
    trace = model(given.exemplars, given.labels, EXPERIMENTS["match"](model, given, [3]))
    plain = model(given.exemplars, given.labels)
    assert (induction_strength(trace, given)[:, 3] == 1).all()
    assert torch.equal(trace["1.pattern"][:, :, :-1], plain["1.pattern"][:, :, :-1])
    assert torch.equal(trace["1.pattern"][:, 4:, -1], plain["1.pattern"][:, 4:, -1])


def test_copying_answers_by_the_scores_at_the_labels_shown():
    _, given, model = some()
    for experiment, source in (("copy", None), ("layer 1 + copy", "layer 1")):
        upper = EXPERIMENTS[source](model, given, [3]) if source else None
        scores = model(given.exemplars, given.labels, upper)["1.scores"][:, 3, -1]
        logits = model(given.exemplars, given.labels, EXPERIMENTS[experiment](model, given, [3]))["logits"][:, -1]
        for row, labels in enumerate(given.labels[:, :2].tolist()):
            assert [logits[row, label] for label in labels] == [scores[row, 1], scores[row, 3]]
            assert (logits[row, [v for v in range(5) if v not in labels]] == -1e9).all()


def test_strength_is_right_minus_wrong_attention():
    _, given, model = some(4)
    trace = model(given.exemplars, given.labels)
    for row, asked in enumerate(given.asked.tolist()):
        query = trace["1.pattern"][row, :, -1]
        assert torch.equal(induction_strength(trace, given)[row], query[:, 1 + 2 * asked] - query[:, 3 - 2 * asked])


def test_crossing_and_plateau_are_read_off_the_curve():
    task, _, model = some()
    loss = np.array([1.6, 0.9, 0.7, 1.2, 0.8, 0.7, 0.69, 0.5, 0.27, 0.7, 0.7, 0.7, 0.7])
    updates = 10 * np.arange(len(loss))
    made = Formation("none", (0,), updates, loss, loss, loss[:, None], model, task, 32, 0)
    assert (made.crossing, made.plateau) == (80, 20)
    frame = made.to_frame()
    assert list(frame.columns) == ["experiment", "update", "sequences", "loss", "accuracy", "L1H0"]
    assert frame.sequences.iloc[-1] == 32 * 120


def test_a_run_follows_from_its_seed_and_experiments_share_their_start():
    first, again = (formation(steps=12, looked_at=64, seed=4) for _ in range(2))
    assert np.array_equal(first.loss, again.loss) and np.array_equal(first.strength, again.strength)
    assert not np.array_equal(first.loss, formation(steps=12, looked_at=64, seed=5).loss)
    assert (
        formation("previous token", steps=12, looked_at=64, seed=4)
        .task.classes["train"]
        .equal(first.task.classes["train"])
    )
    calls = []
    formation(steps=3, looked_at=8, bar=Counting(calls))
    assert calls == [1, 1, 1]


def test_wrong_inputs_are_refused_with_what_to_do():
    _, given, model = some()
    with pytest.raises(InputError, match=r"no intermediate 2\.z"):
        model(given.exemplars, given.labels, {"2.z": Clamp.whole(torch.tensor(0.0))})
    with pytest.raises(InputError, match="broadcast to"):
        model(given.exemplars, given.labels, {"0.z": Clamp.whole(torch.zeros(7))})
    with pytest.raises(InputError, match="one of none"):
        formation("both")
    with pytest.raises(InputError, match="from 0 to 7"):
        formation(heads=[8])
    with pytest.raises(InputError, match="off one head"):
        formation("copy", heads=[0, 1], steps=1)
    with pytest.raises(InputError, match="above 0"):
        formation(steps=0)
    with pytest.raises(InputError, match="at least"):
        FewShot.random(labels=2)
    with pytest.raises(InputError, match="pattern"):
        without_below(model, given, [0], preserve=["q"])
    with pytest.raises(InputError, match='"a", "b" and "c"'):
        triple_product("d")


# what is learned


@pytest.mark.slow
def test_parts_that_are_given_speed_up_the_rest():
    crossings = [run(experiment, steps=150).crossing for experiment in ("layer 1", "match")]
    assert run("none").crossing > 3 * crossings[0] and run("none").crossing > 4 * crossings[1]
    assert crossings[0] > crossings[1]


@pytest.mark.slow
def test_training_ends_with_an_induction_head_after_a_plateau():
    plain = run("none")
    assert plain.plateau >= 50 and plain.loss[-1] < 0.1 * KNOWN_LABELS
    assert plain.loss[0] == pytest.approx(math.log(5), abs=0.6) and abs(plain.strength[0, 0]) < 0.1
    assert plain.strength[-1, 0] >= 0.9


def test_the_head_that_formed_is_found_by_the_atlas_and_carries_the_answer():
    plain = run("none")
    given = plain.task.draw(400, generator(9))
    trained, fresh = (
        open_model(as_transformers(model, plain.task.classes["train"]))
        for model in (plain.model, ClampedTransformer(64, 5, seed=0))
    )
    scores = induction(trained, n=64, length=4).values
    assert np.unravel_index(scores.argmax(), scores.shape) == (1, 0)
    assert scores[1, 0] > induction(fresh, n=64, length=4).values.max() + 0.05  # it never saw repeats as long as these
    ids, answers = token_ids(plain.task, given), 50 + given.answers

    def right(*edits):
        with trained.editing(*edits):
            return float((trained.logits(ids)[:, -1].argmax(-1) == answers).float().mean())

    others = [right(Ablate(HeadSet([Head(1, h)], (2, 8)), "zero")) for h in range(1, 8)]
    assert right() > 0.95 and min(others) > 0.95
    assert right(Ablate(HeadSet([Head(1, 0)], (2, 8)), "zero")) < 0.6


def test_a_clamp_in_evaluation_alone_is_another_experiment():
    """Attending to the right label helps nobody who has not learned to copy."""
    _, given, model = some(500)
    assert formation_accuracy(model, given, EXPERIMENTS["match"](model, given, [0])) < 0.45
    assert run("match", steps=150).accuracy[-1] > 0.99


# the toy


def test_loss_and_gradient_of_the_toy_are_those_of_the_tensor():
    true, found = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator())
    found.requires_grad_()
    outer = [torch.einsum("i,j,k->ijk", *vectors) for vectors in (found, true)]
    loss = 0.5 * (outer[0] - outer[1]).square().mean()
    assert torch.allclose(triple_loss(found, true), loss)
    assert torch.allclose(triple_gradient(found, true), torch.autograd.grad(loss, found)[0])


def test_clamped_factors_stay_true_and_all_of_them_leave_no_loss():
    assert triple_product("abc", steps=3).max() < 1e-12
    curve = triple_product("bc", steps=200)
    ratio = curve[:, 1:100] / curve[:, :99]  # convex: error falls by one factor a step
    assert (ratio < 1).all() and np.allclose(ratio, ratio[:, :1], rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_factors_that_are_given_speed_up_the_toy(seed):
    none, c, bc = (steps_to_learn(clamped, seed=seed) for clamped in ("", "c", "bc"))
    print(f"speed-up, median of 25: c {np.median(none / c):.1f}, b and c {np.median(none / bc):.1f}")
    assert np.median(none / c) >= 3 and np.median(none / bc) >= 9
    assert (c < none).mean() > 0.9 and (bc < c).all()


# the sheet's figures


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_every_part_given_brings_the_head_sooner(seed):
    steps = {"none": 1000, "previous token": 600}
    runs = {name: formation(name, seed=seed, steps=steps.get(name, 200)) for name in EXPERIMENTS}
    crossing = {name: made.crossing for name, made in runs.items()}
    plain = runs["none"]
    print(f"seed {seed}: {crossing}, plateau {plain.plateau}, strength {plain.strength[-1, 0]:.2f}")
    assert crossing["none"] > crossing["previous token"] > crossing["layer 1"] > crossing["match"]
    assert crossing["none"] >= 3 * crossing["layer 1"]
    assert crossing["none"] >= 4 * crossing["match"] and crossing["none"] >= 4 * crossing["copy"]
    assert crossing["layer 1 + copy"] <= min(crossing["layer 1"], crossing["copy"])
    assert plain.plateau >= 50 and plain.strength[-1, 0] >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_a_fixed_pattern_that_is_no_part_of_the_circuit_helps_less(seed):
    def to_itself(model, given, heads):
        fixed = Clamp(torch.arange(8)[:, None, None] == 0, torch.eye(5))
        return only(model, heads) | {"0.pattern": fixed}

    def to_the_first(model, given, heads):
        fixed = Clamp(torch.arange(8)[:, None, None] == 0, torch.eye(5)[:1].expand(5, 5))
        return only(model, heads) | {"0.pattern": fixed}

    crossing = {
        made.experiment: made.crossing
        for made in (
            formation(which, seed=seed, steps=400) for which in ("none", "previous token", to_itself, to_the_first)
        )
    }
    print(f"seed {seed}: {crossing}")
    assert crossing["previous token"] < min(crossing["to_itself"], crossing["to_the_first"])
    assert crossing["previous token"] <= 0.85 * crossing["none"]


@pytest.mark.slow
def test_the_whole_model_has_many_heads_that_add_up_and_layer_one_only_feeds_them():
    full = formation(heads=range(8))
    given = full.task.draw(1000, generator(77))
    table = alone(full.model, given)
    with torch.no_grad():
        pattern = full.model(given.exemplars, given.labels)["0.pattern"]
    previous = (pattern[:, :, 1, 0] + pattern[:, :, 3, 2]).mean(0).argsort(descending=True)[:4].tolist()
    kept = {parts: without_below(full.model, given, previous, preserve=parts) for parts in ((), ("pattern",), ("v",))}
    whole, fed = (
        formation_accuracy(full.model, given),
        without_below(full.model, given, range(8), preserve=("pattern", "v")),
    )
    print(table.round(2).to_string(), whole, fed, kept, sep="\n")
    assert np.corrcoef(table.strength, table.alone)[0, 1] > 0.9
    assert table.without.min() > 0.97 and (table.strength > 0.3).sum() >= 5 and table.alone.max() < whole
    assert whole > 0.99 and fed > whole - 0.01
    assert kept["pattern",] > whole - 0.01 and kept["v",] < whole - 0.1 and kept[()] < whole - 0.1


@pytest.mark.slow
def test_held_out_classes_and_labels_are_answered_too():
    full = formation(heads=range(8))
    right = {
        (c, p): formation_accuracy(full.model, full.task.draw(2000, generator(5), classes=c, pairs=p))
        for c in ("train", "held")
        for p in ("train", "held")
    }
    print(right)
    assert min(right.values()) > 0.75 and right["train", "train"] > 0.99 and right["train", "held"] > 0.95


@pytest.mark.slow
def test_more_classes_slow_matching_and_more_labels_slow_copying():
    worlds = {"50 classes, 5 labels": {}, "200 classes": {"classes": 200}, "15 labels": {"labels": 15}}

    def mean_crossing(experiment, world):
        tasks = [FewShot.random(seed=seed, **world) for seed in range(3)]
        runs = [formation(experiment, task=t, seed=i, steps=120, every=2, looked_at=256) for i, t in enumerate(tasks)]
        return np.mean([made.crossing for made in runs])

    plain, classes, labels = (
        {part: mean_crossing(part, world) for part in ("layer 1 + copy", "match")} for world in worlds.values()
    )
    print(plain, classes, labels)
    assert classes["layer 1 + copy"] > 1.3 * plain["layer 1 + copy"] and classes["match"] < 1.15 * plain["match"]
    assert labels["match"] > 2 * plain["match"] and labels["layer 1 + copy"] < 1.15 * plain["layer 1 + copy"]
